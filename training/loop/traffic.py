"""Recorded routing: which experts the tokens of a run chose."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from mohge import MoHGEConfig
from mohge.model_cards.folder import read_json
from mohge.model_cards.writing import write_file


class RouterTraffic:
    """
    Recorded routing of a run: how many tokens chose each expert, forward pass by forward pass. `mohge place` reads it.

    Args:
        config ([`MoHGEConfig`]): Config of the model.
        limit (`int`, *optional*, defaults to `256`): Number of forward passes to keep, the newest ones.

    Raises:
        ValueError: if the config has no layer with experts.

    ```python
    >>> traffic = RouterTraffic(model.config)
    >>> outputs = model(**inputs, output_router_logits=True)
    >>> traffic.add(outputs.tokens_per_expert, tokens=inputs["attention_mask"].sum())
    >>> traffic.save("traffic.json")
    ```
    """

    expert_groups: list[list[int]]
    """Group of each expert, by id, for each layer that has experts."""
    expert_widths: list[list[int]]
    """Intermediate width of each expert, by id, for each layer that has experts."""

    def __init__(self, config: MoHGEConfig, limit: int = 256):
        if not config.sparse_layers:
            raise ValueError("`mlp_only_layers` leaves no layer with experts: there is no routing to record")
        self.expert_groups = [list(layer.expert_groups) for layer in config.sparse_layers]
        self.expert_widths = [list(layer.expert_widths) for layer in config.sparse_layers]
        self.limit = limit
        self._records = []

    def add(self, tokens_per_expert: Sequence[torch.Tensor], tokens: torch.Tensor | int):
        """Record a forward pass: the model output's `tokens_per_expert`, one tensor `[E]` per layer, and the pass's
        number of tokens without padding. Nothing waits for the device."""
        self._records.append((tokens, tuple(tokens_per_expert)))
        del self._records[: -self.limit]

    def extend(self, records: list[tuple[int, list[list[int]]]]):
        """Append the `records` of another rank or run of the same model. All are kept, whatever `limit` is."""
        self._records += records

    @property
    def records(self) -> list[tuple[int, list[list[int]]]]:
        """The forward passes, oldest first: tokens, and choices of each expert by layer and id, as plain numbers."""
        # Converted in place, so that each tensor is waited for once.
        self._records = [(int(tokens), [_integers(layer) for layer in layers]) for tokens, layers in self._records]
        return list(self._records)

    @property
    def tokens(self) -> list[int]:
        """Tokens of each recorded forward pass, padding left out."""
        return [tokens for tokens, _ in self.records]

    @property
    def counts(self) -> list[list[list[int]]]:
        """Choices of each expert, by record, layer and id."""
        return [layers for _, layers in self.records]

    def layer_counts(self, layer: int) -> torch.Tensor:
        """`[records, E]`, float64: choices of each expert of the sparse layer number `layer`, by id."""
        return torch.tensor([layers[layer] for layers in self.counts], dtype=torch.float64)

    def check(self, config: MoHGEConfig):
        """Raises `ValueError` if the traffic was recorded with other experts than those of `config`."""
        groups = [list(layer.expert_groups) for layer in config.sparse_layers]
        widths = [list(layer.expert_widths) for layer in config.sparse_layers]
        if (groups, widths) != (self.expert_groups, self.expert_widths):
            raise ValueError(
                f"the traffic was recorded with other experts ({_summary(self.expert_widths)}) than the config has "
                f"({_summary(widths)}): record it with this config"
            )

    def save(self, path: str | os.PathLike):
        """Write the records to the JSON file `path`, which holds the old or the new content at every moment."""
        content = {
            "expert_groups": self.expert_groups,
            "expert_widths": self.expert_widths,
            "tokens": self.tokens,
            "counts": self.counts,
        }
        write_file(Path(path), json.dumps(content, separators=(",", ":")))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "RouterTraffic":
        """
        Read what [`~RouterTraffic.save`] wrote.

        Raises:
            ValueError: if the file holds no recorded traffic.
            OSError: if it cannot be read.
        """
        try:
            content = read_json(Path(path))
            _check_content(content)
        except ValueError as error:
            raise ValueError(
                f"{path} is no recorded traffic ({error}): give the file that RouterTraffic.save wrote"
            ) from error
        traffic = cls.__new__(cls)
        traffic.expert_groups, traffic.expert_widths = content["expert_groups"], content["expert_widths"]
        traffic.limit = len(content["tokens"])
        traffic._records = list(zip(content["tokens"], content["counts"], strict=True))
        return traffic


def _integers(counts: torch.Tensor | list[int]) -> list[int]:
    return counts if isinstance(counts, list) else counts.long().tolist()


def _summary(expert_widths: list[list[int]]) -> str:
    experts, widths = sum(map(len, expert_widths)), sorted({width for layer in expert_widths for width in layer})
    return f"{experts} in {len(expert_widths)} layers, widths {widths[0]} to {widths[-1]}"


def _check_content(content):
    names = ("expert_groups", "expert_widths", "tokens", "counts")
    if not isinstance(content, dict) or not set(names) <= set(content):
        raise ValueError(f"it is no object with {', '.join(names)}")
    groups, widths, tokens, counts = (content[name] for name in names)
    if not (_is_table(groups) and _is_table(widths) and [*map(len, groups)] == [*map(len, widths)]):
        raise ValueError("expert_groups and expert_widths are not lists of numbers, of the same lengths")
    if not (_is_table([tokens]) and isinstance(counts, list) and len(tokens) == len(counts)):
        raise ValueError("tokens is no list of numbers, one for each record, or there is no record")
    for number, record in enumerate(counts):
        if not _is_table(record) or [*map(len, record)] != [*map(len, groups)]:
            raise ValueError(f"record {number} of counts does not hold one number, at least 0, for each expert")
    for layer in range(len(groups)):
        if not any(any(record[layer]) for record in counts):
            raise ValueError(f"no token chose any expert of layer {layer}")


def _is_table(value) -> bool:
    """Whether it is a list of lists of whole numbers, none of them empty or negative."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, list) and row and all(type(x) is int and x >= 0 for x in row) for row in value)
    )


__all__ = ["RouterTraffic"]
