"""Validation of the polygons in an instances JSON, with messages that help to fix the program that wrote the file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from refdet.errors import InputError
from refdet.files.short_text import format_count, short_repr
from refer.masks import MAX_DISTANCE, MAX_LENGTH, can_be_drawn

_MIN_NUMBERS = 6  # coordinates of three points


def parse_polygons(path: Path, value: list, what: str) -> tuple[list | None, str]:
    """Check polygons and drop those with fewer than three points.

    Args:
        path: the file, for error messages.
        value: ``segmentation`` of an annotation, ``[[x, y, x, y, ...], ...]`` in pixels.
        what: name of the annotation, for error messages.

    Returns:
        The remaining polygons (None if there are none), and a description of the dropped ones ("" for none).

    Raises:
        InputError: a polygon is not a list of an even number of finite numbers.
    """
    if value and type(value[0]) in (int, float) and all(type(part) in (int, float) for part in value):
        raise InputError(
            f"{path}: {what}: 'segmentation' is a flat list of numbers; wrap it in another list: [[x, y, x, y, ...]]"
        )
    for polygon in value:
        try:
            # Summing is the fastest check that a long list has only finite numbers: with anything else, the sum is
            # infinite or NaN, or raises one of the errors below.
            valid = isinstance(polygon, list) and len(polygon) % 2 == 0 and math.isfinite(sum(polygon))
        except (TypeError, OverflowError):
            valid = False
        if not valid:
            problem = _polygon_problem(polygon)
            raise InputError(f"{path}: {what}: a polygon {problem}; it must be numbers [x, y, x, y, ...]")
    kept = [polygon for polygon in value if len(polygon) >= _MIN_NUMBERS]
    if len(kept) == len(value):
        return value, ""
    short = [polygon for polygon in value if len(polygon) < _MIN_NUMBERS]
    return kept or None, _describe_short(short)


def check_outlines(path: Path, polygons: list, what: str, height: int, width: int) -> None:
    """Check that polygons which passed `parse_polygons` can be drawn (`refer.masks.can_be_drawn`).

    Args:
        path: the file, for error messages.
        polygons: ``[[x, y, x, y, ...], ...]`` in pixels.
        what: name of the annotation, for error messages.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Raises:
        InputError: a polygon reaches more than `MAX_DISTANCE` pixels outside its image, or the outlines are together
            longer than `MAX_LENGTH` pixels.
    """
    if can_be_drawn_in_any_image(polygons) or can_be_drawn(polygons, height, width):
        return
    reach = min(max(max(map(abs, polygon)) for polygon in polygons), 1e300)  # an integer may exceed the range of floats
    if reach > MAX_DISTANCE + max(height, width):
        problem = (
            f"a polygon reaches {reach:.6g}, more than {MAX_DISTANCE} pixels outside its image of {width}x{height}"
        )
    else:
        problem = f"the outlines of its polygons are longer than {MAX_LENGTH} pixels"
    raise InputError(f"{path}: {what}: {problem}; correct or remove the annotation")


def can_be_drawn_in_any_image(polygons: list) -> bool:
    """Whether `refer.masks.can_be_drawn` is true for any image size, by a quick bound that nearly all polygons meet.

    No coordinate exceeds `MAX_DISTANCE`, and the outlines are not too long even if each edge is as long as the range of
    its polygon's coordinates.
    """
    length = 0.0
    for polygon in polygons:
        low, high = min(polygon), max(polygon)
        if low < -MAX_DISTANCE or high > MAX_DISTANCE:
            return False
        length += len(polygon) / 2 * (high - low)
    return length <= MAX_LENGTH


def _polygon_problem(polygon: Any) -> str:
    """Why a polygon is invalid, as a predicate: "is ...", "has ...", "contains ..."."""
    if not isinstance(polygon, list):
        return f"is {short_repr(polygon)}, not a list"
    if any(isinstance(part, list) for part in polygon):
        return "is a list of points [[x, y], ...]"
    for number in polygon:
        if type(number) not in (int, float, bool):
            return f"contains {short_repr(number)}, not a number"
        if isinstance(number, float) and not math.isfinite(number):
            return f"contains {number}"
    if len(polygon) % 2:
        return f"has an odd number of coordinates ({len(polygon)})"
    return "contains numbers that are too large"


def _describe_short(short: list[list]) -> str:
    """Description of polygons with fewer than three points."""
    sizes = sorted({len(polygon) // 2 for polygon in short})  # in points
    points = " or ".join(map(str, sizes)) + (" point" if sizes == [1] else " points")
    what = f"{format_count(len(short), 'polygon')} with fewer than three points ({points}"
    if sizes == [2] and len(short) == 1:
        return f"{what}; a box [x, y, width, height] is not a polygon)"
    if sizes == [1] and len(short) >= 3:
        return f"{what} each; a polygon is one list of numbers [x, y, x, y, ...])"
    return f"{what})"
