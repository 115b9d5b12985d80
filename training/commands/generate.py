"""The commands `mohge generate` and `mohge chat`: text of a model, as it comes."""

import argparse
import math
import sys
from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from mohge import MoHGEForCausalLM

from .models import config_with_weights, load_on_device


def run(options: argparse.Namespace) -> int:
    """
    The command `mohge generate`: print what the model adds to a prompt.

    Raises:
        ValueError: for bad usage or input.
        OSError: if there is no such model.
    """
    writer = _Writer(options)
    if writer.tokenizer.chat_template is None or options.plain:
        writer.write(writer.tokenizer(options.prompt, return_tensors="pt").input_ids)
    else:
        writer.write(writer.chat_ids([{"role": "user", "content": options.prompt}]))
    return 0


def run_chat(options: argparse.Namespace) -> int:
    """
    The command `mohge chat`: answer line after line, until there is none.

    Raises:
        ValueError: for bad usage or input, and without a chat template.
        OSError: if there is no such model.
    """
    writer = _Writer(options)
    if writer.tokenizer.chat_template is None:
        raise ValueError(
            f"{options.model} has no chat template: continue text with `mohge generate`, or give it one with "
            "`mohge finetune --chat_template FILE`"
        )
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    turns = []
    for line in _lines():
        turns.append({"role": "user", "content": line})
        while len(turns) > 1 and writer.room(writer.chat_ids(system + turns)) < 1:
            del turns[:2]  # the oldest question and its answer
        turns.append({"role": "assistant", "content": writer.write(writer.chat_ids(system + turns))})
    return 0


def _lines() -> Iterator[str]:
    """What is typed, until Ctrl-D or Ctrl-C, or comes through a pipe."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    print("Ctrl-D ends the chat", file=sys.stderr)
    try:
        while True:
            if line := input("> ").strip():
                yield line
    except EOFError:
        print()


class _Writer:
    """Writes tokens of a model to standard output as it chooses them."""

    def __init__(self, options: argparse.Namespace):
        for name, fits, wanted in (
            ("temperature", lambda x: 0 <= x < math.inf, "a number of at least 0; 0 takes the likeliest token"),
            ("top_p", lambda x: 0 < x <= 1, "a probability, above 0 and at most 1"),
            ("max_new_tokens", lambda n: n >= 1, "a number of at least 1"),
            ("seed", lambda n: 0 <= n < 2**32, "a number from 0 to 4294967295"),
        ):
            value = getattr(options, name)
            if value is not None and not fits(value):
                raise ValueError(f"--{name.replace('_', '-')} is {value}: give {wanted}")
        config = config_with_weights(options.model)
        self.context = config.max_position_embeddings
        self.options = options
        self.model: MoHGEForCausalLM
        self.tokenizer: PreTrainedTokenizerBase
        self.model, self.tokenizer = load_on_device(options, config)
        if options.seed is not None:
            set_seed(options.seed)

    def chat_ids(self, turns: list[dict[str, str]]) -> torch.Tensor:
        """The tokens of a conversation, up to where the answer begins."""
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # what the template says, or Jinja of it
            raise ValueError(f"the chat template of {self.options.model} does not fit ({error}): mend it") from error
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

    def room(self, ids: torch.Tensor) -> int:
        """Tokens that fit behind these."""
        return self.context - ids.shape[1]

    def write(self, ids: torch.Tensor) -> str:
        """Write what comes after tokens [1, S], and return it."""
        if not ids.shape[1]:
            raise ValueError("the prompt has no tokens: give some text")
        if self.room(ids) < 1:
            raise ValueError(
                f"the prompt has {ids.shape[1]:,} tokens, and the model's context {self.context:,}: shorten it"
            )
        sampling = {"do_sample": False}
        if self.options.temperature:
            sampling = {"do_sample": True, "temperature": self.options.temperature, "top_p": self.options.top_p}
        ids = ids.to(self.model.device)
        tokens = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(self.options.max_new_tokens, self.room(ids)),
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
        return self.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


__all__ = ["run", "run_chat"]
