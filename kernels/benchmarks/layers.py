"""What benchmark_experts.py measures: layers, their traffic, the contestants, and the reference that checks them.

Shapes: T tokens, K slots, E experts, H hidden size, W width of an expert.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers.integrations.moe import grouped_mm_experts_forward

from mohge import MoHGEConfig
from mohge.blocks_mohge import MoHGEExperts


TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Bounds of |error| / |reference| of a whole tensor."""


@dataclass(frozen=True)
class Shape:
    hidden_size: int
    widths: tuple[int, ...]
    experts_per_group: int
    top_k: int

    @property
    def num_experts(self) -> int:
        return len(self.widths) * self.experts_per_group

    @property
    def mean_width(self) -> int:
        return sum(self.widths) // len(self.widths)


SHAPES = {
    "paper": Shape(1024, tuple(range(384, 1281, 128)), 8, 6),
    "large": Shape(2048, tuple(range(512, 1409, 128)), 16, 8),
}


@dataclass
class Inputs:
    hidden_states: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    grad_output: torch.Tensor


class Layer:
    """One layer's weights, and every way to run it: `name -> function(inputs) -> output`."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.experts = self._experts(shape.widths)
        self.uniform = self._experts((shape.mean_width,) * len(shape.widths))
        # Ids run over the groups first.
        self.width_of_id = torch.tensor(shape.widths, device=device).repeat(shape.experts_per_group)

    def _experts(self, widths: tuple[int, ...]) -> MoHGEExperts:
        config = MoHGEConfig(
            hidden_size=self.shape.hidden_size,
            moe_intermediate_sizes=list(widths),
            num_experts_per_group=self.shape.experts_per_group,
            num_experts_per_tok=self.shape.top_k,
            router_type="top_k",
        )
        experts = MoHGEExperts(config, config, torch.nn.SiLU()).to(self.device, self.dtype)
        experts.init_weights(self.shape.hidden_size**-0.5)
        return experts.eval()

    @cached_property
    def padded(self) -> SimpleNamespace:
        """All experts in one rectangle, zeros beyond their width."""
        widest, hidden_size = max(self.shape.widths), self.shape.hidden_size
        gate_up = torch.zeros(self.shape.num_experts, 2, widest, hidden_size, dtype=self.dtype, device=self.device)
        down = torch.zeros(self.shape.num_experts, hidden_size, widest, dtype=self.dtype, device=self.device)
        for expert, (gate_up_e, down_e) in enumerate(self.matrices()):
            gate_up[expert, :, : down_e.shape[1]] = gate_up_e.view(2, *down_e.T.shape)
            down[expert, :, : down_e.shape[1]] = down_e
        return _rectangle(gate_up.flatten(1, 2), down)

    @cached_property
    def of_mean_width(self) -> SimpleNamespace:
        gate_up, down = zip(*self.uniform.groups(), strict=True)
        return _rectangle(torch.cat(gate_up).detach(), torch.cat(down).detach())

    def matrices(self, name: str = "mohge") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """gate_up [2W, H] and down [H, W] by id."""
        experts = self.uniform if name == "uniform" else self.experts
        groups = [(gate_up.detach(), down.detach()) for gate_up, down in experts.groups()]
        for slot in range(self.shape.experts_per_group):
            yield from ((gate_up[slot], down[slot]) for gate_up, down in groups)

    def contestant(self, name: str) -> Callable[[Inputs], torch.Tensor]:
        """`eager`, `loop`, `pad`, `uniform`, `transformers` (both of the mean width), `mohge`, `mohge_prepacked`."""
        if name in ("pad", "transformers"):
            rectangle = self.padded if name == "pad" else self.of_mean_width
            return lambda x: grouped_mm_experts_forward(rectangle, x.hidden_states, x.index, x.weights)
        experts = self.uniform if name == "uniform" else self.experts
        implementation = {"loop": "grouped_mm", "uniform": "mohge"}.get(name, name)

        def run(x: Inputs) -> torch.Tensor:
            experts.config._experts_implementation = implementation
            return experts(x.hidden_states, x.index, x.weights)

        return run

    def parameters_of(self, name: str) -> list[torch.Tensor]:
        if name in ("pad", "transformers"):
            rectangle = self.padded if name == "pad" else self.of_mean_width
            return [rectangle.gate_up_proj, rectangle.down_proj]
        return list((self.uniform if name == "uniform" else self.experts).parameters())

    def inputs(self, tokens: int, traffic: str = "uniform") -> Inputs:
        """Random hidden states and weights, with fresh traffic."""
        shape = tokens, self.shape.hidden_size
        normal = torch.randn(2, *shape, device=self.device).to(self.dtype)
        weights = torch.rand(tokens, self.shape.top_k, device=self.device).softmax(-1).to(self.dtype)
        return Inputs(normal[0], self.traffic(tokens, traffic), weights, normal[1])

    def traffic(self, tokens: int, kind: str) -> torch.Tensor:
        """[T, K] ids: `uniform` at random, `balanced` (equal loads), `zipf` (load 1 / rank), `one_group` (half of the
        tokens choose among one group only)."""
        experts, top_k = self.shape.num_experts, self.shape.top_k
        order = torch.randperm(experts, device=self.device)
        if kind == "balanced":
            return order[torch.arange(tokens * top_k, device=self.device).view(tokens, top_k) % experts]
        scores = -torch.rand(tokens, experts, device=self.device).log().neg_().log()  # of Gumbel
        if kind == "zipf":
            scores += -(order + 1.0).log()
        if kind == "one_group":
            groups = len(self.shape.widths)
            others = torch.arange(experts, device=self.device) % groups != groups // 2
            scores[: tokens // 2, others] = float("-inf")
        return scores.topk(top_k).indices

    def flops(self, index: torch.Tensor) -> int:
        """Of a forward pass: 2 for each weight and pair."""
        return 6 * self.shape.hidden_size * int(self.width_of_id[index].sum())

    def weight_bytes(self, index: torch.Tensor) -> int:
        """Of the experts that tokens chose."""
        widths = self.width_of_id[index.unique()]
        return 3 * self.shape.hidden_size * int(widths.sum()) * self.dtype.itemsize

    def check(self, names: list[str], tokens: int) -> dict[str, float]:
        """Of each contestant the largest relative error of the output, with and without gradients, and of every
        gradient, expert by expert, against float64."""
        x = self.inputs(tokens)
        x.hidden_states.requires_grad_()
        x.weights.requires_grad_()
        made = {name: self._results(name, x) for name in names}
        errors = dict.fromkeys(names, 0.0)
        by_weights = [[name for name in names if name != "uniform"], [name for name in names if name == "uniform"]]
        for same in filter(None, by_weights):
            expected = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in made[same[0]][1:4]]
            for expert, matrices in enumerate(self.matrices(same[0])):
                token, slot = torch.where(x.index == expert)
                taken = x.hidden_states[token], x.weights[token, slot], *matrices
                leaves = [tensor.detach().double().requires_grad_() for tensor in taken]
                gate, up = F.linear(leaves[0], leaves[2]).chunk(2, -1)
                result = F.linear(F.silu(gate) * up, leaves[3]) * leaves[1][:, None]
                gradients = torch.autograd.grad(result, leaves, x.grad_output[token].double())
                expected[0].index_add_(0, token, result.detach())
                expected[1].index_add_(0, token, gradients[0])
                expected[2][token, slot] = gradients[1]
                for name in same:
                    of_expert = self._of_expert(name, made[name][4:], expert)
                    errors[name] = max(errors[name], *map(relative_error, of_expert, gradients[2:]))
            for name in same:
                errors[name] = max(errors[name], *map(relative_error, made[name], [expected[0], *expected]))
        return errors

    def _results(self, name: str, x: Inputs) -> list[torch.Tensor]:
        """The output without gradients and with them, and the gradients of hidden states, weights and parameters."""
        run = self.contestant(name)
        with torch.no_grad():
            inferred = run(x)
        output = run(x)
        leaves = [x.hidden_states, x.weights, *self.parameters_of(name)]
        return [inferred, output, *torch.autograd.grad(output, leaves, x.grad_output)]

    def _of_expert(self, name: str, gradients: list[torch.Tensor], expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        slot, group = divmod(expert, len(self.shape.widths))
        if name == "pad":
            width = self.shape.widths[group]
            gate_up = gradients[0][expert].view(2, -1, self.shape.hidden_size)[:, :width]
            return gate_up.flatten(0, 1), gradients[1][expert][:, :width]
        names = [name for name, _ in self.experts.named_parameters()]
        named = dict(zip(names, gradients, strict=True))
        return named[f"gate_up_proj_{group}"][slot], named[f"down_proj_{group}"][slot]

    def ceiling(self, tokens: int, backward: bool) -> Callable[[Inputs], None]:
        """
        The products alone, at equal loads. On CPU one `F.linear` (and its two transposes) after another; on GPU one
        batched product per group, with SwiGLU and a gather-and-sum.
        """
        return self._ceiling_gpu(tokens, backward) if self.device == "cuda" else self._ceiling_cpu(tokens, backward)

    def _ceiling_cpu(self, tokens, backward):
        pairs, experts = tokens * self.shape.top_k, list(self.matrices())
        rows = torch.full((len(experts),), pairs // len(experts)) + (
            torch.randperm(len(experts)) < pairs % len(experts)
        )

        def new(*shape: int) -> torch.Tensor:
            return torch.randn(shape).to(self.dtype)

        calls = [
            (up, down, new(m, up.shape[1]), new(m, down.shape[1]), new(m, up.shape[0]))
            for m, (up, down) in zip(rows.tolist(), experts, strict=True)
            if m
        ]

        def run(_):
            for gate_up, down, x, activation, projection in calls:
                F.linear(x, gate_up)
                F.linear(activation, down)
                if backward:  # x stands for the gradient of the output
                    F.linear(x, down.t())
                    F.linear(x.t(), activation.t())
                    F.linear(projection, gate_up.t())
                    F.linear(projection.t(), x.t())

        return torch.no_grad()(run)

    def _ceiling_gpu(self, tokens, backward):
        top_k, experts, hidden_size = self.shape.top_k, self.shape.num_experts, self.shape.hidden_size
        count = tokens * top_k // experts
        position = torch.randperm(count * experts, device=self.device)[: count * experts // top_k * top_k]
        position = position.view(-1, top_k)
        groups = [(gate_up.detach(), down.detach()) for gate_up, down in self.experts.groups()]
        x = torch.randn(self.shape.experts_per_group, count, hidden_size, device=self.device).to(self.dtype)
        rows = x.new_empty(len(groups), *x.shape)

        def run(_):
            for (gate_up, down), rows_g in zip(groups, rows, strict=True):
                gate, up = (x @ gate_up.mT).chunk(2, -1)
                activation = F.silu(gate) * up
                torch.bmm(activation, down.mT, out=rows_g)
                if backward:
                    d_activation = x @ down
                    x.mT @ activation
                    d_projection = torch.cat([d_activation * up, d_activation * gate], -1)
                    d_projection @ gate_up
                    d_projection.mT @ x
            for _ in range(1 + backward):
                F.embedding_bag(position, rows.view(-1, hidden_size), mode="sum")

        return torch.no_grad()(run)


def _rectangle(gate_up: torch.Tensor, down: torch.Tensor) -> SimpleNamespace:
    """What transformers' function for equal experts reads of its module."""
    return SimpleNamespace(
        gate_up_proj=gate_up.requires_grad_(),
        down_proj=down.requires_grad_(),
        num_experts=gate_up.shape[0],
        act_fn=F.silu,
        has_gate=True,
        has_bias=False,
        has_post_expert_norm=False,
        is_transposed=False,
        is_concatenated=True,
        _is_expert_parallel=False,
        _apply_gate=lambda gate_up: F.silu(gate_up.chunk(2, -1)[0]) * gate_up.chunk(2, -1)[1],
    )


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|; where the reference is zero, whether the result is (0 or inf)."""
    difference, norm = (got.detach().double() - want).norm(), want.norm()
    if norm == 0:
        return 0.0 if difference == 0 else float("inf")
    ratio = float(difference / norm)
    return ratio if ratio == ratio else float("inf")
