"""
Expert parallelism for experts of different width, behind transformers' `DistributedConfig`.

Every rank holds the same share of every group (MoHGE's all-size group-decoupling allocation), so all ranks have equal
parameters and, with balanced experts inside the groups, equal work. Because experts are numbered set by set, a rank
owns a contiguous range of ids, and one all-to-all each way serves all groups.

Shapes: T tokens of this rank, S <= T K pairs of a token and an expert that it sends, P pairs that it receives.
"""

import importlib.metadata
import json

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import __version__ as transformers_version
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.expert_parallel import AllToAllEP, AutoEP, EPImplementationInterface, MoEParamShard
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from .configuration_mohge import MoHGEConfig, divisors
from .experts_mohge import compute_dtype


class HeterogeneousExpertsShard(MoEParamShard):
    """Expert-parallel style of one group's stack of weights: each rank holds the same share of it, and the experts
    module learns how many experts the rank holds of all groups together."""

    def __init__(self):
        super().__init__(Shard(0))

    def shard_param(self, module, param, mesh):
        super().shard_param(module, param, mesh)
        module.num_experts = len(module.expert_groups) // mesh.size()
        module._is_expert_parallel = True


class _Exchange:
    """One all-to-all of rows that is under way while something else is computed, in forward and in backward."""

    def __init__(self, send_sizes: list[int], recv_sizes: list[int], group: dist.ProcessGroup):
        self.send_sizes, self.recv_sizes, self.group = send_sizes, recv_sizes, group

    def start(self, rows: torch.Tensor, send_sizes: list[int], recv_sizes: list[int]) -> torch.Tensor:
        self.sent = rows.contiguous()  # must live until it has gone out
        self.received = rows.new_empty(sum(recv_sizes), rows.shape[1])
        self.work = dist.all_to_all_single(
            self.received, self.sent, recv_sizes, send_sizes, group=self.group, async_op=True
        )
        return self.received

    def wait(self) -> torch.Tensor:
        self.work.wait()
        received, self.sent, self.received, self.work = self.received, None, None, None
        return received


