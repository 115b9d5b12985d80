"""The mathematics of calibration, against brute force over the tokens."""

import re
from argparse import Namespace

import pytest
import torch

from mohge.conversion import benchmark
from mohge.conversion.decoders import Expert
from mohge.conversion.modes.base import slice_neurons, widen
from mohge.conversion.statistics import (
    RIDGES,
    DenseStatistics,
    ExpertStatistics,
    Gram,
    cluster,
    eliminate,
    linear_rows,
    refit,
    ridge,
    square,
)


H, W = 7, 11


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def gram_of(tokens: torch.Tensor) -> Gram:
    gram = Gram(W)
    gram.add(tokens)
    return gram


def test_refit_solves_the_ridge_regression():
    """Augmented least squares: the ridge is a row for each kept neuron that asks for no change. Its strength is the
    one that does best on the last quarter of the tokens."""
    down, tokens, kept = draw(H, W), draw(200, W, seed=1) @ draw(W, W, seed=2), torch.tensor([0, 2, 3, 7, 10])
    columns, squares = refit(down, kept, gram_of(tokens))
    target = (tokens @ down.T).double()

    def solve(tokens, target, strength):
        ridge = torch.diag((strength * (tokens[:, kept] ** 2).sum(0)).sqrt())
        design = torch.cat([tokens[:, kept], ridge]).double()
        asked = torch.cat([target, (ridge @ down[:, kept].T).double()])
        return torch.linalg.lstsq(design, asked).solution.T

    def error(columns, tokens, target):
        return (target - tokens[:, kept].double() @ columns.double().T).square().sum()

    held_out = [error(solve(tokens[:150], target[:150], s), tokens[150:], target[150:]) for s in RIDGES]
    strength = RIDGES[torch.stack(held_out).argmin()]
    assert strength < RIDGES[-1]
    torch.testing.assert_close(columns.double(), solve(tokens, target, strength), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(columns, down[:, kept], rtol=0.05)
    brute = torch.stack([target.square().sum(), *(error(c, tokens, target) for c in (down[:, kept], columns))])
    torch.testing.assert_close(squares.double(), brute, rtol=1e-3, atol=0)
    assert squares[2] < 0.95 * squares[1]


def test_a_refit_that_does_not_carry_over_is_not_made():
    """The last quarter of the tokens has nothing in common with the others."""
    down, kept = draw(H, W), torch.arange(6)
    common = draw(30, 6, seed=1) @ draw(6, 5, seed=2)
    tokens = torch.cat(
        [torch.cat([draw(30, 6, seed=1), common], 1), torch.cat([draw(10, 6, seed=3), -common[:10]], 1)]
    )
    tokens[30:, 6:] = -draw(10, 6, seed=3) @ draw(6, 5, seed=2)
    columns, (_, without, refitted) = refit(down, kept, gram_of(tokens))
    assert torch.equal(columns, down[:, kept])
    assert refitted == without > 0


@pytest.mark.parametrize("tokens", [0, 1, 3, 8])
def test_refit_with_few_tokens_never_raises_the_error(tokens):
    down, kept = draw(H, W), torch.arange(0, W, 2)
    columns, (whole, without, refitted) = refit(down, kept, gram_of(draw(tokens, W, seed=3)))
    assert columns.isfinite().all()
    assert refitted <= without <= whole + without
    if tokens == 0:
        assert torch.equal(columns, down[:, kept])
        assert whole == without == 0


def test_refit_works_beside_a_neuron_of_massive_activation():
    """As language models have at the first token."""
    mixing = draw(W, W, seed=2)
    tokens, kept = draw(640, W, seed=1) @ mixing, torch.arange(6)
    calm = refit(draw(H, W), kept, gram_of(tokens))[1]
    tokens[::64, 0] = 1e4
    _, without, refitted = refit(draw(H, W), kept, gram_of(tokens))[1]
    assert refitted / without < 1.2 * calm[2] / calm[1]


def test_an_expert_that_keeps_nothing_or_all():
    down, gram = draw(H, W), gram_of(draw(50, W))
    columns, (whole, without, refitted) = refit(down, torch.empty(0, dtype=torch.long), gram)
    assert columns.shape == (H, 0)
    torch.testing.assert_close(torch.stack([without, refitted]), whole.expand(2))
    columns, (_, without, refitted) = refit(down, torch.arange(W), gram)
    assert torch.equal(columns, down)
    assert without == refitted == 0


def test_values_that_are_not_finite_are_named():
    with pytest.raises(ValueError, match="not finite"):
        ridge(torch.full((2, 2), float("nan")), torch.ones(2, 1))


def test_ridge_solves():
    tokens = draw(50, W)
    gram, moments = tokens.T @ tokens, draw(W, 3, seed=1)
    solution = ridge(gram, moments)
    damped = gram + 0.01 * torch.diag(gram.diagonal())
    torch.testing.assert_close(damped @ solution, moments, rtol=1e-3, atol=1e-3)


def test_square_is_the_sum_over_tokens():
    matrix, tokens = draw(H, W), draw(30, W, seed=1)
    torch.testing.assert_close(square(matrix, tokens.T @ tokens).float(), (tokens @ matrix.T).square().sum())


def test_expert_statistics_add_up_over_batches():
    statistics = ExpertStatistics([W, W])
    activations, weights = draw(40, W), draw(40, seed=1).abs()
    for part in (slice(0, 24), slice(24, 40)):
        statistics(1, activations[part], weights[part])
    expected = torch.einsum("t,ti,tj->ij", weights**2, activations, activations)
    torch.testing.assert_close(sum(statistics.grams[1].parts), expected, rtol=1e-4, atol=1e-4)
    held_out = torch.cat([activations[18:24] * weights[18:24, None], activations[36:] * weights[36:, None]])
    torch.testing.assert_close(statistics.grams[1].parts[1], held_out.T @ held_out, rtol=1e-4, atol=1e-4)
    assert not any(part.any() for part in statistics.grams[0].parts)


def test_sample_is_spread_over_all_batches():
    statistics = DenseStatistics(20000, None)
    inputs = torch.arange(20000.0)[:, None].expand(-1, H)
    for batch in inputs.split(700):
        statistics(batch, draw(len(batch), W))
    positions = statistics.sampled()
    assert 4000 < len(positions) <= 8192
    assert torch.equal(statistics.sample()[:, 0].long(), positions)
    assert positions.diff().unique().numel() == 1
    assert positions[-1] > 19990


def test_clusters_find_the_blobs_and_keep_to_capacities():
    centres = 10 * torch.eye(4)[:3]
    points = (centres[torch.arange(60) % 3] + 0.1 * draw(60, 4))[torch.randperm(60, generator=torch.Generator())]
    blobs = points.argmax(1)
    found = cluster(points, [20, 20, 20], torch.Generator().manual_seed(0))
    for blob in range(3):
        assert found[blobs == blob].unique().numel() == 1
    uneven = cluster(points, [5, 15, 40], torch.Generator().manual_seed(0))
    assert uneven.bincount(minlength=3).tolist() == [5, 15, 40]


def test_router_rows_predict_their_targets():
    tokens = 400
    inputs = draw(tokens, H)
    truth = draw(3, H, seed=1)
    targets = inputs @ truth.T + 5.0  # what all targets share must not matter
    rows = linear_rows(inputs.T @ inputs, inputs.T @ targets, tokens)
    logits = inputs @ rows.T
    assert logits.var(unbiased=False).item() == pytest.approx(1, rel=0.3)
    best = (targets - targets.mean(1, keepdim=True)).argmax(1)
    assert (logits.argmax(1) == best).float().mean() > 0.95


def test_router_rows_of_tokens_that_are_all_alike():
    inputs = draw(1, H).expand(64, -1)
    targets = torch.eye(2)[torch.arange(64) % 2]
    rows = linear_rows(inputs.T @ inputs, inputs.T @ targets, 64)
    assert rows.isfinite().all()
    assert (inputs @ rows.T).abs().max() < 10


def test_slices_take_the_same_neurons_of_all_matrices():
    expert = Expert(draw(W, H), draw(W, H, seed=1), draw(H, W, seed=2))
    index = torch.tensor([4, 0, 9])
    x = draw(5, H, seed=3)
    whole = torch.nn.functional.silu(x @ expert.gate.T) * (x @ expert.up.T)
    part = slice_neurons(expert, index)
    made = torch.nn.functional.silu(x @ part.gate.T) * (x @ part.up.T)
    torch.testing.assert_close(made, whole[:, index])
    assert torch.equal(part.down, expert.down[:, index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learns", [True, False])
def test_widened_neurons_are_idle(dtype, learns):
    expert = Expert(*(m.to(dtype) for m in (draw(W, H), draw(W, H, seed=1), draw(H, W, seed=2))))
    generator = torch.Generator().manual_seed(0) if learns else None
    wide = widen(expert, 16, generator, 0.3)
    assert [m.dtype for m in wide[:3]] == [dtype] * 3
    assert torch.equal(wide.gate[:W], expert.gate)
    assert torch.equal(wide.up[:W], expert.up)
    assert torch.equal(wide.down[:, :W], expert.down)
    assert wide.down.shape == (H, 16)
    assert not wide.down[:, W:].any()
    for drawn in (wide.gate[W:], wide.up[W:]):
        assert drawn.any() == learns
        assert not learns or 0.1 < drawn.float().std() < 0.6


@pytest.mark.parametrize("width", [5, 80])  # one block of likely ones, and several
def test_elimination_takes_what_loses_the_least(width):
    """Against solving for what is left, again and again."""
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(300, width, generator=generator) @ torch.randn(width, width, generator=generator)
    rows[:, 1], rows[:, 2] = 2 * rows[:, 0], 0.0
    saliency = rows.square().sum(0) * torch.rand(width, generator=generator)
    gram = rows.T @ rows
    order, lost = eliminate(saliency, gram)
    damped = gram.double() + torch.diag(0.3 * gram.diagonal() + 1e-6 * gram.diagonal().mean())
    left, costs = list(range(width)), [0.0]
    for went in reversed(order.tolist()):
        told = 1 / (damped[left][:, left].inverse().diagonal() * damped.diagonal()[left])
        expected = saliency[left].double() * told
        place = left.index(went)
        assert expected[place] <= 1.02 * expected.min() + 1e-9
        costs.append(costs[-1] + expected[place].item())
        left.remove(went)
    assert not left
    torch.testing.assert_close(lost, torch.tensor(costs[::-1], dtype=torch.float64), rtol=1e-3, atol=1e-6)
    assert order[-1] == 2
    assert lost[0] < 0.95 * saliency.sum()


def test_elimination_without_refit_goes_by_saliency():
    saliency = draw(W).abs()
    order, lost = eliminate(saliency)
    assert torch.equal(order, saliency.argsort(descending=True))
    torch.testing.assert_close(lost[3], saliency.double()[order[3:]].sum())
    assert lost[W] == 0


def test_the_benchmark_of_calibration_runs(tmp_path, capsys):
    """And finds the states that the whole model has, or else it ends with an error."""
    sizes = {"hidden_size": 64, "width": 32, "layers": 2, "experts": 4, "tokens": 1024, "dtype": "float32"}
    benchmark._make_source(Namespace(**sizes), tmp_path / "source")
    benchmark._measure_calibration(tmp_path, Namespace(**sizes))
    head, _, row = capsys.readouterr().out.split("\n")[1:4]
    assert head.startswith("| 1024 tokens |")
    assert re.fullmatch(r"\| trim \| \d+\.\d+ \| \d+\.\d+ \| \d+\.\d+ \|", row)
    assert not (tmp_path / "calibrated").exists()
