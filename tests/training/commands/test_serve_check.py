"""`mohge serve-check` with a stand-in for the engine: what it asks, compares and says."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from model_cases import make_model

from mohge import MoHGEForCausalLM
from mohge.commands.main import main


ENGINE = """#!{python}
import json, sys

open({asked!r}, "w").write(sys.stdin.read())
print("some words of the engine")
if {status}:
    sys.exit({status})
print({printed!r})
"""


class Stand:
    """A folder with a model, and beside it what stands in for the Python of an engine."""

    def __init__(self, place: Path, model: MoHGEForCausalLM):
        self.model, self.folder, self.python, self.asked = model, place / "model", place / "python", place / "asked"
        model.save_pretrained(self.folder)
        self.check("")
        (self.request,) = map(json.loads, self.asked.read_text().splitlines())

    def check(self, printed: str, status: int | str = 0, *options: str) -> int:
        fields = {"python": sys.executable, "asked": str(self.asked), "status": repr(status), "printed": printed}
        self.python.write_text(ENGINE.format(**fields))
        self.python.chmod(0o755)
        engine = ["--engine-python", str(self.python), "--prompts", "2"]
        return main(["serve-check", str(self.folder), *engine, *options])

    def answer(self, result: dict, *options: str) -> int:
        return self.check(f"mohge: {json.dumps({'version': '1.2', **result})}", 0, *options)

    @torch.no_grad()
    def generate(self, choice=int) -> dict:
        """The right answer, or one in which `choice` of the likeliest token is taken."""
        result = {"tokens": [], "logprobs": []}
        for prompt in self.request["prompts"]:
            ids, logprobs = list(prompt), []
            for _ in range(self.request["new_tokens"]):
                row = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                ids.append(choice(int(row.argmax())))
                logprobs.append({str(i): row[i].item() for i in row.topk(5).indices.tolist()})
            result["tokens"].append(ids[len(prompt) :])
            result["logprobs"].append(logprobs)
        return result


@pytest.fixture(scope="module")
def stand(tmp_path_factory) -> Stand:
    return Stand(tmp_path_factory.mktemp("engine"), make_model())


@pytest.fixture(scope="module")
def right(stand) -> dict:
    return stand.generate()


def test_engine_that_agrees(stand, right, capsys):
    assert stand.answer(right) == 0
    printed = capsys.readouterr().out
    assert "vllm 1.2" in printed
    assert f"     64      64     0 {'':<11}" in printed
    assert "ties:" not in printed
    assert stand.request["engine"]["model"] == str(stand.folder)
    assert [len(prompt) for prompt in stand.request["prompts"]] == [5, 9]


def test_llama_cpp_gets_the_file(stand, right, capsys):
    options = ("--engine", "llama.cpp", "--gguf", str(stand.python))
    assert stand.answer(right, *options) == 0
    assert "llama.cpp 1.2 and mohge" in capsys.readouterr().out
    assert json.loads(stand.asked.read_text())["engine"] == {"model": str(stand.python), "max_model_len": 64}


def test_first_difference_is_one_line(stand, right, capsys):
    wrong, old = copy.deepcopy(right), right["tokens"][1][3]
    wrong["tokens"][1][3] = new = (old + 1) % 64
    wrong["logprobs"][1][3] = {str(new): -0.25, str(old): -2.0}
    assert stand.answer(wrong) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("CHECK FAILED")]
    here = right["logprobs"][1][3][str(old)]
    assert f"{stand.folder}: prompt 1, position 3: vllm takes token {new}, log-probability -0.250000; mohge" in line
    assert f"mohge takes {old}, {here:.3f}" in line


@pytest.mark.parametrize("shift", [0.01, float("nan")])
def test_other_log_probabilities_of_the_same_tokens_fail(shift, stand, right, capsys):
    wrong, token = copy.deepcopy(right), right["tokens"][0][2]
    wrong["logprobs"][0][2][str(token)] += shift
    assert stand.answer(wrong) == 1
    printed = capsys.readouterr().out
    assert f"prompt 0, position 2: vllm takes token {token}, " in printed
    assert f"mohge takes {token}, " in printed


def test_ties_are_no_difference(tmp_path, capsys):
    """Each token is as likely as its neighbour, and the engine always takes the other of the two."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[1::2] = model.lm_head.weight[::2]
    stand = Stand(tmp_path, model)
    result = stand.generate(lambda token: token ^ 1)
    assert stand.answer(result) == 0
    printed = capsys.readouterr().out
    assert "     64       0    64 " in printed
    assert "compared on the tokens of vllm" in printed
    step = result["logprobs"][0][5]  # of which the engine finds only one likely
    step[str(result["tokens"][0][5] ^ 1)] -= 1
    assert stand.answer(result) == 1
    assert "prompt 0, position 5: " in capsys.readouterr().out


def test_engine_that_fails(stand, capsys):
    assert stand.answer({"error": "ValueError: no such\n layer"}) == 1
    assert f"CHECK FAILED: {stand.folder}: vllm 1.2 failed: ValueError: no such layer" in capsys.readouterr().out
    for status, says in ((0, "0: nothing on standard error"), ("Boom: out of luck", "1: Boom: out of luck")):
        assert stand.check("", status) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line == f"mohge serve-check: vllm ended at {stand.folder} with exit status {says}"


def test_usage(stand, tmp_path, monkeypatch, capsys):
    for name in ("VLLM_PYTHON", "LLAMA_CPP_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    folder, python = str(stand.folder), str(stand.python)
    for command, says in (
        ([folder], "--engine-python is missing: "),
        ([folder, "--engine-python", str(tmp_path / "none")], "cannot be run ("),
        ([folder, "--engine-python", str(tmp_path)], "cannot be run ("),
        ([folder, "--engine-python", python, "--prompts", "0"], "--prompts is 0: "),
        ([str(tmp_path / "none"), "--engine-python", python], f"{tmp_path / 'none'} is no folder: "),
        ([str(tmp_path), "--engine-python", python], "has no config.json"),
        ([folder, "--engine", "llama.cpp"], "set LLAMA_CPP_PYTHON"),
        ([folder, "--engine", "llama.cpp", "--engine-python", python], "--gguf is missing: "),
        ([folder, "--engine", "llama.cpp", "--engine-python", python, "--gguf", folder], "is no file: "),
        ([folder, folder, "--engine", "llama.cpp", "--engine-python", python, "--gguf", python], "give one"),
        ([folder, "--engine-python", python, "--gguf", python], "--gguf is for --engine llama.cpp: "),
    ):
        assert main(["serve-check", *command]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert stand.check("", status=3) == 2
    assert "has no vllm: name a Python that has it" in capsys.readouterr().err
    # The real script where no engine is installed.
    for engine, options in (("vllm", ()), ("llama.cpp", ("--gguf", python))):
        assert main(["serve-check", folder, "--engine", engine, "--engine-python", sys.executable, *options]) == 2
        assert f"has no {engine}: name a Python that has it" in capsys.readouterr().err
