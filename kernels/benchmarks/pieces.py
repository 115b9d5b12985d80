"""Every kernel of a layer alone, and the sweep over their tiles, for campaign.py.

Shapes: S pairs of a token and an expert, H hidden size, W width.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from statistics import median
from unittest import mock

import torch
from layers import Layer, relative_error

from mohge_kernels import offline, triton_experts, tuning, two_level_route
from mohge_kernels.tuning import Config


KERNELS = ["up", "down", "d_activation", "d_weights", "d_rows"]

_BIG = [Config(256, 128, 64, 8, 4, 1), Config(128, 128, 64, 4, 3, 2), Config(64, 256, 64, 4, 3, 1)]
_SMALL = [Config(64, 128, 64, 4, 4, 2), Config(64, 64, 64, 4, 4, 3), Config(128, 128, 64, 8, 4, 1)]
_DESCRIPTORS = [
    Config(128, 256, 64, 8, 4, 1, False, "descriptors"),
    Config(128, 256, 64, 8, 3, 1, True, "descriptors"),
    Config(128, 128, 64, 8, 4, 1, True, "descriptors"),
]
_TABLE = [Config(128, 128, 64, 8, 4, 1, False, "table"), Config(128, 128, 64, 8, 3, 1, True, "table")]
_MANY = {
    "up": [
        *_TABLE,
        Config(128, 128, 64, 8, 3, 1, True),
        Config(128, 128, 64, 8, 4, 1, True),
        Config(128, 64, 64, 4, 3, 2),
        Config(128, 64, 64, 4, 3, 2, True),
        Config(256, 64, 64, 8, 4, 1),
        Config(128, 64, 64, 8, 4, 1),
    ],
    "d_activation": [
        Config(128, 256, 64, 8, 3, 1),
        Config(128, 256, 64, 8, 4, 1),
        Config(64, 128, 64, 4, 4, 2),
        Config(128, 64, 64, 4, 4, 2),
        Config(128, 128, 64, 8, 3, 1),
    ],
    "d_weights": _BIG,
    "down": _BIG + _DESCRIPTORS,
    "d_rows": _BIG + _DESCRIPTORS,
}
_DECODE = [
    Config(16, 32, 128, 4, 4, 3),
    Config(16, 32, 256, 4, 3, 2),
    Config(16, 64, 128, 4, 4, 2),
    Config(16, 16, 256, 4, 4, 2),
    Config(16, 32, 128, 2, 4, 4),
    Config(16, 64, 64, 4, 6, 3),
    Config(16, 32, 128, 4, 4, 4),
]
_SPLIT = [config._replace(variant="split") for config in _DECODE[:3]]
CANDIDATES: dict[str, dict[str, list[Config]]] = {
    "many": _MANY,
    "decode": {"up": _DECODE, "down": _DECODE + _SPLIT},
    "some": {kernel: configs + _SMALL[:2] for kernel, configs in _MANY.items()},
    "few": dict.fromkeys(KERNELS, _SMALL),
}
"""By class of shapes (`tuning.shape_class`) and kernel."""

TINY_CANDIDATES = {
    "decode": {
        "up": [Config(16, 16, 32, 4, 2, 1), Config(16, 16, 16, 4, 2, 1, False, "table")],
        "down": [Config(16, 16, 16, 4, 2, 1, False, "descriptors"), Config(16, 16, 16, 4, 2, 1, False, "split")],
    }
}
"""For a walk through the sweep in Triton's interpreter."""


