"""
Fine-tuning of all weights or of adapters, on text or on conversations: `mohge finetune RECIPE`.

Without `datasets` nothing is trained: `--model ADAPTER --merge FOLDER` merges a trained adapter into its base model,
and `--model MODEL --quantize int8 --output_dir FOLDER` quantises a model's experts.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.commands.flags import FinetuneArguments
from mohge.commands.main import run_process
from mohge.conversion.tokenizer import required_tokenizer
from mohge.loading import load_model
from mohge.model_cards.card import adapter_card
from mohge.model_cards.shipped import load_config
from mohge.model_cards.writing import write_file
from mohge.training.data.conversations import check_template, has_conversations, read_conversations
from mohge.training.data.packing import check_sequence_length, collate_packed, packed_blocks, read_rows
from mohge.training.data.sources import absolute, parse_sources
from mohge.training.loop.trainer import MoHGETrainer
from mohge.training.tuning.distillation import DistillationLoss, load_teacher
from mohge.training.tuning.lora import ignore_deprecation, known_patterns, lora_config
from mohge.training.tuning.merge import ADAPTER_CONFIG, check_merge, is_quantized, merge_adapter

from .recipe import (
    held_out_sources,
    is_finished,
    one_line_errors,
    open_run,
    parse_recipe,
    print_stopped,
    print_written,
    sole_run,
    train_and_save,
)


def run(options: argparse.Namespace) -> int:
    """
    The command `mohge finetune`.

    Returns:
        `int`: Exit status: 0, or 1 if the run was stopped and can go on, or the merged or quantised model differs.

    Raises:
        ValueError: if arguments contradict each other, the model or the data.
        OSError: if a file cannot be read, or a folder to create exists.
    """
    ignore_deprecation()
    (own, training), given = parse_recipe(
        "mohge finetune", __doc__, [FinetuneArguments, TrainingArguments], options.arguments
    )
    if own.model is None:
        raise ValueError("`model` is missing: name a model folder or a Hub id")
    if own.datasets is None:
        return _without_training(own, training)
    if (Path(own.model) / ADAPTER_CONFIG).exists():
        raise ValueError(f"{own.model} is an adapter: merge it first, with --model {own.model} --merge FOLDER")
    with sole_run(training):
        return _finetune(own, training, given)


def _finetune(own: FinetuneArguments, training: TrainingArguments, given: dict[str, Any]) -> int:
    config = load_config(own.model)
    adapters = _adapters(own, config, training.output_dir)
    if own.merge is not None and is_finished(training, given):  # and stopped before the merge
        return _merge(training.output_dir, own)
    with training.main_process_first(local=False):
        checkpoint = open_run(training, given)
    trainer = _trainer(own, config, training, adapters)
    if not train_and_save(trainer, given, checkpoint):
        print_stopped("finetune", training)
        return 1
    if adapters and training.should_save:
        write_file(Path(training.output_dir) / "README.md", str(adapter_card(Path(training.output_dir))))
    if own.merge is not None:
        return _merge(training.output_dir, own) if training.should_save else 0
    folder = training.output_dir
    merges = adapters and not is_quantized(config)
    way = f"finetune --model {folder} --merge FOLDER" if merges else f'generate {folder} "PROMPT"'
    print_written(training, f"mohge {way}")
    return 0


def _adapters(own: FinetuneArguments, config: MoHGEConfig, output_dir: str) -> LoraConfig | None:
    """The adapters to train; None to train all weights."""
    if own.merge is not None:
        if own.lora_rank is None:
            raise ValueError("`merge` is for adapters, and this trains all weights: give `lora_rank`, or leave it out")
        if Path(own.merge).resolve() == Path(output_dir).resolve():
            raise ValueError("`merge` and `output_dir` are the same folder: name another one to merge into")
        check_merge(config, own.model, own.merge)
    quantized = own.quantize is not None or is_quantized(config)
    if quantized and (own.lora_rank is None or own.lora_targets != "attention"):
        raise ValueError(
            "quantised experts can neither be trained nor have adapters: train adapters on the attention, with "
            "--lora_rank 16 --lora_targets attention"
        )
    if own.lora_rank is None:
        for name in ("lora_targets", "lora_alpha"):
            if getattr(own, name) != getattr(FinetuneArguments, name):
                raise ValueError(f"`{name}` is for adapters, and this trains all weights: give `lora_rank` too")
        return None
    return lora_config(config, own.lora_rank, own.lora_targets, own.lora_alpha)


def _without_training(own: FinetuneArguments, training: TrainingArguments) -> int:
    if (own.merge is None) == (own.quantize is None):
        raise ValueError(
            "`datasets` is missing: give data to train on, or, without training, one of `merge` (of an adapter) and "
            "`quantize`"
        )
    if own.merge is not None:
        return _merge(own.model, own)
    if (Path(own.model) / ADAPTER_CONFIG).exists():
        raise ValueError(f"{own.model} is an adapter: merge it first, with --model {own.model} --merge FOLDER")
    quantize_checkpoint = _quantization().quantize_checkpoint
    result = quantize_checkpoint(own.model, training.output_dir, own.quantize, own.quantize_min_width, own.dtype)
    print(f"weights: {result.bytes_before:,} bytes -> {result.bytes_after:,} bytes")
    if not result.reloaded:
        print("CHECK FAILED: the saved weights are read back with other values; nothing was written")
        return 1
    print(f"written: {training.output_dir}")
    return 0


def _merge(adapter: str, own: FinetuneArguments) -> int:
    check = merge_adapter(adapter, own.merge, None if own.dtype is None else getattr(torch, own.dtype))
    print(f"adapter's effect on the logits  {check.effect:.2g} (relative, median)")
    print(f"error of the merged model       {check.error:.2g}")
    if not check.passed:
        remedy = "" if check.dtype == torch.float32 else ", or give --dtype float32: its dtype rounds the adapter away"
        print(f"CHECK FAILED: the merged model is another; the adapter stays in {adapter}{remedy}")
        return 1
    print(f'written: {own.merge}\nnext: mohge generate {own.merge} "PROMPT"')
    return 0


def _quantization():
    try:
        from mohge.training.tuning import quantization
    except ImportError as error:
        raise ValueError(f"`quantize` needs torchao ({error}): pip install torchao") from error
    return quantization


def _trainer(
    own: FinetuneArguments, config: MoHGEConfig, training: TrainingArguments, adapters: LoraConfig | None
) -> MoHGETrainer:
    sources = parse_sources(own.datasets, "datasets")
    held_out = held_out_sources(own.eval_datasets, training)
    length = check_sequence_length(own.sequence_length, config)
    columns = next(iter(read_rows(sources[0]))).keys()
    tokenizer = _tokenizer(own, config.vocab_size)
    if has_conversations(columns):
        try:
            from mohge.training.tuning.sft import make_sft_trainer
        except ImportError as error:
            raise ValueError(f"conversations need TRL ({error}): pip install trl") from error
        with training.main_process_first():  # the others read its cache
            rows, eval_rows = read_conversations(sources), read_conversations(held_out) if held_out else None
        check_template(tokenizer, rows, own.assistant_only_loss)
        model = _model(own, config, training, adapters)
        options = {"max_length": length, "dataset_num_proc": own.num_proc, **_loss(own, model)}
        if "messages" in columns:
            options["assistant_only_loss"] = own.assistant_only_loss
        with one_line_errors():
            trainer = make_sft_trainer(model, training, tokenizer, rows, eval_rows, **options)
        if not len(trainer.train_dataset):
            raise ValueError(f"no conversation has an answer within `sequence_length` ({length} tokens): raise it")
        return trainer
    with training.main_process_first():
        text, eval_text = (
            packed_blocks(some, tokenizer, length, num_proc=own.num_proc, seed=training.seed) if some else None
            for some in (sources, held_out)
        )
    model = _model(own, config, training, adapters)
    with one_line_errors():
        return MoHGETrainer(
            model,
            training,
            **_loss(own, model),
            train_dataset=text,
            eval_dataset=eval_text,
            data_collator=collate_packed,
            processing_class=tokenizer,
        )


def _loss(own: FinetuneArguments, model: MoHGEForCausalLM | PeftModel) -> dict[str, DistillationLoss]:
    """What a trainer is told of the loss where it is not the model's own."""
    return {} if own.distill is None else {"compute_loss_func": DistillationLoss(load_teacher(own.distill), model)}