class _Start(torch.autograd.Function):
    """Rows on their way: [S, H] -> [P, H], not to be read before `_Finish`. Backward ends the way back of the
    gradients, which `_Finish` began; what the autograd engine runs in between is computed while they travel."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, exchange: _Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange.start(rows, exchange.send_sizes, exchange.recv_sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        return ctx.exchange.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pending: torch.Tensor, exchange: _Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return pending.view_as(pending)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        exchange = ctx.exchange
        exchange.start(grad, exchange.recv_sizes, exchange.send_sizes)
        return grad, None  # only the order of the two functions counts: `_Start` takes the gradient from the exchange


class HeterogeneousAllToAllEP(AllToAllEP):
    """
    transformers' [`AllToAllEP`], with three differences: the shared expert is computed while tokens travel to their
    experts (and its gradient while theirs travel back); rows travel in the dtype that the experts compute in, also
    under autocast, where activations are float32; and empty slots (top-p routing), whose id is E, are not sent, nor
    are those of removed experts.
    """

    def __init__(self, experts: nn.Module, ep_mesh, tp_mesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts

    @torch.compiler.disable
    def __call__(self, hidden_states, top_k_index, top_k_weights):
        if not self.experts.kept_groups:
            return self.experts_forward(hidden_states, top_k_index, top_k_weights)
        num_tokens = hidden_states.shape[0]
        tokens = (
            hidden_states.to(compute_dtype(hidden_states, self.experts.groups()[0][0])),
            top_k_index,
            top_k_weights,
        )
        if self.tp_mesh.size() > 1:  # the ranks of a tensor-parallel group share a batch: each sends its slice
            tokens = (
                DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
                .redistribute(self.tp_mesh, [Shard(0)])
                .to_local()
                for tensor in tokens
            )
        output = self._exchange_and_compute(*tokens)
        if self.tp_mesh.size() > 1:
            width = output.shape[1]
            output = DTensor.from_local(
                output.contiguous(), self.tp_mesh, [Shard(0)], shape=(num_tokens, width), stride=(width, 1)
            ).full_tensor()
        return output

    def _exchange_and_compute(
        self, hidden_states_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        group, ranks = self.ep_mesh.get_group(), self.ep_mesh.size()
        removed = F.pad(self.experts.key_of_expert == self.experts.key_to_skip, (0, 1))  # at last: of empty slots
        index = index_TK.masked_fill(removed[index_TK], ranks * self.num_local_experts).flatten()
        order = torch.argsort(index)
        send_counts = torch.zeros(ranks * self.num_local_experts + 1, dtype=torch.int64, device=index.device)
        send_counts = send_counts.scatter_add_(0, index, torch.ones_like(index))[:-1].view(ranks, -1)
        recv_counts = torch.empty_like(send_counts)
        dist.all_to_all_single(recv_counts, send_counts, group=group)
        # The one wait for the device.
        send_sizes, recv_sizes = torch.stack([send_counts.sum(1), recv_counts.sum(1)]).tolist()
        order = order[: sum(send_sizes)]  # ids of empty slots are the highest

        there = _Exchange(send_sizes, recv_sizes, group)
        pending = _Start.apply(hidden_states_TH[order // index_TK.shape[1]], there)
        if self.experts.meanwhile is not None:
            self.experts.meanwhile()
        rows_PH = _Finish.apply(pending, there)

        ids = torch.arange(self.num_local_experts, device=index.device).repeat(ranks)
        ids_P1 = ids.repeat_interleave(recv_counts.flatten(), output_size=sum(recv_sizes)).unsqueeze(1)
        if rows_PH.shape[0]:
            rows_PH = self.experts_forward(rows_PH, ids_P1, rows_PH.new_ones(ids_P1.shape))
        else:  # one row of zeros: the other ranks wait for this one's gradients
            ids_P1, dummy = ids_P1.new_zeros(1, 1), rows_PH.sum(0, keepdim=True)
            rows_PH = self.experts_forward(dummy, ids_P1, dummy.new_ones(1, 1))[:0]

        back = _Exchange(recv_sizes, send_sizes, group)
        rows_SH = _Finish.apply(_Start.apply(rows_PH, back), back)
        pairs = rows_SH.new_zeros(index.numel(), rows_SH.shape[1]).index_copy(0, order, rows_SH)
        # No view may leave here: FSDP hangs its hooks on what the module returns.
        return (pairs.unflatten(0, index_TK.shape) * weights_TK.to(pairs.dtype).unsqueeze(-1)).sum(1)


class HeterogeneousEP(AutoEP):
    """`ep_implementation="mohge"`, which `"auto"` means for MoHGE models: transformers' choice between all-reduce at
    inference and all-to-all, with [`HeterogeneousAllToAllEP`] as the latter."""

    def __init__(self, experts: nn.Module, ep_mesh, tp_mesh):
        if not hasattr(experts, "meanwhile"):
            raise ValueError(
                f'`ep_implementation="mohge"` is for MoHGE models, and {type(experts).__name__} belongs to another: '
                'choose "auto"'
            )
        super().__init__(experts, ep_mesh, tp_mesh)
        self.all_to_all = HeterogeneousAllToAllEP(experts, ep_mesh, tp_mesh)


ALL_PARALLEL_STYLES.register("heterogeneous_experts", HeterogeneousExpertsShard())
EPImplementationInterface.register("mohge", HeterogeneousEP)


def check_layout(config: MoHGEConfig, layout: DistributedConfig):
    """
    Check that the model can be spread over the devices of `layout`.

    Raises:
        ValueError: if a rank would be left without its share; the message names the size and those that fit.
    """
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name) % layout.tp_size:
            raise ValueError(
                f"`tp_size` {layout.tp_size} does not divide `{name}` ({getattr(config, name)}): "
                f"use {_one_of(divisors(getattr(config, name)))}"
            )
    if layout.ep_size > 1 and layout.ep_implementation == "all_to_all" and config.router_type == "top_p":
        raise ValueError(
            '`ep_implementation="all_to_all"` knows no empty slots, which top-p routing leaves: use "auto"'
        )
    for layer in config.sparse_layers:
        sets = layer.num_expert_sets
        if sets % layout.ep_size:
            raise ValueError(
                f"`ep_size` {layout.ep_size} does not divide the {sets} sets of experts (the greatest common divisor "
                f"of `num_experts_per_group` {layer.expert_counts}): use {_one_of(divisors(sets))}"
            )
        if not layer.kept_groups:  # nothing to share out
            continue
        fewest = min(layer.expert_counts[group] for group in layer.kept_groups)
        narrowest = layer.moe_intermediate_sizes[layer.kept_groups.start]
        share = fewest // layout.ep_size
        if layout.ep_size > 1 and _empty_shards(share, layout.efsdp_size):
            copies = max(number for number in range(1, layout.efsdp_size) if not _empty_shards(share, number))
            raise ValueError(
                f"`fsdp_size` {layout.fsdp_size} times `tp_size` {layout.tp_size} leaves ranks without a share of the "
                f"{fewest} experts of a group: use {copies * layout.ep_size} ranks, and `dp_replicate_size` "
                "for more"
            )
        if layout.ep_size == 1 and _empty_shards(narrowest, layout.tp_size):
            raise ValueError(
                f"`tp_size` {layout.tp_size} leaves ranks without a share of experts of width {narrowest}: "
                f"set `ep_size` to it, or use {_one_of(divisors(narrowest))}"
            )


def _empty_shards(size: int, ranks: int) -> bool:
    """Whether torch, which cuts `size` rows into chunks of equal size, has none left for the last rank."""
    return -(-size // ranks) * (ranks - 1) >= size and ranks > 1


def _one_of(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + " or " * (len(numbers) > 1) + str(numbers[-1])


def check_ranks_agree(config: MoHGEConfig):
    """
    Check that all ranks run the same versions and load the same model: every rank waits for every other here, once,
    instead of in the middle of training.

    Raises:
        ValueError: on every rank, naming the first rank that differs from rank 0, and in what.
    """
    mine = {"torch": torch.__version__, "transformers": transformers_version, "mohge": _own_version()}
    fields = json.loads(config.to_json_string(use_diff=False))
    fields |= {f"backbone_config.{name}": value for name, value in fields.pop("backbone_config").items()}
    for name, value in fields.items():
        if not name.endswith("_name_or_path"):  # each node may have its own copy
            mine[f"config.{name}"] = json.dumps(value)
    every: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    for rank, theirs in enumerate(every):
        for name in sorted(every[0].keys() | theirs.keys()):
            if theirs.get(name) != every[0].get(name):
                remedy = "the same checkpoint" if name.startswith("config.") else "the same version"
                raise ValueError(
                    f"ranks differ: {name} is {every[0].get(name)} on rank 0 and {theirs.get(name)} on rank {rank}: "
                    f"give every rank {remedy}"
                )


def _own_version() -> str | None:
    try:
        return importlib.metadata.version("mohge")
    except importlib.metadata.PackageNotFoundError:  # this file also travels with checkpoints
        return None


__all__ = [
    "HeterogeneousAllToAllEP",
    "HeterogeneousEP",
    "HeterogeneousExpertsShard",
    "check_layout",
    "check_ranks_agree",
]
