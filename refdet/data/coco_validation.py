"""Validation of the entries of an instances JSON. Every InputError names the file and the entry."""

from __future__ import annotations

import math
from pathlib import Path

from refdet.data.polygons import check_outlines, parse_polygons
from refdet.errors import InputError
from refdet.files.short_text import format_count
from refdet.structures.limits import is_id, size_problem
from refer.masks import rle_pixels

_NUMBER_TYPES = {int, float}  # compared with type(), as isinstance accepts bool for int


def json_type(value: object) -> str:
    """Name of the type of a JSON value, for messages."""
    names = {dict: "object", list: "list", str: "string", type(None): "null"}
    return names.get(type(value), type(value).__name__)  # "int" and "float" say more than JSON's "number"


def parse_id(path: Path, entry: dict, key: str, what: str) -> int:
    """Return the integer ``entry[key]``.

    Args:
        path: the file, for error messages.
        entry: a JSON object.
        key: the key to read.
        what: name of the entry, for error messages.

    Returns:
        The integer.

    Raises:
        InputError: the value is missing, not an integer, or has more than 64 bits.
    """
    value = entry.get(key)
    if type(value) is not int:  # not isinstance, which accepts bool
        shown = f"is {value!r:.40}" if key in entry else "is missing"
        raise InputError(f"{path}: {what}: {key!r} {shown}; it must be an integer")
    if not is_id(value):
        raise InputError(f"{path}: {what}: {key!r} is an integer of more than 64 bits; use a smaller one")
    return value


def parse_category(path: Path, position: int, entry: dict) -> tuple[int, str]:
    """Return id and name of ``categories[position]``.

    Args:
        path: the file, for error messages.
        position: position of the entry in ``categories``.
        entry: the entry.

    Returns:
        Category id and name.

    Raises:
        InputError: the id or the name is invalid.
    """
    category_id = parse_id(path, entry, "id", f"categories[{position}]")
    name = entry.get("name")
    if not isinstance(name, str):
        raise InputError(f"{path}: category {category_id} has no name; add one")
    return category_id, name


def parse_image(path: Path, position: int, entry: dict) -> tuple[int, str, int, int]:
    """Return id, file name and size of ``images[position]``.

    Args:
        path: the file, for error messages.
        position: position of the entry in ``images``.
        entry: the entry.

    Returns:
        Image id, file name ("" for none), and height and width in pixels.

    Raises:
        InputError: one of these is invalid.
    """
    image_id = parse_id(path, entry, "id", f"images[{position}]")
    what = f"image {image_id}"
    file_name = entry.get("file_name")
    if file_name is None:
        file_name = ""
    if not isinstance(file_name, str):
        raise InputError(f"{path}: {what}: 'file_name' is a {json_type(file_name)}; it must be a string")
    if "\0" in file_name or any("\ud800" <= character <= "\udfff" for character in file_name):
        raise InputError(f"{path}: {what}: 'file_name' {file_name!a} contains NUL or unpaired surrogates; rename it")
    height, width = (parse_id(path, entry, key, what) for key in ("height", "width"))
    if problem := size_problem(height, width):
        raise InputError(f"{path}: {what}: {problem}")
    return image_id, file_name, height, width


def parse_annotation_ids(path: Path, position: int, entry: dict) -> tuple[int, int, int]:
    """Return id, image id and category id of ``annotations[position]``.

    Args:
        path: the file, for error messages.
        position: position of the entry in ``annotations``.
        entry: the entry.

    Returns:
        Annotation id, image id and category id.

    Raises:
        InputError: one of them is invalid.
    """
    annotation_id = parse_id(path, entry, "id", f"annotations[{position}]")
    what = f"annotation {annotation_id}"
    return annotation_id, parse_id(path, entry, "image_id", what), parse_id(path, entry, "category_id", what)


def parse_box(path: Path, bbox: object, what: str) -> list[float]:
    """Check that a box is four numbers, which may be infinite or NaN.

    Args:
        path: the file, for error messages.
        bbox: the box, ``[x, y, width, height]`` in pixels.
        what: name of the annotation, for error messages.

    Returns:
        The box.

    Raises:
        InputError: the box is missing or not four numbers.
    """
    if not isinstance(bbox, list) or len(bbox) != 4 or not set(map(type, bbox)) <= _NUMBER_TYPES:
        shown = "is missing" if bbox is None else f"is {bbox!r:.60}"
        raise InputError(f"{path}: {what}: 'bbox' {shown}; it must be four numbers [x, y, width, height]")
    return bbox


