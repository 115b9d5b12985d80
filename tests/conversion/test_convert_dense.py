"""`mohge convert` of dense models: copy, residual, split, shards, and the numbers of their receipts."""

import pytest
import torch
import torch.nn.functional as F
from conversion_cases import (
    DENSE,
    DENSE_WIDTH,
    IDS,
    assert_all_neurons,
    assert_narrowed,
    assert_same_tensors,
    assert_widened,
    calibration,
    convert,
    feed_forward,
    load,
    logits,
    make_source,
    positions,
    read_report,
    routed_expert,
    tensors,
)
from model_cases import assert_close, make_ids

from mohge.conversion.statistics import eliminate
from mohge.info import parameter_counts


ROW = make_ids(1, 47, seed=3)
EXACT = {
    "copy": ["--widths", "44,44", "--experts-per-group", "2", "--top-k", "2"],
    "copy_wider": ["--widths", "44,51,60", "--experts-per-group", "1,2,3", "--top-k", "3"],
    "residual": ["--widths", "44,51", "--experts-per-group", "2", "--top-k", "2"],
    "shards": ["--widths", "12,32", "--experts-per-group", "2"],
    "shards_three_unequal": ["--widths", "5,16,23", "--experts-per-group", "1,2,3"],
}


def assert_exact(source, out):
    model = load(out)
    assert_close(logits(model), logits(load(source)))
    expected = load(source).generate(IDS[:, :7], max_new_tokens=9, do_sample=False)
    assert torch.equal(model.generate(IDS[:, :7], max_new_tokens=9, do_sample=False), expected)
    report = read_report(out)
    assert report["exact"] is report["passed"] is True
    assert report["logits"]["relative_error_median"] <= 1e-5
    assert [entry["layer"] for entry in report["layers"]] == list(range(model.config.num_hidden_layers))
    assert all(0 <= entry["relative_error"] <= 1e-5 for entry in report["layers"])
    total = load(source).num_parameters()
    counts = parameter_counts(model.config)
    for when, expected in (("before", (total, total)), ("after", (counts.total, counts.activated))):
        assert tuple(report["parameters"][when][name] for name in ("total", "activated")) == expected
    assert report["parameters"]["before"]["activated_as_routed"] == total
    return model


def assert_rest_unchanged(before, weights):
    names = [name for name in before if ".mlp." not in name]
    assert len(names) > 10
    assert_same_tensors({name: weights[name] for name in names}, {name: before[name] for name in names})


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("name", DENSE)
def test_exact_modes(name, mode, tmp_path):
    source, out = make_source(name, tmp_path / "source"), tmp_path / "out"
    assert convert(source, out, "--mode", mode.partition("_")[0], *EXACT[mode]) == 0
    config = assert_exact(source, out).config
    before, weights = tensors(source), tensors(out)
    assert_rest_unchanged(before, weights)
    assert config.moe_intermediate_sizes == [int(width) for width in EXACT[mode][1].split(",")]
    for layer in range(config.num_hidden_layers):
        ffn = feed_forward(before, layer)
        experts = [routed_expert(weights, config, layer, i) for i in range(config.num_experts)]
        if mode.startswith("copy"):
            for expert in experts:
                assert_widened(expert, ffn)
        elif mode == "residual":
            assert all(
                torch.equal(actual, expected)
                for actual, expected in zip(feed_forward(weights, layer, "mlp.shared_expert"), ffn, strict=True)
            )
            for gate, up, down in experts:
                assert torch.equal(down, torch.zeros_like(down))
                kept = positions(gate, ffn[0])
                assert_all_neurons(kept[kept >= 0].unique(), DENSE_WIDTH)
                assert torch.equal(up[kept >= 0], ffn[1][kept[kept >= 0]])
        else:
            assert config.router_type == "grouped_top_k"
            assert config.num_experts_per_tok == config.num_groups
            assert not weights[f"model.layers.{layer}.mlp.gate.weight"].any()
            shards = [[] for _ in range(config.num_groups)]
            for group, (gate, up, down) in zip(config.expert_groups, experts, strict=True):
                kept = positions(gate, ffn[0])
                assert kept.min() >= 0
                assert torch.equal(up, ffn[1][kept])
                assert torch.equal(down, config.num_groups * ffn[2][:, kept])  # compensated here alone
                shards[group].append(kept.tolist())
            assert all(kept == copies[0] for copies in shards for kept in copies)
            assert_all_neurons(torch.tensor([i for copies in shards for i in copies[0]]), DENSE_WIDTH)


