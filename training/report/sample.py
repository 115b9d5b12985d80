"""A text, and what a model makes of its beginning, whose tokens are coloured by the width that they chose."""

from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .measure import RoutingEvaluation


SHADES = 5
_BACKGROUNDS = (231, 229, 222, 215, 208)
"""White to orange, among the 256 colours of a terminal."""


class Sample(NamedTuple):
    """A text, and what a model makes of its beginning, with the routing of that model."""

    prompt: int
    """Number of tokens that both begin with."""
    real: RoutingEvaluation
    written: RoutingEvaluation


class Piece(NamedTuple):
    """A token of a text."""

    text: str
    width: float
    """Width that it activated, mean over layers."""
    shade: int
    """0, the narrowest of the sample, to `SHADES` - 1, the widest."""
    loss: float
    """Of the prediction made at it, in nats; NaN at the end."""

    @property
    def says(self) -> str:
        """Its figures in words."""
        hard = "" if self.loss != self.loss else f", loss of the next token {self.loss:.2f} nats"
        return f"{self.width:.0f} neurons per layer{hard}"


def passages(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Piece]]:
    """The tokens of a sample, without special ones, by what they are; shaded on one scale."""
    start = sample.prompt
    both = torch.cat([sample.real.activated_width, sample.written.activated_width])
    least, span = float(both.min()), max(float(both.max() - both.min()), 1e-9)

    def pieces(text: RoutingEvaluation) -> list[Piece]:
        figures = (values.tolist() for values in (text.token_ids, text.activated_width, text.token_loss))
        found = []
        for token, width, loss in zip(*figures, strict=True):
            shade = min(int(SHADES * (width - least) / span), SHADES - 1)
            found.append(Piece(tokenizer.decode([token], skip_special_tokens=True), width, shade, loss))
        # Each passage stands by itself, where a line break would leave its first line empty.
        found[start] = found[start]._replace(text=found[start].text.lstrip("\n"))
        return found

    real, written = pieces(sample.real), pieces(sample.written)
    return {
        "Prompt, from text that was held out": real[:start],
        "How that text goes on": real[start:],
        "How the model goes on": written[start:],
    }


def for_terminal(sample: dict[str, list[Piece]], color: bool) -> str:
    """[`passages`] for a terminal, or plain where there is none to show colours."""
    texts, widths = [], [piece.width for pieces in sample.values() for piece in pieces]
    for label, pieces in sample.items():
        painted = (_paint(piece.text, piece.shade) if color else piece.text for piece in pieces)
        texts.append("\n".join([f"{label}:", "".join(painted)]))
    if color:
        scale = f"{_paint(f' {min(widths):.0f} ', 0)} to {_paint(f' {max(widths):.0f} ', SHADES - 1)}"
        texts.append(f"coloured by the neurons per layer that a token used: {scale}")
    return "\n\n".join(texts)


def _paint(text: str, shade: int) -> str:
    # A colour that crosses the end of a line would fill the next one.
    return "\n".join(part and f"\x1b[30;48;5;{_BACKGROUNDS[shade]}m{part}\x1b[0m" for part in text.split("\n"))
