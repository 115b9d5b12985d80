"""`mohge convert --mode trim --keep`: saliency, allocation, and what is left of the experts."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conversion_cases import (
    EXPERT_WIDTH,
    EXPERTS,
    LAYERS,
    add_tokenizer,
    assert_refused,
    assert_same_tensors,
    calibration,
    convert,
    load,
    logits,
    make_source,
    positions,
    read_report,
    sparse_layers,
    tensors,
    tree,
)
from model_cases import VARIANTS, make_ids, make_model
from transformers import AutoConfig

from mohge.backbones_mohge import feed_forwards
from mohge.conversion.allocation import Choices, allocate, choices, even
from mohge.conversion.checkpoint import Checkpoint, NamedTensors, read_config
from mohge.conversion.decoders import Source, make_decoder
from mohge.conversion.modes.trim import Trim
from mohge.conversion.plan import make_plan
from mohge.conversion.recipe import load_recipe
from mohge.conversion.saliency import Survey
from mohge.conversion.statistics import LayerSaliency, eliminate


OURS = {
    **VARIANTS,
    "one_group_in_one_layer": {"per_layer_config": {1: VARIANTS["one_group"] | {"num_groups_per_tok": 1}}},
}


def model_of(name: str, folder):
    """A checkpoint of a transformers model, or of one of ours."""
    if name in OURS:
        make_model(**OURS[name]).save_pretrained(folder)
        return folder
    return make_source(name, folder)


def parts(experts, expert: int):
    """Gate and up in one, and down, of an expert, as views of the weights; None where it has been removed."""
    if not hasattr(experts, "expert_groups"):
        return experts.gate_up_proj[expert], experts.down_proj[expert]
    group, slot = experts.expert_groups[expert], experts.expert_slots[expert]
    if not hasattr(experts, f"down_proj_{group}"):
        return None
    return getattr(experts, f"gate_up_proj_{group}")[slot], getattr(experts, f"down_proj_{group}")[slot]


def saliency_by_autograd(model, ids) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """By layer and expert, from one backward pass through the whole model, with the Gram matrix of what it adds up."""
    activations, found = {}, {}

    def keep(layer, expert, value, weights=1.0):
        value.retain_grad()
        activations[layer, expert] = value, weights
        return value

    def make_forward(layer, experts):
        def forward(hidden, index, weights):
            output = torch.zeros_like(hidden)
            for expert in range(experts.num_experts):
                token, slot = torch.where(index == expert)
                if (pair := parts(experts, expert)) is None or not len(token):
                    continue
                gate, up = F.linear(hidden[token], pair[0]).chunk(2, -1)
                combine = weights[token, slot, None]
                inner = keep(layer, expert, F.silu(gate) * up, combine.detach())
                output = output.index_add(0, token, F.linear(inner, pair[1]) * combine)
            return output

        return forward

    for number, feed_forward in enumerate(feed_forwards(model)):
        if feed_forward.experts is not None:
            feed_forward.experts.forward = make_forward(number, feed_forward.experts)
        elif all(found.experts is None for found in feed_forwards(model)):
            down = feed_forward.module.down_proj
            down.register_forward_pre_hook(lambda m, args, number=number: (keep(number, 0, args[0] * 1.0),))
    logits = model(ids).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for key, (value, weights) in activations.items():
        rows = (value.detach() * weights).flatten(0, -2)
        found[key] = (value.detach() * value.grad).flatten(0, -2).square().sum(0), rows.T @ rows
    return found


@pytest.mark.parametrize(
    "name",
    ["llama_biased_llama3_rope", "olmoe", "qwen2_moe", "two_level", "mixture", "removed_experts", "latent"],
)
def test_saliency_layer_by_layer_is_that_of_one_backward_pass(name, tmp_path):
    folder, ids = model_of(name, tmp_path / "source"), make_ids(6, 20)
    source = make_decoder(read_config(folder))
    named = NamedTensors(Checkpoint(folder), source)
    with torch.no_grad(), named.open() as read:
        source.load_outer({outer: read(outer) for outer in source.outer_names}, "cpu")
        layers = Survey(source, named, list(ids.split(4)), tmp_path).measure("gradient")
    expected = saliency_by_autograd(load(folder), ids)
    assert expected
    compared = 0
    for number, layer in enumerate(layers):
        for expert, neurons in enumerate(layer.neurons):
            if (number, expert) in expected:
                saliency, gram = expected[number, expert]
                torch.testing.assert_close(neurons, saliency, rtol=2e-3, atol=1e-7)
                torch.testing.assert_close(layer.lost[expert], eliminate(saliency, gram)[1], rtol=1e-2, atol=1e-7)
                assert sorted(layer.order[expert].tolist()) == list(range(len(neurons)))
                assert neurons.max() > 0
                compared += 1
            else:
                assert not neurons.any()
    assert compared == len(expected)


def lost_by(layers: list[Choices], picked) -> float:
    return sum(layer.lost[range(len(row)), row].sum() for layer, row in zip(layers, picked, strict=True))


def cost_of(layers: list[Choices], picked) -> float:
    return sum(layer.cost[range(len(row)), row].sum() for layer, row in zip(layers, picked, strict=True))


def made_up(saliency: list[np.ndarray], tokens=(1.0,)) -> LayerSaliency:
    return LayerSaliency.of(list(map(torch.tensor, saliency)), torch.tensor(tokens).expand(len(saliency)))


@pytest.mark.parametrize("budget", ["memory", "work"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_allocation_loses_the_least(budget, groups):
    """Against every possible allocation."""
    random = np.random.default_rng(groups)
    for _ in range(4):
        scales = random.exponential(size=(2, 3)) ** 2
        layers = [
            choices(made_up([scale * random.exponential(size=8) for scale in row], [1.0, 2.0, 3.0]), 3, budget)
            for row in scales
        ]
        if budget == "work":  # in sixths, which are exact
            layers = [layer._replace(cost=np.rint(6 * layer.cost)) for layer in layers]
        most = float(random.integers(10, int(sum(layer.cost[:, -1].sum() for layer in layers))))
        picked = allocate(layers, most, groups)
        every = [
            [row for row in itertools.product(range(4), repeat=3) if groups == 3 or len(set(row)) <= groups]
            for _ in layers
        ]
        fits = [pair for pair in itertools.product(*every) if cost_of(layers, map(list, pair)) <= most]
        best = min(lost_by(layers, map(list, pair)) for pair in fits)
        assert cost_of(layers, picked) <= most
        assert all(len(set(row)) <= groups for row in picked)
        assert lost_by(layers, picked) == pytest.approx(best, rel=1e-5)


def test_allocation_stays_within_a_budget_of_rounded_costs():
    random = np.random.default_rng(0)
    for _ in range(3):
        layers = []
        for _ in range(3):
            saliency = [random.exponential(size=16) * random.exponential() for _ in range(24)]
            layers.append(choices(made_up(saliency, random.exponential(size=24)), 4, "work"))
        most = 0.6 * sum(layer.cost[:, -1].sum() for layer in layers)
        assert 0.99 * most < cost_of(layers, allocate(layers, most, 3)) <= most * (1 + 1e-9)


def test_layers_are_put_on_one_scale():
    """Unless they differ by more than three times; what a layer's experts lose stays as it is among them."""
    random = np.random.default_rng(0)
    rows = [[random.exponential(size=8) for _ in range(3)] for _ in range(5)]
    scales = [1.0, 1.5, 0.7, 300.0, 0.0]
    before = [made_up([scale * row for row in layer]) for scale, layer in zip(scales, rows, strict=True)]
    tables = [choices(layer, 1, "memory") for layer in before]
    after = even(before, tables)
    halves = [layer.lost[:, 4].sum() for layer in after]
    assert halves[0] == pytest.approx(halves[1]) == pytest.approx(halves[2])
    assert halves[3] > 30 * halves[0]
    assert halves[4] == 0
    for old, new in zip(tables[:4], after, strict=False):
        ratios = new.lost[:, :8] / old.lost[:, :8]
        np.testing.assert_allclose(ratios, np.full((3, 8), ratios[0, 0]))


