"""Converting takes the memory of a few layers, not of the model."""

import ctypes
import json
import sys
from pathlib import Path

import pytest
import torch
from parallel_training_runs import Ranks
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

from mohge.conversion import convert, load_recipe, make_plan


SHAPE = {
    "vocab_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "eos_token_id": None,
}
MIXTURE = {"hidden_size": 512, "intermediate_size": 768, "num_experts": 12, "num_experts_per_tok": 2, **SHAPE}
DENSE = {**SHAPE, "hidden_size": 1024, "intermediate_size": 2560, "num_hidden_layers": 6}
SMALL = {"hidden_size": 32, "intermediate_size": 48, **SHAPE}

# glibc keeps freed memory of these small layers for itself, up to 32 MB each; of real ones it gives back at once.
M_MMAP_THRESHOLD = -3


def peak() -> int:  # getrusage would count the parent, too: what a process was before stays in its ru_maxrss
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def measure_growth(small: Path, large: Path, output: Path, options: dict):
    """Leave in a file how much more memory it takes to convert `large` after `small`."""
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20) == 1
    for number, source in enumerate((small, large)):
        before = peak()  # the second time with everything loaded and used once
        recipe = load_recipe(None, source=str(source), output=f"{output}-{number}", **options)
        report = convert(make_plan(recipe))
        assert report["passed"], report["failures"]
    output.write_text(str(peak() - before))


def save(model, path):
    model.save_pretrained(path, max_shard_size="40MB")
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    ids = torch.randint(64, (40, 33), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "ids.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in ids))
    small_mixture = {**SMALL, "num_experts": 12, "num_experts_per_tok": 2}
    save(OlmoeForCausalLM(OlmoeConfig(**small_mixture)), folder / "small_mixture")
    save(LlamaForCausalLM(LlamaConfig(**SMALL)), folder / "small_dense")
    mixture = OlmoeForCausalLM(OlmoeConfig(**MIXTURE))
    save(mixture, folder / "mixture")
    save(mixture.bfloat16(), folder / "mixture_bf16")
    save(LlamaForCausalLM(LlamaConfig(**DENSE)), folder / "dense")
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("mixture", {"mode": "regroup", "experts_per_group": 4}),
        ("mixture_bf16", {"mode": "regroup", "experts_per_group": 4}),
        ("mixture", {"mode": "trim", "widths": [256, 512, 768]}),
        ("dense", {"mode": "residual", "widths": [256, 512], "experts_per_group": 1, "top_k": 1}),
    ],
    ids=["regroup", "regroup_bf16", "trim", "residual"],
)
def test_peak_is_below_two_and_a_half_layers(source, options, sources, tmp_path):
    small = sources / ("small_dense" if source == "dense" else "small_mixture")
    if options["mode"] in ("trim", "residual"):
        options = options | {
            "calibration": str(sources / "ids.jsonl"),
            "calibration_tokens": 512,
            "calibration_length": 32,
        }
    if options["mode"] == "trim":
        options = options | {"experts_per_group": 4}
    output = tmp_path / "out"
    Ranks(1, tmp_path / "logs", measure_growth, small, sources / source, output, options).succeed()
    growth = int(output.read_text())

    written = json.loads((tmp_path / "out-1" / "conversion_report.json").read_text())["bytes_written"]
    files = (sources / source).glob("*.safetensors")
    shards = sorted((tmp_path / "out-1").glob("*.safetensors"))
    largest = max(path.stat().st_size for path in shards)
    layers = (DENSE if source == "dense" else MIXTURE)["num_hidden_layers"]
    layer = max(largest, sum(path.stat().st_size for path in files) / layers)
    assert written > 5 * layer  # the whole model is far more than what is allowed
    sums = 8 * MIXTURE["num_experts"] * MIXTURE["intermediate_size"] ** 2 if options["mode"] == "trim" else 0
    assert growth < 2.5 * layer + sums + 30e6, f"{growth / layer:.2f} layers"
    assert growth > 0.8 * layer  # the measurement sees the work
