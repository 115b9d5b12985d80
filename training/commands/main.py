"""The `mohge` command. Exit status: 0, 1 when a check or a run failed, 2 for bad usage or input."""

import argparse
import os
import sys
from datetime import timedelta
from importlib import import_module


COMMANDS = {
    "info": "print the group table, total and activated parameters",
    "convert": "turn a dense or homogeneous checkpoint into expert groups, or back",
    "place": "where experts go on several devices, what it costs, and how to launch it",
    "simulate": "balance and step time of expert allocations on many devices",
    "evaluate": "perplexity of text, benchmark tasks, and what the router does",
    "serve_check": "compare the tokens of a serving engine with ours",
    "report": "one page about a training run or a model",
    "train": "pretrain or go on training, from a recipe",
    "finetune": "fine-tune all weights or adapters, merge adapters, quantise experts",
    "push": "check a model and upload it to the Hub with a card",
    "demo": "train, save, reload and sample a small model on real text",
}
"""Each module beside this one, with `add_arguments` and `run`; under its name unless `_NAMES` has another."""
_NAMES = {"evaluate": "eval", "serve_check": "serve-check"}
_LEFT_BEHIND = {
    "convert": "the same command goes on from here",
    "train": "the same command goes on from the last checkpoint",
    "finetune": "the same command goes on from the last checkpoint",
}
_NOTHING = "nothing was written"
_PATIENCE = timedelta(seconds=10)
"""For the first of several ranks to say why it ends."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command with `arguments` (by default those of the process) and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="mohge", description="Heterogeneous mixture-of-experts language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module_name, text in COMMANDS.items():
        name = _NAMES.get(module_name, module_name)
        if arguments[:1] != [name]:  # only what runs is imported
            commands.add_parser(name, help=text)
            continue
        module = import_module(f".{module_name}", __package__)
        # Those without `add_arguments` parse what follows themselves, with the flags of `TrainingArguments`.
        own = not hasattr(module, "add_arguments")
        command = commands.add_parser(name, help=text, add_help=not own)
        command.set_defaults(run=module.run)
        if own:
            command.set_defaults(arguments=arguments[1:])
            arguments = arguments[:1]
        else:
            module.add_arguments(command)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        left = _LEFT_BEHIND.get(options.command, _NOTHING)
        print(f"\nmohge {options.command}: interrupted, {left}", file=sys.stderr)
        return 1
    except Exception as error:
        from mohge.training.loop.failure import RunFailed, is_lost_touch, lacks_room

        reason, failed = " ".join(str(error).split()), isinstance(error, RunFailed)
        if is_lost_touch(error):
            failed, first = True, str(error).partition("\n")[0]
            reason = f"lost touch with another rank ({first}): see what that one says, and start all again"
        elif lacks_room(error) and not failed:
            failed, reason = True, f"{reason}: make room; {_LEFT_BEHIND.get(options.command, _NOTHING)}"
        elif not (failed or _is_users(error)):
            raise
        line = f"mohge {options.command}: {reason}"
        if is_lost_touch(error) or _is_news(line):
            print(line, file=sys.stderr)
        return 1 if failed else 2


def _is_news(line: str) -> bool:
    """Whether the first rank of several does not say the same."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
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


if __name__ == "__main__":
    sys.exit(main())