def test_allocation_refuses_what_it_cannot_try():
    layer = choices(made_up([np.ones(1024)] * 8), 8, "memory")
    with pytest.raises(ValueError, match=r"`multiple`.*raise"):
        allocate([layer], 100.0, 4)


def kept_neurons(folder, source_folder):
    """By layer and expert of the source, which of its neurons the result has."""
    result, source = load(folder), load(source_folder)
    kept = {}
    for number, (ours, theirs) in enumerate(zip(feed_forwards(result), feed_forwards(source), strict=True)):
        if theirs.experts is None:
            continue
        for expert in range(theirs.experts.num_experts):
            if (original := parts(theirs.experts, expert)) is None:
                continue
            rows, found = original[0].chunk(2)[0], torch.empty(0, dtype=torch.long)
            for candidate in range(ours.experts.num_experts):
                pair = parts(ours.experts, candidate)
                if pair is None:
                    continue
                idle = (pair[1] == 0).all(0)  # where a group is wider than one of its experts was
                if len(hits := positions(pair[0].chunk(2)[0][~idle], rows)) and hits.min() >= 0:
                    assert not len(found)
                    found = hits
            kept[number, expert] = found
    return kept


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("olmoe", []),
        ("qwen3_moe_sparse_step", ["--router", "two_level"]),
        ("qwen2_moe", []),
        ("two_level", []),
        ("top_p", []),
        ("one_group", []),
        ("one_group_in_one_layer", []),
        ("grouped_top_k", []),
        ("mixture", []),
        ("removed_experts", []),
        ("removed_experts_of_one_layer", []),
    ],
)
def test_without_refit_the_rest_computes_what_it_did(name, options, tmp_path):
    """Of no data: the result is the source with the columns of what was dropped set to zero, its router untouched."""
    source, out = model_of(name, tmp_path / "source"), tmp_path / "out"
    arguments = ["--mode", "trim", "--keep", "0.6", "--saliency", "magnitude", "--multiple", "4", *options]
    assert convert(source, out, *arguments) == 0
    kept, model = kept_neurons(out, source), load(source)
    neurons = total = 0
    for number, found in enumerate(feed_forwards(model)):
        for expert in range(found.experts.num_experts if found.experts is not None else 0):
            if (pair := parts(found.experts, expert)) is None:
                continue
            (gate, up), down = pair[0].chunk(2), pair[1]
            index = kept[number, expert]
            magnitude = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
            assert index.tolist() == magnitude.topk(len(index)).indices.sort().values.tolist()
            dropped = torch.ones(len(gate), dtype=torch.bool)
            dropped[index] = False
            with torch.no_grad():
                down[:, dropped] = 0
            neurons, total = neurons + len(index), total + len(gate)
    assert 0.4 * total < neurons <= 0.6 * total
    torch.testing.assert_close(logits(load(out)), logits(model), rtol=1e-4, atol=1e-4)
    config = AutoConfig.from_pretrained(out)
    before = AutoConfig.from_pretrained(source)
    for layer in sparse_layers(config):
        widths = config.per_layer_config[layer].moe_intermediate_sizes
        groups = len(before.per_layer_config[layer].moe_intermediate_sizes) if name in OURS else 0
        assert len(set(widths)) <= max(3, groups)
    report = read_report(out)
    assert report["calibration"] is None
    assert report["parameters"]["after"]["total"] == load(out).num_parameters()


