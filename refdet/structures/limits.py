"""The largest numbers that the columns of a store hold: what exceeds them is refused where it is read. No numpy.

Without these checks a bad entry would cost all of an extraction: each image is computed, then the store cannot be
written.
"""

from __future__ import annotations

IDS = (-(2**63), 2**63 - 1)
"""The range of int64: ids of images, annotations and categories."""

LONGEST_SIDE = 2**31 - 1
"""The largest int32: the height and the width of an image in pixels."""

MOST_PIXELS = 2**30
"""Pixels of an image. A gigapixel takes 3 GiB when it is decoded; masks count pixels in 32 bits."""


def is_id(value: object) -> bool:
    """Whether it is an integer (no bool) that a column of ids holds."""
    return type(value) is int and IDS[0] <= value <= IDS[1]


def size_problem(height: int, width: int) -> str:
    """Why no image can have this size in pixels, "" if one can."""
    if height < 1 or width < 1:
        return f"its size is {width}x{height}, it must be at least 1x1"
    if max(height, width) > LONGEST_SIDE or height * width > MOST_PIXELS:
        return f"its size is {width}x{height}, more than {MOST_PIXELS} pixels; correct its height and width"
    return ""
