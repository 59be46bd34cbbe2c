"""Charts as SVG, drawn by matplotlib: for the page in its light and dark colors, or as a standalone file."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from refdet.files.short_text import shorten
from refdet.files.spreadsheet_text import xml_characters

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Plot

# The colors --ink, --soft, --line and --s1 to --s5 of page.html, in its light and dark style.
LIGHT = ("#16181d", "#555b66", "#dfe1e6", "#2a78d6", "#0f9a68", "#c98500", "#7a4fd0", "#d8403f")
DARK = ("#eceef2", "#a6adba", "#343942", "#5a9ff0", "#2fbd88", "#e0a030", "#a78bfa", "#f07170")
INK, SOFT, LINE = LIGHT[:3]
SERIES = (INK, *LIGHT[3:])  # colors of lines and bars, as `Series.style` numbers them
MAX_VALUE = 1e30  # larger values are not drawn, as their ticks would overflow
MAX_NAME_LENGTH = 40  # characters of a name in a chart

_STYLE = re.compile(r'style="[^"]*"')
_SETTINGS: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "refdet", "text.parse_math": False, "font.size": 9.5,
    "font.family": "sans-serif", "text.color": SOFT, "axes.labelcolor": SOFT, "xtick.color": SOFT,
    "ytick.color": SOFT, "axes.edgecolor": LINE, "grid.color": LINE, "axes.grid": True, "axes.grid.axis": "y",
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "ytick.major.size": 0,
    "axes.axisbelow": True, "axes.unicode_minus": False,
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: label in the legend.
        points: (x, y), ascending in x; NaN, and values of `MAX_VALUE` or more, are left out.
        style: index of the line's color in `SERIES`, 0 to 5.
        dashed: whether the line is for reference, and is drawn dashed and without dots.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: int
    dashed: bool = False


@dataclass(frozen=True)
class Axes:
    """Axes and size of a chart.

    Attributes:
        x_label: quantity and unit of x.
        y_label: quantity and unit of y.
        x_ticks: positions of the ticks of x, None for round numbers.
        y_range: lowest and highest y, None for the range of the points.
        log_y: logarithmic y; points that are not positive are left out.
        width: in points.
        height: in points.
        x_names: labels of ``x_ticks``, None for the numbers themselves.
    """

    x_label: str
    y_label: str
    x_ticks: Sequence[float] | None = None
    y_range: tuple[float, float] | None = None
    log_y: bool = False
    width: int = 520
    height: int = 300
    x_names: Sequence[str] | None = None


@dataclass(frozen=True)
class Chart:
    """A chart of the page.

    Attributes:
        title: the heading.
        description: the values in words, for screen readers.
        svg: the SVG document, "" if there is nothing to draw.
        legend: (`Series.style`, name) of each line.
    """

    title: str
    description: str
    svg: str
    legend: Sequence[tuple[int, str]] = ()

    @property
    def uri(self) -> str:
        """The SVG as a data URI; as an image, it can neither run scripts nor share ids with the page."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode("ascii")


def line_chart(title: str, description: str, series: Sequence[Series], axes: Axes, dots: bool = False) -> Chart:
    """A line chart, with the first line on top.

    Args:
        title: the heading.
        description: its values in words, for screen readers.
        series: the lines.
        axes: the axes.
        dots: mark each point.
    """
    shown = _drop_undrawable(series, axes.log_y)
    svg = _svg(axes, lambda plot: _draw_lines(plot, shown, axes, dots)) if shown else ""
    return Chart(title, description, _apply_theme(svg), [(curve.style, curve.name) for curve in series])


def bar_chart(title: str, description: str, heights: Sequence[float], axes: Axes) -> Chart:
    """A bar chart, with bars at the ``x_ticks`` of the axes."""

    def draw(plot: Plot) -> None:
        positions = list(axes.x_ticks or range(len(heights)))
        plot.bar(positions, list(heights), color=SERIES[1], width=0.8 * _spacing(positions))

    return Chart(title, description, _apply_theme(_svg(axes, draw)) if any(heights) else "")


def custom_chart(title: str, description: str, axes: Axes, draw: Callable[[Plot], None]) -> Chart:
    """A chart whose plot is drawn by the function ``draw``."""
    return Chart(title, description, _apply_theme(_svg(axes, draw)))


def short_name(text: str, max_length: int = MAX_NAME_LENGTH) -> str:
    """Text from a file, shortened and without characters that XML forbids."""
    return shorten(xml_characters(text), max_length)


