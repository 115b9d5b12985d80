"""`mohge convert` of mixtures of experts: regroup and back, export of padded experts, trim."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conversion_cases import (
    EXPERT_WIDTH,
    EXPERTS,
    IDS,
    MIXTURES,
    TRIM,
    assert_all_neurons,
    assert_narrowed,
    assert_same_tensors,
    assert_widened,
    calibration,
    convert,
    load,
    logits,
    make_source,
    positions,
    read_report,
    routed_expert,
    source_expert,
    source_router,
    sparse_layers,
    tensors,
)
from model_cases import ROUTERS, VARIANTS, assert_close, make_ids, make_model
from safetensors.torch import save_file
from transformers import AutoConfig

from mohge import MoHGEForCausalLM
from mohge.info import parameter_counts
from mohge.loading import load_model


REGROUPED = {  # equal and unequal groups; with 1,2,3 the ids run through one group after another
    "olmoe": ("1,2,3", "two_level"),
    "olmoe_normalised_tied_biased": ("2", "two_level"),
    "olmoe_longrope": ("3", "source"),
    "mixtral": ("2,4", "source"),
    "mixtral_sliding_window": ("6", "two_level"),
    "qwen2_moe": ("3", "two_level"),
    "qwen2_moe_mixed_windows_unbiased": ("1,2,3", "source"),
    "qwen3_moe": ("2", "source"),
    "qwen3_moe_sparse_step": ("1", "two_level"),
}
"""Source -> experts in each group, router."""


@pytest.fixture(scope="module", params=MIXTURES)
def regrouped(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source, out = make_source(request.param, folder / "source"), folder / "out"
    groups, router = REGROUPED[request.param]
    assert convert(source, out, "--mode", "regroup", "--experts-per-group", groups, "--router", router) == 0
    return SimpleNamespace(name=request.param, source=source, out=out, folder=folder, groups=groups, router=router)


def test_regrouped_model_is_the_source(regrouped):
    source, model = load(regrouped.source), load(regrouped.out)
    assert isinstance(model, MoHGEForCausalLM)
    assert_close(logits(model), logits(source))
    generated = [
        m.generate(IDS[:, :7], max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True)
        for m in (model, source)
    ]
    assert torch.equal(generated[0].sequences, generated[1].sequences)
    assert len(generated[1].logits) == 20
    for actual, expected in zip(generated[0].logits, generated[1].logits, strict=True):
        assert_close(actual, expected)


def test_regroup_moves_weights_unchanged(regrouped):
    config = AutoConfig.from_pretrained(regrouped.out)
    counts = [int(count) for count in regrouped.groups.split(",")]
    if len(counts) == 1:
        counts *= EXPERTS // counts[0]
    assert config.expert_counts == counts
    assert config.moe_intermediate_sizes == [EXPERT_WIDTH] * len(counts)
    assert config.router_type == regrouped.router
    if regrouped.router == "two_level":
        assert config.group_score_function == "expert_logsumexp"
    assert config.num_groups_per_tok == len(counts)
    source, weights = tensors(regrouped.source), tensors(regrouped.out)
    layers = sparse_layers(config)
    assert layers == {"qwen2_moe": [0, 2], "qwen3_moe_sparse_step": [1]}.get(regrouped.name, [0, 1])
    for layer in layers:
        assert torch.equal(weights[f"model.layers.{layer}.mlp.gate.weight"], source_router(source, layer))
        for expert in range(EXPERTS):
            pairs = zip(
                routed_expert(weights, config, layer, expert), source_expert(source, layer, expert), strict=True
            )
            assert all(torch.equal(actual, expected) for actual, expected in pairs)
    elsewhere = [name for name in source if ".experts." not in name and ".block_sparse_moe." not in name]
    assert len(elsewhere) > 6 * config.num_hidden_layers
    assert_same_tensors({name: weights[name] for name in elsewhere}, {name: source[name] for name in elsewhere})


def test_regroup_and_back_is_bit_identical(regrouped):
    back = regrouped.folder / "back"
    assert convert(regrouped.out, back, "--mode", "export") == 0
    assert_same_tensors(tensors(back), tensors(regrouped.source))
    config = json.loads((regrouped.source / "config.json").read_text())
    assert json.loads((back / "config.json").read_text()) == config
    assert json.loads((regrouped.out / "config.json").read_text())["source_config"] == config
    model = load(back)
    assert type(model) is MIXTURES[regrouped.name][0]
    assert torch.equal(logits(model).argmax(-1), logits(load(regrouped.source)).argmax(-1))


def test_receipt_of_an_exact_conversion(regrouped):
    report = read_report(regrouped.out)
    source, model = load(regrouped.source), load(regrouped.out)
    assert report["mode"] == "regroup"
    assert report["exact"] is True
    assert report["reason"]
    assert report["passed"] is True
    assert report["failures"] == []
    assert report["source"] == {
        "path": str(regrouped.source),
        "revision": None,
        "model_type": source.config.model_type,
    }
    expected = parameter_counts(model.config)
    after = {"total": expected.total, "activated": expected.activated}
    assert report["parameters"]["after"].items() >= after.items()
    routed = sum(p.numel() for name, p in source.named_parameters() if ".experts." in name)
    idle = routed * (EXPERTS - source.config.num_experts_per_tok) // EXPERTS
    total = source.num_parameters()
    assert report["parameters"]["before"].items() >= {"total": total, "activated": total - idle}.items()
    size = sum(t.numel() * t.element_size() for t in tensors(regrouped.out).values())
    files = sum(file.stat().st_size for file in regrouped.out.glob("*.safetensors"))
    assert size <= report["bytes_written"] <= files
    layers = {entry["layer"]: entry for entry in report["layers"]}
    assert layers.keys() >= set(sparse_layers(model.config))
    assert all(0 <= entry["relative_error"] <= 1e-5 for entry in layers.values())
    measured = report["logits"]
    assert 0 <= measured["relative_error_median"] <= measured["relative_error_max"]
    assert measured["relative_error_median"] <= 1e-5
    assert abs(measured["kl"]) <= 1e-6
    assert measured["top1_agreement"] >= 0.99
    assert measured["perplexity_before"] is measured["perplexity_after"] is None
    assert report["check"]["text"] == "random"
    assert report["check"]["tokens"] > 0
    assert report["calibration"] is None


def test_dead_experts_are_those_without_a_token(tmp_path):
    """An expert whose router row lies between two others is never the best."""

    def change(model):
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = layer.mlp.gate.weight[[0, 5]].mean(0)

    source = make_source("olmoe", tmp_path / "source", change=change, num_experts_per_tok=1)
    row = make_ids(1, 47)
    model = load(source)
    chosen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: chosen.append(output[2].unique().tolist()))
    logits(model, row)
    options = ["--experts-per-group", 2, *calibration(tmp_path / "rows.jsonl", row.repeat(64, 1))]
    assert convert(source, tmp_path / "out", "--mode", "regroup", *options) == 0
    for entry, used in zip(read_report(tmp_path / "out")["layers"], chosen, strict=True):
        assert len(used) > 1
        assert 3 in entry["dead_experts"]
        assert sorted(entry["dead_experts"]) == sorted(set(range(EXPERTS)) - set(used))


def _float32_router(model):
    for layer in model.model.layers:
        layer.mlp.gate.float()


@pytest.mark.parametrize(
    ("name", "change"),
    [("olmoe", None), ("mixtral", None), ("qwen2_moe", None), ("qwen3_moe", _float32_router)],
    ids=["olmoe", "mixtral", "dense layer and shared expert", "float32 router"],
)
def test_bfloat16_stays_bit_identical(name, change, tmp_path):
    source = make_source(name, tmp_path / "source", torch.bfloat16, change)
    assert convert(source, tmp_path / "out", "--mode", "regroup", "--experts-per-group", 2) == 0
    expected, weights = tensors(source), tensors(tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.dtype == torch.bfloat16
    for actual, original in zip(routed_expert(weights, config, 0, 5), source_expert(expected, 0, 5), strict=True):
        assert actual.dtype == torch.bfloat16
        assert torch.equal(actual, original)
    report = read_report(tmp_path / "out")
    assert report["passed"] is True
    assert report["logits"]["relative_error_median"] <= 1e-5
    assert load(tmp_path / "out").lm_head.weight.dtype == torch.bfloat16
    assert convert(tmp_path / "out", tmp_path / "back", "--mode", "export") == 0
    assert_same_tensors(tensors(tmp_path / "back"), expected)


PADDED = [*ROUTERS, "wider_second_layer", "gated_shared_expert", "dense_first_layer", "latent", "tied"]
PADDED += ["removed_experts", "removed_experts_of_a_mixture"]


@pytest.mark.parametrize("name", PADDED)
def test_padded_export_has_one_width(name, tmp_path):
    model = make_model(**VARIANTS[name])
    for router in model.routers:
        if router.corrects_logits:
            router.logit_ema_E.normal_()
    for feed_forward in model.sparse_feed_forwards:
        if model.config.keeps_router:
            feed_forward.experts.expert_ids.copy_(torch.randperm(12))
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert convert(tmp_path / "source", tmp_path / "out", "--mode", "export", "--pad") == 0
    assert_named_for_engines(tmp_path / "out")
    padded, source = load(tmp_path / "out"), load(tmp_path / "source")
    widest = 64 if name == "wider_second_layer" else 40
    for layer in padded.config.sparse_layers:
        assert set(layer.expert_widths) == {widest}
    assert type(padded.config.moe_intermediate_size) is int
    assert padded.config.moe_intermediate_size == widest
    assert hasattr(padded.model.layers[-1].mlp, "experts")
    assert "AutoModel" in json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert_close(logits(padded), logits(source))
    assert torch.equal(padded.generate(IDS, max_new_tokens=4), source.generate(IDS, max_new_tokens=4))
    weights, before = padded.state_dict(), source.state_dict()
    for layer in sparse_layers(source.config):
        ids = before.get(f"model.layers.{layer}.mlp.experts.expert_ids", torch.arange(12)).tolist()
        for expert, ours in enumerate(ids):
            widened = routed_expert(weights, padded.config, layer, expert)
            if source.config.per_layer_config[layer].expert_widths[ours]:
                assert_widened(widened, routed_expert(before, source.config, layer, ours))
            else:
                assert not any(part.any() for part in widened)
    report = read_report(tmp_path / "out")
    assert report["exact"] is report["passed"] is True
    assert report["parameters"]["after"]["total"] == padded.num_parameters() > source.num_parameters()
    assert report["parameters"]["before"]["total"] == source.num_parameters()


def assert_named_for_engines(folder):
    """Serving engines find every expert by the id that the router gives it, and nothing that they do not know."""
    config, on_disk = AutoConfig.from_pretrained(folder), tensors(folder)
    for layer in sparse_layers(config):
        block = f"model.layers.{layer}.mlp.experts."
        shapes = {name.removeprefix(block): w.shape for name, w in on_disk.items() if name.startswith(block)}
        width, hidden = config.moe_intermediate_size, config.hidden_size
        parts = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        assert shapes == {
            f"{index}.{part}.weight": shape for index in range(config.num_experts) for part, shape in parts.items()
        }


def test_padded_export_is_a_source(tmp_path):
    """Whatever reads a folder tensor by tensor knows its names; an expert that is missing is named."""
    make_model(**VARIANTS["mixture"]).save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "out", "--mode", "export", "--pad") == 0
    assert convert(tmp_path / "out", tmp_path / "again", "--mode", "export", "--pad") == 0
    assert_same_tensors(tensors(tmp_path / "again"), tensors(tmp_path / "out"))
    load(tmp_path / "out").save_pretrained(tmp_path / "stacked")
    assert not any(".0.gate_proj" in name for name in tensors(tmp_path / "stacked"))
    assert torch.equal(logits(load(tmp_path / "stacked")), logits(load(tmp_path / "out")))


def test_padded_export_that_lacks_an_expert_is_refused(tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "out", "--mode", "export", "--pad") == 0
    for name in ("gate_proj", "down_proj"):
        (tmp_path / name).mkdir()
        for file in (tmp_path / "out").iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        lost = f"model.layers.1.mlp.experts.4.{name}.weight"
        (tmp_path / name / "model.safetensors.index.json").unlink(missing_ok=True)
        for file in (tmp_path / name).glob("*.safetensors"):
            file.unlink()
        rest = {key: value for key, value in tensors(tmp_path / "out").items() if key != lost}
        save_file(rest, tmp_path / name / "model.safetensors")
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts"):
            load_model(tmp_path / name)
        assert convert(tmp_path / name, tmp_path / "again", "--mode", "export", "--pad") == 2
        assert "model.layers.1.mlp.experts" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_layer_without_experts_is_not_padded(tmp_path, capsys):
    make_model(**VARIANTS["removed_experts_of_one_layer"]).save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "out", "--mode", "export", "--pad") == 2
    assert "all experts of layer 1 have been removed" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def origins(weights, before, layer):
    """Which of the source's experts each expert is."""
    ids = weights.get(f"model.layers.{layer}.mlp.experts.expert_ids")
    router, source_rows = weights[f"model.layers.{layer}.mlp.gate.weight"], source_router(before, layer)
    if ids is None:
        return positions(router, source_rows)
    assert torch.equal(router, source_rows)
    return ids.argsort()