def test_budget_of_work(tmp_path):
    """Experts that many tokens come to cost more."""
    source, row = make_source("olmoe", tmp_path / "source"), make_ids(1, 47)
    used = {}
    for budget in ("memory", "work"):
        out = tmp_path / budget
        options = ["--mode", "trim", "--keep", "0.5", "--budget", budget, "--multiple", "4"]
        assert convert(source, out, *options, *calibration(tmp_path / "rows.jsonl", row.repeat(16, 1))) == 0
        kept, counts = kept_neurons(out, source), {}
        model = load(source)
        for number, layer in enumerate(model.model.layers):

            def count(module, arguments, number=number, counts=counts):
                counts[number] = arguments[1].flatten().bincount(minlength=EXPERTS)

            layer.mlp.experts.register_forward_pre_hook(count)
        logits(model, row)
        work = sum(counts[number][expert].item() * len(index) for (number, expert), index in kept.items())
        whole = sum(count.sum().item() * EXPERT_WIDTH for count in counts.values())
        used[budget] = work / whole
        share = sum(map(len, kept.values())) / (len(kept) * EXPERT_WIDTH)
        if budget == "memory":
            assert share <= 0.5
    assert used["work"] <= 0.505
    assert used["memory"] > used["work"]


def test_gradient_keeps_more_than_chance(tmp_path):
    """Of a source whose neurons differ, the gradient's choice leaves the logits nearer than the reverse would."""
    scale = torch.logspace(-2, 0, EXPERT_WIDTH)

    def change(model):
        for layer in model.model.layers:
            layer.mlp.experts.down_proj *= scale

    source = make_source("olmoe", tmp_path / "source", change=change)
    options = ["--mode", "trim", "--keep", "0.5", "--multiple", "2"]
    assert convert(source, tmp_path / "out", *options, *calibration(tmp_path / "rows.jsonl")) == 0
    for index in kept_neurons(tmp_path / "out", source).values():
        assert not len(index) or index.float().mean() > EXPERT_WIDTH / 2
    assert read_report(tmp_path / "out")["logits"]["relative_error_median"] < 0.2


