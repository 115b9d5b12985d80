"""What the simulator knows of a machine: its speed of computing, of memory and of links."""

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


_RATES = ("flops_per_second", "memory_bytes_per_second", "link_bytes_per_second", "inter_node_bytes_per_second")
_TIMES = ("kernel_overhead_seconds", "link_latency_seconds", "inter_node_latency_seconds")
_COUNTS = ("node_size", "element_bytes", "processors")


@dataclass(frozen=True)
class Hardware:
    """
    A machine of equal devices in nodes. A node's devices are linked to one another, and each has a second link to the
    devices of other nodes, which works at the same time.

    Args:
        name (`str`): Name, for the reader.
        flops_per_second (`float`): What a device achieves in the products of its experts and dense layers.
        memory_bytes_per_second (`float`): What a device achieves when it reads and writes its memory.
        kernel_overhead_seconds (`float`):
            Time that the experts of a device take in one layer, forward or backward, beside the work itself.
        link_bytes_per_second (`float`): What a device achieves to the others of its node, in each direction.
        link_latency_seconds (`float`): Time that a message to another device of the node takes beside its bytes.
        node_size (`int`): Devices of a node.
        inter_node_bytes_per_second (`float`): What a device achieves to other nodes, in each direction.
        inter_node_latency_seconds (`float`): Time that a message to another node takes beside its bytes.
        element_bytes (`int`, *optional*, defaults to `2`): Bytes of a number, computed with and sent.
        processors (`int`, *optional*):
            Processors that all devices together run on, where the devices are processes of one machine; a device
            uses one at a time. `None` if each device has its own.

    Raises:
        ValueError: if a field is out of range.
    """

    name: str
    flops_per_second: float
    memory_bytes_per_second: float
    kernel_overhead_seconds: float
    link_bytes_per_second: float
    link_latency_seconds: float
    node_size: int
    inter_node_bytes_per_second: float
    inter_node_latency_seconds: float
    element_bytes: int = 2
    processors: int | None = None

    def __post_init__(self):
        for names, types, smallest in (
            (_RATES, (int, float), "above 0"),
            (_TIMES, (int, float), "at least 0"),
            (_COUNTS, (int,), "at least 1"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is None and name == "processors":
                    continue
                if type(value) not in types or not 0 <= value < math.inf or (value == 0 and names != _TIMES):
                    kind = "whole number" if types == (int,) else "number"
                    raise ValueError(f"`{name}` is {value!r}: it must be a {kind}, {smallest}")

    def expert_seconds(self, flops: "torch.Tensor", moved_bytes: "torch.Tensor") -> "torch.Tensor":
        """Roofline: the time of a pass over the experts of a device, limited by arithmetic or by memory."""
        work = (flops / self.flops_per_second).maximum(moved_bytes / self.memory_bytes_per_second)
        return self.kernel_overhead_seconds + work

    def exchange_seconds(self, sent_bytes: "torch.Tensor", same_node: "torch.Tensor") -> "torch.Tensor":
        """
        When each device has done its part of an all-to-all.

        Args:
            sent_bytes (`torch.Tensor` of shape `[..., R, R]`): Bytes that a device (row) sends to another (column).
            same_node (`torch.Tensor` of shape `[..., R, R]`): Whether the two are in one node.

        Returns:
            `torch.Tensor` of shape `[..., R]`: seconds. A device sends a message to every other, empty or not, and
            the bytes it sends and those it receives flow at the same time.
        """
        others = sent_bytes.new_ones(sent_bytes.shape[-1]).diag() == 0
        tiers = []
        for within, latency, bandwidth in (
            (same_node, self.link_latency_seconds, self.link_bytes_per_second),
            (~same_node, self.inter_node_latency_seconds, self.inter_node_bytes_per_second),
        ):
            links = within & others
            flowing = sent_bytes * links
            busiest = flowing.sum(-1).maximum(flowing.sum(-2))
            tiers.append(latency * links.sum(-1) + busiest / bandwidth)
        return tiers[0].maximum(tiers[1])

    def wait_for_all(self, seconds: "torch.Tensor") -> "torch.Tensor":
        """
        The time until all devices are done that start together with `seconds` `[..., R]` of work each: that of the
        slowest. Devices that share fewer processors run at the same reduced speed, and faster when some are done.
        """
        if self.processors is None:
            return seconds.amax(-1)
        ascending = seconds.sort(-1).values
        running = seconds.new_ones(seconds.shape[-1]).cumsum(0).flip(0)  # until each has finished in turn
        slices = ascending.diff(dim=-1, prepend=0 * ascending[..., :1])
        return (slices * (running / self.processors).clamp(min=1)).sum(-1)

    def save(self, path: str | Path):
        """Write the fields to a JSON file."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, name_or_path: str) -> "Hardware":
        """
        A preset of `HARDWARE` by its name, or a JSON file with the fields of this class.

        Raises:
            ValueError: if the file does not hold these fields, or one is out of range.
            OSError: if there is neither.
        """
        if name_or_path in HARDWARE:
            return HARDWARE[name_or_path]
        path = Path(name_or_path)
        if not path.is_file():
            raise FileNotFoundError(f"no hardware {name_or_path}: give a file, or one of {', '.join(HARDWARE)}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}): give a file that describes hardware") from error
        known = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if not isinstance(values, dict) or not needed <= set(values) <= known:
            raise ValueError(f"{path} does not describe hardware: give an object with {', '.join(sorted(needed))}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


# Peak rates are NVIDIA's; the fractions of them that training achieves are assumptions: half of the arithmetic, four
# fifths of the memory, three quarters of the links. So are the latencies, and the overhead: that of four launches.
_H100 = Hardware(
    name="H100 SXM, 8 in a node, 400 Gb/s InfiniBand each",
    flops_per_second=0.5 * 989e12,  # bfloat16 without sparsity: H100 data sheet
    memory_bytes_per_second=0.8 * 3.35e12,  # HBM3: H100 data sheet
    kernel_overhead_seconds=8e-6,
    link_bytes_per_second=0.75 * 450e9,  # NVLink 4, 900 GB/s over both directions: H100 data sheet
    link_latency_seconds=2e-6,
    node_size=8,
    inter_node_bytes_per_second=0.75 * 50e9,  # a ConnectX-7 of 400 Gb/s for each GPU: DGX H100 data sheet
    inter_node_latency_seconds=5e-6,
)
# H200 data sheet: as H100, but HBM3e of 4.8 TB/s.
_H200 = replace(_H100, name=_H100.name.replace("H100", "H200"), memory_bytes_per_second=0.8 * 4.8e12)
HARDWARE = {"h100": _H100, "h200": _H200}
"""Machines by name. A measured one is written by `python -m mohge.training.benchmarks.simulation`."""

__all__ = ["HARDWARE", "Hardware"]
