"""What to convert and how: the options of `mohge convert`, as a dataclass and as YAML."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import yaml
from huggingface_hub.dataclasses import strict

from mohge.model_cards.names import STANDARD_LIBRARY, did_you_mean, parse_yaml


Mode = Literal["regroup", "trim", "copy", "residual", "split", "shards", "export"]
Saliency = Literal["gradient", "contribution", "magnitude"]
Budget = Literal["memory", "work"]
Router = Literal["two_level", "top_k", "top_p", "grouped_top_k", "source"]


def _option(default, text: str, with_calibration=None):
    """A field of [`Recipe`]; `with_calibration` is its default where calibration data is given."""
    return field(default=default, metadata={"help": text, "with_calibration": with_calibration})


@strict
@dataclass(kw_only=True)
class Recipe:
    """
    Options of a conversion; `mohge convert --help` and `conversion/README.md` explain each. None leaves the choice to
    the mode.

    Raises:
        huggingface_hub.errors.StrictDataclassError: if an option has the wrong type.
    """

    source: str = _option("", "folder or Hub id of the checkpoint")
    output: str = _option("", "folder to create")
    mode: Mode | None = _option(None, "what to make of the source")
    widths: list[int] | None = _option(None, "expert width of each group, ascending, such as 384,512")
    experts_per_group: int | list[int] | None = _option(None, "experts in each group: one number, or one per group")
    top_k: int | None = _option(None, "experts per token")
    top_groups: int | None = _option(None, "groups kept per token")
    router: Router | None = _option(
        None, "router (default: two_level for a dense source, source, its own, for a mixture)"
    )
    keep: float | int | None = _option(
        None, "fraction of the routed experts' parameters to keep, each expert at the width that it deserves (trim)"
    )
    budget: Budget | None = _option(
        None, "what `keep` is a fraction of: memory, the parameters, or work, the parameters used as routed (trim)"
    )
    saliency: Saliency | None = _option(
        None, "what tells which neurons matter: gradient (default), contribution, or magnitude, without data"
    )
    multiple: int | None = _option(
        None,
        "what widths are multiples of: those that `keep` leads to (trim, default: 64), or the padded one (export)",
    )
    groups: int | None = _option(None, "most different widths in a layer that `keep` leads to (default: 3)")
    keep_active: float | int | None = _option(
        None,
        "activated parameters as routed, as a fraction of the source's (split, in place of widths, counts and top-k)",
    )
    reinit: float | int | None = _option(None, "fraction of each expert's neurons to draw anew (copy)")
    pad: bool | None = _option(None, "pad every expert to the largest width (export)")
    to: str | None = _option(
        None,
        "architecture that engines have, to pad to: mixtral, qwen2_moe, qwen3_moe, olmoe, or source, that of the "
        "mixture whose router the model keeps (export)",
    )
    calibration: str | None = _option(None, "text: a Hub id, a folder, or a txt, jsonl, json, csv or parquet file")
    calibration_config: str | None = _option(None, "configuration of the data set, where it has several")
    calibration_split: str | None = _option(None, "split of the data set", "train")
    calibration_column: str | None = _option(None, "column of the text", "text")
    calibration_tokens: int | None = _option(None, "tokens to read, an eighth of which is held out", 131072)
    calibration_length: int | None = _option(None, "tokens of a sequence", 1024)
    revision: str | None = _option(None, "revision of a source on the Hub")
    seed: int = _option(0, "seed of everything drawn at random")
    max_kl: float | int | None = _option(None, "fail above this mean KL divergence of the logits, in nats per token")
    device: str = _option("cpu", "device of the calibration and of the check")

    def calibrate_with(self, data_set: str):
        """Take this text for calibration, with every option of it that is not given at its default."""
        self.calibration = data_set
        for option in fields(self):
            if option.name.startswith("calibration_") and getattr(self, option.name) is None:
                setattr(self, option.name, option.metadata["with_calibration"])

    def to_yaml(self) -> str:
        """The recipe as YAML, options that are None left out."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return yaml.safe_dump(values, sort_keys=False)


def load_recipe(path: str | None, **options) -> Recipe:
    """
    Read a recipe.

    Args:
        path (`str`, *optional*): YAML file.
        options: Options that go before those of the file; None means not given.

    Raises:
        ValueError: if the file cannot be read or has an unknown option, or one that is needed is missing.
    """
    values = {}
    if path is not None:
        try:
            values = parse_yaml(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a YAML recipe ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} is no recipe: write one option per line, such as `mode: regroup`")
    known = {option.name for option in fields(Recipe)}
    unknown = sorted(str(name) for name in values.keys() - known)
    if unknown:
        raise ValueError(
            f"{path} has the unknown option `{unknown[0]}`: use one of "
            f"{', '.join(sorted(known))}{did_you_mean(unknown[0], known)}"
        )
    recipe = Recipe(**values | {name: value for name, value in options.items() if value is not None})
    for name in ("source", "output", "mode"):
        if not getattr(recipe, name):
            raise ValueError(f"`{name}` is missing: give it on the command line or in the recipe")
    for option in fields(Recipe):
        name, value = option.name, getattr(recipe, option.name)
        if not name.startswith("calibration_"):
            continue
        if value is not None and recipe.calibration is None:
            raise ValueError(
                f"`{name}` needs `calibration`: name the data set, such as {STANDARD_LIBRARY}, or leave it out"
            )
        if isinstance(value, int) and value < 2:
            raise ValueError(f"`{name}` is {value}: it must be at least 2 tokens")
    if recipe.calibration is not None:
        recipe.calibrate_with(recipe.calibration)
    if not 0 <= recipe.seed < 2**31:
        raise ValueError(f"`seed` is {recipe.seed}: it must be in 0 to 2147483647")
    if recipe.keep is not None and not 0 < recipe.keep < 1:
        raise ValueError(f"`keep` is {recipe.keep}: it is a fraction between 0 and 1")
    for name in ("multiple", "groups"):
        if getattr(recipe, name) is not None and getattr(recipe, name) < 1:
            raise ValueError(f"`{name}` is {getattr(recipe, name)}: it must be at least 1")
    if recipe.widths and min(recipe.widths) < 1:
        raise ValueError(f"`widths` is {recipe.widths}: each must be at least 1; `keep` removes experts")
    if recipe.keep_active is not None and not 0 < recipe.keep_active < 1:
        raise ValueError(f"`keep_active` is {recipe.keep_active}: it is a fraction, between 0 and 1")
    if recipe.reinit is not None and not 0 <= recipe.reinit <= 1:
        raise ValueError(f"`reinit` is {recipe.reinit}: it is a fraction, 0 to 1")
    return recipe
