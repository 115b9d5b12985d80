"""
What quantisation costs a model in llama.cpp: `python -m mohge.training.benchmarks.gguf FOLDER GGUF --text TEXT`.

GGUF is the unquantised file that llama.cpp's `convert_hf_to_gguf.py` made of what FOLDER was exported to. It is
checked against the model in FOLDER first; then llama.cpp quantises it, and each file is compared with it. Needs
`llama-cpp-python` beside this package.
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import torch
import torch.nn.functional as F
import transformers

from mohge.conversion.evidence import blocks
from mohge.loading import load_model

from .machine import processor


TOLERANCE = 0.01
"""Nats per token between the model and the unquantised file, which may be in half precision."""
FORMATS = ("Q8_0", "Q4_K_M")


def main() -> int:
    """Parse the arguments, check, quantise, compare, print and write the rows; 1 if the check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="folder of the saved model")
    parser.add_argument("gguf", metavar="GGUF", type=Path, help="its unquantised file")
    parser.add_argument("--text", type=Path, required=True, help="file of held-out text")
    parser.add_argument("--blocks", type=int, default=4, help="of 512 tokens (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="JSON lines to add the rows to")
    options = parser.parse_args()
    try:
        if not options.gguf.is_file():
            raise FileNotFoundError(f"{options.gguf} is no file: name the unquantised .gguf file")
        ids = blocks(options.text, options.folder, options.blocks)
        model = load_model(options.folder, dtype=torch.float32).eval()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with torch.no_grad():
        ours = [model(block[None]).logits[0].log_softmax(-1) for block in ids]
    del model
    unquantised = _evaluate(options.gguf, ids)
    rows = [_row("mohge, float32", None, ids, ours, ours), _row("unquantised", options.gguf, ids, unquantised, ours)]
    if not rows[1]["kl"] < TOLERANCE:
        print(
            f"CHECK FAILED: {options.gguf} is another model than {options.folder}: KL {rows[1]['kl']:.3g}, perplexity "
            f"{rows[1]['perplexity']:.4f} and {rows[0]['perplexity']:.4f}"
        )
        return 1
    with tempfile.TemporaryDirectory() as place:
        for name in FORMATS:
            file = Path(place) / f"{name}.gguf"
            _quantise(options.gguf, file, name)
            rows.append(_row(name, file, ids, _evaluate(file, ids), unquantised))
    print(f"{'file':<16}{'MB':>8}{'KL, nats':>11}{'top-1':>8}{'perplexity':>12}")
    for row in rows:
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.0f}"
        print(f"{row['file']:<16}{size:>8}{row['kl']:>11.2g}{row['top_1']:>8.1%}{row['perplexity']:>12.3f}")
    if options.results:
        facts = {
            "model": Path(options.folder).resolve().name,
            "text": options.text.name,
            "tokens": ids.numel(),
            "machine": f"{processor()}, {os.cpu_count()} cores",
            "llama-cpp-python": llama_cpp.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "date": datetime.date.today().isoformat(),
        }
        with options.results.open("a", encoding="utf-8") as results:
            results.writelines(f"{json.dumps(row | facts)}\n" for row in rows)
    return 0


def _quantise(file: Path, quantised: Path, name: str) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    if llama_cpp.llama_model_quantize(os.fsencode(file), os.fsencode(quantised), parameters) != 0:
        raise SystemExit(f"llama.cpp cannot quantise {file} to {name}: see above")


def _evaluate(file: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """Log-probabilities of each block, [S, V]."""
    exact = llama_cpp.GGML_TYPE_F32  # keys and values, by default in 16 bits
    llm = llama_cpp.Llama(str(file), n_ctx=ids.shape[1], logits_all=True, verbose=False, type_k=exact, type_v=exact)
    found = []
    for block in ids.tolist():
        llm.reset()
        llm.eval(block)
        found.append(torch.tensor(llm.scores[: len(block)]).log_softmax(-1))
    llm.close()
    return found


def _row(
    name: str, file: Path | None, ids: torch.Tensor, found: list[torch.Tensor], reference: list[torch.Tensor]
) -> dict[str, Any]:
    loss = torch.stack([F.nll_loss(block[:-1], own[1:]) for block, own in zip(found, ids, strict=True)]).mean()
    pairs = [*zip(found, reference, strict=True)]
    kl = torch.stack([F.kl_div(block, other, reduction="batchmean", log_target=True) for block, other in pairs])
    same = torch.stack([(block.argmax(-1) == other.argmax(-1)).float().mean() for block, other in pairs])
    return {
        "file": name,
        "bytes": file and file.stat().st_size,
        "kl": float(kl.mean()),
        "top_1": float(same.mean()),
        "perplexity": float(loss.exp()),
    }


if __name__ == "__main__":
    sys.exit(main())
