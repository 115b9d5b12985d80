"""Conversions of briefly trained checkpoints, on which calibration means something."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from mohge import record_routing
from mohge.commands.main import main
from mohge.conversion.comparison import LENGTH, MODES, compare, prepare_text, train_source


CALIBRATION_TOKENS = 16384
SPLIT = {"widths": [8, 16], "experts_per_group": 4, "top_k": 4}
KEPT = 0.85


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def sources(text, tmp_path_factory):
    """Folder of a trained Llama and a trained OLMoE."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("llama", "olmoe"):
        assert train_source(name, text, folder / name) < 4.3  # log(512) = 6.2 before training
    return folder


@pytest.fixture(scope="module")
def converted(text, sources, tmp_path_factory):
    """Folder, source and receipt of each inexact conversion."""
    folder = tmp_path_factory.mktemp("converted")
    made = {}
    trim = {**MODES["trim"], "saliency": "contribution"}
    inexact = {
        **MODES,
        "trim": trim,
        "split": SPLIT,
        "split magnitude": {**SPLIT, "saliency": "magnitude"},
        "split whole": {**SPLIT, "top_k": 8},
        "split kept": {"keep_active": KEPT},
    }
    for name, options in inexact.items():
        mode = name.split()[0]
        source = sources / ("olmoe" if mode == "trim" else "llama")
        arguments = ["convert", str(source), str(folder / name), "--mode", mode, "--calibration-length", str(LENGTH)]
        arguments += ["--calibration", str(text.folder / "calibration.txt")]
        arguments += ["--calibration-tokens", str(CALIBRATION_TOKENS)]
        for option, value in options.items():
            value = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            arguments += ["--" + option.replace("_", "-"), value]
        assert main(arguments) == 0
        made[name] = folder / name, source, json.loads((folder / name / "conversion_report.json").read_text())
    return made


