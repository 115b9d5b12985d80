"""The command `mohge info`."""

import argparse
from pathlib import Path

from mohge.info import describe
from mohge.model_cards.records import recorded_routings
from mohge.model_cards.shipped import load_config


def run(options: argparse.Namespace) -> int:
    """
    Run the command with parsed arguments.

    Raises:
        ValueError: if there is no valid config, or a record of the folder cannot be read.
        OSError: if there is nothing to read.
    """
    config, folder = load_config(options.source), Path(options.source)
    print(describe(config, recorded_routings(folder, config) if folder.is_dir() else ()))
    return 0
