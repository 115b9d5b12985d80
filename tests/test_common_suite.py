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
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES  # noqa: E402

from mohge import MoHGEConfig, MoHGEForCausalLM, MoHGEModel  # noqa: E402


MODEL_MAPPING_NAMES.setdefault("mohge", MoHGEModel.__name__)  # the suite tells base models by this table


class TwoLevelTester(CausalLMModelTester):
    config_class = MoHGEConfig
    base_model_class = MoHGEModel
    causal_lm_class = MoHGEForCausalLM
    router_type = "two_level"

    def __init__(self, parent, **kwargs):
        super().__init__(parent, **kwargs)
        # The suite passes every attribute that is named like a config argument.
        self.hidden_act = "silu"
        self.moe_intermediate_sizes = [8, 16]
        self.num_experts_per_group = 4
        self.num_experts_per_tok = 2
        self.shared_expert_intermediate_size = 36


class TopKTester(TwoLevelTester):
    router_type = "top_k"


class TopPTester(TwoLevelTester):
    router_type = "top_p"


class GroupedTopKTester(TwoLevelTester):
    router_type = "grouped_top_k"


class TestTwoLevel(CausalLMModelTest, unittest.TestCase):
    model_tester_class = TwoLevelTester

    def is_pipeline_test_to_skip(self, *args, **kwargs):
        return True  # there is no small checkpoint on the Hub


class TestTopK(TestTwoLevel):
    model_tester_class = TopKTester


class TestTopP(TestTwoLevel):
    model_tester_class = TopPTester


class TestGroupedTopK(TestTwoLevel):
    model_tester_class = GroupedTopKTester
