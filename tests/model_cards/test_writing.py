"""Temporary folders of killed processes are removed, those of others are not."""

import os
import signal

import pytest
from filelock import FileLock

from mohge.model_cards.writing import temporary_folder, write_file


def test_what_a_killed_process_left_goes_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    process = os.fork()
    if not process:
        with temporary_folder(run, "merge") as folder:
            (folder / "weights").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    (left,) = run.iterdir()
    assert (left / "work" / "weights").exists()
    (run / ".mohge-merge-empty").mkdir()
    kept = [run / f".mohge-merge-{name}" for name in ("alive", "foreign", "linked")] + [run / ".mohge-place-other"]
    for folder in kept:
        folder.mkdir()
        (folder / "precious").touch()
    kept[2].rename(tmp_path / "elsewhere")
    kept[2].symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "lock").touch()
    with FileLock(kept[0] / "lock"), temporary_folder(run, "merge") as folder, temporary_folder(run, "merge") as other:
        assert not list(folder.iterdir())
        assert folder.exists()
        assert other.exists()
        assert not left.exists()
    assert sorted(run.iterdir()) == sorted(kept)
    assert all((folder / "precious").exists() for folder in kept)


def test_a_file_is_there_as_a_whole_or_not_at_all(tmp_path):
    write_file(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_file(tmp_path / "file", "new \ud800")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
