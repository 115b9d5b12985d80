"""What somebody finds who uses the package from Python, in an editor or a shell."""

import inspect
from importlib.metadata import version
from pathlib import Path

import pytest
from conversion_cases import make_source
from model_cases import make_model
from transformers import LlamaConfig
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

import mohge
from mohge import MoHGEConfig
from mohge.training.loop.trainer import MoHGETrainer


def test_names_are_there_and_listed():
    assert mohge.__version__ == version("mohge")
    assert mohge.MoHGETrainer is MoHGETrainer
    listed = [name for name in dir(mohge) if not name.startswith("_")]
    assert {*mohge.__all__} <= {*dir(mohge)}
    assert not {"Path", "TYPE_CHECKING", "find_spec", "lazy_names", "sys"} & {*listed}
    assert "training" in listed
    assert all(hasattr(mohge, name) for name in mohge.__all__)
    assert Path(mohge.__file__).with_name("py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mohge.nothing


def test_signatures_have_names():
    for function, names in (
        (mohge.convert, ["source", "output", "mode", "widths", "keep", "calibration"]),
        (mohge.MoHGETrainer, ["model", "args", "train_dataset", "data_collator"]),
        (mohge.MoHGEConfig, ["moe_intermediate_sizes", "router_type", "backbone_config"]),
        (mohge.MoHGEForCausalLM.forward, ["input_ids", "output_router_logits"]),
    ):
        parameters = inspect.signature(function).parameters
        assert {*names} <= {*parameters}
        assert all(parameter.kind != parameter.VAR_POSITIONAL for parameter in parameters.values())


def test_convert_returns_the_receipt(tmp_path):
    make_source("olmoe", tmp_path / "source", bos_token_id=1, eos_token_id=2)
    receipt = mohge.convert(tmp_path / "source", tmp_path / "out", mode="regroup", experts_per_group=3)
    assert receipt["passed"]
    assert MoHGEConfig.from_pretrained(tmp_path / "out").num_experts_per_group == [3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts_per_groups": 3}, "did you mean experts_per_group?"),
        ({"top_k": "six"}, "'top_k'"),
        ({"keep": 2.0}, "`keep` is 2.0"),
    ],
    ids=["name", "type", "value"],
)
def test_convert_refuses(options, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("?", "[?]")):
        mohge.convert(tmp_path / "source", tmp_path / "out", "regroup", **options)


def test_printed_model_shows_router_groups_and_widths():
    printed = str(make_model(router_type="two_level"))
    assert "two_level, top_k=3 from 2 of 3 groups, experts x width: 2 x 8, 4 x 24, 6 x 40" in printed
    assert "gate_up_proj_1: [4, 48, 32]" in printed
    assert "top_k, top_k=3, experts x width" in str(make_model(router_type="top_k"))


def test_attention_is_chosen_for_model_and_backbone_without_a_word():
    model = make_model()
    with CaptureLogger(logging.get_logger("transformers")) as said:
        for name in ("eager", "sdpa"):
            model.set_attn_implementation(name)
            assert model.config._attn_implementation == name
            assert model.model.layers[0].self_attn.config._attn_implementation == name
        with pytest.raises(ValueError, match="nonsense"):
            model.set_attn_implementation("nonsense")
    assert said.out == ""
    assert model.config.backbone_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("num_expert_per_tok", "num_experts_per_tok"),
        ("router_typ", "router_type"),
        ("moe_intermediate_sizs", "moe_intermediate_sizes"),
        ("num_attention_head", "num_attention_heads"),
        ("num_expert", "num_experts_per_group"),
        ("moe_intermediat_size", "moe_intermediate_sizes"),
    ],
)
def test_field_that_is_almost_one_is_refused_with_its_name(field, meant):
    with pytest.raises(ValueError, match=f"`{field}` is no field: did you mean `{meant}`"):
        MoHGEConfig(**{field: 2})
    with pytest.raises(ValueError, match=meant):
        MoHGEConfig.from_dict({"model_type": "mohge", field: 2})


def test_model_of_another_config_is_refused_with_the_way_to_it():
    with pytest.raises(
        ValueError, match=r"MoHGEForCausalLM takes a MoHGEConfig, not LlamaConfig: .*`backbone_config`"
    ):
        mohge.MoHGEForCausalLM(LlamaConfig())


def test_fields_that_transformers_and_others_pass_through_are_kept():
    others = {
        "torch_dtype": "bfloat16",
        "_name_or_path": "somewhere",
        "auto_map": {},
        "temperature": 0.3,
        "num_labels": 3,
        "use_sliding_window": False,
        "boi_token_id": 5,
        "mine": 1,
    }
    assert MoHGEConfig(**others).mine == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts_per_tok": "six"},
        {"num_experts_per_tok": 2.5},
        {"moe_intermediate_sizes": "512"},
        {"moe_intermediate_sizes": [1.5]},
        {"num_experts_per_group": None},
        {"router_type": "tow_level"},
        {"routed_scaling_factor": []},
        {"num_groups_per_tok": 99},
        {"vocab_size": -1},
        {"num_hidden_layers": 0},
        {"head_dim": -4},
        {"max_position_embeddings": 0},
        {"hidden_act": "sulu"},
    ],
    ids=str,
)
def test_wrong_types_and_values_are_value_errors(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=name):
        MoHGEConfig(**fields)
