"""The `mohge` command. Exit status: 0, 1 when a check failed, 2 for bad usage or input."""

import argparse
import json
import os
import sys
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from mohge.conversion.command import add_arguments as add_convert_arguments
from mohge.conversion.command import run as run_convert
from mohge.model_cards.command import add_arguments as add_push_arguments
from mohge.model_cards.command import run as run_push
from mohge.model_cards.shipped import shipped_file, shipped_recipes
from mohge.training.evaluation import add_arguments as add_evaluation_arguments
from mohge.training.evaluation import run as run_evaluation
from mohge.training.placement.command import add_arguments as add_place_arguments
from mohge.training.placement.command import run as run_place
from mohge.training.report.command import add_arguments as add_report_arguments
from mohge.training.report.command import run as run_report
from mohge.training.simulation.command import add_arguments as add_simulate_arguments
from mohge.training.simulation.command import run as run_simulate

from .configuration_mohge import MoHGEConfig


def main(arguments: list[str] | None = None) -> int:
    """Run the command with `arguments` (by default those of the process) and return its exit status."""
    parser = argparse.ArgumentParser(prog="mohge", description="Heterogeneous mixture-of-experts language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="print the group table, total and activated parameters")
    info.add_argument("source", metavar="CONFIG_OR_FOLDER", help="a config.json, a model folder, a Hub id or a recipe")
    info.set_defaults(run=_info)
    convert = commands.add_parser("convert", help="turn a dense or homogeneous checkpoint into expert groups, or back")
    convert.set_defaults(run=run_convert)
    add_convert_arguments(convert)
    place = commands.add_parser(
        "place", help="where experts go on several devices, what it costs, and how to launch it"
    )
    place.set_defaults(run=run_place)
    add_place_arguments(place)
    simulate = commands.add_parser("simulate", help="balance and step time of expert allocations on many devices")
    simulate.set_defaults(run=run_simulate)
    add_simulate_arguments(simulate)
    evaluate = commands.add_parser("eval", help="perplexity of text, benchmark tasks, and what the router does")
    evaluate.set_defaults(run=run_evaluation)
    add_evaluation_arguments(evaluate)
    report = commands.add_parser("report", help="one page about a training run or a model")
    report.set_defaults(run=run_report)
    add_report_arguments(report)
    train = commands.add_parser("train", help="pretrain or go on training, from a recipe", add_help=False)
    train.set_defaults(run=_train)
    finetune = commands.add_parser(
        "finetune", help="fine-tune all weights or adapters, merge adapters, quantise experts", add_help=False
    )
    finetune.set_defaults(run=_finetune)
    push = commands.add_parser("push", help="check a model and upload it to the Hub with a card")
    push.set_defaults(run=run_push)
    add_push_arguments(push)
    demo = commands.add_parser("demo", help="train, save, reload and sample a small model on real text")
    demo.set_defaults(run=_demo)
    _add_demo_arguments(demo)
    arguments = sys.argv[1:] if arguments is None else arguments
    # These parse what follows themselves, with the flags of `TrainingArguments`, which take seconds to import.
    own = arguments[:1] if arguments[:1] in (["train"], ["finetune"]) else arguments
    options = parser.parse_args(own, argparse.Namespace(arguments=arguments[len(own) :]))
    try:
        return options.run(options)
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes, one on each machine
            print(f"mohge {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        left = {
            "convert": "the same command goes on from here",
            "train": "the same command goes on from the last checkpoint",
            "finetune": "the same command goes on from the last checkpoint",
        }.get(options.command, "nothing was written")
        print(f"\nmohge {options.command}: interrupted, {left}", file=sys.stderr)
        return 1


def _train(options: argparse.Namespace) -> int:
    from mohge.training.pretrain import run

    return run(options.arguments)


def _finetune(options: argparse.Namespace) -> int:
    from mohge.training.finetune import run

    return run(options.arguments)


def _info(options: argparse.Namespace) -> int:
    from .info import describe

    print(describe(load_config(options.source)))
    return 0


def load_config(source: str) -> MoHGEConfig:
    """
    Read a MoHGE config from a JSON file, a model folder, a Hub id or a shipped recipe.

    Raises:
        ValueError: if it is no config of a MoHGE model.
        OSError: if there is nothing to read.
    """
    path = Path(source)
    if not path.exists():
        path = shipped_file(source, "config.json") or path
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{source} is not JSON ({error}): give a config.json or its folder") from error
    elif path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json: give the folder of a saved model")
    elif not path.exists() and (source.count("/") != 1 or path.suffix == ".json"):  # not the form of a Hub id either
        raise FileNotFoundError(
            f"{source} does not exist: give a config.json, the folder of a saved model, or one of the recipes "
            f"{', '.join(shipped_recipes())}"
        )
    else:
        values, _ = MoHGEConfig.get_config_dict(source)
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type != "mohge":
        raise ValueError(f'{source} has `model_type` "{model_type}", not "mohge": give the config of a MoHGE model')
    try:
        return MoHGEConfig.from_dict(values)
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{source} is no valid config ({type(error).__name__}: {error}): mend that field") from error


def _add_demo_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--router",
        choices=["two_level", "top_k", "top_p", "grouped_top_k"],
        default="two_level",
        help="routing system: MoHGE, HMoE top-k, HMoE top-p or Hi-MoE (default: %(default)s)",
    )
    parser.add_argument("--output", help="folder to create for model, plots and page (default: mohge-demo-ROUTER)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")


def _demo(options: argparse.Namespace) -> int:
    from mohge.training.demo import run_demo

    return run_demo(options.router, options.output, options.steps, options.seed)


if __name__ == "__main__":
    sys.exit(main())
