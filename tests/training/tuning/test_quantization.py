"""Experts in 8 bits: what is quantised, saved, read back, and trained beside."""

import pytest
import torch
from finetune_cases import finetune, log, make_workplace
from model_cases import MIXTURE
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.commands.main import main
from mohge.training.tuning.quantization import expert_quantization


SHAPE = {"hidden_size": 64, "moe_intermediate_sizes": [32, 64, 96]}
KINDS = ("int8", "float8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model in bfloat16, trained for a moment, so that its logits mean something."""
    folder = make_workplace(tmp_path_factory.mktemp("quantization"), **SHAPE)
    assert finetune(folder, "trained", max_steps=20) == 0
    model = MoHGEForCausalLM.from_pretrained(folder / "trained", dtype=torch.bfloat16)
    model.save_pretrained(folder / "trained")
    return folder


def quantize(place, name: str, kind: str, **flags) -> MoHGEForCausalLM:
    assert finetune(place, name, data=None, model="trained", quantize=kind, **flags) == 0
    return AutoModelForCausalLM.from_pretrained(place / name).eval()


def load(place, **options) -> MoHGEForCausalLM:
    return MoHGEForCausalLM.from_pretrained(place / "trained", **options).eval()


def quantized_names(model: torch.nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if is_traceable_wrapper_subclass(weight)}


def dequantized(model: MoHGEForCausalLM) -> MoHGEForCausalLM:
    """A plain model with the values that the quantised weights stand for."""
    plain = MoHGEForCausalLM(MoHGEConfig.from_dict({**model.config.to_dict(), "quantization_config": None}))
    weights = model.state_dict()
    plain.load_state_dict(
        {name: w.dequantize() if is_traceable_wrapper_subclass(w) else w for name, w in weights.items()}
    )
    return plain.to(model.dtype).eval()


def ids(rows: int = 4) -> torch.Tensor:
    return torch.randint(1, 300, (rows, 24), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(ids()).logits.float()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_smaller_close_and_read_back_as_it_was(place, kind, capsys):
    reloaded = quantize(place, f"read_back_{kind}", kind)
    before, after = (int(part.split()[0].replace(",", "")) for part in _line(capsys, "weights: ").split(" -> "))
    experts = 2 * sum(w.numel() for name, w in reloaded.named_parameters() if ".experts." in name)
    assert before - after > 0.4 * experts  # a byte for each weight, less scales and names
    original = load(place)
    written = load(place, quantization_config=expert_quantization(original.config, kind))
    assert torch.equal(logits(reloaded), logits(written))
    probabilities = logits(original).log_softmax(-1)
    divergence = (
        torch.nn.functional.kl_div(logits(reloaded).log_softmax(-1), probabilities, log_target=True, reduction="sum")
        / ids().numel()
    )
    assert 0 < divergence < 0.01


def _line(capsys, start: str) -> str:
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(start)]
    return line.removeprefix(start)


def test_experts_alone_are_quantised_and_narrow_groups_are_kept(place):
    model = quantize(place, "kept", "int8", quantize_min_width=64)
    assert quantized_names(model) == {
        f"model.layers.{layer}.mlp.experts.{projection}_{group}"
        for layer in range(2)
        for projection in ("gate_up_proj", "down_proj")
        for group in (1, 2)
    }
    original = dict(load(place).named_parameters())
    for name, weight in model.named_parameters():
        if name not in quantized_names(model):
            assert torch.equal(weight, original[name]), name


def test_removed_experts_are_not_quantised(tmp_path):
    make_workplace(tmp_path, **SHAPE | {"moe_intermediate_sizes": [0, 64, 96]})
    assert finetune(tmp_path, "q", data=None, quantize="int8") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    names = {name.rsplit(".", 1)[1] for name in quantized_names(model)}
    assert names == {f"{projection}_{group}" for projection in ("gate_up_proj", "down_proj") for group in (1, 2)}
    torch.testing.assert_close(logits(model), logits(dequantized(model)))
    removed = model.config.to_dict() | {"moe_intermediate_sizes": [0, 0, 0], "quantization_config": None}
    with pytest.raises(ValueError, match="no expert is that wide"):
        expert_quantization(MoHGEConfig.from_dict(removed), "int8")


@pytest.mark.parametrize("overrides", [{}, MIXTURE], ids=["own router", "mixture"])
def test_groups_are_chosen_by_their_width_in_each_layer(overrides, tmp_path):
    widths = {"per_layer_config": {1: {"moe_intermediate_sizes": [64, 96, 128]}}}
    make_workplace(tmp_path, **SHAPE, **widths, **overrides)
    assert finetune(tmp_path, "q", data=None, quantize="int8", quantize_min_width=96) == 0
    names = quantized_names(AutoModelForCausalLM.from_pretrained(tmp_path / "q"))
    assert {name.split("layers.")[1] for name in names} == {
        f"{layer}.mlp.experts.{projection}_{group}"
        for layer, group in ((0, 2), (1, 1), (1, 2))
        for projection in ("gate_up_proj", "down_proj")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_and_its_gradients_are_those_of_the_dequantised_weights(place, kind):
    original = load(place, dtype=torch.float32)
    quantized = load(place, dtype=torch.float32, quantization_config=expert_quantization(original.config, kind))
    results = []
    for model in (quantized, dequantized(quantized)):
        embedded = model.get_input_embeddings()(ids()).detach().requires_grad_()
        output = model(inputs_embeds=embedded).logits
        output.square().mean().backward()
        results.append((output, embedded.grad, model.model.layers[0].self_attn.q_proj.weight.grad))
    for ours, wanted in zip(*results, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5 * wanted.detach().abs().max().item())


def test_no_dequantised_weight_outlives_its_group(place):
    model = load(place, quantization_config=expert_quantization(load(place).config, "int8"))
    stacks = {tuple(w.shape) for name, w in model.named_parameters() if name in quantized_names(model)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(ids()).logits.sum().backward()
    plain = [t for t in kept if not is_traceable_wrapper_subclass(t)]
    assert len(plain) > 50
    assert not [t.shape for t in plain if {tuple(t.shape), tuple(t.mT.shape) if t.dim() > 1 else ()} & stacks]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_attention_are_trained_beside_quantised_experts_and_merged(place, kind):
    run = f"beside_{kind}"
    flags = {"model": "trained", "quantize": kind, "lora_rank": 4, "lora_targets": "attention"}
    assert finetune(place, run, **flags, merge=place / f"{run}_merged", max_steps=10, dtype="float32") == 0
    losses = [entry["lm_loss"] for entry in log(place / run)]
    assert sum(losses[5:]) < sum(losses[:5])
    original, merged = load(place), AutoModelForCausalLM.from_pretrained(place / f"{run}_merged")
    for name, weight in merged.named_parameters():
        changed = not torch.equal(weight, dict(original.named_parameters())[name].to(weight.dtype))
        assert changed == ("self_attn" in name), name


def test_adapters_are_trained_on_a_model_that_was_saved_quantised(place, capsys, new_warnings, caplog):
    quantize(place, "saved", "int8")
    flags = {"model": "saved", "lora_rank": 4, "lora_targets": "attention"}
    assert finetune(place, "on_saved", **flags, max_steps=2) == 0
    assert "experts_implementation" not in caplog.text
    on_saved = place / "on_saved"
    assert f'next: mohge generate {on_saved} "PROMPT"' in capsys.readouterr().out
    assert main(["generate", str(on_saved), "one", "--max-new-tokens=2"]) == 0
    assert finetune(place, "refused", **flags, merge=place / "never") == 2
    assert "saved quantised, and cannot take an adapter in" in capsys.readouterr().err
    assert finetune(place, "refused", data=None, model="on_saved", merge=place / "never") == 2
    assert not (place / "never").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "can neither be trained nor have adapters"),
        ({"lora_rank": 4}, "can neither be trained nor have adapters"),
        ({"lora_rank": 4, "lora_targets": "experts"}, "can neither be trained nor have adapters"),
        ({"data": None, "quantize": "int4"}, "quantize"),
        ({"data": None, "quantize_min_width": 97}, "no expert is that wide"),
        ({"data": None, "merge": "never"}, "one of `merge` (of an adapter) and `quantize`"),
    ],
)
def test_what_cannot_be_quantised_is_refused_in_one_line(place, flags, message, capsys):
    assert finetune(place, "refused", **{"model": "trained", "quantize": "int8", **flags}) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (place / "refused").exists()


def test_a_quantised_model_is_not_quantised_again(place, capsys):
    quantize(place, "once", "int8")
    assert finetune(place, "twice", data=None, model="once", quantize="int8") == 2
    assert "quantised already" in capsys.readouterr().err
    assert not (place / "twice").exists()
