"""`mohge demo`: a small model from text to a page of results, with nothing but the package and two CPU cores."""

import argparse
import itertools
import re
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Qwen3Config,
    TrainingArguments,
    set_seed,
)

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.info import describe_counts
from mohge.model_cards.card import make_card
from mohge.model_cards.records import write_record
from mohge.model_cards.reload import CACHE_TOLERANCE, cache_error
from mohge.model_cards.writing import new_folder, write_file
from mohge.training.data.corpus import STANDARD_LIBRARY, standard_library_texts, train_tokenizer
from mohge.training.data.packing import TextSource, batches, collate_packed, packed_blocks
from mohge.training.loop.trainer import MoHGETrainer
from mohge.training.report import RoutingEvaluation, evaluate_routing, format_router_table
from mohge.training.report.page import Report, render, write_page
from mohge.training.report.sample import Sample, for_terminal, passages
from mohge.training.report.verdict import against_control

from .evaluate import EVALUATION_NAME


BLOCK = 256
"""Tokens of a training sequence."""
BATCH = 8
"""Sequences of a training step."""
VOCABULARY = 4096
WIDTHS = [64, 128, 192, 256]
"""Neurons of an expert of each group; the control's experts have the mean."""
EXPERTS = 16
HELD_OUT = 64
"""Sequences of the text that perplexity and routing are measured on."""
CONTINUATION = 120
"""Tokens of a sample after its prompt."""
_HEAD = re.compile(r'^def \w+\(.*\):\n    """.*"""(?=\n)', re.MULTILINE)
"""A function up to its docstring of one line, which says what is to come."""

# Each paper's losses. Coefficients of the two-level router are larger than the paper's 1e-5 and 5e-3, which are for
# hundreds of thousands of steps.
ROUTER_LOSSES = {
    "two_level": {"router_group_aux_loss_coef": 1e-2, "router_expert_aux_loss_coef": 2e-2, "router_z_loss_coef": 1e-3},
    "top_k": {"router_parameter_penalty_coef": 1e-2, "router_expert_aux_loss_coef": 0.0},
    "top_p": {
        "router_parameter_penalty_coef": 1e-2,
        "router_entropy_coef": 3e-2,
        "router_expert_aux_loss_coef": 0.0,
    },
    "grouped_top_k": {
        "router_intra_group_coef": 0.1,
        "router_inter_group_coef": 0.05,
        "router_aux_loss_coef": 0.01,
        "router_z_loss_coef": 1e-3,
        "router_expert_aux_loss_coef": 0.0,
        "router_logit_ema_strength": 0.01,
    },
}


def run(options: argparse.Namespace) -> int:
    """Run the command with parsed arguments."""
    return run_demo(options.router, options.output, options.steps, options.seed)


def run_demo(router: str, output: str | None = None, steps: int = 200, seed: int = 0) -> int:
    """
    Train, evaluate, save, reload and sample a small model on the Python standard library's own text, and train a
    control to compare it with: as many experts of one width, and as many parameters.

    Args:
        router (`str`): A `router_type` of [`MoHGEConfig`].
        output (`str`, *optional*): Folder to create; by default `mohge-demo-{router}`, numbered if that exists.
        steps (`int`, *optional*, defaults to 200): Optimizer steps of 2048 tokens, for each of the two models.
        seed (`int`, *optional*, defaults to 0): Seed of weights and data order.

    Returns:
        `int`: 0, or 1 if the reloaded model differs, its cache changes what it computes, or it predicts no better than
        guessing.

    Raises:
        ValueError: if `steps` is not positive.
        OSError: if `output` exists, or Python's sources cannot be found.
    """
    if steps < 1:
        raise ValueError(f"--steps is {steps}: it must be at least 1")
    target = _free_path(output, f"mohge-demo-{router}")
    with new_folder(target, "demo") as temporary:
        folder = temporary / "demo"
        checks_passed = _run(router, folder, steps, seed)
        config = MoHGEConfig.from_pretrained(folder)
        write_file(folder / "README.md", str(make_card(folder, target.name, config)))
        folder.rename(target)  # only now, so that an interrupted run leaves nothing
    print(f"page: {target / 'report.html'}")
    return 0 if checks_passed else 1