@pytest.fixture(scope="module")
def blocks(text):
    """The calibration tokens, and the eighth that is held out, made anew."""
    tokenizer = AutoTokenizer.from_pretrained(text.folder)
    ids = tokenizer((text.folder / "calibration.txt").read_text(encoding="utf-8"))["input_ids"]
    all_blocks = torch.tensor(ids[:CALIBRATION_TOKENS]).view(-1, LENGTH)
    return all_blocks.split([7 * len(all_blocks) // 8, len(all_blocks) // 8])


@torch.no_grad()
def logits_of(folder, ids: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits


@torch.no_grad()
def seen_by_experts(model, ids: torch.Tensor, layer: int) -> tuple[torch.Tensor, ...]:
    """Input, ids and combine weights of the experts of a layer of OLMoE."""
    seen = []
    hook = model.model.layers[layer].mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(ids)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("mode", ["trim", "copy", "split"])
def test_refit_lowers_the_calibration_error(mode, converted):
    report = converted[mode][2]
    assert not report["exact"]
    for layer in report["layers"]:
        assert 0 < layer["calibration_error"] < 0.97 * layer["calibration_error_without_refit"] < 1


@pytest.mark.parametrize("mode", ["trim", "copy", "residual", "split"])
def test_receipt_is_what_the_loaded_models_show(mode, converted, blocks):
    folder, source, report = converted[mode]
    held_out = blocks[1]
    before, after = logits_of(source, held_out), logits_of(folder, held_out)
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    expected = {
        "kl": F.kl_div(log_q, log_p, log_target=True, reduction="sum").item() / held_out.numel(),
        "top1_agreement": (before.argmax(-1) == after.argmax(-1)).float().mean().item(),
        "relative_error_max": ((after - before).norm(dim=-1) / before.norm(dim=-1)).max().item(),
    }
    for name, logits in (("perplexity_before", before), ("perplexity_after", after)):
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten())
        expected[name] = math.exp(loss.item())
    assert report["check"] == {"tokens": held_out.numel(), "text": "calibration"}
    assert report["calibration"]["tokens"] == blocks[0].numel()
    for name, value in expected.items():
        assert report["logits"][name] == pytest.approx(value, rel=2e-3, abs=1e-6), name
    assert report["logits"]["perplexity_before"] < 100  # the source has learned something


@pytest.mark.parametrize("mode", ["trim", "split", "split kept"])
def test_perplexity_survives(mode, converted):
    logits = converted[mode][2]["logits"]
    assert logits["perplexity_after"] < 1.15 * logits["perplexity_before"]
    assert logits["kl"] > 1e-4


def test_salient_experts_get_the_large_widths(converted, blocks):
    """Summed contribution, computed here from the whole source at once."""
    folder, source, _ = converted["trim"]
    original = AutoModelForCausalLM.from_pretrained(source).eval()
    result = AutoModelForCausalLM.from_pretrained(folder).eval()
    for layer in range(len(original.model.layers)):
        hidden, index, weights = seen_by_experts(original, blocks[0], layer)
        experts = original.model.layers[layer].mlp.experts
        saliency = []
        for expert in range(experts.num_experts):
            token, position = (index == expert).nonzero(as_tuple=True)
            gate, up = F.linear(hidden[token], experts.gate_up_proj[expert]).chunk(2, -1)
            summed = weights[token, position] @ (F.silu(gate) * up).abs()
            saliency.append((summed @ experts.down_proj[expert].norm(dim=0)).item())
        places = result.model.layers[layer].mlp.experts.expert_ids.argsort().tolist()
        assert sorted(places) == list(range(experts.num_experts))
        by_width = sorted(zip(result.config.expert_widths, places, strict=True))
        grouped = [sorted(saliency[place] for _, place in by_width[i : i + 2]) for i in range(0, 8, 2)]
        assert grouped == [sorted(saliency)[i : i + 2] for i in range(0, 8, 2)]


def test_trimmed_experts_keep_their_important_neurons(converted, blocks):
    folder, source, report = converted["trim"]
    original = AutoModelForCausalLM.from_pretrained(source).eval()
    result = AutoModelForCausalLM.from_pretrained(folder).eval()
    hidden, index, weights = seen_by_experts(original, blocks[0], 0)
    theirs, ours = original.model.layers[0].mlp, result.model.layers[0].mlp
    whole = without = refitted = 0.0
    for number, origin in enumerate(ours.experts.expert_ids.argsort().tolist()):
        gate, up = theirs.experts.gate_up_proj[origin].chunk(2)
        down = theirs.experts.down_proj[origin]
        token, position = (index == origin).nonzero(as_tuple=True)
        scale = weights[token, position, None]
        activations = F.silu(hidden[token] @ gate.T) * (hidden[token] @ up.T)
        group, slot = result.config.expert_groups[number], result.config.expert_slots[number]
        new_gate, new_up = ours.experts.groups()[group][0][slot].chunk(2)
        new_down = ours.experts.groups()[group][1][slot]
        width = len(new_gate)
        output = scale * (activations @ down.T)
        whole += output.square().sum().item()
        if width >= len(gate):
            assert torch.equal(new_gate[: len(gate)], gate)
            assert not new_down[:, len(gate) :].any()
            continue
        importance = (scale * activations).abs().sum(0) * down.norm(dim=0)
        kept = importance.topk(width).indices.sort().values
        assert torch.equal(new_gate, gate[kept])
        assert torch.equal(new_up, up[kept])
        without += (output - scale * (activations[:, kept] @ down[:, kept].T)).square().sum().item()
        refitted += (output - scale * (activations[:, kept] @ new_down.T)).square().sum().item()
    layer = report["layers"][0]
    assert layer["calibration_error_without_refit"] == pytest.approx(math.sqrt(without / whole), rel=1e-3)
    assert layer["calibration_error"] == pytest.approx(math.sqrt(refitted / whole), rel=1e-3)


@torch.no_grad()
def places_and_choices(result, original, layer: int, ids: torch.Tensor):
    """Which neurons of the source are the shared expert's and each routed expert's, and the activations and chosen
    experts [T, E] of tokens."""
    theirs, ours, config = original.model.layers[layer].mlp, result.model.layers[layer].mlp, result.config
    config = config.per_layer_config[layer]
    rows = [ours.shared_expert.gate_proj.weight]
    for group, slot in zip(config.expert_groups, config.expert_slots, strict=True):
        name = f"gate_up_proj_{group}"
        rows.append(getattr(ours.experts, name)[slot].chunk(2)[0] if hasattr(ours.experts, name) else rows[0][:0])
    places = [
        torch.tensor([(theirs.gate_proj.weight == row).all(1).nonzero().item() for row in r]).long() for r in rows
    ]
    seen = []
    hooks = [
        theirs.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1))),
        theirs.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1))),
    ]
    original(ids)
    for hook in hooks:
        hook.remove()
    chosen = torch.zeros(len(seen[0]), config.num_experts).scatter_(1, ours.gate(seen[0]).index, 1.0)
    return places, seen[1], chosen


