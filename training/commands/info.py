"""The command `mohge info`."""

import argparse

from mohge.info import describe
from mohge.model_cards.shipped import load_config


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of the command."""
    text = "a config.json, a model folder, a Hub id or a recipe"
    parser.add_argument("source", metavar="CONFIG_OR_FOLDER", help=text)


def run(options: argparse.Namespace) -> int:
    """Run the command with parsed arguments."""
    print(describe(load_config(options.source)))
    return 0
