"""Small checkpoints of every source of `mohge convert`, and what its tests look at."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from model_cases import VOCABULARY, make_ids
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from mohge.commands.main import main


DENSE_WIDTH, EXPERT_WIDTH, EXPERTS = 44, 20, 6
LAYERS = 2
IDS = make_ids(2, 24)  # longer than the context that the scaled rotary embeddings were trained for

BACKBONE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": DENSE_WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SCALED = {"rope_theta": 1000.0, "original_max_position_embeddings": 16, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED}
YARN = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, **SCALED}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
    **SCALED,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}

OLMOE = {"intermediate_size": EXPERT_WIDTH, "num_experts": EXPERTS, "num_experts_per_tok": 2}
MIXTRAL = {"intermediate_size": EXPERT_WIDTH, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
QWEN_MOE = {"moe_intermediate_size": EXPERT_WIDTH, "num_experts": EXPERTS, "num_experts_per_tok": 2}
QWEN2_MOE = {**QWEN_MOE, "shared_expert_intermediate_size": 28}

# transformers' class, fields of its config
MIXTURES = {
    "olmoe": (OlmoeForCausalLM, {**OLMOE, "clip_qkv": 0.7}),
    "olmoe_normalised_tied_biased": (
        OlmoeForCausalLM,
        {**OLMOE, "norm_topk_prob": True, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "olmoe_longrope": (OlmoeForCausalLM, {**OLMOE, "rope_parameters": LONGROPE}),
    "mixtral": (MixtralForCausalLM, {**MIXTRAL, "hidden_size": 48, "head_dim": 16, "num_experts_per_tok": 3}),
    "mixtral_sliding_window": (MixtralForCausalLM, {**MIXTRAL, "sliding_window": 4, "rope_parameters": LINEAR}),
    "qwen2_moe": (Qwen2MoeForCausalLM, {**QWEN2_MOE, "num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "qwen2_moe_mixed_windows_unbiased": (
        Qwen2MoeForCausalLM,
        {
            **QWEN2_MOE,
            **{"norm_topk_prob": True, "qkv_bias": False, "tie_word_embeddings": True},
            **{"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        },
    ),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        {**QWEN_MOE, "head_dim": 16, "norm_topk_prob": True, "rope_parameters": YARN},
    ),
    "qwen3_moe_sparse_step": (
        Qwen3MoeForCausalLM,
        {
            **QWEN_MOE,
            **{"num_hidden_layers": 3, "decoder_sparse_step": 2, "norm_topk_prob": False, "attention_bias": True},
            **{"use_sliding_window": True, "sliding_window": 4},
        },
    ),
}
DENSE = {
    "llama": (LlamaForCausalLM, {}),
    "llama_biased_llama3_rope": (LlamaForCausalLM, {"attention_bias": True, "rope_parameters": LLAMA3}),
    "mistral_sliding_window": (MistralForCausalLM, {"sliding_window": 4, "hidden_size": 48, "head_dim": 16}),
    "qwen2_mixed_windows_tied": (
        Qwen2ForCausalLM,
        {
            **{"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            **{"tie_word_embeddings": True, "num_hidden_layers": 3},
        },
    ),
    "qwen3_dynamic_rope": (
        Qwen3ForCausalLM,
        {"head_dim": 16, "max_position_embeddings": 16, "rope_parameters": DYNAMIC},
    ),
}
SOURCES = {**MIXTURES, **DENSE}

TWO_EACH = ["--experts-per-group", "2"]
DENSE_OPTIONS = ["--widths", "44,51", *TWO_EACH, "--top-k", "2"]
COPY = ["--mode", "copy", *DENSE_OPTIONS]
REGROUP = ["--mode", "regroup", *TWO_EACH]
TRIM = ["--mode", "trim", "--widths", "12,20,28", *TWO_EACH]


def make_source(
    name: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    change: Callable[[torch.nn.Module], None] | None = None,
    **kwargs,
) -> Path:
    """A checkpoint in several shards. Norms are away from 1, biases and routers away from 0, so that each counts."""
    model_class, fields = SOURCES[name]
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**BACKBONE | fields | kwargs)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3)
        model.to(dtype)
        if change is not None:
            change(model)
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def add_tokenizer(folder: Path) -> Path:
    """One word for each token: w0, w1 and so on."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


def write_ids(path: Path, rows: torch.Tensor) -> Path:
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows.tolist()))
    return path


