"""The arguments of every command. Imports nothing that takes long, so that help and wrong usage are answered at once;
the module of a command is imported when it runs."""

import argparse
import re
from dataclasses import fields
from typing import get_args

from mohge.conversion.recipe import Budget, Mode, Recipe, Router, Saliency
from mohge.model_cards.names import did_you_mean
from mohge.training.simulation.hardware import HARDWARE

from .evaluate import EVALUATION_NAME
from .flags import FinetuneArguments, PretrainArguments, add_flags
from .serve_check import ENGINES


class Parser(argparse.ArgumentParser):
    """`ArgumentParser` that says which command, option or choice was probably meant."""

    def parse_known_args(self, args=None, namespace=None):
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:  # said here, and not by the parser of all commands, which knows other options
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown

    def error(self, message: str):
        """Print the usage and the message, and exit with 2."""
        known = [*self._option_string_actions]
        for action in self._actions:
            known += map(str, action.choices or ())
        wrong = re.search(r"unrecognized arguments: (--[^ =]+)|invalid choice: '?([^' ]+)", message)
        super().error(message + (did_you_mean(wrong[1] or wrong[2], known) if wrong else ""))


def numbers(text: str) -> list[int]:
    """The value of an option such as 384,512."""
    return [int(part) for part in text.split(",")]


def number_or_numbers(text: str) -> int | list[int]:
    """The value of an option such as 8 or 8,4."""
    return numbers(text) if "," in text else int(text)


def info(parser: argparse.ArgumentParser):
    """Add the arguments of `mohge info`."""
    text = "a config.json, a model folder, a Hub id or a recipe"
    parser.add_argument("source", metavar="CONFIG_OR_FOLDER", help=text)


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


def convert(parser: argparse.ArgumentParser):
    """Add the arguments of `mohge convert`: every option of a [`Recipe`], and how to run it."""
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


def place(parser: argparse.ArgumentParser):
    """Add the arguments of `mohge place`."""
    parser.add_argument("source", metavar="CONFIG_OR_FOLDER", help="a config.json, a model folder or a Hub id")
    parser.add_argument("--devices", type=int, required=True, metavar="R", help="devices that share the experts")
    parser.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="copies of these R devices (default: %(default)s)"
    )
    parser.add_argument("--traffic", metavar="JSON", help="recorded routing (default: every expert equally likely)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the config's, or else float32")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per device and step (default: %(default)s)")
    parser.add_argument(
        "--sequence-length", type=int, metavar="S", help="tokens of a sequence (default: the config's, at most 4096)"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="keep only the inputs of the layers")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda", help="to launch on (default: %(default)s)"
    )
    parser.add_argument("--format", choices=["text", "json"], default="text", help="default: %(default)s")
    parser.add_argument("--plot", metavar="FILE", help="picture to write: .png or .svg")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="folder to create, with accelerate.yaml, launch.sh, placement.json and placement.svg",
    )


SIMULATION_LEGEND = """\
expert time  slowest over mean device of those that exchange tokens, computing the experts of a layer: what papers
             call balance; mean over steps and layers, and 95th percentile
device time  the same of all devices and of all work in a step: experts, exchanges, and the dense part
step         until all devices are done; gradient reduction and optimizer, the same for all, are left out
waiting      part of the step in which the mean device waits for slower ones"""


