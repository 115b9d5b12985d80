"""`mohge.convert`: what `mohge convert` does, from Python."""

import os
from dataclasses import fields
from inspect import Parameter, Signature

from huggingface_hub.errors import StrictDataclassError

from mohge.model_cards.names import did_you_mean

from .pipeline import convert as carry_out
from .plan import make_plan
from .recipe import Mode, Recipe, load_recipe


def convert(source: str | os.PathLike, output: str | os.PathLike, mode: Mode, **options) -> dict:
    """
    Convert a checkpoint into expert groups, or back.

    Args:
        source (`str` or `os.PathLike`): Folder or Hub id of the checkpoint.
        output (`str` or `os.PathLike`): Folder to create.
        mode (`str`): What to make of the source, such as `"regroup"`, `"trim"`, `"split"` or `"export"`.
        options: The other options of [`Recipe`], those of `mohge convert`.

    Returns:
        `dict`: The receipt, as in conversion_report.json. `"passed"` says whether the check of the result passed.

    Raises:
        ValueError: for an option that there is not or that has a wrong value, and for what cannot be converted.
        OSError: if a file cannot be read or written.

    ```python
    >>> receipt = mohge.convert("olmoe", "olmoe-groups", mode="regroup", experts_per_group=3)
    >>> receipt["passed"]
    ```
    """
    known = [option.name for option in fields(Recipe)]
    for name in options.keys() - set(known):
        raise ValueError(f"`{name}` is no option of a conversion{did_you_mean(name, known)}")
    try:
        recipe = load_recipe(None, source=os.fspath(source), output=os.fspath(output), mode=mode, **options)
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return carry_out(make_plan(recipe))


convert.__signature__ = Signature(
    [
        Parameter("source", Parameter.POSITIONAL_OR_KEYWORD, annotation=str | os.PathLike),
        Parameter("output", Parameter.POSITIONAL_OR_KEYWORD, annotation=str | os.PathLike),
        Parameter("mode", Parameter.POSITIONAL_OR_KEYWORD, annotation=Mode),
        *(
            Parameter(option.name, Parameter.KEYWORD_ONLY, default=option.default, annotation=option.type)
            for option in fields(Recipe)
            if option.name not in ("source", "output", "mode")
        ),
    ],
    return_annotation=dict,
)

__all__ = ["convert"]