@pytest.mark.parametrize("mode", ["copy", "residual"])
@pytest.mark.parametrize("router", ["two_level", "top_k", "top_p", "grouped_top_k"])
def test_exact_under_every_router(router, mode, tmp_path):
    source, out = make_source("llama", tmp_path / "source"), tmp_path / "out"
    assert convert(source, out, "--mode", mode, *EXACT["copy"], "--router", router) == 0
    assert assert_exact(source, out).config.router_type == router


def test_groups_kept_are_those_asked_for(tmp_path):
    source, out = make_source("qwen2_mixed_windows_tied", tmp_path / "source"), tmp_path / "out"
    options = ["--widths", "44,45,46,47", "--experts-per-group", "3", "--top-k", "4", "--top-groups", "2"]
    assert convert(source, out, "--mode", "copy", *options) == 0
    config = assert_exact(source, out).config
    assert (config.num_experts_per_tok, config.num_groups_per_tok) == (4, 2)


def test_bfloat16_shards(tmp_path):
    """Twice a bfloat16 number is one too."""
    source, out = make_source("llama", tmp_path / "source", torch.bfloat16), tmp_path / "out"
    assert convert(source, out, "--mode", "shards", *EXACT["shards"]) == 0
    assert {tensor.dtype for tensor in tensors(out).values()} == {torch.bfloat16}
    assert_rest_unchanged(tensors(source), tensors(out))
    report = read_report(out)
    assert report["passed"] is True
    assert report["logits"]["relative_error_median"] <= 1e-5


def test_residual_with_narrow_experts_is_exact(tmp_path):
    source, out = make_source("qwen3_dynamic_rope", tmp_path / "source"), tmp_path / "out"
    options = ["--widths", "20,44", "--experts-per-group", "2", "--top-k", "2"]
    rows = calibration(tmp_path / "rows.jsonl", make_ids(64, 15))
    assert convert(source, out, "--mode", "residual", *options, *rows) == 0
    config = assert_exact(source, out).config
    assert config.shared_expert_intermediate_size == DENSE_WIDTH
    assert config.moe_intermediate_sizes == [20, 44]


def assert_logits_as_measured(report, source, model, ids):
    """The receipt has what a check on `ids` gives. Its tokens may repeat, if all do equally often."""
    p, q = (logits(m, ids)[0].double() for m in (source, model))
    errors = (q - p).norm(dim=-1) / p.norm(dim=-1)
    kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    measured = report["logits"]
    expected = {
        "relative_error_median": errors.median().item(),
        "relative_error_max": errors.max().item(),
        "kl": kl.item(),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
        "perplexity_before": F.cross_entropy(p[:-1], ids[0, 1:]).exp().item(),
        "perplexity_after": F.cross_entropy(q[:-1], ids[0, 1:]).exp().item(),
    }
    assert expected["kl"] > 1e-3
    assert measured == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def feed_forward_errors(source, model, ids):
    """For each layer the relative error over all tokens, at the source's own input; and those inputs."""
    inputs = []
    for layer in source.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, output: inputs.append(output))
    source(ids)
    errors = []
    for x, ours, theirs in zip(inputs, model.model.layers, source.model.layers, strict=True):
        expected = theirs.mlp(x)
        errors.append(((ours.mlp(x) - expected).norm() / expected.norm()).item())
    return errors, [x[0] for x in inputs]


