"""`python -m mohge`: see `mohge.commands`."""

from mohge.commands.main import run_process


run_process()
