"""Models with another head, the base model alone, and replicas: what a language model does is right there too."""

import logging
import types

import pytest
import torch
from model_cases import ATTENTIONS, LOSSES, MIXTURE, assert_close, make_config, make_ids, make_model
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from mohge import (
    MoHGEForCausalLM,
    MoHGEForSequenceClassification,
    MoHGEForTokenClassification,
    MoHGEModel,
    record_routing,
)
from mohge.configuration_mohge import ROUTER_COEFFICIENTS


BACKBONES = {"llama": {}, "qwen3": ATTENTIONS["mixed_windows"], "olmoe": MIXTURE}


@pytest.fixture(scope="module", params=BACKBONES)
def folder(request, tmp_path_factory):
    """A language model on disk, in a folder named after the backbone."""
    path = tmp_path_factory.mktemp("models") / request.param
    make_model(pad_token_id=0, **BACKBONES[request.param], **LOSSES).save_pretrained(path)
    return path


def padded():
    ids = make_ids()
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids.masked_fill(mask == 0, 0), mask


def test_a_sequence_is_scored_by_its_last_token(folder):
    ids, mask = padded()
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    base = AutoModel.from_pretrained(folder).eval()
    assert isinstance(model, MoHGEForSequenceClassification)
    assert isinstance(base, MoHGEModel)
    states = base(ids, attention_mask=mask).last_hidden_state
    assert_close(model(ids, attention_mask=mask).logits, model.score(states[[0, 1], [10, 6]]))


def test_each_token_is_scored(folder):
    ids, mask = padded()
    model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=5).eval()
    assert isinstance(model, MoHGEForTokenClassification)
    states = AutoModel.from_pretrained(folder).eval()(ids, attention_mask=mask).last_hidden_state
    assert_close(model(ids, attention_mask=mask).logits, model.score(states))


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_loss_of_a_head_includes_router_losses_in_training(auto_class, folder, tmp_path):
    ids, mask = padded()
    labels = torch.tensor([2, 0]) if auto_class is AutoModelForSequenceClassification else ids % 3
    model = auto_class.from_pretrained(folder, num_labels=3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    of_head = model.eval()(ids, attention_mask=mask, labels=labels).loss
    loss = model.train()(ids, attention_mask=mask, labels=labels).loss
    language_model = make_model(pad_token_id=0, **LOSSES, **BACKBONES[folder.name]).train()
    aux_loss = language_model(ids, attention_mask=mask, labels=ids).aux_loss
    assert_close(loss - of_head, aux_loss, 1e-4)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

    model.save_pretrained(tmp_path)
    again = auto_class.from_pretrained(tmp_path).eval()
    assert again.config.num_labels == again.config.backbone_config.num_labels == 3
    assert torch.equal(again(ids, attention_mask=mask).logits, model.eval()(ids, attention_mask=mask).logits)


@pytest.mark.usefixtures("new_warnings")
@pytest.mark.parametrize(
    ("model_class", "others"),
    [
        (MoHGEModel, {}),
        (MoHGEForSequenceClassification, {"router_z_loss_coef": 0.25}),
        (MoHGEForCausalLM, {"router_z_loss_coef": 0.25, "router_entropy_coef": 0.5}),
    ],
    ids=["base", "classifier", "language model"],
)
def test_losses_that_nobody_adds_are_named_once(model_class, others, caplog):
    """Each set of losses once in a process."""
    coefficients = {"router_inter_group_coef": 0.5, "router_expert_aux_loss_coef": 0, **others}
    model = model_class(make_config(pad_token_id=0, router_group_aux_loss_coef=0, **coefficients))
    caplog.set_level(logging.WARNING)
    ids = make_ids()
    model.eval()(ids)
    with torch.no_grad():
        model.train()(ids)
    assert "left out" not in caplog.text
    for _ in range(2):
        assert model(ids)[0].requires_grad
    (message,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    on = {name for name, value in coefficients.items() if value}
    assert {name for name in ROUTER_COEFFICIENTS.values() if f"`{name}`" in message.split("left out")[0]} == on


def test_base_model_of_a_language_model_can_run_alone():
    """As trainers call it that have a head of their own: with the running mean of the logits, and recorded."""
    model = make_model(router_type="grouped_top_k", router_logit_ema_strength=0.5).train()
    ids = make_ids()
    with pytest.raises(TypeError, match="`nonsense`"):
        model.model(ids, nonsense=1)
    with record_routing() as routing:
        states = model.model(ids).last_hidden_state
    assert len(routing) == len(model.routers) == 2
    assert all(router.logit_pending[-1] == ids.numel() for router in model.routers)
    assert_close(model.lm_head(states), model.eval()(ids).logits)


def replicate(module: torch.nn.Module, factor: float) -> torch.nn.Module:
    """What DataParallel makes for a device: shallow copies, with other tensors (here scaled) and the copies' children
    in place of the originals'."""
    copies = {original: original._replicate_for_data_parallel() for original in module.modules()}
    for original, copy in copies.items():
        copy._modules.update({name: copies.get(child) for name, child in original._modules.items()})
        for key, parameter in original._parameters.items():
            if parameter is None:
                copy._parameters[key] = None
            else:
                setattr(copy, key, parameter.detach() * factor)
        for key, buffer in original._buffers.items():
            copy._buffers[key] = None if buffer is None else buffer.clone()
    return copies[module]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_replicas_compute_with_their_own_tensors(backbone):
    model = make_model(**BACKBONES[backbone], **LOSSES).train()
    scaled = make_model(**BACKBONES[backbone], **LOSSES).train()
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter *= 0.5
    ids = make_ids()
    expected = scaled(ids, labels=ids)
    outputs = replicate(model, 0.5)(ids, labels=ids)
    assert_close(outputs.logits, expected.logits)
    assert_close(outputs.loss, expected.loss)
    assert_close(outputs.aux_loss, expected.aux_loss)
    assert abs(outputs.loss - model(ids, labels=ids).loss) > 1e-2
    for name, module in model.named_modules():  # a bound method would keep the original's
        assert not any(isinstance(value, types.MethodType) for value in vars(module).values()), name


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_tokens_are_refused(shape):
    ids = torch.zeros(shape, dtype=torch.long)
    model = make_model()
    for module in (model, model.model):
        with pytest.raises(ValueError, match=r"`input_ids` has the shape .*: give at least one token"):
            module(ids)
    with pytest.raises(ValueError, match="`inputs_embeds` has the shape"):
        model(inputs_embeds=torch.zeros(*shape, model.config.hidden_size))