def simulate(parser: argparse.ArgumentParser):
    """Add the arguments of `mohge simulate`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"what is printed for each number of devices and allocation of experts:\n{SIMULATION_LEGEND}"
    parser.add_argument("source", metavar="CONFIG_OR_FOLDER", help="a config.json, a model folder or a Hub id")
    parser.add_argument("--traffic", metavar="JSON", help="recorded routing (default: balanced)")
    parser.add_argument(
        "--devices",
        type=numbers,
        default=[8, 16, 64, 1024],
        metavar="D,...",
        help="numbers of devices (default: 8,16,64,1024)",
    )
    parser.add_argument(
        "--ep-size",
        type=int,
        metavar="R",
        help="devices that share one copy of the experts (default: as many as divide the devices and fit the config)",
    )
    parser.add_argument(
        "--hardware",
        default="h100",
        metavar="NAME_OR_JSON",
        help=f"{', '.join(HARDWARE)}, or a file that describes a machine (default: %(default)s)",
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per device and step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=32, help="steps to simulate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--format", choices=["text", "json"], default="text", help="default: %(default)s")
    parser.add_argument("--plot", metavar="FILE", help="picture to write: .png, .svg or .pdf")


def _add_device(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the weights (default: as they were saved)",
    )
    parser.add_argument("--device", help="where to compute (default: the accelerator, or cpu)")


def _add_generation(parser: argparse.ArgumentParser):
    parser.add_argument("model", metavar="FOLDER", help="model folder or Hub id")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="0: the likeliest token (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="draw among tokens of this probability together (default: %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="tokens at most (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, help="of what is drawn (default: another each time)")
    _add_device(parser)


def generate(parser: argparse.ArgumentParser):
    """Add the arguments of `mohge generate`."""
    _add_generation(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue, or to answer with the chat template")
    parser.add_argument("--plain", action="store_true", help="continue the text although there is a chat template")


def chat(parser: argparse.ArgumentParser):
    """Add the arguments of `mohge chat`."""
    _add_generation(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the first question")


def evaluate(parser: argparse.ArgumentParser):
    """Add the arguments of `mohge eval`."""
    parser.add_argument("model", metavar="MODEL", help="model folder or Hub id")
    parser.add_argument(
        "--datasets",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="text to measure the perplexity of: Hub ids, folders, files (txt, jsonl, json, csv, parquet), "
        "standard-library, or mappings such as '{path: org/name, split: validation}'",
    )
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="tasks of lm-evaluation-harness")
    parser.add_argument("--include-path", metavar="FOLDER", help="folder of more tasks, as YAML")
    parser.add_argument("--num-fewshot", type=int, help="examples in the context of a task (default: the task's)")
    parser.add_argument("--limit", type=int, help="first examples of each task (default: all)")
    parser.add_argument("--tokens", type=int, help="first tokens of each text, in whole sequences (default: all)")
    parser.add_argument(
        "--sequence-length",
        type=int,
        help="tokens of a sequence, beyond which nothing is seen (default: 1024, or the model's context if shorter)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a batch (default: %(default)s)")
    _add_device(parser)
    parser.add_argument(
        "--output", metavar="FILE", help=f"JSON file to add the results to (default: {EVALUATION_NAME} in MODEL)"
    )


def serve_check(parser: argparse.ArgumentParser):
    """Add the arguments of `mohge serve-check`."""
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folder of a saved model, as it is or padded")
    parser.add_argument("--engine", choices=ENGINES, default="vllm", help="default: %(default)s")
    parser.add_argument(
        "--engine-python",
        metavar="PYTHON",
        help="the Python that has vllm, with this package's plugin, or llama_cpp (default: $VLLM_PYTHON or "
        "$LLAMA_CPP_PYTHON)",
    )
    parser.add_argument("--gguf", metavar="FILE", help="for llama.cpp, the file in float32 that was made of FOLDER")
    parser.add_argument("--prompts", type=int, default=4, metavar="N", help="number of prompts (default: %(default)s)")


def report(parser: argparse.ArgumentParser):
    """Add the arguments of `mohge report`."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="RUN_OR_MODEL",
        help="folder of a run (also one that is going on) or a model, or a Hub id; several are compared",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="text to measure routing on: a file (.txt, .jsonl, .json, .csv, .parquet), a folder, a data set's Hub "
        "id, or '{path: ..., split: ...}'",
    )
    parser.add_argument(
        "--tokens", type=int, default=65536, metavar="N", help="tokens of the text at most (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        metavar="FILE.html",
        help="page to write (default: report.html in the folder, or here for several, or for a model on the Hub)",
    )


def push(parser: argparse.ArgumentParser):
    """Add the arguments of `mohge push`."""
    parser.add_argument("folder", metavar="FOLDER", help="folder of a saved model")
    parser.add_argument("repo", metavar="REPO", help="repository on the Hub, such as name/model; created if need be")
    parser.add_argument("--private", action="store_true", default=None, help="create the repository as a private one")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--message", metavar="TEXT", help="commit message")
    parser.add_argument("--license", metavar="ID", help="license of the weights, such as apache-2.0, for the card")
    parser.add_argument("--language", metavar="CODE", nargs="+", help="languages, such as en, for the card")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the folder, print card and files, and leave the Hub alone"
    )


def demo(parser: argparse.ArgumentParser):
    """Add the arguments of `mohge demo`."""
    parser.add_argument(
        "--router",
        choices=["two_level", "top_k", "top_p", "grouped_top_k"],
        default="two_level",
        help="routing system: MoHGE, HMoE top-k, HMoE top-p or Hi-MoE (default: %(default)s)",
    )
    parser.add_argument("--output", help="folder to create for model, plots and page (default: mohge-demo-ROUTER)")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")


def train(parser: argparse.ArgumentParser):
    """Add the arguments of `mohge train` for its help."""
    add_flags(parser, PretrainArguments)


def finetune(parser: argparse.ArgumentParser):
    """Add the arguments of `mohge finetune` for its help."""
    add_flags(parser, FinetuneArguments)
