"""The model's outputs, losses and gradients, also under checkpointing and torch.compile."""

import copy
import pickle

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from model_cases import (
    ATTENTIONS,
    LATENT_ATTENTION,
    LOSSES,
    ROUTER_TYPES,
    ROUTERS,
    VARIANTS,
    assert_close,
    gradients,
    lm_loss,
    make_config,
    make_ids,
    make_model,
    make_padded_ids,
    train,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch._inductor import cpp_builder, exc
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from mohge import MoHGEModel, record_routing
from mohge.losses_mohge import router_losses


def test_exactly_one_kind_of_input():
    model = make_model()
    ids = make_ids()
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        assert torch.equal(embedded, model(ids).logits)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(2, 11, 32)}):
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            model(**arguments)


@pytest.mark.parametrize("name", ["two_level", "top_p"])
def test_experts_implementations_agree(name):
    model = make_model(**VARIANTS[name])
    assert model.config._experts_implementation == "mohge"  # the default
    logits = {}
    with torch.no_grad():
        for implementation in ("grouped_mm", "eager", "batched_mm"):
            model.set_experts_implementation(implementation)
            logits[implementation] = model(make_ids()).logits
    assert_close(logits["grouped_mm"], logits["eager"])
    assert_close(logits["batched_mm"], logits["eager"])


@pytest.mark.parametrize("name", [*ROUTERS, "mixture"])
def test_removed_experts_compute_what_experts_of_zeros_do(name):
    """All that is not theirs gets the same gradients, too, and they are in no list of parameters."""
    fields = {"moe_intermediate_sizes": [8, 24, 40]} | VARIANTS[name]
    whole = make_model(**fields).train()
    for module in whole.sparse_feed_forwards:
        module.experts.down_proj_0.data.zero_()
    removed = make_model(**fields | {"moe_intermediate_sizes": [0, 24, 40]}).train()
    removed.load_state_dict(whole.state_dict(), strict=False)
    ids = make_ids()
    for model in (whole, removed):
        model(ids, labels=ids).loss.backward()
        model.eval()
    with torch.no_grad():
        assert_close(removed(ids).logits, whole(ids).logits)
    expected = {name: value for name, value in gradients(whole).items() if not name.endswith("_proj_0")}
    assert gradients(removed).keys() == removed.state_dict().keys() - dict(removed.named_buffers()).keys()
    for parameter, gradient in gradients(removed).items():
        torch.testing.assert_close(gradient, expected.pop(parameter), rtol=1e-3, atol=1e-6)
    assert not expected
    assert all(parameter.numel() for parameter in removed.parameters())
    assert removed.half()(ids).logits.isfinite().all()


def test_experts_implementation_is_an_argument_of_from_config():
    model = AutoModelForCausalLM.from_config(make_config(), experts_implementation="batched_mm")
    assert model.model.layers[0].mlp.experts.config._experts_implementation == "batched_mm"


# Outputs


@pytest.mark.parametrize("name", [*ROUTER_TYPES, "dense_first_layer"])
def test_router_outputs(name):
    model = make_model(**VARIANTS[name])
    ids = make_ids()
    with torch.no_grad():
        plain = model(ids)
        output = model(ids, output_router_logits=True, output_hidden_states=True)
    sparse_layers = 2 - len(model.config.mlp_only_layers)
    assert torch.equal(output.logits, plain.logits)
    assert plain.router_logits is None
    assert plain.group_logits is None
    assert [x.shape for x in output.router_logits] == [(22, 12)] * sparse_layers
    assert [x.shape for x in output.group_logits] == [(22, 3)] * sparse_layers
    assert [x.shape for x in output.tokens_per_expert] == [(12,)] * sparse_layers
    assert all(x.std() > 0.1 for x in (*output.router_logits, *output.group_logits))
    assert len(output.hidden_states) == 3
    for counts in output.tokens_per_expert:
        assert 22 <= counts.sum() < 66 if name == "top_p" else counts.sum() == 66


