"""`mohge push` and `model.push_to_hub`, with the real client, to a Hub on loopback."""

import json
import re

import pytest
import torch
import yaml
from conversion_cases import REGROUP, add_tokenizer, convert, make_source, read_report
from hub_actions import USER
from hub_cases import Shell, save_model
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from trainer_runs import config, train

from mohge import MoHGEForCausalLM
from mohge.training import MoHGETrainer


PARTS = ("backbones", "blocks", "checks", "configuration", "expert_names", "experts", "llama4", "losses", "modeling")
PARTS += ("parallel", "routing", "versions")
CODE = {f"{name}_mohge.py" for name in PARTS}
MODEL = {"README.md", "config.json", "generation_config.json", "model.safetensors", *CODE}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}

LOGITS = """
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", revision="{revision}", trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.arange(12)[None]).logits, "logits.pt")
print(snapshot_download("{name}", revision="{revision}"))
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    with HubServer(part_size=200_000) as hub, Shell(hub, tmp_path_factory.mktemp("home")) as shell:
        yield shell


@pytest.fixture(scope="module")
def elsewhere(shell, tmp_path_factory):
    """A machine without mohge."""
    with Shell(shell.hub, tmp_path_factory.mktemp("elsewhere"), package=False) as elsewhere:
        yield elsewhere


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "folder")


@pytest.fixture
def _reloads_here(shell):
    with shell.reloads_here():
        yield


def weights(repository, ref="main"):
    files = repository.head(ref).files
    return {name for name in files if ".safetensors" in name}


def snippet(files) -> str:
    return re.search(r"```python\n(.*?)```", files["README.md"].content.decode(), re.DOTALL)[1]


def assert_loads(elsewhere, folder, name, revision="main"):
    """What is on the Hub computes what `folder` computes here, and can be fetched."""
    result = elsewhere.run(LOGITS.format(name=name, revision=revision))
    assert result.status is None, result.err
    expected = MoHGEForCausalLM.from_pretrained(folder)(torch.arange(12)[None]).logits
    torch.testing.assert_close(torch.load(elsewhere.home / "logits.pt"), expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 0.1
    return result.out.strip()


def test_first_push_has_all_that_the_model_needs_and_nothing_else(shell, elsewhere, tmp_path):
    folder = save_model(tmp_path / "model")
    for name in ("checkpoint-1/optimizer.pt", "runs/events.1", ".cache/x", "initial/model.safetensors", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not for the Hub")
    (folder / "training_args.bin").write_text("nor this")
    (folder / "modeling_mohge.py").write_text("raise RuntimeError('code of another version')\n")
    (folder / "LICENSE").write_text("All mine.\n")
    result = shell.push(folder, f"{USER}/first", "--license", "mit", "--message", "Here it is")
    assert result.status == 0, result.err
    repository = shell.hub.repositories[f"{USER}/first"]
    assert result.out.strip() == f"{shell.hub.url}/{USER}/first/commit/{repository.head().oid}"
    assert repository.history() == ["Here it is", "initial commit"]
    assert not repository.private
    files = repository.head().files
    assert set(files) == {*MODEL, *TOKENIZER, "LICENSE", ".gitattributes"}
    assert files["model.safetensors"].lfs
    assert files["model.safetensors"].content == (folder / "model.safetensors").read_bytes()
    assert any(path.endswith("/complete") for _, path in shell.hub.requests)  # in parts
    card = files["README.md"].content.decode()
    assert "license: mit" in card
    text = elsewhere.run(snippet(files)).out
    assert text.startswith("Once upon a time")
    assert len(text.strip()) > len("Once upon a time")
    fetched = assert_loads(elsewhere, folder, f"{USER}/first")
    assert {path.name for path in (tmp_path / fetched).iterdir()} == set(files)


@pytest.mark.usefixtures("_reloads_here")
def test_second_push_replaces_the_first(shell, elsewhere, tmp_path):
    name = f"{USER}/second"
    sharded = save_model(tmp_path / "sharded", max_shard_size="200KB")
    assert shell.push(sharded, name).status == 0
    repository = shell.hub.repositories[name]
    before = repository.head()
    assert len(weights(repository)) > 2
    assert_loads(elsewhere, sharded, name)
    # Others add files: theirs stay, unless the model would be read from them.
    code = "from huggingface_hub import HfApi\n" + "\n".join(
        f"HfApi().upload_file(path_or_fileobj=b'other', path_in_repo='{path}', repo_id='{name}')"
        for path in ("onnx/model.safetensors", "LICENSE", "picture.png", "pytorch_model.bin", "merges.txt")
    )
    assert shell.run(code).err.count("Traceback") == 0
    whole = save_model(tmp_path / "whole", tokenizer=False, initializer_range=0.2)
    commits = len(repository.commits)
    assert shell.push(whole, name).status == 0
    assert len(repository.commits) == commits + 1
    others = {"onnx/model.safetensors", "LICENSE", "picture.png", ".gitattributes"}
    assert set(repository.head().files) == {*MODEL, *others}
    assert repository.head().parent != before.oid
    assert_loads(elsewhere, whole, name)
    uploads = sum(method == "PUT" for method, _ in shell.hub.requests)
    unchanged = shell.push(whole, name)
    assert unchanged.status == 0
    assert len(repository.commits) == commits + 1
    assert unchanged.out.strip().endswith(repository.head().oid)
    assert sum(method == "PUT" for method, _ in shell.hub.requests) == uploads


@pytest.mark.usefixtures("_reloads_here")
def test_pull_request_and_branch(shell, elsewhere, model, tmp_path):
    name = f"{USER}/reviewed"
    proposed = shell.push(model, name, "--create-pr")
    assert proposed.status == 0
    assert proposed.out.strip() == f"{shell.hub.url}/{name}/discussions/1"
    repository = shell.hub.repositories[name]
    assert set(repository.head("main").files) == {".gitattributes"}
    assert set(repository.head("refs/pr/1").files) >= MODEL
    assert shell.push(model, name, "--revision", "next/step").status == 0
    assert repository.refs.keys() == {"main", "refs/pr/1", "next/step"}
    assert set(repository.head("main").files) == {".gitattributes"}
    assert_loads(elsewhere, model, name, "next/step")


@pytest.mark.usefixtures("_reloads_here")
def test_model_in_memory(shell, elsewhere, tmp_path):
    folder = save_model(tmp_path / "model")
    code = f"""
