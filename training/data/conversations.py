"""Conversations to train on: rows of `messages`, or of `prompt` and `completion`, as TRL takes them."""

from collections.abc import Collection

from datasets import Dataset, concatenate_datasets
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .packing import TextSource, read_rows


_FORMS = (("messages",), ("prompt", "completion"))
_OPTIONAL = ("tools", "chat_template_kwargs")


def has_conversations(columns: Collection[str]) -> bool:
    """Whether rows with these columns are conversations."""
    return any(set(form) <= set(columns) for form in _FORMS)


def read_conversations(sources: list[TextSource]) -> Dataset:
    """
    The rows of all sources, one after another.

    Raises:
        ValueError: if a source cannot be read, or they have no conversations of one form.
    """
    if any(source.weight is not None for source in sources):
        raise ValueError("`weight` is for text: leave it out, every conversation is used once")
    rows = [read_rows(source) for source in sources]
    columns = set.intersection(*(set(some.column_names) for some in rows))
    form = next((form for form in _FORMS if set(form) <= columns), None)
    if form is None:
        raise ValueError(
            "the data sets have no form of conversations in common: give all of them the column `messages`, or "
            "`prompt` and `completion`"
        )
    kept = [*form, *(name for name in _OPTIONAL if name in columns)]
    return concatenate_datasets([some.select_columns(kept) for some in rows])


def check_template(tokenizer: PreTrainedTokenizerBase, rows: Dataset, assistant_only: bool):
    """
    Check that the tokenizer can write the first conversation, and tell the assistant's turns if only they count.

    Raises:
        ValueError: if it has no chat template, or one that cannot write it, or does not tell.
    """
    row = rows[0]
    if isinstance(row.get("completion"), str):
        return
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: give one as `chat_template`, a Jinja file")
    if "messages" in row:
        options = {"return_dict": True, "return_assistant_tokens_mask": assistant_only}
        try:
            encoded = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), **options)
            answered = any(turn["role"] == "assistant" for turn in row["messages"])
        except (TemplateError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the chat template cannot write the first of the `messages` ({error}): mend the template, or give "
                "lists of {role, content}"
            ) from error
        if assistant_only and answered and not any(encoded["assistant_masks"]):
            raise ValueError(
                "the chat template marks no turn of the assistant with {% generation %}, which "
                "`assistant_only_loss` goes by: mend it, or train on all turns with --assistant_only_loss false"
            )


__all__ = ["check_template", "has_conversations", "read_conversations"]