def test_tokens_per_expert_leaves_padding_out():
    ids, mask = make_padded_ids(4)
    with torch.no_grad():
        output = make_model()(ids, attention_mask=mask, output_router_logits=True)
    assert all(counts.sum() == (22 - 4) * 3 for counts in output.tokens_per_expert)
    assert all(logits.shape == (22, 12) for logits in output.router_logits)


def test_output_router_logits_in_the_config():
    model = make_model(output_router_logits=True)
    with torch.no_grad():
        assert len(model(make_ids()).router_logits) == 2
        assert model(make_ids(), output_router_logits=False).router_logits is None


def test_recording_says_what_the_routers_chose():
    model = make_model()
    with torch.no_grad(), record_routing() as routing:
        model(make_ids())
        model.model(make_ids(1, 5))
    assert [len(layer.index) for layer in routing] == [22, 22, 5, 5]
    for layer in routing[:2]:
        assert (layer.logits.shape, layer.group_logits.shape) == ((22, 12), (22, 3))
        assert layer.weights.shape == layer.index.shape == (22, 3)
        assert layer.group_index.shape == (22, 2)
        assert_close(layer.weights.sum(-1), torch.ones(22), 1e-6)
        assert all(len(set(row)) == 3 for row in layer.index.tolist())
    with torch.no_grad(), record_routing() as after:
        pass
    model(make_ids())
    assert (len(routing), after) == (4, [])


@pytest.mark.parametrize("name", ["grouped_query", "latent"])
def test_attentions_are_returned(name):
    model = make_model(**ATTENTIONS[name])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(make_ids(), output_attentions=True)
    assert [x.shape for x in output.attentions] == [(2, 4, 11, 11)] * 2


def test_logits_to_keep():
    model = make_model()
    with torch.no_grad():
        logits = model(make_ids()).logits
        assert_close(model(make_ids(), logits_to_keep=2).logits, logits[:, -2:], 1e-6)
        assert_close(model(make_ids(), logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]], 1e-6)


# Losses


@pytest.mark.parametrize("collect", [False, True])
def test_loss_in_evaluation_is_the_language_model_loss(collect):
    model = make_model(**LOSSES)
    ids = make_ids()
    labels = ids.clone()
    labels[0, 3:6] = -100
    output = model(ids, labels=labels, output_router_logits=collect)
    assert_close(output.loss, lm_loss(output.logits, labels), 1e-6)
    assert (output.aux_loss is None) == (not collect)


@pytest.mark.parametrize("router_type", ["two_level", "top_k"])
def test_loss_in_training_includes_the_router_losses(router_type):
    model = make_model(router_type=router_type, **LOSSES).train()
    ids = make_ids()
    output = model(ids, labels=ids)
    assert output.aux_loss.abs() > 1e-3
    assert_close(output.loss, lm_loss(output.logits, ids) + output.aux_loss, 1e-6)
    coefficients = {
        "expert": 0.05,
        "load_balancing": 0.02,
        "z": 0.01,
        "parameter_penalty": 0.03,
        "entropy": 0.04,
        "intra_group": 0.1,
        "inter_group": 0.06,
    }
    if router_type == "two_level":
        coefficients["group"] = 1e-5
    assert output.router_losses.keys() == coefficients.keys()
    total = sum(coefficient * output.router_losses[loss] for loss, coefficient in coefficients.items())
    assert_close(output.aux_loss, total, 1e-5)


def test_training_without_router_losses_computes_none():
    off = dict.fromkeys((*LOSSES, "router_group_aux_loss_coef"), 0.0)
    ids = make_ids()
    model = make_model(**off).train()
    output = model(ids, labels=ids)
    assert output.aux_loss is None
    assert output.router_losses is None
    assert output.tokens_per_expert is None
    assert_close(output.loss, lm_loss(output.logits, ids), 1e-6)
    assert model(ids, labels=ids, output_router_logits=True).aux_loss is None


def test_all_layers_dense():
    model = make_model(mlp_only_layers=[0, 1]).train()
    ids = make_ids()
    output = model(ids, labels=ids, output_router_logits=True)
    assert_close(output.loss, lm_loss(output.logits, ids), 1e-6)
    output.loss.backward()
    gradients(model)


# Gradients