def _run(router: str, folder: Path, steps: int, seed: int) -> bool:
    started = time.perf_counter()
    training_files, held_out_files = standard_library_texts()
    print(f"text: {len(training_files)} files to train on, {len(held_out_files)} held out", flush=True)
    tokenizer = train_tokenizer(training_files, VOCABULARY)
    training_set, held_out_set = (
        packed_blocks([TextSource(STANDARD_LIBRARY, split=split)], tokenizer, BLOCK)
        for split in ("train", "validation")
    )
    print(f"tokens: {len(training_set) * BLOCK:,} to train on, {len(held_out_set) * BLOCK:,} held out")

    held_out_set = held_out_set.select(range(min(HELD_OUT, len(held_out_set))))
    about = f"the first {len(held_out_set) * BLOCK:,} held-out tokens of Python's standard library"

    config = _config(router, tokenizer, WIDTHS, EXPERTS // len(WIDTHS))
    # A group of its own says nothing to a router that chooses groups.
    uniform = _config("top_p" if router == "top_p" else "top_k", tokenizer, [sum(WIDTHS) // len(WIDTHS)], EXPERTS)
    print(f"\n1 of 2: {EXPERTS} experts of {', '.join(map(str, WIDTHS))} neurons ({router})", flush=True)
    trainer, evaluation = _train(config, training_set, held_out_set, folder, steps, seed)
    print(f"2 of 2, the control: {EXPERTS} experts of {uniform.moe_intermediate_sizes[0]} neurons", flush=True)
    control_trainer, control_evaluation = _train(
        uniform, training_set, held_out_set, folder.with_name("control"), steps, seed
    )
    learned = evaluation.perplexity < len(tokenizer)
    if not learned:
        print(f"CHECK FAILED: the perplexity is not below {len(tokenizer):,}, that of guessing")

    trainer.save_model(folder)
    trainer.save_state()  # which `mohge report` reads
    tokenizer.save_pretrained(folder)
    model = trainer.model.eval()
    reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    for parameter in reloaded.parameters():
        # Weights mapped from a file are aligned differently in memory, and matrix kernels then round differently.
        parameter.data = parameter.data.clone()
    probe = torch.tensor(held_out_set[:2]["input_ids"])
    with torch.no_grad():
        identical = torch.equal(model(probe).logits, reloaded(probe).logits)
    print(f"saved and reloaded: logits {'identical' if identical else 'DIFFER (CHECK FAILED)'}")
    error = cache_error(reloaded, probe[:, :64])
    cache_works = error <= CACHE_TOLERANCE
    print(f"generated with a cache: logits differ by {error:.1g}{'' if cache_works else ' (CHECK FAILED)'}")

    report = Report(
        f"mohge demo, {router}",
        config,
        trainer.state.log_history,
        evaluation=evaluation,
        tokenizer=tokenizer,
        text=about,
        facts={"logits after reload": "identical" if identical else "different"},
        sample=_sample(reloaded, tokenizer, "".join(held_out_files)),
        control=Report("the control", uniform, control_trainer.state.log_history, evaluation=control_evaluation),
    )
    print(f"\n{for_terminal(passages(report.sample, tokenizer), sys.stdout.isatty())}\n")
    print(format_router_table(evaluation.statistics))
    print(describe_counts(config, [evaluation.statistics.routing(about)]))
    print(f"\n{against_control(report)}\n")
    write_page(render(report), folder / "report.html")
    measured = {"perplexity": evaluation.perplexity, "tokens": len(evaluation.token_ids)}
    dataset = {"path": STANDARD_LIBRARY, "split": "validation"}
    result = {"dataset": dataset, "settings": {"sequence_length": BLOCK}, "metrics": measured}
    write_record(folder / EVALUATION_NAME, {"results": [result]})
    print(f"done in {time.perf_counter() - started:.0f} s")
    return identical and cache_works and learned


def _free_path(output: str | None, default: str) -> Path:
    if output is not None:
        if Path(output).exists():
            raise FileExistsError(f"--output {output} exists: name another folder, or remove it first")
        return Path(output)
    numbered = (Path(f"{default}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([Path(default)], numbered) if not path.exists())


def _config(router: str, tokenizer: PreTrainedTokenizerFast, widths: list[int], experts: int) -> MoHGEConfig:
    backbone = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=BLOCK,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return MoHGEConfig(
        backbone_config=backbone,
        moe_intermediate_sizes=widths,
        num_experts_per_group=experts,
        num_experts_per_tok=4,
        shared_expert_intermediate_size=128,
        router_type=router,
        **ROUTER_LOSSES[router],
    )


class _QuietProgressCallback(ProgressCallback):
    """Trainer's progress bar with the loss behind it, instead of a line for every logged dictionary."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "lm_loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{logs['lm_loss']:.3f}", max_vio=f"{logs['router/max_vio']:.2f}")


def _train(
    config: MoHGEConfig, training_set: Dataset, held_out_set: Dataset, folder: Path, steps: int, seed: int
) -> tuple[MoHGETrainer, RoutingEvaluation]:
    """Train a model, and measure it on what is held out."""
    set_seed(seed)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(30, steps // 4),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=max(1, steps // 50),
        save_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=True,
    )
    trainer = MoHGETrainer(
        model=MoHGEForCausalLM(config), args=arguments, train_dataset=training_set, data_collator=collate_packed
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_QuietProgressCallback())
    trainer.train()
    return trainer, evaluate_routing(trainer.model, batches(held_out_set, BATCH))


def _sample(model: MoHGEForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: str) -> Sample:
    """The first function of a text whose head is a prompt, and what the model makes of that."""
    head = _HEAD.search(held_out)
    start, end = head.span() if head else (0, 200)
    prompt = tokenizer(held_out[start:end], return_tensors="pt", return_token_type_ids=False)
    real = tokenizer(held_out[start : end + 10 * CONTINUATION], return_tensors="pt")["input_ids"]
    length = prompt["input_ids"].shape[1]
    written = model.generate(
        **prompt,
        max_new_tokens=CONTINUATION,
        do_sample=True,
        temperature=0.8,
        top_k=40,
        repetition_penalty=1.1,
    )
    texts = (real[:, : length + CONTINUATION], written)
    return Sample(length, *(evaluate_routing(model, [{"input_ids": tokens}]) for tokens in texts))
