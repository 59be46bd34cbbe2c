"""Outlines of the shapes as polygons, their placement in a picture, and clipping.

Unit outlines are in the square [-0.5, 0.5]^2, x to the right and y down; placed outlines are in pixels, where pixel
(i, j) covers [j, j + 1) x [i, i + 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Points = np.ndarray  # (K, 2) float64


@dataclass(frozen=True)
class Outline:
    """The union of `parts` minus the union of `holes`."""

    parts: tuple[Points, ...]
    holes: tuple[Points, ...] = ()


def _arc(radius: float, start: float, stop: float, count: int, center: tuple[float, float] = (0.0, 0.0)) -> Points:
    angles = np.linspace(start, stop, count)
    return np.stack([center[0] + radius * np.cos(angles), center[1] + radius * np.sin(angles)], axis=1)


def _disc(radius: float, count: int = 28, center: tuple[float, float] = (0.0, 0.0)) -> Points:
    return _arc(radius, 0.0, 2 * math.pi, count + 1, center)[:-1]


def _points(*pairs: tuple[float, float]) -> Points:
    return np.array(pairs, dtype=np.float64)


def _person() -> Outline:
    # Head and body do not touch, so a person has two polygons.
    half = [(0.31, -0.15), (0.31, 0.20), (0.19, 0.20), (0.19, 0.50), (0.05, 0.50), (0.05, 0.20)]
    body = half + [(-x, y) for x, y in reversed(half)]
    return Outline((_disc(0.145, 16, (0.0, -0.355)), _points(*body)))


def _moon() -> Outline:
    # circle of radius 0.5 at the origin minus circle of radius 0.4 at (0.25, 0); they intersect at x = 0.305
    x = (0.5**2 - 0.4**2 + 0.25**2) / (2 * 0.25)
    y = math.sqrt(0.5**2 - x**2)
    outer, inner = math.atan2(y, x), math.atan2(y, x - 0.25)
    back = _arc(0.4, 2 * math.pi - inner, inner, 15, (0.25, 0.0))[1:-1]
    return Outline((np.concatenate([_arc(0.5, outer, 2 * math.pi - outer, 22), back]) + (0.09, 0.0),))


def _star() -> Outline:
    angles = -math.pi / 2 + np.arange(10) * math.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 0.52, 0.215)
    return Outline((np.stack([radii * np.cos(angles), 0.03 + radii * np.sin(angles)], axis=1),))


def _heart() -> Outline:
    t = np.linspace(0, 2 * math.pi, 29)[:-1]
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return Outline((np.stack([x / 32, -(y + 2.5) / 31], axis=1),))


def _cross() -> Outline:
    arm = [(0.16, -0.16), (0.16, -0.5), (-0.16, -0.5), (-0.16, -0.16)]
    turns = [arm, [(y, -x) for x, y in arm], [(-x, -y) for x, y in arm], [(-y, x) for x, y in arm]]
    return Outline((_points(*[p for turn in turns for p in turn[:3]]),))


def unit_outline(name: str) -> Outline:
    """Make the unit outline of a category, by its name; KeyError for an unknown name."""
    makers = {
        "person": _person,
        "circle": lambda: Outline((_disc(0.5),)),
        "ring": lambda: Outline((_disc(0.5),), (_disc(0.25, 20),)),
        "moon": _moon,
        "square": lambda: Outline((_points((-0.45, -0.45), (0.45, -0.45), (0.45, 0.45), (-0.45, 0.45)),)),
        "triangle": lambda: Outline((_points((0.0, -0.48), (0.52, 0.44), (-0.52, 0.44)),)),
        "star": _star,
        "cross": _cross,
        "heart": _heart,
        "arrow": lambda: Outline(
            (
                _points(
                    (0.0, -0.5),
                    (0.42, -0.02),
                    (0.15, -0.02),
                    (0.15, 0.5),
                    (-0.15, 0.5),
                    (-0.15, -0.02),
                    (-0.42, -0.02),
                ),
            )
        ),
    }
    return makers[name]()


def place(outline: Outline, center: tuple[float, float], size: tuple[float, float], angle: float) -> Outline:
    """Scale to `size` (width, height in pixels), rotate by `angle` (radians, clockwise), move to `center` (x, y)."""
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array([[cos * size[0], -sin * size[1]], [sin * size[0], cos * size[1]]])
    move = np.array(center)
    return Outline(tuple(p @ matrix.T + move for p in outline.parts), tuple(p @ matrix.T + move for p in outline.holes))


def clip(points: Points, height: int, width: int) -> Points:
    """Clip a polygon (K, 2) to the picture (Sutherland-Hodgman); returns (K', 2), empty if nothing is left.

    If the polygon falls into several pieces, these stay connected by edges along the border, which enclose no area.
    """
    if points.min() >= 0 and points[:, 0].max() <= width and points[:, 1].max() <= height:
        return points
    kept = points
    for axis, limit, sign in (  # sign: 1 if the picture is above the limit, -1 if below
        (0, 0.0, 1.0),
        (0, float(width), -1.0),
        (1, 0.0, 1.0),
        (1, float(height), -1.0),
    ):
        if not len(kept):
            break
        inside = (kept[:, axis] - limit) * sign >= 0
        clipped: list[Points] = []
        for i in range(len(kept)):
            current, previous = kept[i], kept[i - 1]
            if inside[i] != inside[i - 1]:
                share = (limit - previous[axis]) / (current[axis] - previous[axis])
                crossing = previous + share * (current - previous)
                crossing[axis] = limit
                clipped.append(crossing)
            if inside[i]:
                clipped.append(current)
        kept = np.array(clipped).reshape(-1, 2)
    return kept


def area(points: Points) -> float:
    """Area of a simple polygon (K, 2) in square pixels, by the shoelace formula."""
    if len(points) < 3:
        return 0.0
    x, y = points[:, 0], points[:, 1]
    inner = np.dot(x[:-1], y[1:]) - np.dot(y[:-1], x[1:])
    return abs(float(inner + x[-1] * y[0] - y[-1] * x[0])) / 2
