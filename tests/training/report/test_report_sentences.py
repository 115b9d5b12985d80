"""What a page and a terminal say about figures: verdicts, samples, and colours with a meaning."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from mohge.training.report.drawing import draw_loads
from mohge.training.report.measure import Decile
from mohge.training.report.sample import Piece, for_terminal
from mohge.training.report.verdict import against_control, compare_tenths


def stub(loss: torch.Tensor, **values) -> SimpleNamespace:
    return SimpleNamespace(
        evaluation=SimpleNamespace(token_loss=loss, perplexity=float(loss.nanmean().exp()), widths=[8, 24]),
        config=SimpleNamespace(router_type="top_k", sparse_layers=[SimpleNamespace(num_experts=4)]),
        sizes=SimpleNamespace(total=1000),
        as_routed=lambda: [("", SimpleNamespace(flops=500))],
        text="the text",
        **values,
    )


@pytest.mark.parametrize(
    ("shift", "winner"),
    [(-0.5, "the unequal experts win by"), (0.5, "the uniform control wins by"), (0.0, "a draw on this text")],
)
def test_verdict_says_who_wins_and_gives_both_axes(shift, winner):
    noise = torch.randn(640, generator=torch.Generator().manual_seed(0))
    loss = torch.full((640,), 2.0)
    loss[::80] = float("nan")
    sentence = against_control(stub(loss + shift + 0.1 * noise, control=stub(loss)))
    assert winner in sentence
    assert f"against {torch.tensor(2.0).exp():.2f} with 4 experts of 8 to 24 neurons" in sentence
    assert "1,000 against 1,000 parameters in all, and 500 against 500 FLOPs" in sentence


@pytest.mark.parametrize(
    ("width", "error", "said"),
    [
        (44.0, 1.0, "10.0% more (+4.0, +-1.4"),
        (36.0, 1.0, "10.0% less"),
        (41.0, 1.0, "no clear"),
        (50, np.nan, "no clear"),
    ],
)
def test_difference_between_tenths_is_said_if_it_is_above_its_error(width, error, said):
    parts = [Decile((0, 1), value, error, torch.ones(1)) for value in (40.0, width)]
    assert said in compare_tenths(parts, "easiest", "hardest")


def test_sample_is_coloured_only_for_a_terminal():
    sample = {"one": [Piece("def", 10, 0, 1.0), Piece(" f\n ", 20, 4, 1.0)], "two": [Piece("g", 15, 2, math.nan)]}
    assert for_terminal(sample, color=False) == "one:\ndef f\n \n\ntwo:\ng"
    colored = for_terminal(sample, color=True)
    assert "\x1b[0m\n" in colored  # no colour crosses the end of a line
    assert re.sub(r"\x1b\[[\d;]*m", "", colored).startswith("one:\ndef f\n \n\ntwo:\ng\n\ncoloured by")


def test_loads_have_one_scale_around_even():
    figure = Figure()
    figure.tips = []
    images = [draw_loads(figure.subplots(), np.array([values]), lambda *_: "") for values in ([0, 1, 2], [1, 30, 0.5])]
    assert images[0].norm(1) == 0.5
    assert [(image.norm.vmin, image.norm.vmax) for image in images] == 2 * [(0.25, 4)]
    assert images[1].get_array().max() == 4