def test_narrow_copy_keeps_important_neurons_and_is_refitted(tmp_path):
    """Every row of the calibration set is the same: statistics and check see the same tokens, whichever they take."""
    source, out = make_source("llama", tmp_path / "source"), tmp_path / "out"
    options = ["--widths", "20", "--experts-per-group", "4", "--top-k", "2", "--router", "top_k"]
    options += ["--saliency", "contribution"]
    rows = calibration(tmp_path / "rows.jsonl", ROW.repeat(64, 1))
    assert convert(source, out, "--mode", "copy", *options, *rows) == 0
    report, before, weights = read_report(out), tensors(source), tensors(out)
    original, model = load(source), load(out)
    assert_logits_as_measured(report, original, model, ROW)
    assert report["check"] == {"tokens": 8 * 47, "text": "calibration"}
    assert report["calibration"] == {"dataset": str(tmp_path / "rows.jsonl"), "tokens": 56 * 47}
    errors, inputs = feed_forward_errors(original, model, ROW)
    for layer, (error, x) in enumerate(zip(errors, inputs, strict=True)):
        gate, up, down = feed_forward(before, layer)
        activations = F.silu(F.linear(x, gate)) * F.linear(x, up)
        importance = activations.abs().mean(0) * down.norm(dim=0)
        expected = eliminate(importance, activations.T @ activations)[0][:20].sort().values
        assert not torch.equal(expected, importance.topk(20).indices.sort().values)
        for expert in range(4):
            kept = assert_narrowed(routed_expert(weights, model.config, layer, expert), (gate, up, down))
            assert torch.equal(kept.sort().values, expected)
        output = F.linear(activations, down)
        cut = F.linear(activations[:, expected], down[:, expected])
        entry = report["layers"][layer]
        assert error > 1e-3
        assert entry["relative_error"] == pytest.approx(error, rel=1e-3)
        assert entry["calibration_error"] == pytest.approx(error, rel=1e-3)
        without = ((cut - output).norm() / output.norm()).item()
        assert entry["calibration_error_without_refit"] == pytest.approx(without, rel=1e-3)
        assert error < without
    assert report["exact"] is False
    assert report["passed"] is True


def test_reinit_draws_whole_neurons_anew(tmp_path, capsys):
    source, out = make_source("mistral_sliding_window", tmp_path / "source"), tmp_path / "out"
    options = ["--mode", "copy", *EXACT["copy"], "--reinit", "0.5"]
    rows = calibration(tmp_path / "rows.jsonl", ROW.repeat(64, 1))
    assert convert(source, out, *options, *rows) == 0
    model, before, weights = load(out), tensors(source), tensors(out)
    kept_neurons = set()
    for layer in range(model.config.num_hidden_layers):
        ffn = feed_forward(before, layer)
        for expert in range(model.config.num_experts):
            gate, up, down = routed_expert(weights, model.config, layer, expert)
            kept, kept_up, kept_down = positions(gate, ffn[0]), positions(up, ffn[1]), positions(down.T, ffn[2].T)
            assert torch.equal(kept_up, kept)
            assert torch.equal(kept_down, kept)
            assert (kept >= 0).sum() == DENSE_WIDTH // 2
            drawn = kept < 0
            assert all((w[drawn].std(-1) > 0).all() for w in (gate, up, down.T))
            kept_neurons.add(tuple(kept[~drawn].tolist()))
    assert len(kept_neurons) == model.config.num_hidden_layers * model.config.num_experts  # none like another
    report = read_report(out)
    assert report["exact"] is False
    assert_logits_as_measured(report, load(source), model, ROW)
    errors, _ = feed_forward_errors(load(source), model, ROW)
    assert [entry["relative_error"] for entry in report["layers"]] == pytest.approx(errors, rel=1e-3)
    assert "KL" in (out / "README.md").read_text().upper()
    assert "KL" in capsys.readouterr().out.upper()


def test_seed_decides_what_is_drawn(tmp_path):
    source = make_source("qwen3_dynamic_rope", tmp_path / "source")
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        options = ["--mode", "copy", *EXACT["copy"], "--reinit", "0.5", "--seed", seed]
        assert convert(source, tmp_path / name, *options) == 0
    first, again, other = (tensors(tmp_path / name) for name in "abc")
    assert_same_tensors(again, first)
    name = "model.layers.1.mlp.experts.down_proj_1"
    assert not torch.equal(other[name], first[name])
    report = read_report(tmp_path / "a")
    assert report["exact"] is False
    assert report["passed"] is True
    assert report["logits"]["kl"] > 0
    assert report["logits"]["perplexity_before"] is report["logits"]["perplexity_after"] is None
    assert report["check"]["text"] == "random"


def test_too_large_a_divergence_fails_and_keeps_the_model(tmp_path):
    source, out = make_source("llama", tmp_path / "source"), tmp_path / "out"
    options = ["--mode", "copy", *EXACT["copy"], "--reinit", "0.5"]
    assert convert(source, out, *options, "--max-kl", "1e-9") == 1
    assert logits(load(out)).isfinite().all()
    report = read_report(out)
    assert report["passed"] is False
    assert len(report["failures"]) == 1
    assert report["logits"]["kl"] > 1e-9
    generous = tmp_path / "generous"
    assert convert(source, generous, *options, "--max-kl", 2 * report["logits"]["kl"]) == 0
    assert read_report(generous)["passed"] is True


