"""Commands that read a model refuse one that is not whole, and name the tensor."""

import shutil

import pytest
import torch
from finetune_cases import arguments, make_workplace
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from mohge import MoHGEForCausalLM
from mohge.commands.main import main
from mohge.loading import load_model
from mohge.training.tuning.lora import lora_config


EXPERT, ROUTER, HEAD = "model.layers.1.mlp.experts.down_proj_1", "model.layers.0.mlp.gate.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("place"))


@pytest.fixture
def damage(place, tmp_path):
    """Make a copy of the model whose tensors were changed."""

    def make(change):
        folder = tmp_path / "damaged"
        shutil.copytree(place / "base", folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def not_a_number(tensors):
    tensors[EXPERT] = tensors[EXPERT].clone()
    tensors[EXPERT][0, 0, 0] = float("nan")


CHANGES = {
    "no head": (lambda tensors: tensors.pop(HEAD), f"lacks the weight {HEAD}:"),
    "no expert": (lambda tensors: tensors.pop(EXPERT), f"lacks the weight {EXPERT}:"),
    "no router": (lambda tensors: tensors.pop(ROUTER), f"lacks the weight {ROUTER}:"),
    "nothing": (
        lambda tensors: [tensors.pop(name) for name in list(tensors)[1:]],
        "lacks the weight .* and 35 more:",
    ),
    "one more": (lambda tensors: tensors.update(foo=torch.zeros(2)), "no place for, foo:"),
    "shape": (
        lambda tensors: tensors.update({HEAD: torch.zeros(3, 4)}),
        f"another shape than its config asks for, {HEAD}",
    ),
    "not finite": (not_a_number, f"`{EXPERT}` of .* is not finite:"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_damaged_model_is_refused_by_the_name_of_the_tensor(name, damage):
    change, reason = CHANGES[name]
    with pytest.raises(ValueError, match=reason):
        load_model(damage(change))


def test_file_that_is_cut_off_is_refused(damage):
    folder = damage(lambda tensors: None)
    file = folder / "model.safetensors"
    for size in (0, 7, 1000, file.stat().st_size - 1):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ValueError, match="does not load"):
            load_model(folder)


def test_whole_model_and_adapter_load(place, tmp_path):
    model = load_model(place / "base")
    assert isinstance(model, MoHGEForCausalLM)
    ids = torch.arange(9)[None]
    get_peft_model(model, lora_config(model.config, 2)).save_pretrained(tmp_path)
    assert any("lora" in name for name, _ in load_model(tmp_path).named_parameters())
    assert torch.equal(load_model(tmp_path)(ids).logits, load_model(place / "base")(ids).logits)


COMMANDS = {
    "eval": lambda place, folder, out: ["eval", str(folder), "--datasets", str(place / "text.txt")],
    "report": lambda place, folder, out: ["report", str(folder), "--text", str(place / "text.txt")],
    "push": lambda place, folder, out: ["push", str(folder), "name/model", "--dry-run"],
    "finetune": lambda place, folder, out: arguments(place, out, model=folder),
    "quantize": lambda place, folder, out: arguments(place, out, data=None, model=folder, quantize="int8"),
    "train": lambda place, folder, out: ["train", *arguments(place, out, model=folder)[1:]],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_it_and_writes_nothing(command, place, damage, tmp_path, capsys):
    folder = damage(CHANGES["no expert"][0])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(COMMANDS[command](place, folder, tmp_path / "out")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mohge")]
    assert f"lacks the weight {EXPERT}" in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {"recipe.yaml"}
