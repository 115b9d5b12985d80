"""
Transformers' own causal-LM tests on MoHGE. They are not in its wheel, and its source distribution has some of them
only: set TRANSFORMERS_SOURCE to a source checkout of the installed version to run them.
"""

import os
import sys
import unittest
from pathlib import Path

import pytest


SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if not SOURCE:
    pytest.skip("needs TRANSFORMERS_SOURCE, a source checkout of transformers", allow_module_level=True)
MISSING = [
    path
    for path in (
        "src/transformers",
        "tests/causal_lm_tester.py",
        "tests/distributed_testing_utils.py",
        "tests/exporters",
        "tests/generation/test_utils.py",
        "tests/test_modeling_common.py",
        "tests/utils",
    )
    if not Path(SOURCE, path).exists()
]
if MISSING:
    pytest.skip(f"TRANSFORMERS_SOURCE has no {', '.join(MISSING)}", allow_module_level=True)
sys.path.insert(0, SOURCE)

from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES  # noqa: E402

from mohge import MoHGEConfig, MoHGEForCausalLM, MoHGEModel  # noqa: E402


MODEL_MAPPING_NAMES.setdefault("mohge", MoHGEModel.__name__)  # the suite tells base models by this table


class TwoLevelTester(CausalLMModelTester):
    config_class = MoHGEConfig
    base_model_class = MoHGEModel
    causal_lm_class = MoHGEForCausalLM
    router_type = "two_level"
    backbone_config = {"model_type": "llama"}
    shared_width = 36

    def __init__(self, parent, **kwargs):
        super().__init__(parent, **kwargs)
        # The suite passes every attribute that is named like a config argument.
        self.hidden_act = "silu"
        self.moe_intermediate_sizes = [8, 16]
        self.num_experts_per_group = 4
        self.shared_expert_intermediate_size, self.shared_expert_gate = self.shared_width, bool(self.shared_width)

    @property
    def config_args(self):
        return [*super().config_args, *CONFIG_MAPPING[self.backbone_config["model_type"]].__dataclass_fields__]


class Qwen3Tester(TwoLevelTester):
    """Norms of queries and keys."""

    router_type = "top_p"
    backbone_config = {"model_type": "qwen3", "head_dim": 16}


class Gemma3Tester(TwoLevelTester):
    """Norms on both sides, windows in some layers, a scaled embedding."""

    router_type = "top_k"
    backbone_config = {
        **{"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
        "layer_types": ["sliding_attention", "full_attention"],
    }


class Lfm2Tester(TwoLevelTester):
    """A hybrid: short convolutions in some layers."""

    router_type = "grouped_top_k"
    backbone_config = {
        "model_type": "lfm2",
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    }


class MixtureTester(TwoLevelTester):
    """A mixture that keeps its router."""

    router_type = "source"
    backbone_config = {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 2}
    shared_width = 0


class TestTwoLevel(CausalLMModelTest, unittest.TestCase):
    model_tester_class = TwoLevelTester

    def is_pipeline_test_to_skip(self, *args, **kwargs):
        return True  # there is no small checkpoint on the Hub


class TestQwen3(TestTwoLevel):
    model_tester_class = Qwen3Tester


class TestGemma3(TestTwoLevel):
    model_tester_class = Gemma3Tester


class TestLfm2(TestTwoLevel):
    model_tester_class = Lfm2Tester

    def _get_conv_state_shape(self, batch_size: int, config):
        return batch_size, config.hidden_size, config.conv_L_cache

    def test_attention_outputs(self):
        """Of the layers that have attention, which the suite expects of all."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        length = inputs["input_ids"].shape[1]
        for model_class in self.all_model_classes:
            model = model_class._from_config(config, attn_implementation="eager").eval()
            attentions = model(**inputs, output_attentions=True).attentions
            assert [matrix.shape[1:] for matrix in attentions] == [(config.num_attention_heads, length, length)]


class TestMixture(TestTwoLevel):
    model_tester_class = MixtureTester