def test_dry_run_shows_the_widths_and_writes_nothing(tmp_path, capsys):
    source = make_source("olmoe", tmp_path / "source")
    rows = calibration(tmp_path / "rows.jsonl")
    before = tree(tmp_path)
    options = ["--mode", "trim", "--keep", "0.5", "--multiple", "4"]
    assert convert(source, tmp_path / "out", *options, *rows, "--dry-run") == 0
    assert tree(tmp_path) == before
    printed = capsys.readouterr().out
    assert convert(source, tmp_path / "out", *options, *rows) == 0
    config = AutoConfig.from_pretrained(tmp_path / "out")
    for layer in sparse_layers(config):
        shape = config.per_layer_config[layer]
        groups = ", ".join(
            f"{n} of width {w}" for w, n in zip(shape.moe_intermediate_sizes, shape.expert_counts, strict=True)
        )
        assert f"layer {layer}" in printed
        assert groups in printed
    assert "saliency lost" in printed
    assert f"{load(tmp_path / 'out').num_parameters():,}" in printed


def test_an_interrupted_survey_goes_on(tmp_path, monkeypatch):
    source, rows = make_source("olmoe", tmp_path / "source"), calibration(tmp_path / "rows.jsonl")
    options = ["--mode", "trim", "--keep", "0.5", "--multiple", "4", *rows]
    assert convert(source, tmp_path / "whole", *options) == 0
    ran = []

    def stop(survey):
        raise RuntimeError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(Survey, "_backward", stop)
        with pytest.raises(RuntimeError, match="no more"):
            convert(source, tmp_path / "out", *options)
    run = Survey._run
    monkeypatch.setattr(Survey, "_run", lambda survey, *args: ran.append(args[0]) or run(survey, *args))
    assert convert(source, tmp_path / "out", *options) == 0
    assert ran.count(0) == ran.count(1)  # on the way back alone
    assert ran[0] == 1
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))


@pytest.mark.parametrize("saliency", ["gradient", "contribution"])
def test_a_survey_that_stopped_before_it_wrote_what_a_layer_has_lost(saliency, tmp_path, monkeypatch):
    source, rows = make_source("olmoe", tmp_path / "source"), calibration(tmp_path / "rows.jsonl")
    options = ["--mode", "trim", "--keep", "0.5", "--multiple", "4", "--saliency", saliency, *rows]

    def stop(*arguments):
        raise RuntimeError("no more")

    with monkeypatch.context() as patch:
        patch.setattr("mohge.conversion.saliency.save_file", stop)
        with pytest.raises(RuntimeError, match="no more"):
            convert(source, tmp_path / "out", *options)
    for out in ("out", "whole"):
        assert convert(source, tmp_path / out, *options) == 0
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("olmoe", [], "`keep`"),
        ("olmoe", ["--keep", "0.5", "--widths", "4,8"], "one of the two"),
        ("olmoe", ["--keep", "0.5", "--experts-per-group", "2"], "`experts_per_group`"),
        ("olmoe", ["--widths", "4,8", "--multiple", "4"], "`multiple`"),
        ("olmoe", ["--keep", "0.5", "--top-k", "2"], "`top_k` is the source's own"),
        ("olmoe", ["--keep", "0.5", "--router", "top_p"], "`router` top_p"),
        ("olmoe", ["--keep", "0.5", "--router", "two_level", "--top-k", "9"], "`top_k` is 9"),
        ("olmoe", ["--keep", "0.5", "--router", "two_level", "--top-groups", "0"], "`top_groups` is 0"),
        ("olmoe", ["--keep", "1.5"], "`keep` is 1.5"),
        ("olmoe", ["--keep", "nan"], "`keep` is nan"),
        ("olmoe", ["--keep", "0.5", "--budget", "work", "--saliency", "magnitude"], "leave out `saliency` magnitude"),
        ("olmoe", ["--keep", "0.5", "--groups", "0"], "`groups` is 0"),
        ("two_level", ["--keep", "0.5", "--top-k", "2"], "`top_k`"),
        ("two_level", ["--widths", "4,8"], "use `keep`"),
    ],
)
def test_options_that_contradict_each_other(kind, options, message, tmp_path, capsys):
    source = model_of(kind, tmp_path / "source")
    assert message in assert_refused([source, tmp_path / "out", "--mode", "trim", *options], tmp_path, capsys)