@pytest.mark.parametrize(
    ("name", "router"),
    [("olmoe", "source"), ("mixtral", "two_level"), ("qwen2_moe", "source"), ("qwen3_moe_sparse_step", "two_level")],
)
def test_trim(name, router, tmp_path):
    source, out = make_source(name, tmp_path / "source"), tmp_path / "out"
    assert convert(source, out, *TRIM, "--router", router, *calibration(tmp_path / "rows.jsonl")) == 0
    model, before, weights = load(out), tensors(source), tensors(out)
    config = model.config
    assert config.moe_intermediate_sizes == [12, 20, 28]
    assert config.num_experts_per_tok == load(source).config.num_experts_per_tok
    assert config.num_groups_per_tok == 3
    report = read_report(out)
    layers = {entry["layer"]: entry for entry in report["layers"]}
    for layer in sparse_layers(config):
        rows = origins(weights, before, layer)
        assert_all_neurons(rows, EXPERTS)  # each source expert once
        widths = config.per_layer_config[layer].expert_widths
        for expert, row in enumerate(rows.tolist()):
            original = source_expert(before, layer, row)
            trimmed = routed_expert(weights, config, layer, expert)
            if widths[expert] < EXPERT_WIDTH:
                assert_narrowed(trimmed, original)
            else:
                assert_widened(trimmed, original)
        entry = layers[layer]
        assert 0 < entry["calibration_error"] < entry["calibration_error_without_refit"]
        assert entry["relative_error"] > 1e-5
    assert report["exact"] is False
    assert report["passed"] is True
    assert report["logits"]["kl"] > 0
    assert report["check"]["text"] == "calibration"
    assert report["calibration"]["dataset"] == str(tmp_path / "rows.jsonl")
    assert report["parameters"]["after"]["total"] == model.num_parameters()


