"""Caches, positions, padding, attention implementations and generation."""

import pytest
import torch
import torch.nn.functional as F
from model_cases import ATTENTIONS, VARIANTS, VOCABULARY, assert_close, make_ids, make_model, make_padded_ids
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from mohge import MoHGEForCausalLM
from mohge.model_cards.reload import CACHE_TOLERANCE, cache_error


@pytest.mark.parametrize("padded", [False, True], ids=["no_padding", "left_padding"])
@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "soft_capped"])  # which SDPA cannot do
def test_attention_implementations_agree(name, padded):
    model = make_model(**ATTENTIONS[name])
    ids, mask = make_padded_ids(4 if padded else 0)
    logits = {}
    # Without compilation flex attention is slow but the same function, and there is no compiler to wait for.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for implementation in ("eager", "sdpa", "flex_attention"):
            model.set_attn_implementation(implementation)
            assert model.config._attn_implementation == implementation
            logits[implementation] = model(ids, attention_mask=mask).logits[mask.bool()]
    assert_close(logits["sdpa"], logits["eager"])
    assert_close(logits["flex_attention"], logits["eager"])


def test_sliding_window_hides_what_lies_before_it():
    model = make_model(**ATTENTIONS["sliding_window"] | {"sliding_window": 3, "num_hidden_layers": 1})
    ids = make_ids(1, 10)
    changed = ids.clone()
    changed[0, 2] = (changed[0, 2] + 1) % VOCABULARY
    with torch.no_grad():
        difference = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]
    assert (difference[2:5] > 1e-3).all()
    assert (difference[[0, 1, 5, 6, 7, 8, 9]] < 1e-5).all()


def test_position_ids_are_used():
    model = make_model()
    ids = make_ids()
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        default = model(ids).logits
        assert torch.equal(model(ids, position_ids=positions).logits, default)
        assert_close(model(ids, position_ids=positions + 20).logits, default)  # rotary embeddings are relative
        assert (model(ids, position_ids=2 * positions).logits - default).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["two_level_logsumexp", "top_p", "dense_first_layer", *ATTENTIONS])
