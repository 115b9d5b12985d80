"""`mohge generate` and `mohge chat`: text as it comes, with the chat template, and what they refuse."""

import io
import re
import sys
from pathlib import Path

import pytest
from finetune_cases import make_workplace
from transformers import AutoModelForCausalLM, AutoTokenizer

from mohge.commands.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the model `base`, and `chatty`, the same with a chat template."""
    place = make_workplace(tmp_path_factory.mktemp("place"))
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    tokenizer.chat_template = (place / "chat.jinja").read_text()
    AutoModelForCausalLM.from_pretrained(place / "base").save_pretrained(place / "chatty")
    tokenizer.save_pretrained(place / "chatty")
    return place


def expected(folder: Path, text: str, tokens: int) -> str:
    """What a model adds to a text, the likeliest token each time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True)


def test_text_is_continued(place, capsys):
    command = ["generate", str(place / "base"), "one plus", "--max-new-tokens", "6", "--temperature", "0"]
    assert main(command) == 0
    assert capsys.readouterr().out == expected(place / "base", "one plus", 6) + "\n"


def test_sampling_is_repeated_by_its_seed(place, capsys):
    printed = []
    for seed in ("3", "3", "4"):
        assert main(["generate", str(place / "base"), "one plus", "--max-new-tokens", "12", "--seed", seed]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_chat_template_is_applied_unless_plain(place, capsys):
    command = ["generate", str(place / "chatty"), "one plus two", "--max-new-tokens", "6", "--temperature", "0"]
    assert main(command) == 0
    asked = capsys.readouterr().out
    assert asked == expected(place / "chatty", "<user>one plus two<assistant>", 6) + "\n"
    assert main([*command, "--plain"]) == 0
    assert capsys.readouterr().out == expected(place / "chatty", "one plus two", 6) + "\n" != asked


def test_chat_answers_line_after_line_and_remembers(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one plus two\n\ntwo plus two\n"))
    assert main(["chat", str(place / "chatty"), "--max-new-tokens", "4", "--temperature", "0"]) == 0
    first = expected(place / "chatty", "<user>one plus two<assistant>", 4)
    conversation = f"<user>one plus two<assistant>{first}<|endoftext|><user>two plus two<assistant>"
    tokenizer = AutoTokenizer.from_pretrained(place / "chatty")
    conversation = conversation.replace("<|endoftext|>", tokenizer.eos_token)
    assert capsys.readouterr().out == f"{first}\n{expected(place / 'chatty', conversation, 4)}\n"


REFUSED = {
    "no template": (["chat", "base"], "base has no chat template: continue text with `mohge generate`"),
    "no text": (["generate", "base", ""], "the prompt has no tokens: give some text"),
    "long": (["generate", "base", "one plus " * 600], "shorten it"),
    "top-p": (["generate", "base", "one", "--top-p", "3"], "--top-p is 3.0: give a probability"),
    "temperature": (["generate", "base", "one", "--temperature", "-1"], "--temperature is -1.0: give a number"),
    "tokens": (["chat", "chatty", "--max-new-tokens", "0"], "--max-new-tokens is 0: give a number"),
    "recipe": (["generate", "tiny", "one"], "tiny is a recipe without weights"),
    "nowhere": (["generate", "bsae", "one"], "did you mean base?"),
    "device": (["generate", "base", "one", "--device", "cuda:77"], "--device cuda:77: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    command, message = REFUSED[case]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = re.findall("^mohge.*", captured.err, re.MULTILINE)
    assert line.startswith(f"mohge {command[0]}: ")
    assert message in line
