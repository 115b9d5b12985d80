"""Pushes that fail: nothing is left behind on the Hub, and one line says why."""

import pytest
import torch
from hub_actions import USER
from hub_cases import Shell, save_model
from hub_server import TOKEN, HubServer
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    with HubServer(part_size=200_000) as hub, Shell(hub, tmp_path_factory.mktemp("home")) as shell:
        yield shell


@pytest.fixture(autouse=True)
def _no_faults(shell):
    yield
    shell.hub.faults.clear()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "folder")


@pytest.fixture
def _reloads_here(shell):
    with shell.reloads_here():
        yield


FAULTS = {
    "repository": ("create_repo", 500),
    "read_only": ("preupload", 403),
    "storage_refuses": ("lfs_put", 403),
    "storage_down": ("lfs_put", 500),
    "cut_off": ("lfs_put", "drop"),
    "corrupted": ("lfs_put", "corrupt"),
    "overtaken": ("commit", 412),
    "commit_cut_off": ("commit", "drop"),
}


@pytest.mark.usefixtures("_reloads_here")
@pytest.mark.parametrize("case", FAULTS)
def test_failed_upload_leaves_the_last_commit(case, shell, model, tmp_path):
    name, (action, fault) = f"{USER}/failing", FAULTS[case]
    if name not in shell.hub.repositories:
        assert shell.push(model, name).status == 0
    repository = shell.hub.repositories[name]
    head, commits = repository.head(), set(repository.commits)
    changed = save_model(tmp_path / "changed", initializer_range=0.1 + 0.01 * list(FAULTS).index(case))
    shell.hub.fail(action, fault)
    result = shell.push(changed, name)
    assert shell.hub.faults[action][1] < 1000  # it was met
    assert result.status == 2
    assert len(result.line) > len("mohge push: ")
    assert repository.head() == head
    assert set(repository.commits) == commits
    assert repository.refs == {"main": head.oid}


@pytest.mark.usefixtures("_reloads_here")
def test_storage_that_recovers_is_tried_again(shell, tmp_path):
    folder = save_model(tmp_path / "model", initializer_range=0.25)
    shell.hub.fail("lfs_put", 500, times=1)
    assert shell.push(folder, f"{USER}/patient").status == 0
    content = (folder / "model.safetensors").read_bytes()
    assert shell.hub.repositories[f"{USER}/patient"].head().files["model.safetensors"].content == content


@pytest.mark.parametrize("flaw", ["not_finite", "missing_tensor", "unknown_tensor", "cut_off"])
def test_folder_that_does_not_work_is_refused_before_any_request(flaw, shell, tmp_path):
    folder = save_model(tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if flaw == "not_finite":
        tensors["model.norm.weight"][3] = torch.nan
    elif flaw == "missing_tensor":
        del tensors["model.layers.1.mlp.experts.down_proj_2"]
    elif flaw == "unknown_tensor":
        tensors["model.layers.1.mlp.experts.down_proj_3"] = torch.ones(3)
    save_file(tensors, file, metadata={"format": "pt"})
    if flaw == "cut_off":
        file.write_bytes(file.read_bytes()[:-1000])
    requests = len(shell.hub.requests)
    result = shell.push(folder, f"{USER}/{flaw}")
    assert result.status == 2
    assert result.line
    assert len(shell.hub.requests) == requests
    assert f"{USER}/{flaw}" not in shell.hub.repositories


def test_folder_whose_cache_is_lost_is_refused(shell, tmp_path):
    """The code that is staged is that of this installation: what is broken here is a copy of it."""
    folder = save_model(tmp_path / "model", tokenizer=False)
    code = f"""
import mohge.model_cards.push as push
from mohge.commands.main import main
from mohge.model_cards import verify
stage = push.stage
def stage_broken(folder, target, *arguments, **about):
    card = stage(folder, target, *arguments, **about)
    file = target / "modeling_mohge.py"
    text = file.read_text()
    labels = '        labels = kwargs.get("labels")'
    broken = text.replace(labels, '        kwargs["cache"] = None' + chr(10) + labels)
    assert broken != text
    file.write_text(broken)
    return card
push.stage = stage_broken
check_code, verify.check_code = verify.check_code, lambda folder: None
try:
    assert main(["push", {str(folder)!r}, "{USER}/forgetful"]) == 1
finally:
    push.stage, verify.check_code = stage, check_code
"""
    requests = len(shell.hub.requests)
    result = shell.run(code)
    assert "Traceback" not in result.err
    assert result.line.startswith("mohge push: nothing was pushed: generation with a cache computes other logits")
    assert len(shell.hub.requests) == requests


@pytest.mark.usefixtures("_reloads_here")
def test_private_repository(shell, model):
    assert shell.push(model, f"{USER}/secret", "--private").status == 0
    assert shell.hub.repositories[f"{USER}/secret"].private
    assert shell.push(model, f"{USER}/open").status == 0
    refused = shell.push(model, f"{USER}/open", "--private")
    assert refused.status == 2
    assert "public" in refused.line


@pytest.mark.usefixtures("_reloads_here")
@pytest.mark.parametrize("token", ["", "hf_wrong"], ids=["no_token", "wrong_token"])
def test_without_access(token, shell, model):
    set_token = "import os; os.environ['HF_TOKEN'] = {!r}"
    shell.run(set_token.format(token))
    result = shell.push(model, f"{USER}/first-of-all")
    shell.run(set_token.format(TOKEN))
    assert result.status == 2
    assert "401" in result.line
    assert f"{USER}/first-of-all" not in shell.hub.repositories


@pytest.mark.usefixtures("_reloads_here")
@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [("somebody/else", [], "403"), (f"{USER}/licensed", ["--license", "unheard-of"], "license")],
    ids=["namespace", "license"],
)
def test_what_the_hub_refuses(name, options, reason, shell, model):
    result = shell.push(model, name, *options)
    assert result.status == 2
    assert reason in result.line
    assert name not in shell.hub.repositories or set(shell.hub.repositories[name].head().files) == {".gitattributes"}
