"""Line charts as inline SVG, without scripts, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from refdet.report.markup import Markup, html, joined

LEFT, RIGHT, TOP, BOTTOM = 46, 14, 26, 44  # margins of the plot in units of the view box


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: label in the legend.
        points: (x, y), ascending in x; points that are not finite are left out.
        style: index of the page's series colours, 0 to 5.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: int


@dataclass(frozen=True)
class Axes:
    """Axes and size of a chart.

    Attributes:
        x_label: quantity and unit of x.
        y_label: quantity and unit of y.
        x_ticks: positions of the ticks of x, None for round numbers.
        y_range: lowest and highest y, None for the range of the points.
        log_y: logarithmic y; points that are not positive are left out.
        width: of the view box.
        height: of the view box.
        x_names: labels of ``x_ticks``, None for the numbers themselves.
    """

    x_label: str
    y_label: str
    x_ticks: Sequence[float] | None = None
    y_range: tuple[float, float] | None = None
    log_y: bool = False
    width: int = 580
    height: int = 340
    x_names: Sequence[str] | None = None


def line_chart(title: str, description: str, series: Sequence[Series], axes: Axes, dots: bool = False) -> Markup:
    """An ``<svg>`` line chart with ticks; empty without points.

    Args:
        title: for screen readers.
        description: for screen readers.
        series: the lines, the first on top.
        axes: the axes.
        dots: mark each point, with its values as a tooltip.
    """
    lines = [(s, [p for p in s.points if _shown(p, axes.log_y)]) for s in series]
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    if not xs:
        return Markup()
    x_ticks = list(axes.x_ticks) if axes.x_ticks else linear_ticks(min(xs), max(xs), 6)
    x_names = dict(zip(x_ticks, axes.x_names or map(_number, x_ticks), strict=True))
    y_low, y_high = axes.y_range or (min(ys), max(ys))
    y_ticks = log_ticks(y_low, y_high) if axes.log_y else linear_ticks(y_low, y_high, 6)
    to_x = _scale(min(*xs, *x_ticks), max(*xs, *x_ticks), LEFT, axes.width - RIGHT, False)
    low, high = min(y_low, *y_ticks), max(y_high, *y_ticks)
    to_y = _scale(low, high, axes.height - BOTTOM, TOP, axes.log_y)
    bottom, right = axes.height - BOTTOM, axes.width - RIGHT
    parts = [
        html('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">', axes.width, axes.height, title),
        html("<title>{}</title><desc>{}</desc>", title, description),
        html('<text x="2" y="13">{}</text>', axes.y_label),
        html('<text x="{}" y="{}" text-anchor="end">{}</text>', right, axes.height - 6, axes.x_label),
    ]
    for tick in y_ticks:
        at = f"{to_y(tick):.1f}"
        parts.append(html('<line class="grid" x1="{}" x2="{}" y1="{at}" y2="{at}"/>', LEFT, right, at=at))
        parts.append(html('<text x="{}" y="{}" dy=".35em" text-anchor="end">{}</text>', LEFT - 7, at, _number(tick)))
    for tick in x_ticks:
        at = f"{to_x(tick):.1f}"
        parts.append(html('<line class="grid" x1="{at}" x2="{at}" y1="{}" y2="{}"/>', bottom, bottom + 5, at=at))
        parts.append(html('<text x="{}" y="{}" text-anchor="middle">{}</text>', at, bottom + 19, x_names[tick]))
    for line, points in reversed(lines):  # the first lies on top
        path = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in points)
        parts.append(html('<polyline class="s{}" points="{}"/>', line.style, path))
        for x, y in points if dots else ():
            tooltip = f"{line.name}: {y:.3f} at {x_names.get(x, _number(x))}"
            point = '<circle class="s{}" r="4.5" cx="{:.1f}" cy="{:.1f}"><title>{}</title></circle>'
            parts.append(html(point, line.style, to_x(x), to_y(y), tooltip))
    return joined([*parts, Markup("</svg>")], "\n")


def legend(series: Sequence[Series]) -> Markup:
    """The names of the lines beside their colours."""
    items = (html('<li><i class="s{}"></i>{}</li>', s.style, s.name) for s in series)
    return html('<ul class="legend">{}</ul>', joined(items))


# The page's colours on white, for a chart that stands alone.
_COLOURS = ("#16181d", "#2a78d6", "#0f9a68", "#c98500", "#7a4fd0", "#d8403f")
_STYLE = (
    "text{fill:#555b66;font:13px system-ui,Arial,sans-serif}.grid{stroke:#dfe1e6}polyline{fill:none;stroke-width:2}"
)


def standalone(chart: Markup, title: str, series: Sequence[Series], axes: Axes) -> str:
    """A standalone SVG file: title, legend, and the chart from `line_chart`."""
    head = 50
    style = _STYLE + "".join(
        f"polyline.s{i}{{stroke:{c}}}.k{i},circle.s{i}{{fill:{c}}}" for i, c in enumerate(_COLOURS)
    )
    share = (axes.width - LEFT - RIGHT) / max(len(series), 1)
    parts = [
        html(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
            width=axes.width,
            height=axes.height + head,
        ),
        html('<style>{}</style><rect width="100%" height="100%" fill="#fff"/>', style),
        html('<text x="{}" y="18" style="font-weight:600">{}</text>', LEFT, title),
    ]
    for i, line in enumerate(series):
        x = LEFT + i * share
        parts.append(html('<rect class="k{}" x="{:.0f}" y="32" width="16" height="4"/>', line.style, x))
        parts.append(html('<text x="{:.0f}" y="39">{}</text>', x + 21, line.name))
    sized = chart.replace("<svg ", html('<svg width="{}" height="{}" ', axes.width, axes.height), 1)
    return joined([*parts, html('<g transform="translate(0 {})">{}</g>', head, sized), Markup("</svg>\n")], "\n")


def linear_ticks(low: float, high: float, about: int) -> list[float]:
    """About `about` multiples of 1, 2 or 5 times a power of ten that enclose ``low`` and ``high``."""
    span = (high - low) or abs(high) or 1.0
    rough = span / max(about - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that enclose ``low`` and ``high``, both positive."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    under = [t for t in ticks if t <= low * 1.001]
    over = [t for t in ticks if t >= high * 0.999]
    return [t for t in ticks if under[-1] <= t <= over[0]]


def _shown(point: tuple[float, float], log_y: bool) -> bool:
    return all(map(math.isfinite, point)) and (point[1] > 0 or not log_y)


def _scale(low: float, high: float, start: float, end: float, log: bool) -> Callable[[float], float]:
    """Maps values between ``low`` and ``high`` to coordinates between ``start`` and ``end``."""
    bend = math.log if log else float
    first, last = bend(low), bend(high)
    return lambda value: start + (bend(value) - first) / ((last - first) or 1.0) * (end - start)


def _number(value: float) -> str:
    return f"{value:.10g}"