@pytest.mark.parametrize(
    ("name", "implementation"),
    [*((name, "grouped_mm") for name in VARIANTS), ("top_p", "eager"), ("top_p", "batched_mm")],
)
def test_every_parameter_gets_a_gradient(name, implementation):
    """Even with so few tokens that most experts get none: data parallelism waits for all gradients."""
    model = make_model(**VARIANTS[name], **LOSSES).train()
    model.set_experts_implementation(implementation)
    ids = make_ids(1, 3)
    model(ids, labels=ids).loss.backward()
    values = gradients(model)
    assert all(value.isfinite().all() for value in values.values())
    zero = [parameter for parameter, value in values.items() if not value.any()]
    # A group that no token chose has zero gradients, and so has the choice among one group. Nothing else has.
    assert all("experts." in parameter or (name == "one_group" and "group_weight" in parameter) for parameter in zero)


def assert_same_training(actual, expected, losses_error, gradients_error):
    """Losses, last gradients and buffers of two trained models."""
    (losses, model), (expected_losses, expected_model) = actual, expected
    assert_close(losses, expected_losses, losses_error)
    expected_gradients = gradients(expected_model)
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected_gradients[name], gradients_error)
    buffers = dict(model.named_buffers())
    for name, buffer in expected_model.named_buffers():
        assert_close(buffers[name], buffer, 1e-6)


@pytest.mark.parametrize("name", ["two_level", "grouped_top_k", "latent", "mixture"])
def test_gradient_checkpointing_changes_nothing(name):
    results = []
    for checkpointing in (True, False):
        model = make_model(**VARIANTS[name], **LOSSES).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            assert model.model.layers[0].gradient_checkpointing
        results.append((train(model, steps=3), model))
    assert_same_training(*results, 1e-6, 1e-5)


def test_reentrant_checkpointing_warns_that_router_losses_are_idle():
    model = make_model().train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    logger = logging.get_logger("mohge.modeling_mohge")
    logger.warning_once.cache_clear()
    with CaptureLogger(logger) as captured:
        model(make_ids(), labels=make_ids())
    assert "use_reentrant" in captured.out


COMPILED = {
    "two_level": ROUTERS["two_level"],
    "top_p_with_latent_attention": ROUTERS["top_p"] | LATENT_ATTENTION,
    "grouped_top_k": ROUTERS["grouped_top_k"],
    "mixture": VARIANTS["mixture"],
}


@pytest.mark.parametrize("name", COMPILED)
def test_training_compiles_without_graph_breaks(name):
    """Forward and backward of the whole model, all router losses and the running means included."""
    results = []
    for compiled in (True, False):
        model = make_model(**COMPILED[name], **LOSSES)
        model(make_ids(1, 3), output_router_logits=True)  # transformers installs its hooks at the first such call
        model.train()
        function = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        results.append((train(function, steps=2), model))
    torch.compiler.reset()
    assert_same_training(*results, 1e-5, 1e-4)