@pytest.mark.parametrize("name", DENSE)
def test_split_partitions_the_neurons(name, tmp_path):
    source, out = make_source(name, tmp_path / "source"), tmp_path / "out"
    rows = make_ids(64, 15 if name == "qwen3_dynamic_rope" else 47)
    options = ["--widths", "3,6", "--experts-per-group", "2,3", "--top-k", "2"]
    assert convert(source, out, "--mode", "split", *options, *calibration(tmp_path / "rows.jsonl", rows)) == 0
    model, before, weights = load(out), tensors(source), tensors(out)
    config = model.config
    assert config.moe_intermediate_sizes == [3, 6]
    assert config.shared_expert_intermediate_size == DENSE_WIDTH - 2 * 3 - 3 * 6
    assert config.num_groups_per_tok == 2
    assert_rest_unchanged(before, weights)
    for layer in range(config.num_hidden_layers):
        ffn = feed_forward(before, layer)
        shared = feed_forward(weights, layer, "mlp.shared_expert")
        experts = [shared] + [routed_expert(weights, config, layer, i) for i in range(5)]
        kept = torch.cat([positions(gate, ffn[0]) for gate, _, _ in experts])
        assert_all_neurons(kept, DENSE_WIDTH)
        assert torch.equal(torch.cat([up for _, up, _ in experts]), ffn[1][kept])
        assert all(torch.isfinite(down).all() and (down != 0).any(0).all() for _, _, down in experts)
        assert weights[f"model.layers.{layer}.mlp.gate.weight"].norm(dim=-1).min() > 0
    report = read_report(out)
    routers = sum(p.numel() for router in model.routers for p in router.parameters())
    biases = sum(w.numel() for n, w in weights.items() if n.endswith("bias") and n not in before)
    counts = report["parameters"]
    assert counts["after"]["total"] - routers - biases == counts["before"]["total"]
    assert counts["after"]["activated"] < counts["before"]["activated"]
    assert report["exact"] is False
    assert report["passed"] is True


def test_narrow_copy_without_data(tmp_path):
    """By magnitude: the neurons with the largest weights, as they were."""
    source, out = make_source("llama", tmp_path / "source"), tmp_path / "out"
    options = ["--widths", "20,44", "--experts-per-group", "2", "--top-k", "2", "--saliency", "magnitude"]
    assert convert(source, out, "--mode", "copy", *options) == 0
    before, weights, config = tensors(source), tensors(out), load(out).config
    for layer in range(config.num_hidden_layers):
        gate, up, down = feed_forward(before, layer)
        kept = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).topk(20).indices.sort().values
        for expert, width in enumerate(config.expert_widths):
            index = kept if width == 20 else torch.arange(44)
            expected = (gate[index], up[index], down[:, index])
            assert all(map(torch.equal, routed_expert(weights, config, layer, expert), expected))
    assert read_report(out)["calibration"] is None


@pytest.mark.parametrize("name", ["llama_biased_llama3_rope", "mistral_sliding_window", "qwen2_mixed_windows_tied"])
def test_split_lays_out_itself_what_it_was_asked_to_keep(name, tmp_path):
    """The layout follows from the text: layers differ in it, and all neurons are there."""
    source, out, again = make_source(name, tmp_path / "source"), tmp_path / "out", tmp_path / "again"
    options = calibration(tmp_path / "rows.jsonl", make_ids(64, 47))
    assert convert(source, out, "--mode", "split", "--keep-active", "0.9", *options) == 0
    model, before, weights = load(out), tensors(source), tensors(out)
    assert_rest_unchanged(before, weights)
    for layer in range(model.config.num_hidden_layers):
        config = model.config.per_layer_config[layer]
        assert config.moe_intermediate_sizes[0] == 0 < config.moe_intermediate_sizes[1]
        ffn = feed_forward(before, layer)
        kept = [positions(feed_forward(weights, layer, "mlp.shared_expert")[0], ffn[0])]
        for number, width in enumerate(config.expert_widths):
            kept += [positions(routed_expert(weights, model.config, layer, number)[0], ffn[0])] if width else []
        assert_all_neurons(torch.cat(kept), DENSE_WIDTH)
    assert logits(model).isfinite().all()
    assert convert("--recipe", out / "conversion_recipe.yaml", source, again) == 0
    assert_same_tensors(tensors(again), weights)
