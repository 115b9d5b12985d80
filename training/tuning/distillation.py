"""Learning from another model's logits (Hinton et al., https://huggingface.co/papers/1503.02531)."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mohge.losses_mohge import at_least_one


_OWN = ("labels", "shift_labels", "sequence_weights", "num_items_in_batch", "output_router_logits")
"""Arguments of the student's forward that are none of the teacher's."""


class DistillationLoss:
    """
    A `compute_loss_func` for `Trainer`: in training, the mean over targets of the KL divergence from the teacher's
    distribution of the next token to the student's, in nats; in evaluation, the cross-entropy with the labels.

    Args:
        teacher (`PreTrainedModel`): Model with the vocabulary of the student, such as the one it was made of.
        student (`nn.Module`): The model that is trained.

    Raises:
        ValueError: if the two have other vocabularies.
    """

    def __init__(self, teacher: PreTrainedModel, student: nn.Module):
        sizes = teacher.config.get_text_config().vocab_size, student.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"`distill` has {sizes[0]} tokens and the model {sizes[1]}: name a model with the same ones"
            )
        self.teacher, self.student = teacher.eval().requires_grad_(False), student
        self._inputs = {}
        student.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, module: nn.Module, args: tuple, kwargs: dict):
        # A loss function is given what the student returns, and not what it was given.
        self._inputs = {name: value for name, value in kwargs.items() if name not in _OWN}

    def __call__(self, outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None):
        """The loss of a batch; `labels` [B, S], -100 for what is no target."""
        targets = F.pad(labels, (0, 1), value=-100)[..., 1:]
        chosen = targets != -100
        count = at_least_one(chosen.sum() if num_items_in_batch is None else num_items_in_batch)
        logits = outputs.logits[chosen].float()
        if not self.student.training:
            return F.cross_entropy(logits, targets[chosen], reduction="sum") / count
        with torch.no_grad():
            self.teacher.to(logits.device)
            wanted = self.teacher(**self._inputs, use_cache=False).logits[chosen].float().log_softmax(-1)
        return F.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True) / count


def load_teacher(name: str) -> PreTrainedModel:
    """
    A language model from a folder or the Hub, in the dtype that it was saved in.

    Raises:
        ValueError: if some of its weights are not there.
    """
    model, found = AutoModelForCausalLM.from_pretrained(name, dtype="auto", output_loading_info=True)
    missing = sorted(found["missing_keys"] | found["unexpected_keys"])
    if missing:
        raise ValueError(f"`distill` {name} lacks {missing[0]}, or has no place for it: name a whole model")
    return model


__all__ = ["DistillationLoss", "load_teacher"]