def test_gradients_of_a_router_compiled_by_inductor():
    """With code in C++: what the tests above compile runs op by op, so no fusion can put the ops in a wrong order."""
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        pytest.skip("torch.compile needs a C++ compiler")
    # The router and its losses alone: to compile a whole model takes a minute.
    router = make_model(**LOSSES, num_hidden_layers=1).routers[0].train()
    hidden_states = torch.randn(22, 32, requires_grad=True)
    mask, progress = torch.ones(2, 11), torch.tensor(-1.0)
    first, second = torch.randn(3, 8), torch.randn(8)

    def loss(hidden_states):
        output = router(hidden_states * hidden_states)
        use = ((output.weights @ first).sin() @ second).sum()
        return use + router_losses([router], [output], mask, None, progress).aux_loss

    # A cached graph would be that of an older release of the router or of PyTorch.
    autograd_cache = torch._functorch.config.patch(enable_autograd_cache=False)
    with autograd_cache, torch._inductor.config.patch(fx_graph_cache=False):
        leaves = [hidden_states, *router.parameters()]
        actual = torch.autograd.grad(torch.compile(loss, fullgraph=True)(hidden_states), leaves)
    torch.compiler.reset()
    for gradient, expected in zip(actual, torch.autograd.grad(loss(hidden_states), leaves), strict=True):
        assert_close(gradient, expected, 1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("whole", [True, False], ids=["causal_lm", "base"])
def test_an_argument_that_nothing_takes_is_refused(whole, compiled):
    model = make_model() if whole else MoHGEModel(make_config()).eval()
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with pytest.raises(TypeError, match="`key_values`, `past_keys`, which no part of the model takes"):
        model(make_ids(), past_keys=None, key_values=None)
    # What transformers passes around is not refused, nor what somebody else's attention implementation names.
    seen = []

    def foreign_attention(module, query, key, value, attention_mask, instances=None, **kwargs):
        seen.append(instances)
        return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("foreign", foreign_attention)
    model.set_attn_implementation("foreign")
    with torch.no_grad():
        forward(make_ids(), instances="theirs", num_items_in_batch=7, is_causal=True, output_attentions=False)
    assert seen == ["theirs"] * 2
    model.set_attn_implementation("eager")
    with pytest.raises(TypeError, match="`instances`"):
        model(make_ids(), instances="theirs")


def test_the_old_name_of_the_cache_is_still_taken():
    model = make_model()
    with torch.no_grad():
        expected = model(make_ids()).logits[:, -1]
        cache = model(make_ids()[:, :-1]).cache
        assert_close(model(make_ids()[:, -1:], past_key_values=cache).logits[:, -1], expected)


@pytest.mark.parametrize("name", ["two_level", "mixed_windows", "mixture"])
def test_copies_and_parts_on_the_disk_compute_the_same(name, tmp_path):
    """The class of a model is made at run time: copies have to find it. Hooks of accelerate move layers in and out."""
    model = make_model(**VARIANTS[name])
    with torch.no_grad():
        expected = model(make_ids()).logits
        copies = {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}
        for made in copies.values():
            assert type(made) is type(model)
            assert torch.equal(made(make_ids()).logits, expected)
        copies["pickle"].routers[0].membership_GE.zero_()
        copies["deepcopy"].sparse_feed_forwards[0].experts.down_proj_0.zero_()
        assert torch.equal(model(make_ids()).logits, expected)
        model.save_pretrained(tmp_path)
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        dispatched = AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=places, offload_folder=tmp_path / "offload"
        )
        assert dispatched.model.layers[1].self_attn.q_proj.weight.device.type == "meta"
        assert_close(dispatched(make_ids()).logits, expected)


@pytest.mark.parametrize("name", ["two_level", "mixture"])
def test_base_model_inside_is_one_of_ours(name, tmp_path):
    model = make_model(**VARIANTS[name])
    assert isinstance(model.model, MoHGEModel)
    model.model.save_pretrained(tmp_path)
    with torch.no_grad(), record_routing() as routing:
        base = AutoModel.from_pretrained(tmp_path)
        output = base(make_ids(), output_router_logits=True)
        assert_close(output.last_hidden_state, model.model(make_ids()).last_hidden_state)
    assert [len(layer.index) for layer in routing] == [22] * 4
    assert [logits.shape for logits in output.router_logits] == [(22, 12)] * 2
    assert len(base.routers) == len(model.model.routers) == 2


@pytest.mark.parametrize("name", ["post_norm", "mixture"])
def test_adapters_of_the_backbone_fit_by_their_names(name, tmp_path):
    """An adapter of attention that was trained on the backbone itself, before its feed-forward was replaced."""
    model = make_model(**VARIANTS[name])
    source = AutoModelForCausalLM.from_config(model.config.backbone_config)
    adapted = get_peft_model(source, LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        before = model(make_ids()).logits
        ours = PeftModel.from_pretrained(model, tmp_path)
        loaded = {name: p for name, p in ours.named_parameters() if "lora" in name}
        theirs = dict(adapted.named_parameters())
        assert len(loaded) == 2 * 2 * model.config.num_hidden_layers
        assert all(torch.equal(parameter, theirs[name]) for name, parameter in loaded.items())
        assert (ours(make_ids()).logits - before).abs().max() > 1e-3
