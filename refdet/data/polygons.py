"""Polygons of an instances JSON: what is wrong with them, said so that their writer can be corrected."""

from __future__ import annotations

import math
import reprlib
from pathlib import Path
from typing import Any

from refdet.errors import InputError
from refer.masks import FARTHEST, LONGEST, can_be_drawn

_FEWEST = 6  # numbers: three points


def checked_polygons(path: Path, value: list, what: str) -> tuple[list | None, str]:
    """The polygons that enclose something (None for none at all), and what is said of those left out, "" for none.

    Args:
        value: ``segmentation`` of an annotation, a list.
        what: names the annotation.

    Raises:
        InputError: one is no list of an even number of finite numbers.
    """
    if value and type(value[0]) in (int, float) and all(type(part) in (int, float) for part in value):
        raise InputError(f"{path}: {what}: 'segmentation' is a flat list of numbers; a polygon needs another list "
                         "around it: [[x, y, x, y, ...]]")  # fmt: skip
    for polygon in value:
        try:
            # Adding up is the quick way to see that all of a long list are finite numbers.
            good = isinstance(polygon, list) and len(polygon) % 2 == 0 and math.isfinite(sum(polygon))
        except (TypeError, OverflowError):
            good = False
        if not good:
            raise InputError(f"{path}: {what}: a polygon {_fault(polygon)}; it must be numbers [x, y, x, y, ...]")
    kept = [polygon for polygon in value if len(polygon) >= _FEWEST]
    if len(kept) == len(value):
        return value, ""
    return kept or None, _left_out([polygon for polygon in value if len(polygon) < _FEWEST])


def check_outlines(path: Path, polygons: list, what: str, height: int, width: int) -> None:
    """See that polygons which passed `checked_polygons` can be drawn in an image of this size in pixels.

    Raises:
        InputError: one lies far from its image, or they are absurdly long: see `refer.masks.can_be_drawn`.
    """
    if is_surely_drawn(polygons) or can_be_drawn(polygons, height, width):
        return
    reach = min(max(max(map(abs, polygon)) for polygon in polygons), 1e300)  # an integer may exceed all floats
    if reach > FARTHEST + max(height, width):
        told = f"a polygon reaches to {reach:.6g}, more than {FARTHEST} pixels from its image of {width}x{height}"
    else:
        told = f"its polygons are more than {LONGEST} pixels long, going to and fro"
    raise InputError(f"{path}: {what}: {told}; correct them or take the annotation out")


def is_surely_drawn(polygons: list) -> bool:
    """Whether polygons can be drawn in an image of any size, which nearly all can: a quick look without arrays.

    Each step of an outline is at most as long as its numbers differ.
    """
    length = 0.0
    for polygon in polygons:
        low, high = min(polygon), max(polygon)
        if low < -FARTHEST or high > FARTHEST:
            return False
        length += len(polygon) / 2 * (high - low)
    return length <= LONGEST


def _fault(polygon: Any) -> str:
    if not isinstance(polygon, list):
        return f"is {reprlib.repr(polygon)}, no list"
    if any(isinstance(part, list) for part in polygon):
        return "is a list of points [[x, y], ...]"
    for number in polygon:
        if type(number) not in (int, float, bool):
            return f"holds {reprlib.repr(number)}, no number"
        if isinstance(number, float) and not math.isfinite(number):
            return f"holds {number}"
    if len(polygon) % 2:
        return f"has an odd number of coordinates ({len(polygon)})"
    return "holds numbers that are too large"


def _left_out(short: list[list]) -> str:
    """What is said of polygons with fewer than three points."""
    sizes = sorted({len(polygon) // 2 for polygon in short})
    points = " or ".join(map(str, sizes)) + (" point" if sizes == [1] else " points")
    told = f"{len(short)} of its polygons with fewer than three points ({points}"
    if sizes == [2] and len(short) == 1:
        return f"{told}; a box [x, y, width, height] is no polygon)"
    if sizes == [1] and len(short) >= 3:
        return f"{told} each; a polygon is one list of numbers [x, y, x, y, ...])"
    return f"{told})"
