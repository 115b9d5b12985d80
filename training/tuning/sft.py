"""Supervised fine-tuning on conversations, with TRL (`pip install trl`)."""

import warnings
from collections.abc import Callable

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from ..loop.trainer import MoHGETrainer


class _ModelLossSFTTrainer(SFTTrainer):
    """`SFTTrainer` that takes the loss from the model. TRL computes one of its own from the hidden states, and adds
    Mixtral's router loss, which is for experts of one width."""

    compute_loss = Trainer.compute_loss
    prediction_step = Trainer.prediction_step


class MoHGESFTTrainer(MoHGETrainer, _ModelLossSFTTrainer):
    """
    [`MoHGETrainer`] on conversations: TRL's `SFTTrainer` applies the chat template, finds the tokens to train on and
    pads; loss, router losses, logs and checkpoints are those of [`MoHGETrainer`]. Arguments are those of `SFTTrainer`.
    """

    def __init__(self, model: PreTrainedModel, args: SFTConfig, *more, **kwargs):
        output_router_logits = model.config.output_router_logits
        with warnings.catch_warnings():  # of the extra forward that TRL's own loss needs with these
            warnings.filterwarnings("ignore", "`(compute_loss_func|label_smoothing_factor)` is dep", FutureWarning)
            super().__init__(model, args, *more, **kwargs)
        model.config.output_router_logits = output_router_logits  # which SFTTrainer switches on for its own loss

    def create_model_card(self, *args, **kwargs):
        """TRL writes a card into every checkpoint; `mohge push` writes one that knows the model."""


def make_sft_trainer(
    model: PreTrainedModel,
    training: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    compute_loss_func: Callable | None = None,
    **options,
) -> MoHGESFTTrainer:
    """
    A trainer for rows of `messages`, or of `prompt` and `completion`. Of the latter, completions are trained on.

    Args:
        model (`PreTrainedModel`): The model, or adapters on it.
        training (`TrainingArguments`): Arguments of the run.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer, with a chat template if any row has messages.
        train_dataset (`Dataset`): Rows to train on.
        eval_dataset (`Dataset`, *optional*): Rows to evaluate on.
        compute_loss_func (`Callable`, *optional*): As for `Trainer`.
        options: What `SFTConfig` has beyond `TrainingArguments`.
    """
    values = training.to_dict() | {"hub_token": training.hub_token}  # which to_dict hides
    return MoHGESFTTrainer(
        model,
        SFTConfig(**values, **options),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        compute_loss_func=compute_loss_func,
    )


__all__ = ["MoHGESFTTrainer", "make_sft_trainer"]
