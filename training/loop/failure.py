"""How a run ends that cannot go on."""


class RunFailed(RuntimeError):
    """A run failed although what it was given was right: commands print the reason and end with 1."""
