"""
Fine-tuning from a conversion against training the same shape from scratch: `python -m mohge.conversion.comparison`.

Trains a small Llama and a small OLMoE on the standard library's text, converts them, and fine-tunes each result and a
model of its shape with random weights on the same data in the same order. Prints the table of `conversion/README.md`.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from mohge.training.data.corpus import standard_library_texts, token_blocks, train_tokenizer
from mohge.training.loop.trainer import MoHGETrainer

from .pipeline import convert
from .plan import make_plan
from .recipe import load_recipe


LENGTH, BATCH = 64, 8
_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2 * LENGTH,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
_SOURCES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE, intermediate_size=160)),
    "olmoe": lambda: OlmoeForCausalLM(
        OlmoeConfig(**_SHAPE, intermediate_size=48, num_experts=8, num_experts_per_tok=2, output_router_logits=True)
    ),
}
MODES = {
    "trim": {"widths": [16, 32, 48, 64], "experts_per_group": 2},
    "copy": {"widths": [96, 128, 160, 192], "experts_per_group": 2, "top_k": 2, "top_groups": 2},
    "residual": {"widths": [32, 64, 96], "experts_per_group": 2, "top_k": 2, "top_groups": 2},
}
"""The conversions compared, with their options."""


class Text(NamedTuple):
    """The standard library's text."""

    training: Dataset
    held_out: Dataset
    folder: Path
    """Holds the tokenizer, and the training text as calibration.txt."""


def prepare_text(folder: Path) -> Text:
    """Tokenise the text, and write tokenizer and calibration text to `folder`."""
    training, held_out = standard_library_texts(1_000_000)
    tokenizer = train_tokenizer(training, _SHAPE["vocab_size"])
    tokenizer.save_pretrained(folder)
    (folder / "calibration.txt").write_text("\n".join(training), encoding="utf-8")
    training_set, held_out_set = (token_blocks(texts, tokenizer, LENGTH) for texts in (training, held_out))
    return Text(training_set, held_out_set.select(range(min(200, len(held_out_set)))), folder)


def train(model: PreTrainedModel, text: Text, steps: int, learning_rate: float = 3e-3, seed: int = 0) -> float:
    """Train for `steps` of `BATCH` sequences; the held-out language-model loss, in nats per token."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=4 * BATCH,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            seed=seed,
            use_cpu=True,
            disable_tqdm=True,
            prediction_loss_only=True,
        )
        trainer_class = MoHGETrainer if model.config.model_type == "mohge" else Trainer
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=text.training,
            eval_dataset=text.held_out,
            data_collator=default_data_collator,
        )
        if steps:
            trainer.train()
        model.config.output_router_logits = False  # or OLMoE's evaluation loss has its router loss in it
        return trainer.evaluate()["eval_loss"]


def train_source(architecture: str, text: Text, folder: Path, steps: int = 400) -> float:
    """Train a small source, `"llama"` or `"olmoe"`, and save it with its tokenizer; its held-out loss."""
    set_seed(0)
    model = _SOURCES[architecture]()
    loss = train(model, text, steps)
    model.save_pretrained(folder)
    for file in text.folder.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return loss


def convert_source(mode: str, source: Path, output: Path, text: Text) -> dict:
    """Convert `source` as `MODES` says, calibrated on the training text; the receipt."""
    options = MODES[mode] | {"calibration": str(text.folder / "calibration.txt"), "calibration_tokens": 16384}
    recipe = load_recipe(None, source=str(source), output=str(output), mode=mode, calibration_length=LENGTH, **options)
    return convert(make_plan(recipe))


def compare(converted: Path, text: Text, seeds: range, steps: int = 200) -> dict:
    """
    Fine-tune a conversion and a model of its shape with random weights.

    Returns:
        `dict`: held-out losses `"converted"` (before fine-tuning), and `"from_conversion"` and `"from_scratch"`, a
        list each, one for each seed.
    """
    losses = {"from_conversion": [], "from_scratch": []}
    losses["converted"] = train(AutoModelForCausalLM.from_pretrained(converted), text, 0)
    for seed in seeds:
        set_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(converted)
        losses["from_conversion"].append(train(model, text, steps, 1e-3, seed))
        set_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(converted), dtype=torch.float32)
        losses["from_scratch"].append(train(model, text, steps, 3e-3, seed))
    return losses


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print("| mode | parameters | used as routed | source | after conversion | fine-tuned | from scratch |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = prepare_text(folder)
        sources = {name: train_source(name, text, folder / name) for name in _SOURCES}
        for mode in MODES:
            name = "olmoe" if mode == "trim" else "llama"
            counts = convert_source(mode, folder / name, folder / mode, text)["parameters"]
            losses = compare(folder / mode, text, range(options.seeds), options.steps)
            axes = ("total", "activated_as_routed")
            cells = [f"{counts['before'][axis]:,} -> {counts['after'][axis]:,}" for axis in axes]
            cells += [f"{sources[name]:.3f} ({name})", f"{losses['converted']:.3f}"]
            for kind in ("from_conversion", "from_scratch"):
                spread = statistics.stdev(losses[kind]) if options.seeds > 1 else 0.0
                cells.append(f"{statistics.mean(losses[kind]):.3f} +- {spread:.3f}")
            print(f"| {mode} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
