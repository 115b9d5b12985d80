"""Generated text whose tokens are coloured by the width that they chose."""

from collections.abc import Iterable
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .measure import RoutingEvaluation


SHADES = 5
_BACKGROUNDS = (231, 229, 222, 215, 208)
"""White to orange, among the 256 colours of a terminal."""


class Piece(NamedTuple):
    """A token of a text."""

    text: str
    width: float
    """Width that it activated, mean over layers."""
    shade: int
    """0, the narrowest of the text, to `SHADES` - 1, the widest."""


def pieces(sample: RoutingEvaluation, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The tokens of a text, without special ones."""
    widths = sample.activated_width.tolist()
    least, span = min(widths), max(max(widths) - min(widths), 1e-9)
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in sample.token_ids.tolist()]
    return [
        Piece(text, width, min(int(SHADES * (width - least) / span), SHADES - 1))
        for text, width in zip(texts, widths, strict=True)
    ]


def for_terminal(sample: Iterable[Piece], color: bool) -> str:
    """The text for a terminal, or plain where there is none to show colours."""
    sample = list(sample)
    if not color:
        return "".join(piece.text for piece in sample)
    # A colour that crosses the end of a line would fill the next one.
    text = "".join(_paint(piece.text, piece.shade).replace("\n", "\x1b[0m\n") for piece in sample)
    widths = [piece.width for piece in sample]
    scale = f"{_paint(f' {min(widths):.0f} ', 0)} to {_paint(f' {max(widths):.0f} ', SHADES - 1)}"
    return f"{text}\n\ncoloured by the neurons per layer that a token used: {scale}"


def _paint(text: str, shade: int) -> str:
    return f"\x1b[30;48;5;{_BACKGROUNDS[shade]}m{text}\x1b[0m"
