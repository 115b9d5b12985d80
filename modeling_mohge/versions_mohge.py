"""Which versions of transformers this code is for. Whatever imports it refuses an older one with this one line, so it
stands before every import that an older one may not have. This file also travels with checkpoints, whose code runs in
the environments of serving engines, which are behind."""

from packaging.version import Version
from transformers import __version__


OLDEST_TRANSFORMERS = "5.24"
"""The floor in pyproject.toml, of the package."""
OLDEST_SERVING_TRANSFORMERS = "5.19"
"""The floor of the code in a checkpoint, for inference: vLLM 0.32 pins this version."""
TESTED_TRANSFORMERS = "5.24"
"""Newest minor version on which the tests have run."""


TRAINS = Version(__version__) >= Version(OLDEST_TRANSFORMERS)
"""Whether this version has what training and spreading over devices need; any that is not refused can run a model."""

_oldest = OLDEST_TRANSFORMERS if __package__ == "mohge" else OLDEST_SERVING_TRANSFORMERS
if Version(__version__) < Version(_oldest):
    raise ImportError(
        f"mohge needs transformers {_oldest} or later, and {__version__} is installed: run "
        "`pip install -U transformers`"
    )
if Version(__version__).release[:2] > Version(TESTED_TRANSFORMERS).release:
    from transformers.utils import logging

    # One name, for the package and for every checkpoint's copy of it: one process is told once.
    logging.get_logger("transformers.mohge").warning_once(
        f"mohge was tested with transformers up to {TESTED_TRANSFORMERS}, and {__version__} is installed: if anything "
        f'fails, `pip install "transformers=={TESTED_TRANSFORMERS}.*"`'
    )
