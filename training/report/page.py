"""The page of `mohge report` as a file."""

from pathlib import Path

import jinja2
import markupsafe

from mohge.model_cards.writing import write_file

from .comparison import comparison
from .drawing import LINES, as_inline
from .layout import as_text
from .sections import sections
from .subject import Report


GENERATOR = "mohge report"
"""How a page says what wrote it."""


def render(report: Report) -> str:
    """The page as HTML. It needs nothing else: no network, no script."""
    folder, kind = Path(report.source), "Training run" if report.history else "Model"
    name = folder.resolve().name if folder.is_dir() else report.source
    return _render(
        name=name,
        about=kind if name == report.source else f"{kind}, {report.source}",
        tiles=report.tiles(),
        facts=report.all_facts(),
        sections=sections(report),
    )


def render_comparison(reports: list[Report]) -> str:
    """A page that compares runs or models, at most [`LINES`]."""
    about = ", ".join(report.source for report in reports)
    return _render(name=f"{len(reports)} models", about=about, tiles=[], facts={}, sections=comparison(reports))


def _render(**content) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "cell": as_text,
        "drawing": lambda exhibit, narrow: markupsafe.Markup(as_inline(exhibit, narrow)),
    }
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(generator=GENERATOR, **content)


def is_page(path: Path) -> bool:
    """Whether the file is a page of ours, which may be replaced."""
    return path.is_file() and f'name="generator" content="{GENERATOR}"'.encode() in path.read_bytes()


def write_page(page: str, path: Path):
    """Write a page to `path`, which holds the old or the new content at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, page)


__all__ = ["LINES", "Report", "is_page", "render", "render_comparison", "write_page"]
