"""
Speed and memory in vLLM of one model of random weights, as it is and padded to one width:
`python -m mohge.training.benchmarks.serving --engine-python PYTHON`.

As it is, the plugin runs the model; padded, vLLM's own experts do, without the plugin. Each has a process that keeps
its model. Both must give the same tokens in float32 before anything is timed; then they alternate, with other prompts
each time. CPU time is the fairer clock where others use the machine, and none on a GPU, for which there is
`--dtype bfloat16 --layers 16 --hidden-size 2048`.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.commands.main import main as mohge
from mohge.info import parameter_counts
from mohge_engines import generate

from .machine import processor


VOCABULARY = 8192
WORK = {
    "decode, batch 1": (1, 32, 32),
    "decode, batch 8": (8, 32, 32),
    "decode, batch 32": (32, 32, 32),
    "prefill, 4 prompts": (4, 512, 1),
}
"""Prompts, tokens of each, and new tokens."""


class Contestant:
    """An engine in a process of its own, with one model."""

    def __init__(self, python: str, folder: Path, environment: dict[str, str], options: argparse.Namespace):
        self.engine = {
            "model": str(folder),
            "dtype": options.dtype,
            "enforce_eager": options.eager,
            "max_model_len": 1024,
            "gpu_memory_utilization": 0.4,  # there are two
        }
        self.process = subprocess.Popen(
            [python, "-I", generate.__file__, "vllm"],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def generate(self, prompts: list[list[int]], new_tokens: int, **engine) -> dict[str, Any]:
        """The engine's answer."""
        request = {"engine": self.engine | engine, "prompts": prompts, "new_tokens": new_tokens, "logprobs": None}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(generate.ANSWER):
                answer = json.loads(line[len(generate.ANSWER) :])
                if "error" in answer:
                    raise SystemExit(f"{self.engine['model']}: {answer['error']}")
                return answer
        raise SystemExit(f"{self.engine['model']}: the engine ended with exit status {self.process.wait()}")


def main() -> None:
    """Parse the arguments, check, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-python", default=os.environ.get("VLLM_PYTHON"), help="(default: $VLLM_PYTHON)")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--widths", default="128,256,512,1024", help="widths of the groups")
    parser.add_argument("--experts-per-group", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--router", choices=["two_level", "top_k"], default="top_k")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folders = _save_models(Path(place), options)
        environment = {"HF_MODULES_CACHE": f"{place}/modules"}
        contestants = {
            "as it is": Contestant(options.engine_python, folders[0], environment, options),
            "padded": Contestant(options.engine_python, folders[1], environment | {"VLLM_PLUGINS": "none"}, options),
        }
        try:
            _compare(contestants, options)
        finally:
            for contestant in contestants.values():
                contestant.process.kill()
                contestant.process.wait()


def _save_models(place: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    torch.manual_seed(0)
    config = MoHGEConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        max_position_embeddings=1024,
        moe_intermediate_sizes=[int(width) for width in options.widths.split(",")],
        num_experts_per_group=options.experts_per_group,
        num_experts_per_tok=options.top_k,
        shared_expert_intermediate_size=0,
        router_type=options.router,
        initializer_range=0.1,  # so that greedy tokens vary, and with them the experts
    )
    folder, padded = place / "model", place / "padded"
    model = MoHGEForCausalLM(config).to(getattr(torch, options.dtype))
    model.save_pretrained(folder)
    counts = parameter_counts(config)
    size = counts.total * model.dtype.itemsize
    print(f"mohge info: {counts.total:,} parameters, {size:,} bytes; {counts.activated:,} activated per token")
    if mohge(["convert", str(folder), str(padded), "--mode", "export", "--pad"]) != 0:
        raise SystemExit(1)
    return folder, padded


def _prompts(count: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (count, length), generator=generator).tolist()


def _compare(contestants: dict[str, Contestant], options: argparse.Namespace) -> None:
    check = [c.generate(_prompts(8, 32, -1), 32, dtype="float32") for c in contestants.values()]
    if check[0]["tokens"] != check[1]["tokens"]:
        raise SystemExit("CHECK FAILED: as it is and padded, the model gives different tokens")
    print("check: the same 256 tokens, float32\n")
    print(f"{_machine()}, vLLM {check[0]['version']}, {options.dtype}, {'eager' if options.eager else 'compiled'}")
    for name, contestant in contestants.items():
        found = contestant.generate(_prompts(1, 32, -1), 1)
        print(f"{name}: parameters {found['parameters']:,} bytes, process {found['process'] / 2**20:,.0f} MiB")
    head = f"{'tokens/s, median (quartiles)':<30}{'as it is':>26}{'padded':>26}"
    print(f"\n{head}{'ratio':>8}{'by CPU time':>13}")
    for name, (count, length, new_tokens) in WORK.items():
        tokens = count * (new_tokens if new_tokens > 1 else length)
        rounds = [
            [engine.generate(_prompts(count, length, repeat), new_tokens) for engine in contestants.values()]
            for repeat in range(options.repeats + 1)
        ][1:]  # the first warms up
        columns = "".join(_spread([tokens / found["seconds"] for found in side]) for side in zip(*rounds, strict=True))
        ratios = [
            statistics.median(padded[clock] / ours[clock] for ours, padded in rounds)
            for clock in ("seconds", "cpu_seconds")
        ]
        print(f"{name:<30}{columns}{ratios[0]:>8.2f}{ratios[1]:>13.2f}", flush=True)


def _spread(values: list[float]) -> str:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{f'{median:.1f} ({low:.1f} to {high:.1f})':>26}"


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
