"""How a run ends that cannot go on."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class RunFailed(RuntimeError):
    """A run failed although what it was given was right: commands print the reason and end with 1."""


def is_lost_touch(error: BaseException) -> bool:
    """Whether an error says that the ranks of a run cannot reach each other."""
    dist = sys.modules.get("torch.distributed")  # or else it is not of torch
    return isinstance(error, RuntimeError) and ((dist and isinstance(error, dist.DistError)) or "/gloo/" in str(error))


def lacks_room(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that a file could not grow."""
    while error is not None:
        if getattr(error, "errno", None) in _NO_ROOM or any(f"(os error {n})" in str(error) for n in _NO_ROOM):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Within this context, which writes `path`, a full disk and the like is [`RunFailed`]."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # torch's writer raises the last
        if isinstance(error, RunFailed) or is_lost_touch(error):
            raise
        raise RunFailed(
            f"{path} cannot be written ({error}): earlier checkpoints are as they were; make room, and the same "
            "command goes on"
        ) from error
