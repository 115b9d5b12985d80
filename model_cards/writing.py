"""Writing so that a file or folder appears as a whole or not at all, and nothing that others made is touched."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


LOCK = "lock"
"""File of a folder of ours that whoever works in it has locked."""


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """
    Within this context, an empty folder, in a folder `.mohge-NAME-...` of `parent`. What killed processes left there
    under that name is removed; those that are alive hold a lock.
    """
    prefix = f".mohge-{name}-"
    while True:
        home = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = FileLock(home / LOCK)
        lock.acquire()
        if (home / LOCK).exists():  # or else another process took it for left behind, just before
            break
        lock.release()
    try:
        for left in parent.glob(f"{prefix}*"):
            if left != home:
                _remove_left(left, home.lstat().st_uid)
        (home / "work").mkdir()
        yield home / "work"
    finally:
        remove_folder(home)
        lock.release()


def _remove_left(folder: Path, owner: int):
    with suppress(OSError, Timeout):
        if folder.is_symlink() or folder.lstat().st_uid != owner:
            return
        if not (folder / LOCK).exists():
            folder.rmdir()  # which removes nothing that has a content
            return
        with FileLock(folder / LOCK, timeout=0):
            remove_folder(folder)


def remove_folder(folder: Path):
    """Remove a folder of ours as far as it can be."""
    with suppress(OSError):
        remove_contents(folder)
        shutil.rmtree(folder)


def remove_contents(folder: Path):
    """Remove all in a folder of ours but its lock, which tells it from others' until it is empty."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink()


def write_file(path: Path, text: str):
    """Write a text file so that it is there as a whole or not at all. A link there is replaced, not followed."""
    with temporary_folder(path.parent, path.name) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")
        os.replace(folder / path.name, path)


@contextmanager
def sole_writer(lock: Path, output: Path) -> Iterator[None]:
    """
    Within this context no other process that locks the file `lock` writes `output`. Folders that were made for the
    lock, and hold nothing else at the end, are removed.

    Raises:
        ValueError: if another process has locked it.
    """
    made = [path for path in lock.parents if not path.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = hold(lock, output)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # while it is held: who waits for it looks whether it is there
            held.release()
    finally:
        with suppress(OSError):  # until one is not empty
            for path in made:
                path.rmdir()


@contextmanager
def new_folder(target: Path, name: str) -> Iterator[Path]:
    """
    Within this context, an empty folder, as of [`temporary_folder`], in which to make what is then renamed to
    `target`.

    Raises:
        ValueError: if another process makes `target`.
        OSError: if it exists.
    """
    lock = target.with_name(f".{target.name}.lock")
    with sole_writer(lock, target), temporary_folder(target.parent, name) as folder:
        if target.exists():
            raise FileExistsError(f"{target} exists: name another folder, or remove it first")
        yield folder


def hold(file: Path, output: Path) -> FileLock:
    """
    Lock `file`, which says that this process writes `output`. The system lets go of it when the process ends, however
    that may be.

    Raises:
        ValueError: if another process has locked it.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process is writing {output}: wait for it, or name another folder") from None
    return lock