from mohge import MoHGEForCausalLM
model = MoHGEForCausalLM.from_pretrained({str(folder)!r})
model.lm_head.weight.data *= 2
model.add_model_tags("tagged")
commit = model.push_to_hub("memory", commit_message="From memory", private=True, tags=["mine"], max_shard_size="200KB")
assert commit.oid, commit
assert model.config._experts_implementation == "mohge"
model.push_to_hub("{USER}/memory", create_pr=True, commit_message="Again")
print("done")
model.lm_head.register_forward_hook(lambda module, args, output: output + 1)
model.push_to_hub("{USER}/hooked")
"""
    result = shell.run(code)
    assert result.out.strip() == "done", result.err
    assert "ReloadError" in result.err.splitlines()[-1]
    assert f"{USER}/hooked" not in shell.hub.repositories
    repository = shell.hub.repositories[f"{USER}/memory"]
    assert repository.private
    assert repository.history() == ["From memory", "initial commit"]
    assert len(weights(repository)) > 2
    assert set(repository.head().files) >= TOKENIZER
    card = repository.head().files["README.md"].content.decode()
    assert "- tagged\n- mine\n" in card
    assert str(tmp_path) not in card
    changed = MoHGEForCausalLM.from_pretrained(folder)
    changed.lm_head.weight.data *= 2
    changed.save_pretrained(tmp_path / "changed")
    assert_loads(elsewhere, tmp_path / "changed", f"{USER}/memory")


def test_without_the_package_transformers_pushes(shell, elsewhere, model):
    code = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(model)!r}, trust_remote_code=True)
model.push_to_hub("{USER}/plain", commit_message="Plain")
"""
    result = elsewhere.run(code)
    assert result.status is None, result.err
    repository = shell.hub.repositories[f"{USER}/plain"]
    assert repository.history() == ["Plain", "initial commit"]
    assert set(repository.head().files) == {*MODEL, ".gitattributes"}