def standalone_svg(title: str, series: Sequence[Series], axes: Axes) -> str:
    """A line chart as a standalone SVG on white, with dots, title and legend."""

    def draw(plot: Plot) -> None:
        _draw_lines(plot, _drop_undrawable(series, axes.log_y), axes, dots=True)
        plot.set_title(short_name(title, 2 * MAX_NAME_LENGTH), color=INK, loc="left", fontweight="bold", pad=24)
        for i, curve in enumerate(series):
            at = (i / len(series), 1.03)  # evenly spaced above the plot, as fractions of its width and height
            plot.text(
                *at, short_name(curve.name), color=SERIES[curve.style], transform=plot.transAxes, fontweight="bold"
            )

    return _svg(axes, draw, "white")


def _draw_lines(plot: Plot, series: Sequence[Series], axes: Axes, dots: bool) -> None:
    """Draw lines, the first on top; ``dots`` marks the points of those that are not dashed."""
    for index, curve in enumerate(series):
        x, y = zip(*curve.points, strict=True)
        width = 2.2 if curve.style == 0 else 1.6
        line = plot.plot(x, y, color=SERIES[curve.style], linewidth=width, zorder=10 + len(series) - index)[0]
        line.set_gid(f"series-{index}")
        if curve.dashed:
            line.set(linestyle="--", linewidth=1)
        elif dots:
            line.set(marker="o", markersize=4)
    if axes.log_y:
        plot.set_yscale("log")
        plot.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        plot.yaxis.set_minor_formatter(lambda value, position: "")


def _svg(axes: Axes, draw: Callable[[Plot], None], background: str = "none") -> str:
    """The SVG of a plot with these axes and what the function ``draw`` draws."""
    with _matplotlib() as figure:
        drawn = figure(figsize=(axes.width / 72, axes.height / 72), layout="constrained", facecolor=background)
        plot: Plot = drawn.add_subplot(facecolor=background)
        draw(plot)
        plot.set_xlabel(short_name(axes.x_label))
        plot.set_ylabel(short_name(axes.y_label))
        if axes.x_ticks is not None:
            names = axes.x_names or [f"{tick:g}" for tick in axes.x_ticks]
            plot.set_xticks(list(axes.x_ticks), [short_name(name) for name in names])
        if axes.y_range is not None:
            low, high = axes.y_range
            plot.set_ylim(low, high + 0.02 * (high - low))  # room for a line at the upper end
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # so that equal charts have equal bytes
        drawn.savefig(file, format="svg", metadata=no_metadata)
    return file.getvalue()[file.getvalue().index("<svg") :]  # without the XML declaration


@contextmanager
def _matplotlib() -> Iterator[Any]:
    """Matplotlib's `Figure`, under `_SETTINGS`; pyplot would keep the figures in memory."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), rc_context(_SETTINGS):
        warnings.simplefilter("ignore")  # about characters that matplotlib's font lacks; the reader's font has them
        yield Figure


def _apply_theme(svg: str) -> str:
    """Make the colors of a chart follow the page's light or dark style; prints are light."""
    if not svg:
        return ""

    def use_variables(match: re.Match[str]) -> str:
        style = match[0]
        for i, color in enumerate(LIGHT):
            style = style.replace(color, f"var(--C{i})")
        return style

    light, dark = (";".join(f"--C{i}:{c}" for i, c in enumerate(colors)) for colors in (LIGHT, DARK))
    rules = f"<style>:root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    rules += "text{font-family:system-ui,Arial,sans-serif!important}</style>"
    head, rest = svg.split(">", 1)
    return f"{head}>{rules}{_STYLE.sub(use_variables, rest)}"


def _drop_undrawable(series: Sequence[Series], log_y: bool) -> list[Series]:
    """The series without points that cannot be drawn; series without points are left out."""

    def can_be_drawn(x: float, y: float) -> bool:
        return abs(x) < MAX_VALUE and abs(y) < MAX_VALUE and (y > 0 or not log_y)

    kept = [replace(curve, points=[point for point in curve.points if can_be_drawn(*point)]) for curve in series]
    return [curve for curve in kept if curve.points]


def _spacing(positions: Sequence[float]) -> float:
    """Distance between evenly spaced positions, 1 for a single one."""
    return positions[1] - positions[0] if len(positions) > 1 else 1.0
