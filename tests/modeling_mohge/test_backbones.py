"""Every text decoder of transformers is a backbone, or there is a reason against it."""

import pytest
import torch
from backbone_cases import BACKBONES, tiny_config
from transformers import AutoModelForCausalLM

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.backbones_mohge import (
    activation,
    feed_forwards,
    gated_weights,
    is_mixture,
    reason_against,
    stacked_experts,
)
from mohge.llama4_mohge import adapt_llama4


_REASONS = {
    "apertus": "ApertusMLP has parameters beside those of its projections",
    "apertus1p5_text": "Apertus1p5TextMLP has parameters beside those of its projections",
    "arcee": "ArceeMLP does not compute down(act(gate(x)) * up(x))",
    "biogpt": "BioGptForCausalLM has no list of decoder layers with a feed-forward of a known name",
    "bitnet": "BitNetMLP has parameters beside those of its projections",
    "bloom": "BloomMLP takes more than the hidden states",
    "blt": "BltForCausalLM has no list of decoder layers with a feed-forward of a known name",
    "codegen": "CodeGenMLP has biases, which our feed-forwards have not",
    "cpmant": "CpmAntForCausalLM has no list of decoder layers with a feed-forward of a known name",
    "ctrl": "Sequential has biases, which our feed-forwards have not",
    "dbrx": "DbrxExperts does not follow transformers' interface for experts",
    "dory": "DoryMLP has parameters beside those of its projections",
    "falcon": "FalconMLP does not compute down(act(gate(x)) * up(x))",
    "falcon_mamba": "FalconMambaMixer takes more than the hidden states",
    "fuyu": "PersimmonMLP has biases, which our feed-forwards have not",
    "gpt-sw3": "GPT2MLP has parameters beside those of its projections",
    "gpt2": "GPT2MLP has parameters beside those of its projections",
    "gpt_bigcode": "GPTBigCodeMLP has biases, which our feed-forwards have not",
    "gpt_neo": "GPTNeoMLP has biases, which our feed-forwards have not",
    "gpt_neox": "GPTNeoXMLP has biases, which our feed-forwards have not",
    "gpt_neox_japanese": "GPTNeoXJapaneseMLP does not compute down(act(gate(x)) * up(x))",
    "gptj": "GPTJMLP has biases, which our feed-forwards have not",
    "hrm_text": "HrmTextForCausalLM has no list of decoder layers with a feed-forward of a known name",
    "jais2": "Jais2MLP has biases, which our feed-forwards have not",
    "jetmoe": "JetMoeMoE has parameters beside those of its projections",
    "longcat_flash": "LongcatFlashExperts does not follow transformers' interface for experts",
    "mamba": "MambaMixer takes more than the hidden states",
    "mamba2": "Mamba2Mixer takes more than the hidden states",
    "mpt": "MptMLP takes more than the hidden states",
    "nanochat": "NanoChatMLP does not compute down(act(gate(x)) * up(x))",
    "nemotron": "NemotronMLP does not compute down(act(gate(x)) * up(x))",
    "nemotron_h": "NemotronHExperts has no gate",
    "openai-gpt": "MLP has parameters beside those of its projections",
    "opt": "OPTForCausalLM has no list of decoder layers with a feed-forward of a known name",
    "persimmon": "PersimmonMLP has biases, which our feed-forwards have not",
    "phi": "PhiMLP has biases, which our feed-forwards have not",
    "recurrent_gemma": "RecurrentGemmaMlp has biases, which our feed-forwards have not",
    "rwkv": "RwkvFeedForward takes more than the hidden states",
    "starcoder2": "Starcoder2MLP has biases, which our feed-forwards have not",
    "xglm": "XGLMForCausalLM has no list of decoder layers with a feed-forward of a known name",
    "zamba": "ZambaForCausalLM has no list of decoder layers with a feed-forward of a known name",
    "zamba2": "Zamba2ForCausalLM has no list of decoder layers with a feed-forward of a known name",
}


@pytest.mark.parametrize("model_type", BACKBONES)
def test_the_swapped_model_computes_what_the_source_computes(model_type, tmp_path):
    config = tiny_config(model_type)
    mixture = is_mixture(config)
    reason = reason_against(config, keeps_router=mixture)
    assert reason == _REASONS.get(model_type)
    if reason is not None:
        return
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(config).eval()
    adapted = adapt_llama4(source)
    swap = swap_experts if mixture else swap_feed_forward
    model = swap(source)
    if adapted:
        weights, source = source.state_dict(), AutoModelForCausalLM.from_config(config).eval()
        source.load_state_dict(weights)
    ids = torch.randint(3, 60, (2, 7))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        scale = logits.abs().max()
        torch.testing.assert_close(logits, source(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5 * scale)
    assert_same_generation(model, source, ids)
    assert_trains(model, source, ids)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids, use_cache=False).logits, logits, rtol=1e-5, atol=1e-5 * scale)
    assert_same_state(reloaded, model)


