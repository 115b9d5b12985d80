"""The command `mohge convert`."""

import argparse
import sys
from dataclasses import fields

from mohge.conversion.listing import list_decoders
from mohge.conversion.pipeline import convert, settle
from mohge.conversion.plan import make_plan
from mohge.conversion.receipt import summary
from mohge.conversion.recipe import Recipe, load_recipe


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
        settle(plan, progress=sys.stderr.isatty())
        print(plan.describe())
        return 0
    report = convert(plan, progress=sys.stderr.isatty())
    print(summary(report))
    print(f"written: {plan.recipe.output}")
    return 0 if report["passed"] else 1
