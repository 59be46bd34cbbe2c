"""Limits of the values in a store. No numpy.

They are checked when inputs are read, so that an invalid entry does not make an extraction fail only at the very end,
when the store is written.
"""

from __future__ import annotations

ID_RANGE = (-(2**63), 2**63 - 1)
"""Lowest and highest id of an image, annotation or category: the range of int64."""

MAX_PIXELS = 2**30
"""Largest number of pixels of an image, so that sides are int32. A gigapixel takes 3 GiB when decoded."""


def is_id(value: object) -> bool:
    """Whether a value is an int64 id (not a bool)."""
    return type(value) is int and ID_RANGE[0] <= value <= ID_RANGE[1]


def size_problem(height: int, width: int) -> str:
    """Why an image size in pixels is invalid, "" if it is valid."""
    if height < 1 or width < 1:
        return f"its size is {width}x{height}, it must be at least 1x1"
    if height * width > MAX_PIXELS:
        return f"its size is {width}x{height}, more than {MAX_PIXELS} pixels; correct its height and width"
    return ""