class Pieces:
    """The launches of one layer by name (`run`), the FLOPs and bytes of each (`work`), and the results of those that
    have tiles (`written`)."""

    def __init__(self, bench: Layer, tokens: int):
        experts, x = bench.experts, bench.inputs(tokens)
        gate_up, down = ([stack.detach() for stack in stacks] for stacks in zip(*experts.groups(), strict=True))
        layer = triton_experts._Layer(x.hidden_states, gate_up, down, experts.keys_per_group, bench.shape.top_k)
        groups, hidden, pairs, widest = len(down), layer.hidden_size, layer.pairs, max(layer.widths)
        used = int(bench.width_of_id[x.index].sum())

        def sort():
            keys = experts.key_of_expert[: experts.num_experts]
            return triton_experts.sort_pairs(x.index, keys, groups * layer.keys_per_group)

        order, position, counts = sort()
        pre = layer.empty(triton_experts.saved_elements(pairs, gate_up))
        activation, weighted, d_pre = (layer.empty(factor * pairs * widest) for factor in (1, 1, 2))
        rows, d_rows, output = layer.empty(pairs, hidden), layer.empty(pairs, hidden), layer.empty(tokens, hidden)
        d_gate_up, d_down = [torch.empty_like(t) for t in gate_up], [torch.empty_like(t) for t in down]
        logits = [torch.randn(tokens, n, device=bench.device) for n in (experts.num_experts, groups)]
        group_of_expert = torch.arange(experts.num_experts, device=bench.device) % groups
        kept = max(groups // 2, -(-layer.slots // layer.keys_per_group))

        def d_activation():
            parts = -(-widest // layer.tiles("d_activation")[0].block_n)
            partials = layer.empty(pairs, parts, dtype=torch.float32)
            layer.d_activation(x.grad_output, x.weights, order, counts, pre, d_pre, weighted, partials, True)

        self.layer = layer
        self.run: dict[str, Callable] = {
            "route": lambda: two_level_route(*logits, group_of_expert, layer.slots, kept, False),
            "sort": sort,
            "up": lambda: layer.up(x.hidden_states, order, counts, activation, pre, pre.numel()),
            "up_infer": lambda: layer.up(x.hidden_states, order, counts, activation, pre[:0], 0),
            "down": lambda: layer.rows("down", activation, layer.down, counts, rows),
            "combine": lambda: layer.combine(rows, x.weights, position, output),
            # Both, as `split` replaces both.
            "down_and_combine": lambda: layer.down_and_combine(activation, x.weights, position, counts, output),
            "d_activation": d_activation,
            "d_weights": lambda: layer.d_weights(
                x.hidden_states, x.grad_output, d_pre, weighted, order, counts, d_gate_up, d_down
            ),
            "d_rows": lambda: layer.rows("d_rows", d_pre, layer.gate_up, counts, d_rows),
            "combine_backward": lambda: layer.combine(d_rows, None, position, output),
        }
        self.written = {
            "up": [activation[:used]],
            "down": [output],
            "d_activation": [weighted[:used], d_pre[: 2 * used]],
            "d_weights": [*d_gate_up, *d_down],
            "d_rows": [d_rows],
        }
        flops, matrix = 2 * hidden * used, bench.weight_bytes(x.index) // 3
        per_token, per_pair = 2 * tokens * hidden, 2 * pairs * hidden
        self.work = {
            "route": (0, 4 * tokens * experts.num_experts),
            "sort": (0, 24 * pairs),
            "up": (2 * flops, per_token + 6 * used + 2 * matrix),
            "up_infer": (2 * flops, per_token + 2 * used + 2 * matrix),
            "down": (flops, 2 * used + per_pair + matrix),
            "combine": (0, per_pair + per_token),
            "down_and_combine": (flops, 2 * used + 3 * per_pair + per_token + matrix),
            "d_activation": (flops, per_token + 10 * used + matrix),
            "d_weights": (3 * flops, 2 * per_token + 6 * used + 3 * matrix),
            "d_rows": (2 * flops, 4 * used + per_pair + 2 * matrix),
            "combine_backward": (0, per_pair + per_token),
        }
        for run in self.run.values():  # what one reads another has written
            run()

    def seconds(self, name: str, replays: int = 5) -> float:
        """Of one launch, from replays of a graph of several: without the time of the host."""
        run, calls, times = self.run[name], 4, []
        if self.layer.device.type == "cpu":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        run()
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            for _ in range(calls):
                run()
        for _ in range(replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / calls / 1e3)
        return median(times)


def sweep(pieces: Pieces, kernel: str, candidates: list[Config], known: dict, decode: bool) -> Iterator[dict]:
    """Yield a record before and after every candidate is tried, and one of the best. Its results must be those of the
    tiles in use, its time is from graph replays, and it must be 2% better."""
    name = {"down": "down_and_combine", "up": "up_infer" if decode else "up"}.get(kernel, kernel)
    forced, by_table, run = {}, tuning.config, pieces.run[name]

    def config(asked: str, *args):
        return forced.get(asked) or by_table(asked, *args)

    with mock.patch.object(tuning, "config", config):
        base = pieces.layer.tiles(kernel)[0]
        run()
        expected = [tensor.double() for tensor in pieces.written[kernel]]
        times = {base: pieces.seconds(name)}
        for tried in candidates:
            if tried in known:  # it ended an earlier process, does not compile or spills
                continue
            yield {"kind": "trying", "config": tried}
            forced[kernel] = tried
            try:
                for tensor in pieces.written[kernel]:
                    tensor.fill_(float("nan"))
                run()
                error = max(map(relative_error, pieces.written[kernel], expected))
                if not error < 1e-2:
                    raise ValueError(f"wrong by {error:.1e}")
                times[tried] = pieces.seconds(name)
                yield {"kind": "tile", "config": tried, "us": 1e6 * times[tried], "error": error}
            except Exception as problem:
                yield {"kind": "tile", "config": tried, "problem": f"{type(problem).__name__}: {problem}"[:300]}
                if "CUDA error" in str(problem):  # nothing runs in this process any more
                    os._exit(3)
        finals = {}
        for tried in dict.fromkeys([base, *sorted(times, key=times.get)[:3]]):  # once more, in turn
            forced[kernel] = tried
            finals[tried] = pieces.seconds(name, replays=9)
    best = min(finals, key=finals.get)
    best = best if finals[best] < 0.98 * finals[base] else base
    yield {"kind": "tuned", "config": best, "us": 1e6 * finals[best], "before": 1e6 * finals[base]}


def compile_one(layer: offline.Layer, tokens: int, kernel: str | None, tried: Config | None) -> dict:
    """Compile into the cache of all processes what a layer launches: everything, or one kernel at a candidate."""
    names = {"d_activation": "d_activation_kernel", "d_weights": "d_weights_kernel"}
    by_table, start = tuning.config, time.time()
    with mock.patch.object(tuning, "config", lambda k, *args: tried if k == kernel else by_table(k, *args)):
        launches = offline.launches(layer, tokens, torch.bfloat16, weights_dtype=torch.bfloat16)
    made = [
        offline.compile_launch(launched, args, kwargs, tuning.OFFLINE.capability)
        for launched, args, kwargs in launches
        if kernel is None
        or launched.__name__ == names.get(kernel)
        or (kernel == "up" and launched.__name__.startswith(("up_", "tile_")))
        or kwargs.get("FACTOR") == {"down": 1, "d_rows": 2}.get(kernel, 0)
        or (kernel == "down" and "SPLITS" in kwargs)
    ]
    return {"seconds": time.time() - start, "spilled": max(each.spilled for each in made)}


def compile_ahead(tasks: list[tuple], workers: int) -> Iterator[dict]:
    """Yield a record of each task (arguments of `compile_one`) when it is done, by processes without a GPU."""
    with ProcessPoolExecutor(workers) as pool:
        futures = {pool.submit(compile_one, *task): task for task in tasks}
        for future in as_completed(futures):
            _, tokens, kernel, tried = futures[future]
            problem = future.exception()
            result = future.result() if problem is None else {"problem": str(problem)[-300:]}
            yield {"kind": "compiled", "tokens": tokens, "kernel": kernel, "config": tried, **result}
