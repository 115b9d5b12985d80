"""
One thread for all tests: their tensors are too small to share, and threads would only wait for one another. And what
has been imported stays: Trainer collects garbage in every run, which would otherwise look through all of it.

Products are those of oneDNN on every processor: with MKL, equal models do not compute equal bits. The kernels' own
tests take each way.
"""

import gc

import pytest
import torch

from mohge_kernels import cpu


torch.set_num_threads(1)
cpu.MKL_LEADS = False


def pytest_collection_finish():
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # or else some libraries report at the end what was left


@pytest.fixture
def new_warnings():
    """What is said once in a process is said again."""
    from transformers.utils import logging

    logging.warning_once.cache_clear()
