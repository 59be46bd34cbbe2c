"""The checks that an entry of an instances JSON must pass, each an InputError that names the file and the entry."""

from __future__ import annotations

import math
from pathlib import Path

from refdet.data.polygons import check_outlines, checked_polygons
from refdet.errors import InputError
from refdet.structures.limits import is_id, size_problem
from refer.masks import rle_pixels

_NUMBERS = {int, float}  # what JSON has for numbers; bool is an int to isinstance


def kind(value: object) -> str:
    """The JSON name of a value's type."""
    names = {dict: "object", list: "list", str: "string", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def checked_id(path: Path, entry: dict, key: str, what: str) -> int:
    """The integer ``entry[key]``; ``what`` names the entry."""
    value = entry.get(key)
    if type(value) is not int:  # bool is an int to isinstance
        shown = f"is {value!r:.40}" if key in entry else "is missing"
        raise InputError(f"{path}: {what}: {key!r} {shown}, it must be an integer")
    if not is_id(value):
        raise InputError(f"{path}: {what}: {key!r} is an integer of more than 64 bits, which no store can hold")
    return value


def checked_category(path: Path, position: int, entry: dict) -> tuple[int, str]:
    """Id and name of ``categories[position]``."""
    category_id = checked_id(path, entry, "id", f"categories[{position}]")
    name = entry.get("name")
    if not isinstance(name, str):
        raise InputError(f"{path}: category {category_id} has no name")
    return category_id, name


def checked_image(path: Path, position: int, entry: dict) -> tuple[int, str, int, int]:
    """Id, file name ("" for none), height and width in pixels of ``images[position]``."""
    image_id = checked_id(path, entry, "id", f"images[{position}]")
    what = f"image {image_id}"
    file_name = entry.get("file_name") or ""
    if not isinstance(file_name, str):
        raise InputError(f"{path}: {what}: 'file_name' is a {kind(file_name)}, it must be a string")
    if "\0" in file_name or any("\ud800" <= character <= "\udfff" for character in file_name):
        raise InputError(f"{path}: {what}: 'file_name' is {file_name!a}, which is no text")
    height, width = (checked_id(path, entry, key, what) for key in ("height", "width"))
    if problem := size_problem(height, width):
        raise InputError(f"{path}: {what}: {problem}")
    return image_id, file_name, height, width


def checked_ids(path: Path, position: int, entry: dict) -> tuple[int, int, int]:
    """Id, image id and category id of ``annotations[position]``."""
    annotation_id = checked_id(path, entry, "id", f"annotations[{position}]")
    what = f"annotation {annotation_id}"
    return annotation_id, checked_id(path, entry, "image_id", what), checked_id(path, entry, "category_id", what)


def checked_box(path: Path, bbox: object, what: str) -> list[float]:
    """``[x, y, width, height]``: four numbers, finite or not, as they stand in the file."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not set(map(type, bbox)) <= _NUMBERS:
        shown = "is missing" if bbox is None else f"is {bbox!r:.60}"
        raise InputError(f"{path}: {what}: 'bbox' {shown}, it must be four numbers [x, y, width, height]")
    return bbox


def checked_crowd(path: Path, entry: dict, what: str) -> bool:
    """``iscrowd``, False where it is not given."""
    iscrowd = entry.get("iscrowd", 0)
    if iscrowd not in (0, 1):
        raise InputError(f"{path}: {what}: 'iscrowd' is {iscrowd!r:.40}, it must be 0 or 1")
    return bool(iscrowd)


def checked_area(path: Path, area: object, what: str) -> float:
    """An area in square pixels."""
    if not is_finite(area):
        raise InputError(f"{path}: {what}: 'area' is {area!r:.40}, it must be a finite number")
    return float(area)  # type: ignore[arg-type]


def is_finite(value: object) -> bool:
    """Whether it is a number that a finite float can hold."""
    try:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer beyond the range of floats
        return False


def checked_segmentation(
    path: Path, value: object, what: str, size: tuple[int, int] | None
) -> tuple[list | dict | None, str]:
    """The segmentation without polygons that enclose nothing (None for none at all), and what is said of those.

    Args:
        size: height and width of the image in pixels, which an RLE must have and polygons must lie near; None
            where they are not known yet: then the RLE must fit its own size, and `check_outlines` is called later.
    """
    if value is None or value == []:
        return None, ""
    if isinstance(value, dict):
        _check_rle(path, value, what, size)
        return value, ""
    if not isinstance(value, list):
        raise InputError(f"{path}: {what}: 'segmentation' is a {kind(value)}, it must be polygons or an RLE")
    polygons, left_out = checked_polygons(path, value, what)
    if polygons is not None and size is not None:
        check_outlines(path, polygons, what, *size)
    return polygons, left_out


def _check_rle(path: Path, rle: dict, what: str, image_size: tuple[int, int] | None) -> None:
    size, counts = rle.get("size"), rle.get("counts")
    if image_size is None:
        if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
            raise InputError(f"{path}: {what}: its RLE has size {size!r:.40}, it must be [height, width]")
        image_size = (size[0], size[1])
    height, width = image_size
    if size != [height, width]:
        raise InputError(f"{path}: {what}: its RLE has size {size!r:.40}, its image is [{height}, {width}]")
    pixels = height * width
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts):
            raise InputError(f"{path}: {what}: the counts of its RLE must be integers from 0 on")
        if sum(counts) != pixels:
            raise InputError(f"{path}: {what}: its RLE covers {sum(counts)} pixels, its image has {pixels}")
    elif not isinstance(counts, str):
        raise InputError(f"{path}: {what}: its RLE has no 'counts' (a list or a string)")
    elif rle_pixels(counts) != pixels:
        raise InputError(f"{path}: {what}: its RLE is damaged: it does not cover the {pixels} pixels of its image")