@pytest.mark.parametrize(("top_k", "top_groups"), [(1, 2), (3, 1)])
def test_groups_per_token_of_layers_that_differ(top_k, top_groups, tmp_path):
    """As many as asked for, of those that there are; more where the smallest would not hold the experts of a token."""

    def change(model):
        model.model.layers[0].mlp.experts.down_proj[1:] *= 1e-3

    source = make_source("olmoe", tmp_path / "source", change=change)
    options = ["--keep", "0.4", "--saliency", "magnitude", "--multiple", "2", "--router", "two_level"]
    options += ["--top-k", top_k, "--top-groups", top_groups]
    assert convert(source, tmp_path / "out", "--mode", "trim", *options) == 0
    layers = AutoConfig.from_pretrained(tmp_path / "out").sparse_layers
    assert len({str(layer.moe_intermediate_sizes) for layer in layers}) > 1
    for layer in layers:
        least = np.searchsorted(np.cumsum(sorted(layer.expert_counts)), top_k) + 1
        assert layer.num_groups_per_tok == min(max(least, top_groups), layer.num_groups)


def test_a_text_that_is_always_there(tmp_path):
    source = add_tokenizer(make_source("olmoe", tmp_path / "source"))
    recipe = load_recipe(None, source=str(source), output=str(tmp_path / "out"), mode="trim", keep=0.5)
    plan = make_plan(recipe)
    assert plan.recipe.calibration == "standard-library"
    assert plan.recipe.calibration_tokens == 131072


def test_the_recipe_is_written_out(tmp_path):
    source = make_source("olmoe", tmp_path / "source")
    options = ["--mode", "trim", "--keep", "0.5", "--multiple", "4", "--saliency", "contribution"]
    assert convert(source, tmp_path / "out", *options, *calibration(tmp_path / "rows.jsonl")) == 0
    recipe = load_recipe(str(tmp_path / "out" / "conversion_recipe.yaml"))
    assert (recipe.keep, recipe.multiple, recipe.groups, recipe.budget) == (0.5, 4, 3, "memory")
    assert (recipe.saliency, recipe.router, recipe.widths) == ("contribution", "source", None)
    arguments = ["--recipe", tmp_path / "out" / "conversion_recipe.yaml", source, tmp_path / "again"]
    assert convert(*arguments) == 0
    assert_same_tensors(tensors(tmp_path / "again"), tensors(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["per_layer_config"]


@pytest.mark.parametrize(
    "options", [["--keep", "0.5", "--multiple", "4"], ["--widths", "16,32", "--saliency", "contribution"]]
)
def test_statistics_of_the_survey_are_those_of_another_pass(options, tmp_path, monkeypatch):
    source = make_source("olmoe", tmp_path / "olmoe")
    read, run, passes = Source.read_layer, Source.run, Counter()

    def counted(self, number, ids, before):
        passes[Trim.keeps_statistics] += 1
        return run(self, number, ids, before)

    def let_go(self, number, state):
        weights = read(self, number, state)
        assert all(parameter.is_meta for parameter in self.feed_forwards[number].layer.parameters())
        return weights

    monkeypatch.setattr(Source, "run", counted)
    monkeypatch.setattr(Source, "read_layer", let_go)
    for kept in (True, False):
        monkeypatch.setattr(Trim, "keeps_statistics", kept)
        trim = ["--mode", "trim", *calibration(tmp_path / "ids.jsonl"), *options]
        assert convert(source, tmp_path / str(kept), *trim) == 0
    assert_same_tensors(tensors(tmp_path / "True"), tensors(tmp_path / "False"))
    assert passes[False] - passes[True] == LAYERS  # all calibration tokens are one batch
