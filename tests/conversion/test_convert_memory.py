"""Converting takes the memory of a few layers, not of the model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM


SHAPE = {
    "vocab_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "eos_token_id": None,
}
MIXTURE = {"hidden_size": 512, "intermediate_size": 768, "num_experts": 12, "num_experts_per_tok": 2, **SHAPE}
DENSE = {"hidden_size": 1024, "intermediate_size": 2560, **SHAPE}
SMALL = {"hidden_size": 32, "intermediate_size": 48, **SHAPE}

MEASURE = """
import json
import sys

import torch

from mohge.conversion import convert, load_recipe, make_plan

torch.set_num_threads(1)


def peak():  # getrusage would count the parent, too: what a process was before exec stays in its ru_maxrss
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


small, large, output, options = sys.argv[1:]
before = []
for number, source in enumerate((small, large)):
    before.append(peak())  # the second time with everything loaded and used once
    recipe = load_recipe(None, source=source, output=f"{output}-{number}", **json.loads(options))
    report = convert(make_plan(recipe))
    assert report["passed"], report["failures"]
print(peak() - before[1])
"""


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
            "calibration_tokens": 1024,
            "calibration_length": 32,
        }
    if options["mode"] == "trim":
        options = options | {"experts_per_group": 4}
    command = [sys.executable, "-c", MEASURE, small, sources / source, tmp_path / "out", json.dumps(options)]
    # glibc keeps freed memory of these small layers for itself, up to 32 MB each; of real ones it gives back at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr[-2000:]
    growth = int(finished.stdout.split()[-1])

    written = json.loads((tmp_path / "out-1" / "conversion_report.json").read_text())["bytes_written"]
    files = (sources / source).glob("*.safetensors")
    shards = sorted((tmp_path / "out-1").glob("*.safetensors"))
    largest = max(path.stat().st_size for path in shards)
    layer = max(largest, sum(path.stat().st_size for path in files) / SHAPE["num_hidden_layers"])
    assert written > 5 * layer  # the whole model is far more than what is allowed
    assert growth < 2.5 * layer + 30e6, f"{growth / layer:.2f} layers"
    assert growth > 0.8 * layer  # the measurement sees the work
