"""
One thread for all tests: their tensors are too small to share, and threads would only wait for one another. And what
has been imported stays: Trainer collects garbage in every run, which would otherwise look through all of it.
"""

import gc

import pytest
import torch


torch.set_num_threads(1)


def pytest_collection_finish():
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # or else some libraries report at the end what was left


@pytest.fixture
def new_warnings():
    """What is said once in a process is said again."""
    from transformers.utils import logging

    logging.warning_once.cache_clear()
