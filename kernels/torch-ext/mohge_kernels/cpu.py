"""Heterogeneous SwiGLU experts on CPU: one expert after another, on rows that are gathered while they are in cache.

Shapes: T tokens, K slots, S = T K pairs of a token and an expert, H hidden size, W width of an expert, M pairs of an
expert, P = `padded(M)`, R = sum of P over the experts.

What makes it fast (figures: benchmarks/results):

- Each processor has the product that is fastest on it: float32 goes to oneDNN or, as in `F.linear` of PyTorch, to MKL
  (`_mkl_leads`).
- Numbers of rows are rounded up to a few sizes. oneDNN generates code for every new shape, which takes as long as the
  product of some 50 rows, and keeps that of the latest 1024 shapes; traffic to experts has another shape every time.
- A weight keeps the memory of its gradient for the next one, in huge pages: the first write to 82 MB of fresh memory
  took 32 ms in pages of 4 KiB and 8 ms in pages of 2 MiB.
- Gradients of weights are written to their place. Autograd, which indexes a stack of weights for every expert, fills a
  stack of zeros for each.
- `embedding_bag` gathers, weights and adds a token's rows in one pass.
- `PackedExperts` keeps a copy of the weights in the layout of oneDNN, for inference.
"""

import ctypes
import mmap
import platform
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary


