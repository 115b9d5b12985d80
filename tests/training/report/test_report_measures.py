"""What `mohge report` measures on a text, and the colours it draws with."""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from report_runs import CONTEXT, EDGES, TEXT, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mohge import record_routing
from mohge.training.report import evaluate_routing
from mohge.training.report.drawing import group_styles
from mohge.training.report.measure import deciles, mean_and_error, top_tokens
from mohge.training.report.record import read_record, read_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


def test_every_token_of_a_text_is_read_once_and_the_last_sequence_is_short(folder, tmp_path):
    tokenizer, config = AutoTokenizer.from_pretrained(folder), read_record(str(folder)).config
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    whole = tokenizer(TEXT)["input_ids"] + [tokenizer.eos_token_id]
    batches = read_text(str(path), tokenizer, config, 10 * CONTEXT + 7)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(8, CONTEXT), (2, CONTEXT), (1, 7)]
    assert torch.cat([batch["input_ids"].flatten() for batch in batches]).tolist() == whole[: 10 * CONTEXT + 7]
    everything = read_text(str(path), tokenizer, config, 10**6)
    assert torch.cat([batch["input_ids"].flatten() for batch in everything]).tolist() == whole


def test_documents_do_not_predict_one_another(folder, tmp_path):
    documents = [[5, 6, 7, 8, 9], [6, 7, 5], [9]]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"input_ids": ids}) for ids in documents))
    tokenizer, record = AutoTokenizer.from_pretrained(folder), read_record(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    packed = evaluate_routing(model, read_text(str(tmp_path / "rows.jsonl"), tokenizer, record.config, 100))
    alone = [evaluate_routing(model, [{"input_ids": torch.tensor([ids])}]) for ids in documents]
    assert packed.token_loss.isnan().nonzero().flatten().tolist() == [4, 7, 8]
    for name in ("token_loss", "group_choices", "width_choices"):
        expected = torch.cat([getattr(evaluation, name) for evaluation in alone])
        torch.testing.assert_close(getattr(packed, name), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["layers of different widths", "empty slots", "one layer", "mixture"])
def test_choices_are_those_of_the_routers(name, tmp_path):
    model = save_model(tmp_path, **EDGES[name])
    ids = torch.randint(model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    evaluation = evaluate_routing(model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}])
    with torch.no_grad(), record_routing() as routing:
        model(ids)
    index = [layer.index for layer in routing]
    groups, widths = torch.zeros(40, evaluation.statistics.num_groups), torch.zeros(40, len(evaluation.widths))
    for layer, chosen in zip(model.config.sparse_layers, index, strict=True):
        for token, experts in enumerate(chosen.tolist()):
            for expert in experts:
                if expert < layer.num_experts:
                    groups[token, layer.expert_groups[expert]] += 1
                    widths[token, evaluation.widths.index(layer.expert_widths[expert])] += 1
    assert torch.equal(evaluation.group_choices, groups)
    assert torch.equal(evaluation.width_choices, widths)
    assert torch.equal(evaluation.token_ids, ids.flatten())
    if name == "empty slots":
        assert groups.sum() < 40 * 6 * len(index)
    # The same number of activated parameters, from widths by token and from counts by expert.
    config, layers = model.config, len(index)
    dense = model.num_parameters() - config.routed_parameters
    activated = dense + layers * config.expert_parameters(1) * float(evaluation.activated_width.mean())
    assert evaluation.statistics.activated_parameters() == pytest.approx(activated, rel=1e-5)


def make_evaluation(tokens: int) -> argparse.Namespace:
    """Token t chooses group 0 (narrow) 4 - t // 10 times and group 1 t // 10 times."""
    wide = torch.arange(tokens).float() // 10
    return argparse.Namespace(group_choices=torch.stack([4 - wide, wide], dim=1), activated_width=8 + wide)


def test_deciles_order_tokens_by_difficulty_and_leave_out_what_has_none():
    difficulty = torch.arange(50).flip(0).float()
    difficulty[:10] = float("nan")
    parts = deciles(make_evaluation(50), difficulty)
    assert parts[0].error == 0 < parts[2].error
    assert mean_and_error(torch.tensor([1.0, 3.0])) == pytest.approx((2.0, 1.96))
    assert [part.difficulty for part in parts] == [(4.0 * n, 4.0 * n + 3) for n in range(10)]
    assert parts[0].activated_width == 12  # tokens 46 to 49
    assert parts[0].group_share.tolist() == [0, 1]
    assert parts[2].activated_width == 11.5  # tokens 38 to 41
    assert parts[2].group_share.tolist() == [0.125, 0.875]


def test_top_tokens_prefer_their_width_and_are_frequent():
    ids = torch.tensor([7] * 4 + [8] * 4 + [9])
    choices = torch.tensor([[3.0, 1.0]] * 4 + [[1.0, 3.0]] * 4 + [[0.0, 4.0]])
    narrow, wide = top_tokens(ids, choices, minimum=2)
    assert narrow.share == pytest.approx(16 / 36)
    assert [(token, count) for token, count, _ in narrow.tokens] == [(7, 4)]
    assert narrow.tokens[0][2] == pytest.approx(0.75 / (16 / 36))
    assert [(token, count) for token, count, _ in wide.tokens] == [(8, 4)]  # 9 occurs once
    assert [token for token, *_ in top_tokens(ids, choices, minimum=1)[1].tokens] == [9, 8]


def test_width_that_no_token_chooses_has_no_top_tokens():
    tops = top_tokens(torch.tensor([1, 1, 2, 2]), torch.tensor([[1.0, 0.0]] * 4), minimum=1)
    assert tops[1].share == 0
    assert tops[1].tokens == []


# Colours: matrices of Machado, Oliveira and Fernandes (2009) for complete deficiency, on linear RGB.

DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(linear: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of linear sRGB."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.array(to_xyz) @ linear / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_four_groups_stay_apart_without_all_colours(deficiency):
    """20 in L*a*b* is many times what the eye just tells apart, 2.3."""
    srgb = np.array([to_rgb(style["color"]) for style in group_styles(4)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = [lab(np.clip(np.array(DEFICIENCIES[deficiency]) @ color, 0, 1)) for color in linear]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(distances) > 20


def test_groups_differ_by_more_than_colour():
    assert len({style["marker"] for style in group_styles(8)}) == 8
    dashes = [style["linestyle"] for style in group_styles(8)]
    assert all(one != other for one, other in itertools.pairwise(dashes))
