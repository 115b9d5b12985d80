"""Which versions of transformers this code is for. Whatever imports it refuses an older one with this one line, so it
stands before every import that an older one may not have; this file also travels with checkpoints."""

from packaging.version import Version
from transformers import __version__


OLDEST_TRANSFORMERS = "5.24"
"""The floor in pyproject.toml."""
TESTED_TRANSFORMERS = "5.24"
"""Newest minor version on which the tests have run."""


if Version(__version__) < Version(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"mohge needs transformers {OLDEST_TRANSFORMERS} or later, and {__version__} is installed: run "
        "`pip install -U transformers`"
    )
if Version(__version__).release[:2] > Version(TESTED_TRANSFORMERS).release:
    from transformers.utils import logging

    # One name, for the package and for every checkpoint's copy of it: one process is told once.
    logging.get_logger("transformers.mohge").warning_once(
        f"mohge was tested with transformers up to {TESTED_TRANSFORMERS}, and {__version__} is installed: if anything "
        f'fails, `pip install "transformers=={TESTED_TRANSFORMERS}.*"`'
    )