def test_bfloat16_without_tokenizer(shell, elsewhere, tmp_path):
    folder, name = save_model(tmp_path / "model", tokenizer=False, dtype=torch.bfloat16), f"{USER}/half"
    assert shell.push(folder, name).status == 0
    files = shell.hub.repositories[name].head().files
    assert not TOKENIZER & set(files)
    assert json.loads(files["config.json"].content)["dtype"] == "bfloat16"
    code = f"from mohge import MoHGEForCausalLM as M; M.from_pretrained({str(folder)!r}).push_to_hub('{name}')"
    head = shell.hub.repositories[name].head()
    with shell.reloads_here():
        assert "Traceback" not in shell.run(code).err
    assert shell.hub.repositories[name].head() == head  # the same files
    tokens = json.loads(elsewhere.run(snippet(files)).out)
    assert tokens[:3] == [1, 2, 3]
    assert len(tokens) == 23


@pytest.mark.usefixtures("_reloads_here")
def test_float16_with_chat_template(shell, elsewhere, tmp_path):
    folder, name = save_model(tmp_path / "model", dtype=torch.float16), f"{USER}/chat"
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    assert shell.push(folder, name).status == 0
    files = shell.hub.repositories[name].head().files
    assert "chat_template.jinja" in files
    text = elsewhere.run(snippet(files)).out
    assert text.startswith("<user>Once upon a time")
    assert len(text.strip()) > len("<user>Once upon a time")


def texts(files) -> str:
    return "\n".join(file.content.decode() for name, file in files.items() if not name.endswith(".safetensors"))


@pytest.mark.usefixtures("_reloads_here")
def test_conversion(shell, elsewhere, tmp_path):
    source, folder, name = tmp_path / "secret-place" / "olmoe", tmp_path / "groups", f"{USER}/groups"
    add_tokenizer(make_source("olmoe", source))
    for file, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        content = json.loads((source / file).read_text())
        (source / file).write_text(json.dumps(content | {key: str(source)}))  # as earlier versions of transformers
    assert convert(source, folder, *REGROUP) == 0
    assert shell.push(folder, name).status == 0
    files = shell.hub.repositories[name].head().files
    assert {"conversion_recipe.yaml", "conversion_report.json", "tokenizer.json"} <= set(files)
    assert "Converted by `mohge convert --mode regroup` from `olmoe`" in files["README.md"].content.decode()
    assert "tokenizer = AutoTokenizer.from_pretrained(name" in files["README.md"].content.decode()
    assert "secret-place" not in texts(files)
    report = json.loads(files["conversion_report.json"].content)
    assert report["source"]["path"] == "olmoe"
    assert report["logits"] == read_report(folder)["logits"]
    assert_loads(elsewhere, folder, name)


@pytest.mark.usefixtures("_reloads_here")
def test_run_folder(shell, tmp_path):
    folder, name = tmp_path / "secret-place" / "run", f"{USER}/run"
    saving = {"save_strategy": "steps", "save_steps": 1, "report_to": ["tensorboard"]}
    trainer = train(config("load_balancing"), str(folder), MoHGETrainer, **saving)
    trainer.save_model()
    trainer.save_state()
    recipe = {"model": str(tmp_path / "start"), "datasets": ["org/corpus"], "output_dir": str(folder)}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    dataset = {"path": str(tmp_path / "own.txt"), "name": None, "split": "train", "revision": None}
    results = [{"dataset": dataset, "metrics": {"perplexity": 49.5, "loss": 3.9, "tokens": 80}}]
    (folder / "evaluation.json").write_text(json.dumps({"results": results}))
    assert shell.push(folder, name).status == 0
    files = shell.hub.repositories[name].head().files
    assert set(files) == {*MODEL, "recipe.yaml", "evaluation.json", ".gitattributes"}
    assert "secret-place" not in texts(files)
    assert str(tmp_path) not in texts(files)
    assert yaml.safe_load(files["recipe.yaml"].content) == {
        "model": "start",
        "datasets": ["org/corpus"],
        "output_dir": "run",
    }
    card = ModelCard(files["README.md"].content.decode())
    assert card.data.datasets == ["org/corpus"]
    assert [r.metric_value for r in card.data.eval_results] == [49.5, 3.9]
    assert "| optimizer steps | 2 |" in card.text
    assert "On the last passes of training" in card.text


