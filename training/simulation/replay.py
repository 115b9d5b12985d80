"""
Routing replayed by real processes: each is a device with the experts that an allocation gives it, computes with the
real kernels and exchanges real rows. What the simulator predicts is measured here.

Shapes: R devices, E experts of a layer, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mohge import MoHGEConfig
from mohge_kernels import swiglu_experts

from ..placement.allocations import Allocation


def expert_weights(layer_config: MoHGEConfig, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[2 W, H]` gate and up, and `[H, W]` down, of one expert: the same on every device."""
    generator = torch.Generator().manual_seed(layer * layer_config.num_experts + expert)
    width, hidden = layer_config.expert_widths[expert], layer_config.hidden_size
    gate_up = torch.randn(2 * width, hidden, generator=generator) / hidden**0.5
    return gate_up, torch.randn(hidden, width, generator=generator) / width**0.5


def split_choices(choices: torch.Tensor, allocation: Allocation) -> torch.Tensor:
    """
    `[R, R, E]`: rows of each expert that a device sends to another if its tokens choose `choices` `[R, E]`. A device
    with a copy of the expert keeps its rows; others spread them over all copies, as equally as whole rows can be.
    """
    devices = allocation.devices
    rows = torch.zeros(len(devices), *choices.shape, dtype=torch.int64)
    for source, counts in enumerate(choices.long().tolist()):
        for expert, count in enumerate(counts):
            holders = [device for device, experts in enumerate(devices) if expert in experts]
            targets = [source] if source in holders else holders
            for part in range(len(targets)):
                share = count * (part + 1) // len(targets) - count * part // len(targets)
                rows[source, targets[(part + source) % len(targets)], expert] = share
    return rows


class Exchange:
    """
    The rows of one layer and step as one device sees them. It sends them ordered by device and by id of the expert.

    Args:
        rows (`torch.Tensor` of shape `[R, R, E]`): What [`split_choices`] returns.
        rank (`int`): This device.
    """

    def __init__(self, rows: torch.Tensor, rank: int):
        sent, received = rows[rank], rows[:, rank]
        self.sent, self.received = sent.sum(1).tolist(), received.sum(1).tolist()
        ids = torch.arange(rows.shape[2]).expand_as(sent).flatten()
        self.sent_experts = ids.repeat_interleave(sent.flatten())
        self.received_experts = ids.repeat_interleave(received.flatten())

    def there(self, rows: torch.Tensor) -> torch.Tensor:
        """Send `rows` `[sent, H]` to their experts; returns those for the experts of this device."""
        return _all_to_all(rows, self.sent, self.received)

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        """Send what the experts of this device made of their rows back to where these came from."""
        return _all_to_all(rows, self.received, self.sent)


def _all_to_all(rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    output = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(output, rows, received, sent)
    return output


class DeviceExperts:
    """
    The experts of one layer that an allocation gives to one device.

    Args:
        layer_config ([`MoHGEConfig`]): Config of the layer.
        layer (`int`): Number of the layer, which its weights depend on.
        held (`tuple[int, ...]`): Ids of the experts.
        like (`torch.Tensor`): Has the device and dtype of the weights.
    """

    def __init__(self, layer_config: MoHGEConfig, layer: int, held: tuple[int, ...], like: torch.Tensor):
        groups = sorted({layer_config.expert_groups[expert] for expert in held})
        by_group = [[expert for expert in held if layer_config.expert_groups[expert] == group] for group in groups]
        self.place_of_expert = torch.empty(layer_config.num_experts, dtype=torch.int64, device=like.device)
        ordered = [expert for group in by_group for expert in group]
        self.place_of_expert[ordered] = torch.arange(len(held), device=like.device)
        weights = [[expert_weights(layer_config, layer, expert) for expert in group] for group in by_group]
        self.gate_up, self.down = (
            [torch.stack([pair[part] for pair in group]).to(like).requires_grad_() for group in weights]
            for part in range(2)
        )

    def __call__(self, rows: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """`[S, H]`: the output of expert `experts[s]` for each row `[S, H]`."""
        index = self.place_of_expert[experts].unsqueeze(1)
        return swiglu_experts(rows, self.gate_up, self.down, index, torch.ones_like(index, dtype=torch.float32))

    def zero_grad(self):
        """Forget the gradients of the weights."""
        for stack in self.gate_up + self.down:
            stack.grad = None


@dataclass
class Replayed:
    """What one device saw of a step."""

    expert_seconds: list[float]
    """Time with its experts, forward and backward, by layer."""
    outputs: list[torch.Tensor]
    """Output of each row it sent, by layer."""
    gradients: list[torch.Tensor]
    """Gradient of half the sum of all squared outputs in each of these rows, by layer."""


def replay_step(
    layers: list[DeviceExperts], exchanges: list[Exchange], rows: torch.Tensor, clock: Callable[[], float]
) -> Replayed:
    """
    The experts' part of a training step: for each layer all-to-all, experts, all-to-all back, and then backward.

    Args:
        layers (`list[DeviceExperts]`): This device's experts, by layer.
        exchanges (`list[Exchange]`): The rows of the step, by layer.
        rows (`torch.Tensor` of shape `[S, H]`): What is sent; each layer takes as many from the start as it needs.
        clock (`Callable[[], float]`): Seconds of this device's work.
    """
    seconds, outputs, kept = [], [], []
    for experts, exchange in zip(layers, exchanges, strict=True):
        received = exchange.there(rows[: sum(exchange.sent)]).requires_grad_()
        ids = exchange.received_experts.to(rows.device)
        start = clock()
        output = experts(received, ids)
        seconds.append(clock() - start)
        outputs.append(exchange.back(output.detach()))
        kept.append((received, output))
    gradients = []
    for layer in reversed(range(len(layers))):
        received, output = kept.pop()
        gradient = exchanges[layer].there(outputs[layer])
        start = clock()
        output.backward(gradient)
        seconds[layer] += clock() - start
        gradients.insert(0, exchanges[layer].back(received.grad))
        layers[layer].zero_grad()
    return Replayed(seconds, outputs, gradients)


def replay_error(config: MoHGEConfig, exchanges: list[Exchange], rows: torch.Tensor, replayed: Replayed) -> float:
    """The largest relative error, over layers, of outputs and gradients against one process in plain PyTorch."""
    errors = []
    for index, layer in enumerate(config.sparse_layers):
        ids = exchanges[index].sent_experts
        sent = rows[: len(ids)].float().requires_grad_()
        expected = torch.zeros_like(sent)
        for expert in ids.unique().tolist():
            gate_up, down = (weight.to(rows).float() for weight in expert_weights(layer, index, expert))
            chosen = (ids == expert).nonzero().squeeze(1).to(rows.device)
            gate, up = (sent[chosen] @ gate_up.T).chunk(2, dim=-1)
            expected = expected.index_add(0, chosen, (F.silu(gate) * up) @ down.T)
        (expected_gradient,) = torch.autograd.grad(expected.square().sum() / 2, sent)
        for value, reference in (
            (replayed.outputs[index], expected),
            (replayed.gradients[index], expected_gradient),
        ):
            reference = reference.detach()
            errors.append((value - reference).norm() / reference.norm())
    return float(torch.stack(errors).nan_to_num(nan=torch.inf).max())


__all__ = ["DeviceExperts", "Exchange", "Replayed", "expert_weights", "replay_error", "replay_step", "split_choices"]