def swap_feed_forward(source):
    """Experts that are copies of the feed-forward, some of them wider for the zeros that they have beside it."""
    weights = [gated_weights(found.module, activation(found.module, source.config)) for found in feed_forwards(source)]
    widest = max(gate.shape[0] for gate, _, _ in weights)
    config = MoHGEConfig(
        backbone_config=source.config,
        router_type="two_level",
        moe_intermediate_sizes=[widest, widest + 8],
        num_experts_per_group=2,
        num_experts_per_tok=3,
        shared_expert_intermediate_size=0,
    )
    model = model_like(config, source)
    with torch.no_grad():
        for module, (gate, up, down) in zip(model.sparse_feed_forwards, weights, strict=True):
            width = gate.shape[0]
            for gate_up, down_proj in module.experts.groups():
                gate_up.zero_()
                down_proj.zero_()
                gate_part, up_part = gate_up.chunk(2, dim=1)
                gate_part[:, :width], up_part[:, :width], down_proj[..., :width] = gate, up, down
    return model


def swap_experts(source):
    """Every other expert half as wide, where the other half of the source's is dead."""
    layers = [found for found in feed_forwards(source) if found.experts is not None]
    stacks = [stacked_experts(found.experts) for found in layers]
    number, _, width = stacks[0].down.shape
    with torch.no_grad():
        for each in stacks:
            each.down[::2, :, width // 2 :] = 0
    config = MoHGEConfig(
        backbone_config=source.config,
        moe_intermediate_sizes=[width // 2, width],
        num_experts_per_group=number // 2,
        router_aux_loss_coef=0.01,
    )
    assert config.mlp_only_layers == [f.layer_idx for f in feed_forwards(source) if f.experts is None]
    model = model_like(config, source)
    theirs = [list(range(number))[::-2], list(range(number))[::2]]  # by group: odd ones, then even ones
    theirs = theirs[::-1]
    with torch.no_grad():
        for module, each in zip(model.sparse_feed_forwards, stacks, strict=True):
            experts = module.experts
            for ours, (group, slot) in enumerate(zip(experts.expert_groups, experts.expert_slots, strict=True)):
                expert, kept = theirs[group][slot], config.moe_intermediate_sizes[group]
                experts.expert_ids[expert] = ours
                gate_up, down = experts.groups()[group]
                gate_up[slot] = torch.cat([part[:kept] for part in each.gate_up[expert].chunk(2)])
                down[slot] = each.down[expert][:, :kept]
                if each.down_bias is not None:
                    gate_up_bias, down_bias = experts.biases()[group]
                    gate_up_bias[slot] = torch.cat([part[:kept] for part in each.gate_up_bias[expert].chunk(2)])
                    down_bias[slot] = each.down_bias[expert]
    return model


def model_like(config, source):
    """A model with the source's weights outside of what is replaced."""
    model = MoHGEForCausalLM(config).eval()
    missing, _ = model.load_state_dict(source.state_dict(), strict=False)
    paths = tuple(model._sparse_paths)
    assert all(name.startswith(paths) for name in missing)
    return model


def assert_same_state(ours, theirs):
    for tensors in ("parameters", "buffers"):
        ours_by_name = dict(getattr(ours, f"named_{tensors}")())
        for name, tensor in getattr(theirs, f"named_{tensors}")():
            assert torch.equal(ours_by_name[name], tensor), name


def assert_same_generation(model, source, ids):
    ours, theirs = (
        each.generate(
            ids, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None
        )
        for each in (model, source)
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    ours, theirs = torch.stack(ours.logits), torch.stack(theirs.logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())


def assert_trains(model, source, ids):
    """Every parameter has a gradient that has one in the source."""
    output = model.train()(ids, labels=ids, use_cache=False)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    if model.config.keeps_router:
        assert output.aux_loss > 0
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    if without:
        source.train()(ids, labels=ids, use_cache=False).loss.backward()
        without -= {name for name, parameter in source.named_parameters() if parameter.grad is None}
    assert not without
    model.eval()


def test_scaled_inputs_of_several_experts_are_refused():
    config = tiny_config("llama4_text", num_experts_per_tok=2)
    assert "scales the input of 2 experts" in reason_against(config, keeps_router=True)
    groups = {"moe_intermediate_sizes": [8, 16], "num_experts_per_group": 3}
    with pytest.raises(ValueError, match="scales the input of 2 experts"):
        MoHGEForCausalLM(MoHGEConfig(backbone_config=config, router_type="source", mlp_only_layers=[0], **groups))


@pytest.mark.parametrize("router_type", ["source", "top_k"])
def test_a_mixture_may_keep_its_own_experts_in_some_layers(router_type):
    backbone = tiny_config("olmoe")
    more = {} if router_type == "source" else {"num_experts_per_tok": 2, "shared_expert_intermediate_size": 0}
    groups = {"moe_intermediate_sizes": [8, 24], "num_experts_per_group": 3}
    config = MoHGEConfig(backbone_config=backbone, router_type=router_type, mlp_only_layers=[0], **groups, **more)
    torch.manual_seed(0)
    model = MoHGEForCausalLM(config).eval()
    source = AutoModelForCausalLM.from_config(backbone).eval()
    source.load_state_dict(model.state_dict(), strict=False)
    assert type(model.model.layers[0].mlp) is type(source.model.layers[0].mlp)
    ids = torch.randint(3, 60, (2, 7))
    outputs = [
        each(ids, output_hidden_states=True, output_router_logits=True).hidden_states[1] for each in (model, source)
    ]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    logits = model(ids).logits
    model.set_experts_implementation("eager")
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-5)
