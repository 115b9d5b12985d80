"""The `mohge` command. Exit status: 0, 1 when a check or a run failed, 2 for bad usage or input."""

import argparse
import os
import signal
import sys
import threading
from datetime import timedelta
from importlib import import_module


COMMANDS = {
    "info": "print the group table, total and activated parameters",
    "convert": "turn a dense or homogeneous checkpoint into expert groups, or back",
    "place": "where experts go on several devices, what it costs, and how to launch it",
    "simulate": "balance and step time of expert allocations on many devices",
    "evaluate": "perplexity of text, benchmark tasks, and what the router does",
    "serve_check": "compare the tokens of a serving engine with ours",
    "generate": "continue a text, or answer it",
    "chat": "talk with a model that has a chat template",
    "report": "one page about a training run or a model",
    "train": "pretrain or go on training, from a recipe",
    "finetune": "fine-tune all weights or adapters, merge adapters, quantise experts",
    "push": "check a model and upload it to the Hub with a card",
    "demo": "train, save, reload and sample a small model on real text",
}
"""Each module beside this one, with `run`, and function of `parsers`; under its name unless `_NAMES` has another."""
_NAMES = {"evaluate": "eval", "serve_check": "serve-check"}
_TRAINING = ("train", "finetune")
"""Those that parse what follows themselves, with `TrainingArguments`."""
_LEFT_BEHIND = {
    "convert": "the same command goes on from here",
    "generate": "the text ends here",
    "chat": "the chat ends here",
}
_NOTHING = "nothing was written"
_PATIENCE = timedelta(seconds=10)
"""For the first of several ranks to say why it ends."""


def make_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands, or with the arguments of one `only`."""
    from mohge import __version__

    from . import parsers

    parser = parsers.Parser(prog="mohge", description="Heterogeneous mixture-of-experts language models.")
    parser.add_argument("--version", action="version", version=f"mohge {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module, text in COMMANDS.items():
        name = _NAMES.get(module, module)
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=module not in _TRAINING)
        command.set_defaults(module=module, parser=command)
        if only in (None, name):
            getattr(parsers, module)(command)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command with `arguments` (by default those of the process) and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = next(iter(arguments), "")
    if not sys.stderr.isatty():  # where a bar's control characters are in the way; before the libraries look
        for library in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(library, "1")
    interrupted = []

    def interrupt(number, frame):
        interrupted.append(number)
        raise KeyboardInterrupt

    # In a thread, or where somebody else listens to Ctrl-C, or nobody shall, that stays as it is.
    listens = threading.current_thread() is threading.main_thread()
    listens = listens and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if listens:
        signal.signal(signal.SIGINT, interrupt)
    try:
        return _run(arguments, command)
    except (KeyboardInterrupt, Exception) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        if stopped or interrupted:  # which some packages make an error of their own
            left = (stopped and str(error)) or _LEFT_BEHIND.get(command, _NOTHING)
            print(f"\nmohge {command}: interrupted, {left}", file=sys.stderr)
            return 1
        return _end(command, error)
    finally:
        if listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(arguments: list[str], command: str) -> int:
    from mohge.model_cards.names import check_there
    from mohge.training.data.sources import parse_sources

    from .flags import check_flags, check_named

    parser = make_parser(command)
    trains = command in _TRAINING and not {"-h", "--help"} & {*arguments}
    options = parser.parse_args(arguments[:1] if trains else arguments)
    if trains:
        options.arguments = arguments[1:]
        check_flags(options.arguments, options.parser._option_string_actions)
        if os.environ.get("WORLD_SIZE", "1") == "1":  # other ranks, for whom it may be there, would wait
            check_named(options.arguments)
    named = [getattr(options, name, None) for name in ("source", "model", "folder")]
    for name in filter(None, [*named, *getattr(options, "sources", ())]):
        check_there(name)
    for name in ("datasets", "text", "calibration") if not trains else ():
        entries = getattr(options, name, None) or []
        parse_sources([entries] if isinstance(entries, str) else entries, f"--{name}")
    return import_module(f".{options.module}", __package__).run(options)


def _end(command: str, error: Exception) -> int:
    """Say in one line why a command failed, and return its exit status; raise what no message explains."""
    from mohge.training.loop.failure import RunFailed, is_lost_touch, lacks_room

    reason, failed = " ".join(str(error).split()), isinstance(error, RunFailed)
    if is_lost_touch(error):
        failed, first = True, str(error).partition("\n")[0]
        reason = f"lost touch with another rank ({first}): see what that one says, and start all again"
    elif lacks_room(error) and not failed:
        failed, reason = True, f"{reason}: make room; {_LEFT_BEHIND.get(command, _NOTHING)}"
    elif not (failed or _is_users(error)):
        raise error
    line = f"mohge {command}: {reason}"
    if is_lost_touch(error) or _is_news(line):
        print(line, file=sys.stderr)
    return 1 if failed else 2


def _is_news(line: str) -> bool:
    """Whether the first rank of several does not say the same."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not (dist.is_available() and dist.is_initialized()):
        return os.environ.get("LOCAL_RANK", "0") == "0"  # all have the same arguments, and are no further
    store = dist.distributed_c10d._get_default_store()
    try:
        if dist.get_rank() == 0:
            store.set("mohge/end", line)
            return True
        store.wait(["mohge/end"], _PATIENCE)
        return store.get("mohge/end").decode() != line
    except RuntimeError:  # the first rank is gone, or goes on
        return True


def _is_users(error: Exception) -> bool:
    """Whether this is a mistake of usage or input, which its message explains."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return isinstance(error, ValueError | OSError | ImportError | StrictDataclassError | SafetensorError)


def run_process(arguments: list[str] | None = None):
    """Run the command as all that this process does, which may be one of several ranks."""
    status = main(arguments)
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


if __name__ == "__main__":
    run_process()
