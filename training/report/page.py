"""The page of `mohge report` as a file."""

from pathlib import Path

import jinja2
import markupsafe

from mohge.model_cards.writing import write_file

from .drawing import as_inline
from .layout import as_text
from .sections import sections
from .subject import Report


GENERATOR = "mohge report"
"""How a page says what wrote it."""


def render(report: Report) -> str:
    """The page as HTML. It needs nothing else: no network, no script."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "cell": as_text,
        "drawing": lambda exhibit, narrow: markupsafe.Markup(as_inline(exhibit, narrow)),
    }
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    folder = Path(report.source)
    return template.render(
        generator=GENERATOR,
        name=folder.resolve().name if folder.is_dir() else report.source,
        report=report,
        sections=sections(report),
    )


def is_page(path: Path) -> bool:
    """Whether the file is a page of ours, which may be replaced."""
    return path.is_file() and f'name="generator" content="{GENERATOR}"'.encode() in path.read_bytes()


def write_page(page: str, path: Path):
    """Write a page to `path`, which holds the old or the new content at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, page)


__all__ = ["Report", "is_page", "render", "write_page"]