def parse_iscrowd(path: Path, entry: dict, what: str) -> bool:
    """Return ``iscrowd`` of an annotation, False by default.

    Args:
        path: the file, for error messages.
        entry: the annotation.
        what: name of the annotation, for error messages.

    Returns:
        Whether it is a crowd.

    Raises:
        InputError: ``iscrowd`` is neither 0 nor 1.
    """
    iscrowd = entry.get("iscrowd", 0)
    if iscrowd not in (0, 1):
        raise InputError(f"{path}: {what}: 'iscrowd' is {iscrowd!r:.40}; it must be 0 or 1")
    return bool(iscrowd)


def parse_area(path: Path, area: object, what: str) -> float:
    """Check an area and convert it to float.

    Args:
        path: the file, for error messages.
        area: the area in square pixels, as in the file.
        what: name of the annotation, for error messages.

    Returns:
        The area as a float.

    Raises:
        InputError: the area is not a finite number.
    """
    if not is_finite(area):
        raise InputError(f"{path}: {what}: 'area' is {area!r:.40}; it must be a finite number")
    return float(area)  # type: ignore[arg-type]


def is_finite(value: object) -> bool:
    """Whether a value is a number within the range of finite floats."""
    try:
        return type(value) in _NUMBER_TYPES and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer beyond the range of floats
        return False


def parse_segmentation(
    path: Path, value: object, what: str, size: tuple[int, int] | None
) -> tuple[list | dict | None, str]:
    """Check a segmentation and drop polygons with fewer than three points.

    Args:
        path: the file, for error messages.
        value: the segmentation: polygons, an RLE or None.
        what: name of the annotation, for error messages.
        size: height and width of the image in pixels, to check the size of an RLE and the extent of polygons. None
            if not known yet: the counts of an RLE are then checked against the size that the RLE has itself, and the
            caller must check that size and call `check_outlines` later.

    Returns:
        The segmentation (None if nothing is left), and a description of the dropped polygons ("" for none).

    Raises:
        InputError: the segmentation is neither polygons nor an RLE, or does not fit the image.
    """
    if value is None or value == []:  # [] is what some programs write for an annotation that has only a box
        return None, ""
    if isinstance(value, dict):
        _check_rle(path, value, what, size)
        return value, ""
    if not isinstance(value, list):
        raise InputError(f"{path}: {what}: 'segmentation' is a {json_type(value)}; it must be polygons or an RLE")
    polygons, dropped = parse_polygons(path, value, what)
    if polygons is not None and size is not None:
        check_outlines(path, polygons, what, *size)
    return polygons, dropped


def _check_rle(path: Path, rle: dict, what: str, image_size: tuple[int, int] | None) -> None:
    """Raise an InputError if an RLE does not cover its image or, if ``image_size`` is None, its own ``size``."""
    size, counts = rle.get("size"), rle.get("counts")
    if image_size is None:
        if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
            raise InputError(f"{path}: {what}: its RLE has size {size!r:.40}; it must be [height, width]")
        image_size = (size[0], size[1])
    height, width = image_size
    if size != [height, width]:
        raise InputError(f"{path}: {what}: its RLE has size {size!r:.40}, but its image is [{height}, {width}]")
    pixels = height * width
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts):
            raise InputError(f"{path}: {what}: the counts of its RLE must be nonnegative integers")
        if sum(counts) != pixels:
            raise InputError(
                f"{path}: {what}: its RLE covers {format_count(sum(counts), 'pixel')}, but its image has {pixels}"
            )
    elif not isinstance(counts, str):
        raise InputError(f"{path}: {what}: 'counts' of its RLE is missing or not a list or string")
    elif rle_pixels(counts) != pixels:
        raise InputError(
            f"{path}: {what}: its RLE is damaged, it does not cover the {format_count(pixels, 'pixel')} of its image"
        )
