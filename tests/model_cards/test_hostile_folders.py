"""Folders of models that come from somebody else: no code in them is run, and nothing outside of them is read."""

import json
import os
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conversion_cases import COPY, add_tokenizer, make_source, tree
from hub_cases import TEXT, save_model
from safetensors.torch import load_file, save_file

from mohge.commands.main import main
from mohge.model_cards import verify
from mohge.model_cards.staging import pushed_files, stage


class _Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def _evil(folder, name="tokenization_evil.py"):
    """Code that leaves a trace if it is run."""
    (folder / name).parent.mkdir(exist_ok=True)
    trace = f"import pathlib\npathlib.Path({str(folder.parent / 'canary')!r}).touch()\n"
    (folder / name).write_text(f"{trace}class Evil: pass\ngenerate = Evil\n")


def _json(name, **fields):
    def change(folder):
        file = folder / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(content | fields))
        _evil(folder)

    return change


def _nested(name):
    def change(folder):
        (folder / name).write_text('{"a":' * 5000 + "{}" + "}" * 5000)

    return change


def _link(name):
    def change(folder):
        outside = folder.parent / "outside"
        outside.mkdir()
        if (folder / name).exists():
            (folder / name).rename(outside / "file")
        else:
            (outside / "file").write_text("{}")
        (folder / name).symlink_to(outside / "file")

    return change


def _index(weight_map):
    """The weights lie outside, under the name of a shard; `FOLDER` is where."""

    def change(folder):
        (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
        text = json.dumps({"weight_map": weight_map}).replace("FOLDER", str(folder.parent))
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def _pickle(name):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(_Payload(folder.parent / "canary")))

    return change


