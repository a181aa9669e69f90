"""Rendering of figures as inline SVG for the page, and into files.

On the page each panel is an SVG element of its own, so that a narrow screen stacks panels instead of
shrinking their text. Text is not converted to paths, and colours are replaced by CSS variables of the page,
which have values for light and dark mode. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import logging
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from harness_rect.io.files import written_whole
from harness_rect.io.progress import logging_only

#: Colours of axes and text, and of the data: Okabe and Ito's without yellow, too pale on white.
INK, MUTED, GRID, PAPER = "#1b1e23", "#5b6470", "#d3d8de", "#ffffff"
PALETTE = (INK, "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = "osD^vPX<>"
_LINES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (9, 1.5)))
#: The CSS variable of each colour on the page.
CSS_NAMES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    c: f"c{i}" for i, c in enumerate(PALETTE) if i
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "harness-rect",
    "text.parse_math": False,  # a model may be called $x$
    "font.family": ["Helvetica", "Arial", "sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # each name is looked for, and written, for each text
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "hatch.linewidth": 1.2,
    "figure.dpi": 72,
}


@dataclass(frozen=True)
class Look:
    """Colour, marker and line: two series differ in at least two of them."""

    color: str
    marker: str
    line: Any

    @classmethod
    def number(cls, index: int) -> Look:
        return cls(
            PALETTE[index % len(PALETTE)], _MARKERS[index % len(_MARKERS)], _LINES[index % len(_LINES)]
        )


#: The look of a bar: arguments of ``Axes.barh``.
Fill = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """One set of axes. description: the text for screen readers."""

    title: str
    description: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (4.2, 3.0)

    def draw_on(self, axes: Axes) -> None:
        axes.set_title(fitting(self.title))
        self.draw(axes)


@dataclass(frozen=True)
class FigureSpec:
    """A figure: panels with one legend and one caption.

    name: of the file. columns: of the whole figure. header, rows: the numbers drawn, as a table.
    tags: the classes by which the page's filters hide it.
    """

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    legend: Sequence[tuple[str, Look | Fill]] = ()
    columns: int = 3
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    tags: str = ""


def fitting(label: str, width: int = 44) -> str:
    """A label wrapped into at most two lines, cut if necessary; tables and legends show it in full."""
    return "\n".join(textwrap.wrap(label, width, max_lines=2, placeholder="…"))


# ---------------------------------------------------------------------------------------------- rendering


@contextmanager
def _style() -> Iterator[None]:
    # matplotlib warns if Helvetica or Arial is not installed.
    quiet_fonts = logging_only(logging.ERROR, "matplotlib.font_manager")
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings(), quiet_fonts:
        # A font may lack a letter of a model's name; the browser uses another font for it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


#: These entries would make a file depend on time and version.
_UNDATED: dict[str, None] = {"Date": None, "Creator": None}


def _save(figure: Figure, target: Any, form: str) -> None:
    metadata = _UNDATED if form == "svg" else {"Software": None}
    figure.savefig(
        target, format=form, metadata=metadata, transparent=form == "svg", dpi=200 if form == "png" else 72
    )


def inline_svg(panel: Panel, name: str) -> Markup:
    """The panel as an ``<svg>`` element for an HTML page: with the page's colours, a title and own ids."""
    with _style():
        figure = Figure(figsize=panel.size, layout="constrained")
        panel.draw_on(figure.add_subplot())
        return _element(figure, name, panel.title, panel.description)


def swatch(look: Look | Fill, name: str) -> Markup:
    """The symbol of a legend entry, without text."""
    with _style():
        figure = Figure(figsize=(0.55, 0.22))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        if isinstance(look, Look):
            line = {"color": look.color, "ls": look.line, "marker": look.marker}
            axes.plot([0.04, 0.5, 0.96], [0.5] * 3, markevery=[1], **line)
        else:
            axes.barh([0.5], [0.9], height=0.8, left=0.05, **look)
        return _element(figure, name, None, "")


def _element(figure: Figure, name: str, title: str | None, description: str) -> Markup:
    buffer = io.StringIO()
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_facecolor("none")
    # savefig would draw all twice.
    FigureCanvasSVG(figure).print_svg(buffer, metadata=_UNDATED)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[\w.]+_\d+"|(?m:^ +)', "", text)  # what nothing refers to, and indentation
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(url\(|href=")#([^")]+)', rf"\1#{name}-\2", text)
    for color, css in CSS_NAMES.items():
        text = text.replace(color, f"var(--{css})")
    width, height = (72 * inches for inches in figure.get_size_inches())
    if title is None:
        accessible, named = 'aria-hidden="true"', ""
    else:
        accessible = f'role="img" aria-labelledby="{name}-title {name}-desc"'
        named = f'<title id="{name}-title">{escape(title)}</title>'
        named += f'<desc id="{name}-desc">{escape(description)}</desc>'
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {accessible}'
    )
    opening += f' viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">'
    return Markup(re.sub(r"<svg[^>]*>", lambda _: opening + named, text, count=1).strip())


def _whole(spec: FigureSpec) -> Figure:
    """All panels in one figure with the legend below them."""
    columns = min(spec.columns, len(spec.panels))
    rows = math.ceil(len(spec.panels) / columns)
    width = max(panel.size[0] for panel in spec.panels) * columns
    height = max(panel.size[1] for panel in spec.panels) * rows
    entries = math.ceil(len(spec.legend) / max(1, columns * 2))
    figure = Figure(figsize=(width, height + 0.35 * entries), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for panel in spec.panels:
        panel.draw_on(next(axes))
    for unused in axes:
        unused.set_axis_off()
    if spec.legend:
        handles = [_handle(label, look) for label, look in spec.legend]
        figure.legend(handles=handles, loc="outside lower center", ncols=columns * 2, frameon=False)
    return figure


def write(spec: FigureSpec, folder: Path) -> list[Path]:
    """``NAME.svg`` and ``NAME.png`` (200 dpi) in ``folder``."""
    paths = [folder / f"{spec.name}.{form}" for form in ("svg", "png")]
    with _style():
        figure = _whole(spec)
        for path in paths:
            with written_whole(path) as temporary:
                _save(figure, temporary, path.suffix[1:])
    return paths


def _handle(label: str, look: Look | Fill) -> Line2D | Patch:
    if isinstance(look, Look):
        return Line2D([], [], color=look.color, ls=look.line, marker=look.marker, label=label)
    return Patch(label=label, **look)
