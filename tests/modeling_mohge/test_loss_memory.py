"""Router losses work with counts: nothing they make is as large as tokens x chosen experts x experts."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.configuration_mohge import ROUTER_COEFFICIENTS
from mohge.losses_mohge import router_losses
from mohge.training.benchmarks.step import peak_memory


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("router", ["two_level", "top_p", "grouped_top_k"])
def test_largest_tensor_of_the_losses(router, per_sequence):
    coefficients = dict.fromkeys(ROUTER_COEFFICIENTS.values(), 1.0)
    if router != "two_level":
        coefficients["router_group_aux_loss_coef"] = 0.0
    config = MoHGEConfig(
        hidden_size=8,
        num_attention_heads=1,
        num_hidden_layers=1,
        vocab_size=8,
        moe_intermediate_sizes=[4, 4, 4, 4],
        num_experts_per_group=4,
        num_experts_per_tok=8,
        router_type=router,
        **coefficients,
    )
    model = MoHGEForCausalLM(config)
    batch, length = 4, 64
    tokens = batch * length
    output = model.routers[0](torch.randn(tokens, 8))
    weights = torch.full((batch,), 1 / batch) if per_sequence else None
    with LargestTensor() as largest:
        losses = router_losses(model.routers, [output], torch.ones(batch, length), weights, model.training_progress)
        losses.aux_loss.backward()
    assert len(losses.values) == sum(value > 0 for value in coefficients.values())
    assert tokens <= largest.elements <= tokens * config.num_experts


def test_router_losses_and_logits_take_no_memory_to_speak_of():
    config = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 4096}
    experts = {"moe_intermediate_sizes": [48, 64, 80, 96], "num_experts_per_group": 4, "num_experts_per_tok": 4}
    batch = torch.randint(4096, (32, 256))
    without, with_outputs = (
        peak_memory(MoHGEForCausalLM(MoHGEConfig(**config, **experts)), batch, router_outputs)
        for router_outputs in (False, True)
    )
    assert without > 8192 * 4096 * 4  # the logits over the vocabulary at least
    assert without < with_outputs < 1.02 * without
