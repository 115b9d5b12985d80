"""What campaign.py measures the kernels against beyond the contestants of layers.py: bare products, other packages'
grouped products, and experts of one width that fills whole tiles.

Shapes as in layers.py.
"""

from collections.abc import Callable
from functools import cached_property
from statistics import median
from unittest import mock

import benchmark_experts
import torch
import torch.nn.functional as F
from layers import TOLERANCES, Inputs, Layer, relative_error

from mohge import experts_mohge


def transformer_engine() -> Callable:
    """TransformerEngine's grouped product, in the place of `experts_mohge._grouped_linear`."""
    import transformer_engine.pytorch as te

    modules = {}

    def product(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        experts, columns, depth = weight.shape
        if weight.data_ptr() not in modules:
            module = te.GroupedLinear(experts, depth, columns, bias=False, params_dtype=weight.dtype, device="cuda")
            for expert, matrix in enumerate(weight):
                getattr(module, f"weight{expert}").data.copy_(matrix)
            modules[weight.data_ptr()] = module
        return modules[weight.data_ptr()](rows, offsets.diff(prepend=offsets.new_zeros(1)).tolist())

    return product


def quack() -> Callable:
    """quack's grouped product, likewise."""
    from quack.gemm_interface import gemm

    def product(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return gemm(rows, weight.mT, cu_seqlens_m=F.pad(offsets, (1, 0)))

    return product


PACKAGES = {"transformer_engine": transformer_engine, "quack": quack}


class LayerWithRivals(Layer):
    """`products` (no function of the inputs), `whole_tiles`, and those of PACKAGES that are installed."""

    @cached_property
    def packages(self) -> dict[str, Callable]:
        found = {}
        for name, product in PACKAGES.items():
            try:
                found[name] = product()
            except Exception as error:  # not installed, or built for another version
                print(f"{name}: not measured, {type(error).__name__}: {error}")
        return found

    @cached_property
    def whole_tiles(self) -> torch.nn.Module:
        """Experts of the multiple of 256 next to the mean width."""
        tile = 256 if self.shape.mean_width > 256 else 16
        width = max(1, round(self.shape.mean_width / tile)) * tile
        return self._experts((width,) * len(self.shape.widths))

    def contestant(self, name: str) -> Callable[[Inputs], torch.Tensor]:
        if name == "whole_tiles":
            with mock.patch.object(self, "uniform", self.whole_tiles):
                return super().contestant("uniform")
        if name not in PACKAGES:
            return super().contestant(name)
        loop = super().contestant("loop")

        def run(x: Inputs) -> torch.Tensor:
            with mock.patch.object(experts_mohge, "_grouped_linear", self.packages[name]):
                return loop(x)

        return run

    def parameters_of(self, name: str) -> list[torch.Tensor]:
        return list(self.whole_tiles.parameters()) if name == "whole_tiles" else super().parameters_of(name)

    def products(self, tokens: int, backward: bool) -> Callable[[None], None]:
        """The matrix products of C alone, one batched product per group at equal loads: the hard ceiling."""
        count = max(1, tokens * self.shape.top_k // self.shape.num_experts)

        def new(experts: int, columns: int) -> torch.Tensor:
            return torch.randn(experts, count, columns, device=self.device).to(self.dtype)

        groups = [(gate_up.detach(), down.detach()) for gate_up, down in self.experts.groups()]
        data = [
            (gate_up, down, new(len(down), gate_up.shape[2]), new(len(down), down.shape[2]), new(*gate_up.shape[:2]))
            for gate_up, down in groups
        ]

        def run(_):
            for gate_up, down, x, activation, projection in data:
                x @ gate_up.mT
                activation @ down.mT
                if backward:  # x stands for the gradient of the output
                    x @ down
                    x.mT @ activation
                    projection @ gate_up
                    projection.mT @ x

        return torch.no_grad()(run)


def rivals_table(layer: LayerWithRivals, rounds: int, tokens: int) -> dict:
    """Forward passes; seconds of `whole_tiles` are scaled to the FLOPs of the others, which are not of their width."""
    names = ["loop", "mohge", "whole_tiles", *layer.packages]
    x = layer.inputs(tokens)
    with torch.no_grad():
        expected = layer.contestant("loop")(x).double()
        for name in list(layer.packages):
            error = relative_error(layer.contestant(name)(x), expected)
            if not error < TOLERANCES[layer.dtype]:
                print(f"{name}: not measured, wrong by {error:.1e}")
                names.remove(name)
    times = benchmark_experts.measure(layer, names, rounds, tokens, backward=False)
    width = layer.whole_tiles.config.moe_intermediate_sizes[0]
    times["whole_tiles"] = [seconds * layer.shape.mean_width / width for seconds in times["whole_tiles"]]
    demands = {}
    for backward in (False, True):
        products = layer.products(tokens, backward)
        bare = median(benchmark_experts.timed(products, None) for _ in range(rounds))
        ours = benchmark_experts.measure(layer, ["mohge"], rounds, tokens, backward)["mohge"]
        title = f"share of the products alone, {'forward + backward' if backward else 'forward'}"
        demands[title] = ([bare / seconds for seconds in ours], 0.0, 1.0)
    for name in [name for name in times if name not in ("mohge", "loop")]:
        must = 0.97 if name == "whole_tiles" else 1.0
        demands[f"against {name}"] = (benchmark_experts.ratios(times, name, "mohge"), must, 1.0)
    return benchmark_experts.report(f"rivals, forward, T = {tokens}", times, demands)


def few_tokens(layer: LayerWithRivals, rounds: int) -> dict:
    """Replays of CUDA graphs, every time with other traffic; `loop` waits for the device and cannot be captured."""
    times = {}
    for tokens in (1, 16, 64, 256, 600):
        for name in ("mohge", "uniform", "pad"):
            x, run = layer.inputs(tokens), layer.contestant(name)
            with torch.no_grad():
                run(x)  # compiles
                torch.cuda.synchronize()
                try:
                    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
                        run(x)
                except RuntimeError as error:  # transformers' functions may wait for the device
                    print(f"{name}: not captured, {error}")
                    continue
            measured = times[f"{name}, T = {tokens}"] = []
            for _ in range(rounds):
                x.index.copy_(layer.traffic(tokens, "uniform"))
                measured.append(benchmark_experts.timed(lambda _, graph=graph: graph.replay(), x))
    demands = {
        f"against {name}": (benchmark_experts.ratios(times, name, f"mohge, {name.split(', ')[1]}"), 0.97, 1.0)
        for name in times
        if not name.startswith("mohge")
    }
    return benchmark_experts.report("few tokens, from CUDA graphs", times, demands)