EVIL = {"AutoTokenizer": ["tokenization_evil.Evil", None], "AutoProcessor": "tokenization_evil.Evil"}
HOSTILE = {
    "tokenizer code": (_json("tokenizer_config.json", auto_map=EVIL, tokenizer_class="Evil"), "auto_map"),
    "old tokenizer code": (_json("tokenizer_config.json", auto_map=EVIL["AutoTokenizer"]), "auto_map"),
    "processor code": (_json("processor_config.json", auto_map=EVIL), "processor_config.json.*auto_map"),
    "image processor code": (_json("preprocessor_config.json", auto_map=EVIL), "preprocessor_config.*auto_map"),
    "generation code": (_json("generation_config.json", auto_map=EVIL), "generation_config.json.*auto_map"),
    "attention code": (_json("config.json", attn_implementation="evil/kernel"), "attn_implementation"),
    "nested config": (_nested("config.json"), "config.json"),
    "nested tokenizer config": (_nested("tokenizer_config.json"), "tokenizer_config.json"),
    "list as config": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    "bytes as config": (lambda folder: (folder / "config.json").write_bytes(b'{"a": "\xff"}'), "config.json"),
    "linked weights": (_link("model.safetensors"), "model.safetensors leads out"),
    "linked config": (_link("config.json"), "config.json leads out"),
    "linked license": (_link("LICENSE"), "LICENSE leads out"),
    "linked template": (_link("chat_template.jinja"), "chat_template.jinja leads out"),
    "linked card": (_link("README.md"), "README.md leads out"),
    "linked record": (_link("evaluation.json"), "evaluation.json leads out"),
    "link in a circle": (lambda folder: (folder / "x.model").symlink_to("x.model"), r"x\.model"),
    "pipe": (lambda folder: os.mkfifo(folder / "chat_template.jinja"), "chat_template.jinja"),
    "name of no text": (lambda folder: (folder / "LICENSE-\udcff.txt").touch(), "LICENSE-"),
}
WEIGHTS = {
    "shard above": (_index({"a": "../x.safetensors"}), r"index.*\.\./x\.safetensors"),
    "absolute shard": (_index({"a": "FOLDER/x.safetensors"}), r"index.*x\.safetensors"),
    "shard of another kind": (_index({"a": "config.json"}), r"index.*config\.json"),
    "shard of no name": (_index({"a": "\ud800.safetensors"}), "index"),
    "null as index": (_index(None), "index.*weight_map"),
    "list as index": (_index(["x.safetensors"]), "index.*weight_map"),
    "numbers in index": (_index({"a": 3}), "index.*weight_map"),
    "nothing in index": (_index({}), "index.*weight_map"),
    "nested index": (lambda folder: (_index({})(folder), _nested("model.safetensors.index.json")(folder)), "index"),
    "text as number": (_json("tokenizer_config.json", model_max_length="x"), "tokenizer"),
    "pickle as safetensors": (_pickle("model.safetensors"), "model.safetensors is damaged|does not load"),
    "pickle": (_pickle("pytorch_model.bin"), r"no safetensors.*\.bin|no file named model\.safetensors"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "mohge")
    (folder / "text.txt").write_text(TEXT[0] * 20)
    add_tokenizer(make_source("qwen3_dynamic_rope", folder / "sharded"))
    source, files = folder / "sharded", {}
    for file in source.glob("*.safetensors"):
        files |= load_file(file)
    shutil.copytree(source, folder / "qwen3", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(files, folder / "qwen3" / "model.safetensors", {"format": "pt"})
    return folder


def commands(models: Path, folder: Path) -> dict[str, tuple[str, list]]:
    """What reads a folder -> the kind of model that it has to be, and the command line."""
    text, out = models / "text.txt", folder.parent / "out"
    tune = ["finetune", "--model", folder, "--output_dir", out, "--report_to", "none"]
    return {
        "convert": ("qwen3", ["convert", folder, out, *COPY]),
        "push": ("mohge", ["push", folder, "someone/model", "--dry-run"]),
        "eval": ("mohge", ["eval", folder, "--datasets", text, "--device", "cpu"]),
        "report": ("mohge", ["report", folder, "--text", text, "--output", out / "report.html"]),
        "quantize": ("mohge", [*tune, "--quantize", "int8"]),
        "finetune": ("mohge", [*tune, "--datasets", text, "--max_steps", "1"]),
        "train": ("mohge", ["train", "--model", folder, "--datasets", text, "--output_dir", out, "--max_steps", "1"]),
        "info": ("mohge", ["info", folder]),
    }


def assert_refused(command: list, folder: Path, capsys) -> str:
    before = tree_of_files(folder.parent)
    capsys.readouterr()
    assert main([str(part) for part in command]) == 2
    assert tree_of_files(folder.parent) == before
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"mohge {command[0]}: ")
    return line


def tree_of_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("case", HOSTILE)
def test_every_command_refuses_it(case, models, tmp_path, capsys):
    damage, message = HOSTILE[case]
    for name in commands(models, tmp_path / "model"):
        place = tmp_path / name
        kind, command = commands(models, place / "model")[name]
        shutil.copytree(models / kind, place / "model")
        damage(place / "model")
        assert re.search(message, assert_refused(command, place / "model", capsys)), name


@pytest.mark.parametrize("case", WEIGHTS)
def test_whoever_loads_the_model_refuses_it(case, models, tmp_path, capsys):
    damage, message = WEIGHTS[case]
    for name in ("convert", "push", "eval", "report", "quantize"):
        place = tmp_path / name
        kind, command = commands(models, place / "model")[name]
        shutil.copytree(models / kind, place / "model")
        damage(place / "model")
        assert re.search(message, assert_refused(command, place / "model", capsys)), name


CODE = ("tokenizer.py", "tokenization_x.py", "vocab.pkl", "tokenizer.bin", "LICENSE.py", "chat_template.py")
CODE += ("additional_chat_templates/x.py", "custom_generate/generate.py", "modeling_x.py", "conftest.py")


def test_only_data_is_copied(models, tmp_path):
    for kind in ("qwen3", "mohge"):
        shutil.copytree(models / kind, tmp_path / kind)
        for name in CODE:
            _evil(tmp_path / kind, name)
        for name in ("LICENSE-APACHE-2.0", "NOTICE.txt", "vocab.json", "additional_chat_templates/tools.jinja"):
            (tmp_path / kind / name).write_text("{}")
    assert main([*map(str, ("convert", tmp_path / "qwen3", tmp_path / "out", *COPY))]) == 0
    (tmp_path / "staged").mkdir()
    stage(tmp_path / "mohge", tmp_path / "staged", "someone/model")
    for folder in (tmp_path / "out", tmp_path / "staged"):
        files = pushed_files(folder)
        assert {"LICENSE-APACHE-2.0", "NOTICE.txt", "vocab.json", "additional_chat_templates/tools.jinja"} <= {*files}
        assert not {*files} & {*CODE}
        verify.check_code(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("change", ["other code", "more code", "code of another repository"])
def test_only_the_code_of_the_package_is_trusted(change, models, tmp_path):
    shutil.copytree(models / "mohge", tmp_path / "model")
    verify.check_code(tmp_path / "model")
    if change == "other code":
        with (tmp_path / "model" / "routing_mohge.py").open("a") as file:
            file.write("\n")
    elif change == "more code":
        _evil(tmp_path / "model", "custom_generate/generate.py")
    else:
        _json("config.json", auto_map={"AutoModelForCausalLM": "evil/repo--modeling_mohge.MoHGEForCausalLM"})(
            tmp_path / "model"
        )
    with pytest.raises(verify.ReloadError, match=r"routing_mohge\.py|generate\.py|evil"):
        verify.verify(tmp_path / "model", models / "mohge")
    assert not (tmp_path / "canary").exists()


def test_the_verifying_process_has_no_secrets(models, monkeypatch):
    secrets = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_PAT", "WANDB_API_KEY", "PASSWORD", "PYTHONPATH", "X")
    for name in secrets:
        monkeypatch.setenv(name, "secret")
    seen = {}

    def run(command, env, **options):
        seen.update(env)
        return subprocess.CompletedProcess(command, 1, "", "as far as this")

    monkeypatch.setattr(verify.subprocess, "run", run)
    with pytest.raises(verify.ReloadError, match="as far as this"):
        verify._reload(models / "mohge", {"tokens": torch.zeros(1, 2, dtype=torch.long)})
    assert "secret" not in seen.values()
    assert "PATH" in seen
    assert os.environ["HOME"] not in seen.values()


def test_links_of_the_hubs_cache(models, tmp_path, capsys):
    """Its folders are made of links to the repository's `blobs`."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(models / "mohge", blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (tmp_path / "staged").mkdir()
    stage(snapshot, tmp_path / "staged", "someone/model")
    assert set(pushed_files(tmp_path / "staged")) >= {"model.safetensors", "tokenizer.json"}
    (tmp_path / "link").symlink_to(snapshot)
    assert main(["info", str(tmp_path / "link")]) == 0
    shutil.copytree(models / "mohge", tmp_path / "other" / "blobs")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../other/blobs/config.json")
    assert "config.json leads out" in assert_refused(["info", snapshot], snapshot, capsys)


def test_adapters(models, tmp_path, capsys):
    """The adapter's weights are a pickle, or its base model asks for code."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copytree(models / "mohge", tmp_path / "base")
    fields = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base"), "task_type": "CAUSAL_LM"}
    mapping = {"base_model_class": "Evil", "parent_library": "tokenization_evil"}
    (adapter / "adapter_config.json").write_text(json.dumps(fields | {"auto_mapping": mapping}))
    _evil(adapter)
    command = ["finetune", "--model", adapter, "--merge", tmp_path / "merged", "--output_dir", tmp_path / "unused"]
    payload = pickle.dumps(_Payload(tmp_path / "canary"))
    (adapter / "adapter_model.bin").write_bytes(payload)
    assert "adapter_model.safetensors" in assert_refused(command, adapter, capsys)
    (adapter / "adapter_model.safetensors").write_bytes(payload)
    assert "adapter_model.safetensors is damaged" in assert_refused(command, adapter, capsys)
    save_file({}, adapter / "adapter_model.safetensors")
    _json("tokenizer_config.json", auto_map=EVIL)(tmp_path / "base")
    assert "auto_map" in assert_refused(command, adapter, capsys)
    _json("config.json", auto_map={"AutoConfig": "tokenization_evil.Evil"}, model_type="evil")(tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").unlink()
    assert "model_type" in assert_refused(command, adapter, capsys)


PLACES = {
    "compile_cache": "/home/alice/cache",
    "nested": [{"deep": "file:///home/alice/x", "/home/alice/key": 1}, "python /home/alice/run.py --in=/home/alice/y"],
    "windows": "C:\\Users\\alice\\model",
    "below_home": "~/alice/model",
}
KEPT = {"added_tokens_decoder": {"299": {"content": "</s>"}}, "pattern": "\\d+/\\d+", "url": "https://a.b/alices/x"}


def test_pushed_files_have_no_paths(models, tmp_path):
    folder, staged = tmp_path / "model", tmp_path / "staged"
    shutil.copytree(models / "mohge", folder)
    staged.mkdir()
    template = "{{ '/mnt/data/x' }}"
    _json("config.json", **PLACES)(folder)
    _json("generation_config.json", **PLACES)(folder)
    _json("tokenizer_config.json", **PLACES, **KEPT, chat_template=template)(folder)
    (folder / "evaluation.json").write_text(json.dumps({"results": [], "note": PLACES}))
    (folder / "recipe.yaml").write_text(json.dumps({"model": "x", **PLACES, "hub_token": "hf_secret"}))
    stage(folder, staged, "someone/model")
    for name in pushed_files(staged):
        if not name.endswith((".safetensors", ".py", "tokenizer.json")):
            text = (staged / name).read_text()
            assert not re.search(r"alice\b|hf_secret", text.replace("C:", "")), name
    content = json.loads((staged / "tokenizer_config.json").read_text())
    assert content["chat_template"] == template
    assert {name: content[name] for name in KEPT} == KEPT
    assert json.loads((staged / "generation_config.json").read_text())["compile_cache"] == "cache"


def _in_tokenizer(folder, place):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"][f"{place}/x"] = 299  # a token is no path
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [], "from": [{"file": f"{place}/merges"}]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer).replace("/", "\\/"))


def _in(name, text):
    return lambda folder, place: (folder / name).write_text(text.replace("PLACE", place))


TEXTS = {
    "tokenizer.json": _in_tokenizer,
    "chat_template.jinja": _in("chat_template.jinja", "{% include 'PLACE/x.jinja' %}"),
    "README.md": _in("README.md", "# Mine\nTrained in PLACE."),
    "LICENSE": _in("LICENSE", "see PLACE/LICENSE"),
    "added_tokens.json": _in("added_tokens.json", '{"of": "PLACE/x"}'),
    "sentencepiece.model": _in("sentencepiece.model", "\0\x12PLACE/corpus.txt\xff"),
}


@pytest.mark.parametrize("where", ["home", "folder"])
@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_name_a_place_of_this_machine_are_not_pushed(name, where, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "model"
    shutil.copytree(models / "mohge", folder)
    TEXTS[name](folder, "/somewhere/else")
    (tmp_path / "staged").mkdir()
    stage(folder, tmp_path / "staged", "someone/model")
    TEXTS[name](folder, str(tmp_path / {"home": "home", "folder": "model"}[where]))
    line = assert_refused(["push", folder, "someone/model", "--dry-run"], folder, capsys)
    assert re.search(f"{re.escape(name)} would be pushed and names {tmp_path}", line)


def test_nothing_is_written_through_a_link(models, tmp_path):
    model, precious = tmp_path / "model", tmp_path / "precious"
    shutil.copytree(models / "mohge", model)
    precious.write_text("mine")
    (model / "evaluation.json.tmp").symlink_to(precious)
    options = ["--datasets", str(models / "text.txt"), "--device", "cpu", "--sequence-length", "16"]
    assert main(["eval", str(model), *options]) == 0
    (tmp_path / "results.json").symlink_to(tmp_path / "nothing")
    assert main(["eval", str(model), *options, "--output", str(tmp_path / "results.json")]) == 0
    assert precious.read_text() == "mine"
    assert (model / "evaluation.json.tmp").is_symlink()
    assert not (tmp_path / "nothing").exists()
    assert [path.name for path in tmp_path.glob(".*")] == [path.name for path in model.glob(".*")] == []


@pytest.mark.parametrize("name", [".out.partial", ".out.scratch"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_conversion_leaves_what_is_not_its_own(name, linked, models, tmp_path, capsys):
    foreign = tmp_path / ("foreign" if linked else name)
    (foreign / "inner").mkdir(parents=True)
    (foreign / "inner" / "precious").write_text("mine")
    (foreign / "precious").write_text("mine")
    if linked:
        (tmp_path / name).symlink_to(foreign)
    before = tree(tmp_path)
    assert main([*map(str, ("convert", models / "qwen3", tmp_path / "out", *COPY))]) == 2
    assert name in capsys.readouterr().err.splitlines()[-1]
    assert tree(tmp_path) == before
