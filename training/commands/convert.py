"""The command `mohge convert`."""

import argparse
from dataclasses import fields
from typing import get_args

from mohge.conversion.listing import list_decoders
from mohge.conversion.pipeline import convert, settle
from mohge.conversion.plan import make_plan
from mohge.conversion.receipt import summary
from mohge.conversion.recipe import Budget, Mode, Recipe, Router, Saliency, load_recipe


def numbers(text: str) -> list[int]:
    """The value of an option such as 384,512."""
    return [int(part) for part in text.split(",")]


def number_or_numbers(text: str) -> int | list[int]:
    """The value of an option such as 8 or 8,4."""
    return numbers(text) if "," in text else int(text)


_TYPES = {
    "widths": numbers,
    "experts_per_group": number_or_numbers,
    "top_k": int,
    "top_groups": int,
    "keep": float,
    "multiple": int,
    "groups": int,
    "keep_active": float,
    "reinit": float,
    "calibration_tokens": int,
    "calibration_length": int,
    "seed": int,
    "max_kl": float,
}
"""How an option's text becomes its value, where it is not the text itself."""
_CHOICES = {
    name: get_args(choices)
    for name, choices in {"mode": Mode, "router": Router, "saliency": Saliency, "budget": Budget}.items()
}


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of the command: every option of a [`Recipe`], and how to run it."""
    parser.add_argument("--recipe", metavar="YAML", help="file of options; those given here go before it")
    parser.add_argument("--list", action="store_true", help="print which decoders of transformers can be converted")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    for option in fields(Recipe):
        text, default = option.metadata["help"], option.default
        if default is None:
            default = option.metadata["with_calibration"]
        if default not in (None, ""):
            text += f" (default: {default})"
        if option.name in ("source", "output"):
            parser.add_argument(option.name, nargs="?", metavar=option.name.upper(), help=text)
        elif option.name == "pad":
            parser.add_argument("--pad", action="store_true", default=None, help=text)
        else:
            parser.add_argument(
                "--" + option.name.replace("_", "-"),
                type=_TYPES.get(option.name, str),
                choices=_CHOICES.get(option.name),
                help=text,
            )


def run(options: argparse.Namespace) -> int:
    """
    Run the command with parsed arguments.

    Returns:
        `int`: 0, or 1 if the check of the result failed.

    Raises:
        ValueError: for bad usage or input; nothing is written then.
    """
    if options.list:
        for line in list_decoders():
            print(line, flush=True)
        return 0
    given = {option.name: getattr(options, option.name) for option in fields(Recipe)}
    plan = make_plan(load_recipe(options.recipe, **given))
    if options.dry_run:
        settle(plan, progress=True)
        print(plan.describe())
        return 0
    report = convert(plan, progress=True)
    print(summary(report))
    print(f"written: {plan.recipe.output}")
    return 0 if report["passed"] else 1
