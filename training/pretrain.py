"""
Pretraining, on one process or many: `python -m mohge.training.pretrain --help`, and on several devices
`accelerate launch --config_file accelerate.yaml -m mohge.training.pretrain ...` (`mohge place` writes such a launch).
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, HfArgumentParser, TrainingArguments, default_data_collator, set_seed
from transformers.distributed.configuration_utils import DistributedConfig

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.cli import load_config
from mohge.parallel_mohge import check_layout

from .corpus import standard_library_texts, token_blocks, train_tokenizer
from .trainer import MoHGETrainer


@dataclass
class PretrainArguments:
    """What to train, on which text, and spread how."""

    model: str = field(
        metadata={"help": "Config.json, model folder or Hub id. A config without weights starts from random weights."}
    )
    text: list[str] | None = field(
        default=None, metadata={"help": "Text files. By default the Python standard library's own text."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the tokenizer. By default the model's; for a config, one of the text."},
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Of the weights, float32 or bfloat16. By default the config's, or float32."}
    )
    sequence_length: int = field(default=256, metadata={"help": "Tokens of a training sequence."})
    ep_size: int = field(
        default=1, metadata={"help": "Ranks that hold different experts; divides fsdp_size * tp_size."}
    )
    fsdp_size: int = field(default=1, metadata={"help": "Ranks that hold different shards of the dense weights."})
    tp_size: int = field(default=1, metadata={"help": "Ranks that share a batch and split each dense weight."})
    dp_replicate_size: int = field(default=1, metadata={"help": "Copies of the whole model."})

    def layout(self, config: MoHGEConfig) -> DistributedConfig | None:
        """How the model of `config` is spread over ranks; None if it is not.

        Raises:
            ValueError: if the sizes contradict each other, the config or the number of processes.
        """
        layout = DistributedConfig(
            tp_size=self.tp_size,
            ep_size=self.ep_size,
            fsdp_size=self.fsdp_size,
            dp_replicate_size=self.dp_replicate_size,
        )
        wanted, started = layout.dp_size * layout.tp_size, int(os.environ.get("WORLD_SIZE", "1"))
        if wanted == 1:
            return None  # on several processes Trainer copies the model to each
        if wanted != started:
            raise ValueError(
                f"`fsdp_size` * `tp_size` * `dp_replicate_size` is {wanted}, and {started} processes were started: "
                f"launch with --num_processes {wanted}"
            )
        check_layout(config, layout)
        if layout.tp_size > 1 and not torch.accelerator.is_available():
            raise ValueError("`tp_size` above 1 needs GPUs under Trainer: on CPU use `fsdp_size` with `ep_size`")
        return layout


def main(arguments: list[str] | None = None) -> int:
    """Run with `arguments` (by default those of the process) and return the exit status: 0, or 2 for bad input."""
    parser = HfArgumentParser([PretrainArguments, TrainingArguments])
    if not torch.accelerator.is_available():  # or else accelerate takes each process of a CPU run for the only one
        os.environ.setdefault("ACCELERATE_USE_CPU", "1")
    try:
        own, training = parser.parse_args_into_dataclasses(arguments)
        run_pretraining(own, training)
    except (ValueError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line from each machine
            print(f"mohge.training.pretrain: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run_pretraining(own: PretrainArguments, training: TrainingArguments) -> MoHGETrainer:
    """
    Train a model, save it with its tokenizer in `training.output_dir`, and return the trainer.

    Raises:
        ValueError: if arguments contradict each other or the model.
        OSError: if a file cannot be read.
    """
    config = load_config(own.model)
    layout = own.layout(config)
    texts = standard_library_texts()[0] if own.text is None else [Path(path).read_text("utf-8") for path in own.text]
    trained = _has_weights(own.model)
    if own.tokenizer is None and not trained:
        tokenizer = train_tokenizer(texts, config.vocab_size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(own.tokenizer or own.model)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"`vocab_size` is {config.vocab_size}, and the tokenizer has {len(tokenizer)} tokens: raise it, or name "
            "another `tokenizer`"
        )
    data = token_blocks(texts, tokenizer, own.sequence_length)
    if not len(data):
        raise ValueError(f"the text is shorter than `sequence_length` ({own.sequence_length} tokens): give more text")

    folder = own.model if trained else _random_weights(config, training)
    dtype = own.dtype or config.dtype or "float32"
    model = MoHGEForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=layout)
    trainer = MoHGETrainer(model, training, train_dataset=data, data_collator=default_data_collator)
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)  # the last one
    trainer.save_model()
    if training.should_save:
        tokenizer.save_pretrained(training.output_dir)
    trainer.accelerator.wait_for_everyone()
    return trainer


def _has_weights(model: str) -> bool:
    path = Path(model)
    if path.is_dir():
        return any([*path.glob("*.safetensors"), *path.glob("*.bin")])
    return not path.is_file()  # a Hub id


def _random_weights(config: MoHGEConfig, training: TrainingArguments) -> str:
    """A model folder with random weights, the same for every rank."""
    folder = Path(training.output_dir) / "initial"
    with training.main_process_first(local=False):
        if training.should_save:
            set_seed(training.seed)
            MoHGEForCausalLM(config).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    status = main()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)