def kept_need(need_TD, shared, experts, chosen_TE) -> float:
    """How much of what neurons add to the output is there, of those that a token uses."""
    kept = need_TD[:, shared].sum() + sum(
        (need_TD[:, e].sum(1) * chosen_TE[:, i]).sum() for i, e in enumerate(experts)
    )
    return (kept / need_TD.sum()).item()


@pytest.mark.parametrize("name", ["split", "split kept", "split magnitude"])
def test_split_keeps_every_neuron_and_what_tokens_need(name, converted, blocks):
    """On text that calibration did not see: less is missed than with other neurons in the shared expert, or with the
    routed ones dealt out to the experts at random."""
    folder, source, _ = converted[name]
    original = AutoModelForCausalLM.from_pretrained(source).eval()
    result = AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        (shared, *experts), activations, chosen = places_and_choices(result, original, layer, blocks[1])
        routed = torch.cat(experts)
        assert sorted([*shared.tolist(), *routed.tolist()]) == list(range(original.config.intermediate_size))
        need = activations.square() * original.model.layers[layer].mlp.down_proj.weight.square().sum(0)
        missed = 1 - kept_need(need, shared, experts, chosen)
        sizes = [len(shared), *map(len, experts)]
        dealt = routed[torch.randperm(len(routed), generator=generator)].split(sizes[1:])
        assert missed < 0.95 * (1 - kept_need(need, shared, dealt, chosen))
        drawn = torch.randperm(len(shared) + len(routed), generator=generator).split(sizes)
        assert missed < 0.7 * (1 - kept_need(need, drawn[0], drawn[1:], chosen))


def test_split_with_all_experts_is_the_source(converted):
    logits = converted["split whole"][2]["logits"]
    assert logits["relative_error_median"] < 1e-2
    assert logits["kl"] < 1e-4


def test_split_uses_what_it_was_asked_for(converted, blocks):
    """As routed, the router's own rows included; and tokens differ in it."""
    folder, source, report = converted["split kept"]
    original = AutoModelForCausalLM.from_pretrained(source).eval()
    result = AutoModelForCausalLM.from_pretrained(folder).eval()
    width, hidden_size = original.config.intermediate_size, original.config.hidden_size
    activated = original.num_parameters()
    for layer in range(2):
        (shared, *experts), _, chosen = places_and_choices(result, original, layer, blocks[1])
        used = len(shared) + chosen @ torch.tensor([float(len(expert)) for expert in experts])
        assert used.std() > 1
        activated += hidden_size * (chosen.shape[1] + 3 * (used.mean().item() - width))
    before, after = (report["parameters"][when] for when in ("before", "after"))
    assert activated / before["activated"] == pytest.approx(KEPT, abs=0.01)
    routers = sum(p.numel() for router in result.routers for p in router.parameters())
    assert after["total"] == before["total"] + routers


@pytest.mark.parametrize("mode", ["copy", "residual"])
@torch.no_grad()
def test_hard_tokens_start_at_wider_groups(mode, converted, text):
    """On text that calibration did not see."""
    folder, source, _ = converted[mode]
    ids = torch.tensor(text.held_out["input_ids"][:64])
    logits = logits_of(source, ids)[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    easy, hard = loss <= loss.quantile(0.25), loss >= loss.quantile(0.75)
    result = AutoModelForCausalLM.from_pretrained(folder).eval()
    with record_routing() as routing:
        result(ids)
    widths = torch.tensor(result.config.expert_widths, dtype=torch.float32)
    gains = []
    for index in (layer.index for layer in routing):
        width = widths[index].mean(-1).view(ids.shape)[:, :-1].flatten()
        gains.append((width[hard].mean() / width[easy].mean()).item())
        assert index.flatten().bincount(minlength=len(widths)).min() > 0  # no expert starts dead
    assert min(gains) > 1
    assert max(gains) > 1.015


@pytest.mark.parametrize("mode", MODES)
def test_fine_tuning_beats_training_from_scratch(mode, converted, text):
    losses = compare(converted[mode][0], text, range(1), steps=120)
    (ours,), (scratch,) = losses["from_conversion"], losses["from_scratch"]
    assert ours < scratch - 0.1
    assert ours < losses["converted"]
    assert scratch < 5  # from scratch something is learned, too