@pytest.mark.parametrize("router", ["source", "two_level"])
def test_trim_gives_the_large_widths_to_salient_experts(router, tmp_path):
    """Every row of the calibration set is the same, so that any part of it has the same saliencies."""
    scale = 8.0 ** torch.tensor([0, -3, 2, -2, 1, -1])

    def change(model):
        for layer in model.model.layers:
            layer.mlp.experts.down_proj *= scale[:, None, None]

    source = make_source("mixtral", tmp_path / "source", change=change)
    row, seen = make_ids(1, 47), []
    model, before = load(source), tensors(source)
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], *output[1:])))
    logits(model, row)
    options = calibration(tmp_path / "rows.jsonl", row.repeat(64, 1))
    assert convert(source, tmp_path / "out", *TRIM, "--router", router, *options) == 0
    weights, config = tensors(tmp_path / "out"), AutoConfig.from_pretrained(tmp_path / "out")
    for layer, (x, combine, index) in enumerate(seen):
        x = x.reshape(-1, x.shape[-1])
        sums, counts = torch.zeros(EXPERTS), torch.zeros(EXPERTS)
        for expert in range(EXPERTS):
            gate, up, down = source_expert(before, layer, expert)
            norms = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down).norm(dim=-1)
            chosen = index == expert
            sums[expert], counts[expert] = (combine * chosen).sum(-1) @ norms, chosen.sum()
        assert counts.min() > 0
        order = sums.argsort().tolist()
        # The mean over all tokens and the mean over an expert's own tokens agree on who is salient.
        assert order == (sums / counts).argsort().tolist()
        rows = origins(weights, before, layer).tolist()
        for expert, width in enumerate(config.expert_widths):
            assert width == [12, 20, 28][order.index(rows[expert]) // 2]