def _tokenizer(own: FinetuneArguments, vocab_size: int) -> PreTrainedTokenizerBase:
    tokenizer = required_tokenizer(own.tokenizer or own.model)
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, and the model's `vocab_size` is {vocab_size}: name the "
            "model's own as `tokenizer`"
        )
    if own.chat_template is not None:
        tokenizer.chat_template = Path(own.chat_template).read_text(encoding="utf-8")
    return tokenizer


def _model(
    own: FinetuneArguments, config: MoHGEConfig, training: TrainingArguments, adapters: LoraConfig | None
) -> MoHGEForCausalLM | PeftModel:
    """The model to train: all of it, or frozen with adapters."""
    options = {"dtype": own.dtype or config.dtype or "float32"}
    if own.quantize is not None:
        quantization = _quantization()
        options["quantization_config"] = quantization.expert_quantization(config, own.quantize, own.quantize_min_width)
    model = load_model(absolute(own.model), **options)  # by which an adapter names it
    if getattr(model, "hf_quantizer", None) is not None:
        _quantization().allow_adapters(model)
    if adapters is None:
        return model
    set_seed(training.seed)
    with known_patterns():
        return get_peft_model(model, adapters)


if __name__ == "__main__":
    run_process(["finetune", *sys.argv[1:]])
