"""The way to the Hub: stage a folder, check that it works on its own, upload it in one commit."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from mohge.conversion.tokenizer import load_tokenizer

from .card import MARKER, keep_card
from .names import is_hub_id
from .staging import is_stale, pushed_files, stage
from .verify import verify
from .writing import temporary_folder


@contextmanager
def checked_stage(
    folder: Path, repo_id: str, original: PreTrainedModel | None = None, **about
) -> Iterator[tuple[Path, ModelCard]]:
    """Within this context, a folder with what is pushed of the model in `folder`, and its card. It has been loaded
    where mohge is missing and computes what the model computes here. Arguments and errors as for [`push_folder`]."""
    validate_repo_id(repo_id)
    with temporary_folder(Path(tempfile.gettempdir()), "push") as staged:
        card = stage(folder, staged, repo_id, **about)
        verify(staged, original or folder)
        yield staged, card


@contextmanager
def _hub_errors(repo_id: str):
    """Within this context, what goes wrong with the Hub is an `OSError`, or a `ValueError` for the user's mistakes."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the client's HTTP library or of hf_xet, which have no base in common
        raise OSError(f"{repo_id} was not pushed: {error} {error.__cause__ or ''}") from error


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    original: PreTrainedModel | None = None,
    **about,
) -> CommitInfo:
    """
    Push the model in `folder`: `mohge push`.

    What is pushed is put together in a temporary folder (see [`stage`]) and loaded where mohge is missing. Only if it
    computes there what it computes here does anything go to the Hub, and then as one commit, which also deletes what
    an earlier push left there of other weights, code, tokenizer or records.

    A README.md that a person wrote, in `folder` or else in the repository, stays (see [`keep_card`]).

    Args:
        folder (`str` or `Path`): Folder of a saved MoHGE model.
        repo_id (`str`): Repository, created if it does not exist; without a namespace, one's own.
        private (`bool`, *optional*): Whether a new repository is private. By default as the account has it.
        token (`bool` or `str`, *optional*): Token of the Hub; by default the one of `hf auth login` or `HF_TOKEN`.
        revision (`str`, *optional*): Branch, created if it does not exist, or `refs/pr/N`.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request with the commit.
        commit_message (`str`, *optional*): First line of the commit message.
        commit_description (`str`, *optional*): The other lines.
        original (`PreTrainedModel`, *optional*): Model to compare with, if not the one in `folder`.
        about: What the card says beside what the folder records; see [`make_card`].

    Raises:
        ReloadError: if what would be pushed does not compute what the model computes. Nothing has gone to the Hub.
        ValueError: if `folder` or an argument does not do.
        OSError: if the Hub refuses, or cannot be reached; no commit was made.
    """
    api = HfApi(token=token, library_name="mohge")
    if "/" not in repo_id:
        with _hub_errors(repo_id):
            repo_id = f"{api.whoami()['name']}/{repo_id}"
    with checked_stage(Path(folder), repo_id, original, **about) as (staged, card), _hub_errors(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision)
        if private and not head.private:
            raise ValueError(f"{repo_id} exists and is public: make it private on its settings page first")
        there = {sibling.rfilename for sibling in head.siblings}
        if "README.md" in there and MARKER in card.text:
            other = api.hf_hub_download(repo_id, "README.md", revision=head.sha, cache_dir=staged / ".cache")
            keep_card(Path(other), card, about.get("license")).save(staged / "README.md")
        files = pushed_files(staged)
        # Not `upload_folder`, which may make several commits of a large folder.
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path, staged / path) for path in files),
                *(CommitOperationDelete(path) for path in sorted(there.difference(files)) if is_stale(path)),
            ],
            commit_message=commit_message or "Upload model with mohge",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head.sha,  # somebody else's commit in between is not overwritten unseen
        )


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    max_shard_size: int | str | None = "50GB",
    tags: list[str] | str | None = None,
    **kwargs,
) -> CommitInfo | None:
    """
    Push a model in memory, with the tokenizer of the checkpoint that it was loaded from: `model.push_to_hub`.

    Args:
        model ([`MoHGEForCausalLM`]): The model. If it is spread over ranks, all of them have to call this.
        repo_id (`str`): Repository.
        max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): Largest file of weights.
        tags (`list[str]` or `str`, *optional*): Tags for the card, beside `model.model_tags`.
        kwargs: As for [`push_folder`], which says what is raised.

    Returns:
        `CommitInfo`: The commit; `None` on ranks other than the first.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    place = model.config._name_or_path
    with temporary_folder(Path(tempfile.gettempdir()), "push") as folder:
        model.save_pretrained(folder, is_main_process=first, max_shard_size=max_shard_size)
        if not first:
            return None
        if place:
            with suppress(ValueError):  # there is none
                tokenizer = load_tokenizer(place)
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
        # What does not fit a process on the CPU, or cannot be copied, is compared as it was saved.
        as_saved = model.device.type != "cpu" or dist.is_initialized() or hasattr(model.config, "quantization_config")
        original = None if as_saved else model
        base_model = place if is_hub_id(place) and place != repo_id else None
        tags = [*(model.model_tags or []), *([tags] if isinstance(tags, str) else tags or [])]
        return push_folder(folder, repo_id, original=original, base_model=base_model, tags=tags, **kwargs)
