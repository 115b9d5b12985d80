"""Low-rank adapters (LoRA, https://huggingface.co/papers/2106.09685) on attention and on experts of every width."""

import copy
import math
import re
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Literal

from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.backbones_mohge import FEED_FORWARD_NAMES
from mohge.info import model_without_memory
from mohge.loading import find_not_finite, load_model
from mohge.model_cards.folder import ADAPTER, ADAPTER_CONFIG, check_folder, open_weights, read_json


_NAMES = "|".join(FEED_FORWARD_NAMES)
_ATTENTION = rf"layers\.\d+\.(?!{_NAMES})\w+\.\w*_proj\w*"
_FEED_FORWARD = rf"({_NAMES})\.(shared_experts?\.)?((gate|up|down|gate_up)_proj|w[123])"


def group_ranks(config: MoHGEConfig, rank: int) -> list[list[int]]:
    """
    Ranks proportional to width, at the parameter budget of one rank for all groups.

    An expert of width W has `rank * (2 H + 3 W)` adapter parameters, on its `gate_up_proj` and its `down_proj`. Group
    g gets rank `c W_g`, rounded to the nearest integer (halves up) and at least 1; removed experts, of width 0, have
    no adapter. `c` is one number for the whole model, the largest with which all adapters together have no more
    parameters than at rank `rank` in every group.

    Args:
        config ([`MoHGEConfig`]): Config of the model.
        rank (`int`): Rank that all groups would have.

    Returns:
        `list[list[int]]`: rank of each group, for each layer that has experts.
    """
    layers = config.sparse_layers
    costs: dict[int, int] = {}  # adapter parameters of all experts of a width, for each unit of rank
    for layer in layers:
        for group in layer.kept_groups:
            count, width = layer.expert_counts[group], layer.moe_intermediate_sizes[group]
            costs[width] = costs.get(width, 0) + count * (2 * config.hidden_size + 3 * width)
    budget = rank * sum(costs.values())

    def parameters(c: Fraction) -> int:
        return sum(cost * _rounded(c * width) for width, cost in costs.items())

    # The rank of a width changes only where c * width passes a half, and stays below what takes the whole budget.
    steps = sorted(
        Fraction(2 * r - 1, 2 * width) for width, cost in costs.items() for r in range(1, budget // cost + 1)
    )
    steps.insert(0, Fraction(0))  # which is left where all experts have been removed
    within = bisect_right(steps, budget, key=parameters)
    return [[_rounded(steps[within - 1] * width) for width in layer.moe_intermediate_sizes] for layer in layers]


def _rounded(value: Fraction) -> int:
    return max(1, int(value + Fraction(1, 2))) if value else 0


def ignore_deprecation():
    """Ignores that PEFT and TRL read what transformers will remove: nobody who runs them can change that."""
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


@contextmanager
def known_patterns() -> Iterator[None]:
    """Silences peft's warning that ranks match nothing: it looks among modules, and these are of parameters."""
    with warnings.catch_warnings():
        ignore_deprecation()
        warnings.filterwarnings("ignore", message=".*(rank|alpha)_pattern keys did not match")
        yield


def lora_config(
    config: MoHGEConfig,
    rank: int = 16,
    targets: Literal["attention", "experts", "all"] = "all",
    alpha: float | None = None,
    **kwargs,
) -> LoraConfig:
    """
    Configuration of adapters, for [`~peft.get_peft_model`].

    Adapters on experts are one pair of factors for each expert, on the group tensors `gate_up_proj_{g}` and
    `down_proj_{g}` (`target_parameters` of peft), of the ranks of [`group_ranks`]. The router has none: it would move
    tokens between experts whose adapters are not trained for them.

    Args:
        config ([`MoHGEConfig`]): Config of the model.
        rank (`int`, *optional*, defaults to 16):
            Rank on attention and dense feed-forwards, and on experts the rank whose budget is shared out.
        targets (`str`, *optional*, defaults to `"all"`):
            `"attention"`, `"experts"` (the routed ones), or `"all"`: both, with the shared expert and dense layers.
        alpha (`float`, *optional*, defaults to `2 * rank`):
            Scale of the adapters in units of the rank: every adapter is multiplied by `alpha / rank`, whatever its own
            rank.
        kwargs: Other fields of `LoraConfig`.

    Raises:
        ValueError: if an argument is out of range, or adapters on experts are asked for what peft cannot do there.

    ```python
    >>> from peft import get_peft_model

    >>> model = get_peft_model(model, lora_config(model.config, rank=8, targets="experts"))
    ```
    """
    if not 1 <= rank <= config.hidden_size:
        raise ValueError(
            f"`lora_rank` is {rank}: it must be at least 1, and at most `hidden_size` {config.hidden_size}"
        )
    alpha = 2 * rank if alpha is None else alpha
    if not 0 < alpha < math.inf:
        raise ValueError(f"`lora_alpha` is {alpha}: it must be a number above 0")
    modules = {"attention": _ATTENTION, "experts": None, "all": f"({_ATTENTION}|{_FEED_FORWARD})"}
    if targets not in modules:
        raise ValueError(f'`lora_targets` is "{targets}": use one of {", ".join(modules)}')
    values = {"r": rank, "lora_alpha": alpha, "task_type": "CAUSAL_LM", **kwargs}
    if modules[targets] is not None:
        values["target_modules"] = rf".*\.{modules[targets]}"
    if targets != "attention":
        for name in ("lora_dropout", "use_dora"):
            if values.get(name):
                raise ValueError(
                    f"`{name}` works on no stack of experts: leave it out, or adapt the attention only (lora_targets)"
                )
        ranks = _ranks_by_parameter(config, rank)
        values["target_parameters"] = list(ranks)
        values["rank_pattern"] = ranks
        values["alpha_pattern"] = {name: alpha * own / rank for name, own in ranks.items()}
    return LoraConfig(**values)


def base_name(folder: str | Path) -> str:
    """Folder or Hub id of the model itself: `folder`, or what the adapter in it was trained on."""
    adapter = Path(folder) / ADAPTER_CONFIG
    if not adapter.is_file():
        return str(folder)
    check_folder(Path(folder))
    return str(read_json(adapter).get("base_model_name_or_path"))


def load_adapted(name: str | Path, config: MoHGEConfig, **kwargs) -> MoHGEForCausalLM:
    """[`load_model`] of a model of `config`, or of an adapter on one. Errors are those of [`read_adapter`] too."""
    if (Path(name) / ADAPTER_CONFIG).is_file():
        read_adapter(name, config)
    with known_patterns():
        return load_model(name, **kwargs)


def read_adapter(folder: str | Path, config: MoHGEConfig) -> PeftConfig:
    """
    The configuration of the adapter in a folder, whose file has all tensors that it needs on a model of `config`.

    Raises:
        ValueError: if it cannot be read, or naming the tensor that is missing, left over, of another shape or not
            finite.
        OSError: if there is none.
    """
    folder = Path(folder)
    check_folder(folder)
    try:
        adapter = PeftConfig.from_pretrained(folder)
        probe = copy.deepcopy(adapter)
        probe.base_model_name_or_path = None  # or else peft says that it was renamed
        with known_patterns():
            model = get_peft_model(model_without_memory(copy.deepcopy(config)), probe, low_cpu_mem_usage=True)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, re.error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} fits no adapter on this model ({reason}): train it again"
        ) from error
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    with open_weights(folder, ADAPTER) as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    reasons = {
        "lacks": wanted.keys() - found.keys(),
        # PEFT adds what belongs to the vocabulary.
        "has no place for": found.keys() - wanted.keys() - {f"base_model.model.{name}" for name in model.state_dict()},
        "has in another shape than its config asks for": {
            name for name in wanted.keys() & found.keys() if wanted[name].shape != found[name].shape
        },
        "has, but not finite,": {find_not_finite(found)} - {None},
    }
    for says, names in reasons.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{folder / ADAPTER} {says} the tensor {min(names)}{more}: train the adapter again")
    return adapter


def _ranks_by_parameter(config: MoHGEConfig, rank: int) -> dict[str, int]:
    """Rank of each stack of expert weights, by name."""
    layers = group_ranks(config, rank)
    if not any(map(any, layers)):
        raise ValueError(
            '`mlp_only_layers` and `moe_intermediate_sizes` leave no layer with experts: use lora_targets="attention"'
        )
    if not config.is_heterogeneous:
        return dict(_stacks("experts", layers[0]))
    model = model_without_memory(config)
    names = {module: name for name, module in model.named_modules()}
    return {
        name: own
        for found, ranks in zip(model.sparse_feed_forwards, layers, strict=True)
        for name, own in _stacks(names[found.experts], ranks)
    }


def _stacks(prefix: str, ranks: list[int]) -> Iterator[tuple[str, int]]:
    for group, rank in enumerate(ranks):
        for projection in ("gate_up_proj", "down_proj") if rank else ():
            yield f"{prefix}.{projection}_{group}", rank


__all__ = [
    *("base_name", "group_ranks", "ignore_deprecation", "known_patterns", "load_adapted"),
    *("lora_config", "read_adapter"),
]