def calibration(path: Path, rows: torch.Tensor | None = None) -> list:
    """Options for calibration on `rows`, by default 64 random ones of 47 tokens."""
    rows = make_ids(64, 47) if rows is None else rows
    options = ["--calibration", write_ids(path, rows), "--calibration-tokens", rows.numel()]
    return [*options, "--calibration-length", rows.shape[1]]


def convert(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


def load(folder: Path) -> torch.nn.Module:
    """The model that transformers' Auto class finds in `folder`, all of whose weights were there."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint, as stored."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not found.keys() & part.keys()
        found |= part
    assert found
    return found


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def read_report(folder: Path) -> dict:
    return json.loads((folder / "conversion_report.json").read_text())


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below `folder` with its content, every folder with None."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# Feed-forwards, as (gate [W, H], up [W, H], down [H, W])


def feed_forward(weights: dict, layer: int, part: str = "mlp") -> tuple[torch.Tensor, ...]:
    names = (f"model.layers.{layer}.{part}.{projection}_proj.weight" for projection in ("gate", "up", "down"))
    return tuple(weights[name] for name in names)


def source_expert(weights: dict, layer: int, expert: int) -> tuple[torch.Tensor, ...]:
    mixtral = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    if f"{mixtral}.w1.weight" in weights:
        return tuple(weights[f"{mixtral}.{name}.weight"] for name in ("w1", "w3", "w2"))
    return feed_forward(weights, layer, f"mlp.experts.{expert}")


def source_router(weights: dict, layer: int) -> torch.Tensor:
    name = f"model.layers.{layer}.mlp.gate.weight"
    return weights[name.replace(".mlp.", ".block_sparse_moe.") if name not in weights else name]


def routed_expert(weights: dict, config, layer: int, expert: int) -> tuple[torch.Tensor, ...]:
    """The expert with id `expert` of a converted model."""
    shape = config.per_layer_config[layer]
    group, slot = shape.expert_groups[expert], shape.expert_slots[expert]
    experts = f"model.layers.{layer}.mlp.experts"
    gate, up = weights[f"{experts}.gate_up_proj_{group}"][slot].chunk(2)
    down = weights[f"{experts}.down_proj_{group}"][slot]
    assert gate.shape[0] == up.shape[0] == down.shape[1] == shape.moe_intermediate_sizes[group]
    return gate, up, down


def sparse_layers(config) -> list[int]:
    return [i for i in range(config.num_hidden_layers) if i not in config.mlp_only_layers]


def positions(rows: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """For each of `rows`, the one row of `source` that equals it bit for bit, -1 where there is none."""
    same = (rows[:, None] == source[None]).all(-1)
    assert same.sum(1).max() <= 1
    return torch.where(same.any(1), same.int().argmax(1), -1)


def assert_all_neurons(kept: torch.Tensor, width: int):
    assert kept.sort().values.tolist() == list(range(width))


def assert_widened(expert: tuple[torch.Tensor, ...], source: tuple[torch.Tensor, ...]):
    """Every neuron of `source`, and beside them only neurons whose column in the down projection is zero."""
    gate, up, down = expert
    idle = (down == 0).all(0)
    kept = positions(gate[~idle], source[0])
    assert_all_neurons(kept, source[0].shape[0])
    assert torch.equal(up[~idle], source[1][kept])
    assert torch.equal(down[:, ~idle], source[2][:, kept])


def assert_narrowed(expert: tuple[torch.Tensor, ...], source: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Gate and up of some neurons of `source`, with another down projection. Returns which neurons."""
    gate, up, down = expert
    kept = positions(gate, source[0])
    assert kept.min() >= 0
    assert kept.unique().numel() == kept.numel() < source[0].shape[0]
    assert torch.equal(up, source[1][kept])
    assert torch.isfinite(down).all()
    assert down.abs().max() > 0
    assert not torch.equal(down, source[2][:, kept])  # refitted
    return kept


def assert_refused(arguments, folder, capsys) -> str:
    """The command exits with 2, changes nothing below `folder` and says why on one line. Returns that line without the
    path of `folder`, which has words of its own."""
    before = tree(folder)
    capsys.readouterr()
    try:
        status = convert(*arguments)
    except SystemExit as error:  # argparse
        status = error.code
    printed = capsys.readouterr()
    assert status == 2
    assert tree(folder) == before
    lines = printed.err.splitlines()
    usage = r"mohge( convert)?: error: " if lines[0].startswith("usage: mohge") else None
    assert re.match(usage or "mohge convert: ", lines[-1])
    assert usage or len(lines) == 1
    return lines[-1].partition(": ")[2].replace(str(folder), "FOLDER")