@pytest.mark.usefixtures("_reloads_here")
def test_dry_run_needs_no_hub(shell, model):
    requests = len(shell.hub.requests)
    result = shell.push(model, f"{USER}/never", "--dry-run")
    assert result.status == 0
    assert len(shell.hub.requests) == requests
    assert result.out.startswith("---\n")
    listed = {
        line.split()[1]: int(line.split()[0].replace(",", ""))
        for line in result.out.splitlines()[-len(MODEL | TOKENIZER) :]
    }
    assert listed.keys() == {*MODEL, *TOKENIZER}
    assert listed["model.safetensors"] == (model / "model.safetensors").stat().st_size


@pytest.mark.usefixtures("_reloads_here")
def test_card_of_a_person_stays(shell, tmp_path):
    name, folder = f"{USER}/written", save_model(tmp_path / "model")
    assert shell.push(folder, name).status == 0
    repository = shell.hub.repositories[name]
    text = "---\nlanguage: fi\n---\n\n# Written on the website\n"
    code = f"""
from huggingface_hub import HfApi
HfApi().upload_file(path_or_fileobj={text.encode()!r}, path_in_repo="README.md", repo_id="{name}")
"""
    shell.run(code)
    assert shell.push(folder, name, "--license", "mit").status == 0
    card = repository.head().files["README.md"].content.decode()
    assert card.endswith("---\n\n# Written on the website\n")
    assert {"language: fi", "license: mit", "library_name: transformers"} <= set(card.splitlines())
    (folder / "README.md").write_text("# Written here\n")
    assert shell.push(folder, name).status == 0
    card = repository.head().files["README.md"].content.decode()
    assert card.endswith("# Written here\n")
    assert "pipeline_tag: text-generation" in card
    assert (folder / "README.md").read_text() == "# Written here\n"


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_a_training_run_pushes_what_was_checked_and_nothing_of_this_machine(
    strategy, shell, elsewhere, tmp_path, request
):
    if strategy == "every_save":  # three checks of the kind that the other strategy makes once
        request.getfixturevalue("_reloads_here")
    (tmp_path / "text.txt").write_text("one two three four five six seven\n" * 200)
    config("expert", vocab_size=300).save_pretrained(tmp_path / "config")
    values = {
        "model": tmp_path / "config",
        "datasets": tmp_path / "text.txt",
        "output_dir": tmp_path / "run",
        "sequence_length": 32,
        "max_steps": 2,
        "save_steps": 1,
        "push_to_hub": True,
        "hub_model_id": f"{USER}/trained_{strategy}",
        "hub_strategy": strategy,
        "hub_token": TOKEN,
        "report_to": "none",
        "disable_tqdm": True,
    }
    result = shell.run(["train", *(f"--{name}={value}" for name, value in values.items())])
    assert result.status == 0, result.err
    repository = shell.hub.repositories[f"{USER}/trained_{strategy}"]
    during = [f"Training in progress, step {step}" for step in (2, 1)] if strategy == "every_save" else []
    assert repository.history() == ["Model save", *during, "initial commit"]
    for commit in repository.commits.values():
        for name, file in commit.files.items():
            assert TOKEN.encode() not in file.content, name
            assert str(tmp_path).encode() not in file.content, name
    files = repository.head().files
    assert set(files) == {*MODEL, *TOKENIZER, "recipe.yaml", ".gitattributes"}
    card = files["README.md"].content.decode()
    assert "| optimizer steps | 2 |" in card
    assert_loads(elsewhere, tmp_path / "run", f"{USER}/trained_{strategy}")


def test_of_an_adapter_run_only_the_adapter_is_pushed(shell, model, tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time there was a tokenizer.\n" * 100)
    values = {
        "model": model,
        "datasets": tmp_path / "text.txt",
        "lora_rank": 2,
        "sequence_length": 32,
        "max_steps": 1,
        "output_dir": tmp_path / "adapter",
        "push_to_hub": True,
        "hub_model_id": f"{USER}/adapter",
        "hub_token": TOKEN,
        "report_to": "none",
        "disable_tqdm": True,
    }
    result = shell.run(["finetune", *(f"--{name}={value}" for name, value in values.items())])
    assert result.status == 0, result.err
    files = shell.hub.repositories[f"{USER}/adapter"].head().files
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert not {"training_args.bin", "recipe.yaml", "trainer_state.json"} & set(files)
    assert not [name for name, file in files.items() if TOKEN.encode() in file.content]
