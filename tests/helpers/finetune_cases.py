"""A small model with its tokenizer, conversations and text, and the command that fine-tunes it."""

import json
from pathlib import Path

import torch
from model_cases import make_config

from mohge import MoHGEForCausalLM
from mohge.commands.main import main
from mohge.training.data.corpus import train_tokenizer


DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def questions() -> list[tuple[str, str]]:
    """Questions and answers of unequal length."""
    sums = [(1, 2), (3, 3), (0, 7), (2, 2), (4, 4), (5, 1), (2, 6), (1, 1)]
    return [(f"{DIGITS[a]} plus {DIGITS[b]}", " and ".join([DIGITS[(a + b) % 10]] * (1 + a % 3))) for a, b in sums]


def messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def make_workplace(folder: Path, dtype: torch.dtype = torch.float32, **config) -> Path:
    """A folder with a model, `base`, data, `chat.jsonl`, `pairs.jsonl` and `text.txt`, and `chat.jinja`."""
    lines = [f"<user>{question}<assistant>{answer}" for question, answer in questions()]
    tokenizer = train_tokenizer(lines * 3, 300)
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    values = {"vocab_size": 300, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.1} | config
    MoHGEForCausalLM(make_config(**values)).to(dtype).save_pretrained(folder / "base")
    (folder / "chat.jinja").write_text(TEMPLATE)
    rows = [messages(*pair) for pair in questions()]
    write_rows(folder / "chat.jsonl", [{"messages": row} for row in rows])
    write_rows(folder / "pairs.jsonl", [{"prompt": row[:1], "completion": row[1:]} for row in rows])
    (folder / "text.txt").write_text("\n".join(lines * 20))
    return folder


def write_rows(file: Path, rows: list[dict]):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(place: Path, run: str, data: str | None = "text.txt", model: str = "base", **flags) -> list[str]:
    """A command line. Flags are those of the command; `None` leaves one out."""
    values = {
        "model": place / model,
        "datasets": None if data is None else place / data,
        "chat_template": place / "chat.jinja" if data is not None and data.endswith(".jsonl") else None,
        "output_dir": place / run,
        "sequence_length": 32,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        **flags,
    }
    return ["finetune", *(f"--{name}={value}" for name, value in values.items() if value is not None)]


def finetune(place: Path, run: str, data: str | None = "text.txt", model: str = "base", **flags) -> int:
    """Run the command and return its exit status."""
    return main(arguments(place, run, data, model, **flags))


def log(folder: Path) -> list[dict]:
    """What the run in `folder` logged of its training steps."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]
