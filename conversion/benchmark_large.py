"""
Time and memory of trimming a mixture of 7B parameters: `python -m mohge.conversion.benchmark_large FOLDER`.

FOLDER gets 14 GB of random weights in bfloat16, in the shape of OLMoE-1B-7B (16 layers, 64 experts of width 1024,
top-8, hidden size 2048), unless it has them, and for a while what is made of them. Each conversion is a process of its
own, whose receipt must say that it passed; printed are its CPU seconds, wall clock and largest resident memory.
"""

import argparse
import json
import os
import shutil
import sys
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import OlmoeConfig, OlmoeForCausalLM

from mohge.training.benchmarks.machine import processor


CONVERSIONS = {
    "widths, contribution": ["--widths", "512,1024", "--experts-per-group", "32", "--saliency", "contribution"],
    "keep, contribution": ["--keep", "0.75", "--saliency", "contribution"],
    "keep, gradient": ["--keep", "0.75"],
    "keep, magnitude": ["--keep", "0.75", "--saliency", "magnitude"],
}


def main() -> None:
    """Parse the arguments, make the source, convert it and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--conversions", nargs="+", choices=list(CONVERSIONS), default=list(CONVERSIONS))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens")
    options = parser.parse_args()
    source = options.folder / "source"
    if not source.exists():
        _make_source(source, options.layers)
    text = options.folder / "tokens.jsonl"
    ids = torch.randint(50304, (options.tokens // 512, 512), generator=torch.Generator().manual_seed(0))
    text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()), encoding="utf-8")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{processor()}, {torch.get_num_threads()} threads, {versions}, {options.tokens} tokens, {date.today()}")
    print("| | CPU, s | wall clock, s | most memory, GiB |\n|---|---|---|---|")
    for name in options.conversions:
        print(f"| {name} | {_convert(source, text, options, CONVERSIONS[name])} |", flush=True)


def _make_source(folder: Path, layers: int):
    torch.manual_seed(0)
    config = OlmoeConfig(
        num_hidden_layers=1, intermediate_size=1024, pad_token_id=None, eos_token_id=None, dtype="bfloat16"
    )
    OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="100GB")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {}
    for number in range(layers):
        shard = f"model-{number + 1:05}-of-{layers:05}.safetensors"
        # The same in all layers: how fast they are computed does not depend on it.
        renamed = {name.replace("layers.0.", f"layers.{number}."): tensor for name, tensor in weights.items()}
        renamed = {name: tensor for name, tensor in renamed.items() if name not in index}
        save_file(renamed, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(renamed, shard)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
    config.num_hidden_layers = layers
    config.architectures = ["OlmoeForCausalLM"]
    config.save_pretrained(folder)


def _convert(source: Path, text: Path, options: argparse.Namespace, arguments: list[str]) -> str:
    output = options.folder / "output"
    command = [sys.executable, "-m", "mohge", "convert", source, output, "--mode", "trim", "--calibration", text]
    command += ["--calibration-length", 512, "--calibration-tokens", options.tokens, *arguments]
    began = time.perf_counter()
    process = os.spawnv(os.P_NOWAIT, sys.executable, list(map(str, command)))
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - began
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"error: {' '.join(map(str, command))} failed")
    report = json.loads((output / "conversion_report.json").read_text(encoding="utf-8"))
    if not report["passed"]:
        raise SystemExit(f"error: the conversion did not pass: {report['failures']}")
    shutil.rmtree(output)
    most = usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return f"{usage.ru_utime + usage.ru_stime:.0f} | {seconds:.0f} | {most:.2f}"


if __name__ == "__main__":
    main()
