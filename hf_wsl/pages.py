"""Self-contained HTML pages and the pictures in them: no network, no scripts, all text from models escaped.

`templates/page.html` is the frame of every page, with its style; `templates/table.html` writes tables.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
DOTS_PER_INCH = 160
# The palette of Okabe and Ito, whose colors color-blind eyes tell apart. Color is never the only difference.
BLACK, GRAY, OLIVE = "#000000", "#8A8A8A", "#5B5B00"
BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
ORANGE, RED, PURPLE = "#E69F00", "#D55E00", "#CC79A7"


class Table(NamedTuple):
    """Rows of cells; the first `text_columns` columns are text, the others numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


def html_page(template: Path, **content: Any) -> str:
    """Fills a jinja2 template that extends `page.html`.

    Args:
        template: its file.
        content: its variables; all text is escaped but `markupsafe.Markup`.

    Raises:
        jinja2.UndefinedError: the template names a variable that is not given.
    """
    import jinja2  # here, so that commands that write no page start without it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    return environment.get_template(template.name).render(**content)


def new_figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    """A figure of so many inches, outside of pyplot: no global state, no window system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    tidy(axes)
    return figure, axes


def tidy(axes: "Axes") -> None:
    """Two spines and a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)


def png(figure: "Figure") -> bytes:
    """A picture as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def inline_svg(figure: "Figure", label: str) -> str:
    """A picture as an `<svg>` element (`markupsafe.Markup`), the same bytes for the same picture.

    Args:
        figure: without text that comes from a model.
        label: what the picture shows, for those who cannot see it.
    """
    import matplotlib
    from markupsafe import Markup, escape

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hf-wsl"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    drawing = buffer.getvalue().partition("<svg ")[2]
    # A page holds many pictures: names of groups, which nothing refers to, would be there several times.
    drawing = re.sub(r'<g id="[^"]*">', "<g>", drawing)
    return Markup(f'<svg role="img" aria-label="{escape(label)}" {drawing}')