def test_cache_step_by_step_equals_the_full_forward(name):
    """Position ids are left to the model, and come from the cache."""
    model = make_model(**VARIANTS[name])
    ids = make_ids(2, 12)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert model(ids).cache.get_seq_length() == 12
        cache = DynamicCache(config=model.config)
        parts = []
        for chunk in ids.split([5, 1, 2, 1, 1, 1, 1], dim=1):
            output = model(chunk, cache=cache)
            assert output.cache is cache
            parts.append(output.logits)
    assert_close(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("name", ["two_level_logsumexp", "top_p", "dense_first_layer", "mixture", *ATTENTIONS])
def test_generation_is_the_same_for_every_cache(name):
    model = make_model(**VARIANTS[name])
    arguments = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(make_ids(2, 6), use_cache=False, **arguments)
    assert expected.sequences.shape == (2, 14)
    for cache in ("dynamic", "static"):
        output = model.generate(make_ids(2, 6), cache_implementation=cache, **arguments)
        assert torch.equal(output.sequences, expected.sequences)
        assert_close(torch.stack(output.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("name", ["two_level", "top_p", "mixed_windows", "latent"])
def test_sampling_and_beams_are_the_same_for_every_cache(name):
    model = make_model(**VARIANTS[name])
    ids = make_ids(2, 6)
    results = [model.generate(ids, max_new_tokens=8)]
    for mode in ({"do_sample": True}, {"num_beams": 3}, {"do_sample": True, "num_beams": 3}):
        sequences = []
        for cache in ({"use_cache": False}, {"cache_implementation": "dynamic"}, {"cache_implementation": "static"}):
            torch.manual_seed(0)
            sequences.append(model.generate(ids, max_new_tokens=8, **mode, **cache))
        assert torch.equal(sequences[0], sequences[1])
        assert torch.equal(sequences[0], sequences[2])
        assert not any(torch.equal(sequences[0], other) for other in results)
        results.append(sequences[0])


@pytest.mark.parametrize("name", ["two_level", "top_p", "mixed_windows", "latent"])
def test_proposed_tokens_change_nothing(name):
    """A draft model or the prompt proposes tokens; the cache gives up those that the model rejects."""
    model, draft = make_model(**VARIANTS[name]), make_model(**VARIANTS[name])
    with torch.no_grad():  # so that it is right about some tokens, not about all
        draft.lm_head.weight.add_(torch.randn_like(draft.lm_head.weight), alpha=0.1)
    draft.generation_config.update(
        num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    lengths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ids = make_ids(1, 6).repeat(1, 2)
    expected = model.generate(ids, max_new_tokens=16, use_cache=False)
    lengths.clear()
    for proposals in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(ids, max_new_tokens=16, **proposals), expected)
    assert len(lengths) < 2 * 16  # some tokens were accepted,
    assert sum(lengths) > 2 * (12 + 16)  # and some rejected


def test_generation_compiles_without_graph_breaks():
    """What `generate` does by itself on a GPU, which also prepares the masks of both kinds of layers."""
    model = make_model(**ATTENTIONS["mixed_windows"], router_type="top_p")
    compile_config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True  # on a CPU too
    expected = model.generate(make_ids(2, 6), max_new_tokens=8, use_cache=False)
    counters.clear()
    actual = model.generate(
        make_ids(2, 6), max_new_tokens=8, cache_implementation="static", compile_config=compile_config
    )
    assert counters["stats"]["unique_graphs"] > 0
    torch.compiler.reset()
    assert torch.equal(actual, expected)


def test_check_of_the_cache_tells_faults_from_rounding(monkeypatch):
    forward, update = MoHGEForCausalLM.forward, DynamicCache.update

    def shifted(self, *, input_ids, position_ids=None, **kwargs):
        if input_ids.shape[1] == 1:
            position_ids = position_ids + 1
        return forward(self, input_ids=input_ids, position_ids=position_ids, **kwargs)

    def confused(self, keys, values, *args, **kwargs):
        keys, values = update(self, keys, values, *args, **kwargs)
        return keys.roll(1, 2), values

    for name in ("two_level", "top_p", "grouped_query", "mixed_windows", "latent"):
        model = make_model(**VARIANTS[name])
        assert cache_error(model, make_ids(2, 20)) < 1e-5
        assert cache_error(model, make_ids(1, 1)) < 1e-5
        for owner, method, fault in (
            (MoHGEForCausalLM, "forward", lambda self, *, cache=None, **kwargs: forward(self, **kwargs)),
            (MoHGEForCausalLM, "forward", shifted),
            (DynamicCache, "update", confused),
        ):
            with monkeypatch.context() as broken:
                broken.setattr(owner, method, fault)
                assert cache_error(model, make_ids(2, 20)) > 5 * CACHE_TOLERANCE


@pytest.mark.parametrize("name", ["two_level", "top_p", "sliding_window", "mixed_windows", "mixture"])
def test_continuous_batching_equals_generate(name):
    model = make_model(**VARIANTS[name])
    prompts = [row[:length].tolist() for row, length in zip(make_ids(3, 9), (9, 4, 6), strict=True)]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = [
        model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    outputs = model.generate_batch(
        inputs=prompts,
        generation_config=settings,
        continuous_batching_config=ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=32),
    )
    assert [outputs[name].generated_tokens for name in sorted(outputs)] == expected


def test_continuous_batching_refuses_latent_attention():
    with pytest.raises(ValueError, match="does not work with multi-head latent attention: transformers' paged cache"):
        make_model(**ATTENTIONS["latent"]).generate_batch(inputs=[[1, 2, 3]])


def pad_left(ids, other):
    """A batch of two sequences, the shorter one first, and its mask."""
    padding = (other.shape[1] - ids.shape[1], 0)
    mask = torch.cat([F.pad(torch.ones_like(ids), padding), torch.ones_like(other)])
    return torch.cat([F.pad(ids, padding), other]), mask


@pytest.mark.parametrize("name", ["top_p", *ATTENTIONS])
def test_left_padding_changes_no_logits(name):
    model = make_model(**VARIANTS[name])
    ids = make_ids(1, 7)
    batch, mask = pad_left(ids, make_ids(1, 12, seed=8))
    with torch.no_grad():
        expected = model(ids).logits[0]
        assert_close(model(batch, attention_mask=mask).logits[0, 5:], expected)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        assert_close(model(batch, attention_mask=mask, position_ids=positions).logits[0, 5:], expected)


def test_generation_with_left_padding():
    model = make_model()
    ids, other = make_ids(1, 6), make_ids(1, 9, seed=8)
    batch, mask = pad_left(ids, other)
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **arguments)[:, 9:]
    assert torch.equal(together[:1], model.generate(ids, **arguments)[:, 6:])
    assert torch.equal(together[1:], model.generate(other, **arguments)[:, 9:])