def saved_elements(pairs: int, gate_up: list[torch.Tensor]) -> int:
    """Elements of the buffer of pre-activations: an upper bound. Memory is taken by the part that is written."""
    return (pairs + pairs // 4) * max(weight.shape[1] for weight in gate_up)


def _huge_pages(size: int) -> mmap.mmap | None:
    """`size` bytes of fresh memory in huge pages, where the system has them and they pay."""
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return None
    return memory


_HUGE_PAGE = 2**21

_SPARE_MEMORY: "WeakTensorKeyDictionary[torch.Tensor, list[mmap.mmap]]" = WeakTensorKeyDictionary()
"""Of each weight, the memory of a former gradient, for the next one. It goes with the weight, or when the weight runs
without gradients."""


def _empty_gradient(weight: torch.Tensor) -> torch.Tensor:
    size = weight.nbytes
    spare = _SPARE_MEMORY.setdefault(weight, [])
    memory = spare.pop() if spare else _huge_pages(size)
    if memory is None or len(memory) != size:  # a weight may be resized in place
        return torch.empty_like(weight)
    exported = (ctypes.c_char * size).from_buffer(memory)  # the storage keeps it, and it can be watched
    weakref.finalize(exported, _keep_one, spare, memory).atexit = False
    return torch.frombuffer(exported, dtype=weight.dtype).view(weight.shape)


def release_spare_memory(weights: list[torch.Tensor]):
    """Gives back what `_empty_gradient` keeps for weights that now run without gradients."""
    if _SPARE_MEMORY:
        for weight in weights:
            _SPARE_MEMORY.pop(weight, None)


def _keep_one(spare: list[mmap.mmap], memory: mmap.mmap):
    if not spare:
        spare.append(memory)


def padded(rows: int) -> int:
    """`rows` rounded up to the next of four sizes between powers of two, or of eight above 64: at most a quarter."""
    step = 1 << max(rows.bit_length() - (4 if rows > 64 else 3), 0)
    return -(-rows // step) * step


_ROWS_TOGETHER = 128
"""Up to which the experts of a group share the calls around their products. With few rows each, a call takes as long
as what it does."""


class _Layout:
    """
    The padded order: the P rows of each expert that has pairs, by key. Rows beyond its M pairs repeat the last one, so
    that what a token holds reaches no other expert.
    """

    def __init__(self, order_S, position_TK, counts, keys_per_group):
        self.shape_TK = position_TK.shape
        chosen = counts.nonzero().flatten()
        counts_C = counts[chosen].long()
        self.counts = counts_C.tolist()
        self.places = [divmod(key, keys_per_group) for key in chosen.tolist()]
        self.sizes = [padded(count) for count in self.counts]
        sizes_C = torch.tensor(self.sizes, dtype=torch.int64, device="cpu")
        self.rows = sum(self.sizes)
        ends_C = counts_C.cumsum(0)
        shifts_C = sizes_C.cumsum(0) - sizes_C - ends_C + counts_C
        expert_R = torch.arange(len(self.sizes), device="cpu").repeat_interleave(sizes_C, output_size=self.rows)
        position_R = torch.minimum(torch.arange(self.rows, device="cpu") - shifts_C[expert_R], ends_C[expert_R] - 1)
        self.pairs_R = order_S[position_R].long()
        self.tokens_R = self.pairs_R // max(self.shape_TK[1], 1)
        # Skipped slots read a row behind the last, which is zero.
        self.row_TK = torch.full((self.shape_TK.numel(),), self.rows, device="cpu")
        rows_S = torch.arange(sum(self.counts), device="cpu")
        rows_S += shifts_C.repeat_interleave(counts_C, output_size=rows_S.numel())
        self.row_TK[order_S[: rows_S.numel()].long()] = rows_S
        self.row_TK = self.row_TK.view(self.shape_TK)

    def matrices(self, stacks: list[torch.Tensor]) -> list[torch.Tensor]:
        """The matrix of each expert that has pairs."""
        return [stacks[group][slot] for group, slot in self.places]

    def runs(self) -> Iterator[slice]:
        """Neighbours in a group that have few rows between them, or one expert."""
        first, rows = 0, 0
        for expert, ((group, _), size) in enumerate(zip(self.places, self.sizes, strict=True)):
            if expert > first and (group != self.places[first][0] or rows + size > _ROWS_TOGETHER):
                yield slice(first, expert)
                first, rows = expert, 0
            rows += size
        if self.sizes:
            yield slice(first, len(self.sizes))

    def split(self, tensor_R: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rows of each expert."""
        return tensor_R[: self.rows].split(self.sizes)

    def split_saved(self, saved: torch.Tensor, gate_up: list[torch.Tensor]) -> list[torch.Tensor]:
        """[P, 2W] pre-activations of each expert."""
        columns = [gate_up[group].shape[1] for group, _ in self.places]
        sizes = [rows * width for rows, width in zip(self.sizes, columns, strict=True)]
        parts = saved[: sum(sizes)].split(sizes)
        return [part.view(-1, width) for part, width in zip(parts, columns, strict=True)]

    def new_rows(self, like: torch.Tensor) -> torch.Tensor:
        """[R + 1, H], the last row zero."""
        rows = like.new_empty(self.rows + 1, like.shape[1])
        rows[-1] = 0
        return rows

    def combine(self, rows_RH: torch.Tensor, weights_TK: torch.Tensor | None = None) -> torch.Tensor:
        """[T, H]: the sum of each token's rows, added up in float32."""
        if weights_TK is not None:
            weights_TK = weights_TK.to(rows_RH.dtype).masked_fill(self.row_TK == self.rows, 0)
        if self.row_TK.numel() == 0:
            return rows_RH.new_zeros(self.shape_TK[0], rows_RH.shape[1])
        return F.embedding_bag(self.row_TK, rows_RH, mode="sum", per_sample_weights=weights_TK)


def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available():
        return ()
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return (torch.float32,)
    return (torch.float32, torch.bfloat16)


_ONEDNN_DTYPES = _onednn_dtypes()

EMULATES_BFLOAT16 = platform.machine().lower() in ("x86_64", "amd64") and not (
    torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
)
"""Whether this is a processor of Intel or AMD without instructions for bfloat16."""


class PackedExperts:
    """
    Copies of the experts' weights in the layout in which oneDNN multiplies, for inference on CPU. They take the memory
    of the weights once more, and do not follow later changes of them.

    Args:
        gate_up (`list[torch.Tensor]`, each of shape `(experts_of_group, 2 * width, hidden_size)`): In float32 or
            bfloat16.
        down (`list[torch.Tensor]`, each of shape `(experts_of_group, hidden_size, width)`): The same.

    Raises:
        ValueError: for weights in another dtype or on another device.
    """

    def __init__(self, gate_up: list[torch.Tensor], down: list[torch.Tensor]):
        reason = self.reason_against(gate_up[0])
        if reason is not None:
            raise ValueError(f"`gate_up` cannot be packed: {reason}")
        pack = torch.ops.mkldnn._reorder_linear_weight
        self.gate_up, self.down = (
            [[pack(matrix.detach(), _PACKED_FOR_ROWS) for matrix in stack] for stack in stacks]
            for stacks in (gate_up, down)
        )

    @staticmethod
    def reason_against(weight: torch.Tensor) -> str | None:
        """Why weights like this one cannot be packed, in half a sentence; None if they can."""
        if weight.device.type == "cpu" and weight.dtype in _ONEDNN_DTYPES:
            return None
        possible = " or ".join(map(str, _ONEDNN_DTYPES)) or "nothing without oneDNN"
        return f"it is {weight.dtype} on {weight.device}, and this machine packs {possible} on cpu"


_PACKED_FOR_ROWS = 24
"""oneDNN chooses a layout for a number of rows; this one's was within 2% of the best for 1 to 192 rows."""


@torch.autocast("cpu", enabled=False)
def forward(
    hidden_states: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    index: torch.Tensor,
    key_of_expert: torch.Tensor,
    weights: torch.Tensor,
    keys_per_group: int,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator `mohge_kernels::swiglu_experts`."""
    order, position, counts = _sort(index, key_of_expert, len(gate_up) * keys_per_group)
    layout = _Layout(order, position, counts, keys_per_group)
    rows_RH = layout.new_rows(hidden_states)
    saved = hidden_states.new_empty(saved_elements(index.numel(), gate_up) if save else 0)
    parts = layout.split(layout.tokens_R), layout.split(rows_RH), layout.matrices(gate_up), layout.matrices(down)
    projections = layout.split_saved(saved, gate_up) if save else [None] * len(layout.sizes)
    for run in layout.runs():
        tokens, outs, up_matrices, down_matrices = (part[run] for part in parts)
        x = hidden_states.index_select(0, torch.cat(tokens) if len(tokens) > 1 else tokens[0])
        made = map(_linear, x.split(layout.sizes[run]), up_matrices, projections[run])
        projection = torch.cat(list(made)) if len(tokens) > 1 else next(made)
        gate, up = projection.chunk(2, dim=-1)
        activations = F.silu(gate).mul_(up).split(layout.sizes[run])
        for activation, matrix, out in zip(activations, down_matrices, outs, strict=True):
            _linear(activation, matrix, out)
    return layout.combine(rows_RH, weights), saved, order, position, counts


@torch.autocast("cpu", enabled=False)
@torch.no_grad()
def infer(
    hidden_states: torch.Tensor,
    gate_up: list[torch.Tensor] | list[list[torch.Tensor]],
    down: list[torch.Tensor] | list[list[torch.Tensor]],
    index: torch.Tensor,
    key_of_expert: torch.Tensor,
    weights: torch.Tensor,
    keys_per_group: int,
) -> torch.Tensor:
    """The output alone, for weights in stacks or of `PackedExperts`. A single token needs no sorting."""
    if index.shape[0] != 1:
        return forward(hidden_states, gate_up, down, index, key_of_expert, weights, keys_per_group, save=False)[0]
    keys, to_skip = key_of_expert.tolist(), len(gate_up) * keys_per_group
    chosen = [(slot, keys[id]) for slot, id in enumerate(index[0].tolist()) if 0 <= id < len(keys)]
    chosen = [(slot, key) for slot, key in chosen if key != to_skip]
    rows = hidden_states.new_empty(len(chosen), hidden_states.shape[1])
    for (_, key), row in zip(chosen, rows.unsqueeze(1), strict=True):
        group, slot = divmod(key, keys_per_group)
        gate, up = _linear(hidden_states, gate_up[group][slot]).chunk(2, dim=-1)
        _linear(F.silu(gate).mul_(up), down[group][slot], row)
    return weights[:, [slot for slot, _ in chosen]].to(rows.dtype) @ rows


@torch.autocast("cpu", enabled=False)
def backward(
    grad_output: torch.Tensor,
    hidden_states: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    weights: torch.Tensor,
    saved: torch.Tensor,
    order: torch.Tensor,
    position: torch.Tensor,
    counts: torch.Tensor,
    keys_per_group: int,
    needs: list[bool],
) -> list[torch.Tensor]:
    """The operator `mohge_kernels::swiglu_experts_backward`."""
    needs_hidden, needs_weights, needs_gate_up, needs_down = needs
    layout = _Layout(order, position, counts, keys_per_group)
    weights_R = weights.flatten().index_select(0, layout.pairs_R).to(hidden_states.dtype).unsqueeze(1)
    d_rows_RH = layout.new_rows(hidden_states)
    d_weights_R = weights.new_zeros(layout.rows + 1)
    d_gate_up = _empty_gradients(gate_up, counts, keys_per_group) if needs_gate_up else []
    d_down = _empty_gradients(down, counts, keys_per_group) if needs_down else []
    unneeded = [None] * len(layout.sizes)
    experts = zip(
        layout.counts,
        layout.split(layout.tokens_R),
        layout.split(weights_R),
        layout.split_saved(saved, gate_up),
        layout.matrices(gate_up),
        layout.matrices(down),
        layout.split(d_rows_RH),
        layout.split(d_weights_R),
        layout.matrices(d_gate_up) if needs_gate_up else unneeded,
        layout.matrices(d_down) if needs_down else unneeded,
        strict=True,
    )
    for (
        count,
        tokens_P,
        weights_P,
        projection,
        gate_up_e,
        down_e,
        d_rows,
        d_weights_e,
        d_gate_up_e,
        d_down_e,
    ) in experts:
        dy_PH = grad_output.index_select(0, tokens_P)
        if count < dy_PH.shape[0]:
            dy_PH[count:] = 0
        gate, up = projection.chunk(2, dim=-1)
        silu = F.silu(gate)
        activation = silu * up
        d_activation = _linear(dy_PH, down_e.t())
        if needs_weights:
            d_weights_e.copy_(torch.linalg.vecdot(d_activation, activation))
        if needs_down:
            _linear(dy_PH.t(), activation.mul_(weights_P).t(), d_down_e)
        if needs_hidden or needs_gate_up:
            d_projection = torch.empty_like(projection)
            d_gate, d_up = d_projection.chunk(2, dim=-1)
            d_activation.mul_(weights_P)
            torch.mul(d_activation, silu, out=d_up)
            torch.ops.aten.silu_backward.grad_input(d_activation.mul_(up), gate, grad_input=d_gate)
        if needs_hidden:
            _linear(d_projection, gate_up_e.t(), d_rows)
        if needs_gate_up:
            _linear(d_projection.t(), hidden_states.index_select(0, tokens_P).t(), d_gate_up_e)
    gradients = [layout.combine(d_rows_RH)] if needs_hidden else []
    if needs_weights:
        gradients.append(d_weights_R[layout.row_TK])
    return gradients + d_gate_up + d_down


def _empty_gradients(stacks: list[torch.Tensor], counts: torch.Tensor, keys_per_group: int) -> list[torch.Tensor]:
    """Tensors like the weights, zero for the experts that no pair chose."""
    gradients = [_empty_gradient(stack) for stack in stacks]
    for key in (counts == 0).nonzero().flatten().tolist():
        group, slot = divmod(key, keys_per_group)
        gradients[group][slot : slot + 1].zero_()
    return gradients


def _sort(index_TK: torch.Tensor, key_of_expert: torch.Tensor, keys: int) -> tuple[torch.Tensor, ...]:
    """The pairs in order of their keys [S], the position of each pair in it, -1 to skip [T, K], pairs per key."""
    experts = key_of_expert.shape[0]
    keys_TK = key_of_expert[index_TK.clamp(0, experts - 1)]
    keys_TK = keys_TK.masked_fill((index_TK < 0) | (index_TK >= experts), keys)
    sorted_S, order_S = keys_TK.flatten().sort(stable=True)
    counts = sorted_S.bincount(minlength=keys + 1)[:keys]
    position_S = torch.empty_like(order_S)
    position_S[order_S] = torch.arange(order_S.numel(), device="cpu").masked_fill_(sorted_S == keys, -1)
    return order_S.int(), position_S.int().view_as(keys_TK), counts.int()


def _mkl_leads() -> bool:
    """
    Whether MKL leads in products in float32: by 1.2 to 2.1 times on an Intel Xeon with AVX-512 and without AMX. On AMD
    EPYCs oneDNN does: of family 26 (Zen 5) in all, of family 25 (Zen 4) but for gradients of weights, in which neither
    does (benchmarks/products.py).
    """
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else platform.processor()
    return torch.backends.mkl.is_available() and "GenuineIntel" in text


MKL_LEADS = _mkl_leads()
"""With MKL the last bits depend on where a weight lies in memory and on how many rows there are, as in all other
layers of a model."""
few_rows = 0
"""Products of float32 with at most so many rows go to MKL on AMD too: as the first of two matrices, and with two
rows at least, it reads a weight about twice as fast as oneDNN, up to 8 rows; at 12 oneDNN is faster. Serving engines
set it. Not by default, for the sake of the last bits."""


def _linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` by oneDNN or MKL, into `out` if there is one."""
    few = x.dtype == torch.float32 and len(x) <= few_rows
    if few and not MKL_LEADS and not weight.is_mkldnn and weight.is_contiguous():
        rows = (x.expand(2, -1) if len(x) == 1 else x).contiguous()
        result = torch.mm(weight, rows.t())[:, : len(x)].t()
        return result if out is None else out.copy_(result)
    if weight.is_mkldnn or (x.dtype == torch.float32 and x.dtype in _ONEDNN_DTYPES and not MKL_LEADS):
        result = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
        return result if out is None else out.copy_(result)
    return torch.mm(x, weight.t(), out=out)
