"""COCO's compressed RLEs, many at once: whether they are sound, and how many pixels they cover.

The coding is that of rleFrString in COCO's maskApi.c: groups of five bits, lowest first, in characters from "0" on, the
sixth bit telling that more follow; from the fourth number of a mask on they are differences to the number two before.
"""

from __future__ import annotations

import numpy as np

_MOST_GROUPS = 7  # of five bits; maskApi.c holds the numbers in 32
_LIMIT = 2**32


def covered_pixels(counts: np.ndarray, starts: np.ndarray) -> np.ndarray | None:
    """How many pixels each of n compressed RLEs covers, inside and outside of its mask.

    pycocotools decodes what does not fit its image to garbage or beyond its memory, so this is asked first. It takes
    some numpy calls for all masks of an image instead of some for each.

    Args:
        counts: (bytes,) uint8, the RLEs back to back.
        starts: (n + 1,) integers, ascending from 0 to ``len(counts)``: RLE i is ``counts[starts[i]:starts[i + 1]]``.

    Returns:
        (n,) int64; None where at least one is no RLE, or has a run below 0 or beyond 32 bits.
    """
    if len(starts) < 2:
        return np.zeros(0, np.int64)
    codes = counts - np.uint8(48)  # what is below "0" wraps around to above 63
    if (starts[1:] <= starts[:-1]).any() or codes.max() > 63:
        return None
    ends = np.flatnonzero(codes < 32)  # the last character of each number
    last = np.searchsorted(ends, starts[1:] - 1)  # the last number of each RLE
    if not len(ends) or last[-1] >= len(ends) or (ends[last] != starts[1:] - 1).any():
        return None
    first = np.empty_like(ends)
    first[0], first[1:] = 0, ends[:-1] + 1
    more = ends - first  # characters of each number but one
    if more.max() >= _MOST_GROUPS:
        return None
    values = (codes[ends] & 31).astype(np.int64)
    values -= (values & 16) << 1  # the last group holds the sign
    for _ in range(int(more.max())):
        longer = np.flatnonzero(more)
        more[longer] -= 1
        values[longer] = (values[longer] << 5) | (codes[first[longer] + more[longer]] & 31)
    numbers = np.concatenate([[0], last + 1])  # RLE i has values[numbers[i]:numbers[i + 1]]
    runs = _runs(values, numbers)
    if runs.min() < 0 or runs.max() >= _LIMIT:
        return None
    return np.add.reduceat(runs, numbers[:-1])


def _runs(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The runs that the values of RLEs, back to back, stand for: but for the first three, sums of every second one."""
    sums = values.copy()
    sums[::2], sums[1::2] = np.cumsum(values[::2]), np.cumsum(values[1::2])
    # The chains of an RLE that begins at s are s + 1, s + 3, ... and s + 2, s + 4, ...: less what was summed before.
    begin, length = numbers[:-1], np.diff(numbers)
    before = np.where(begin > 0, sums[begin - 1], 0)
    place = np.arange(len(values)) - np.repeat(begin, length)
    runs = sums - np.where(place & 1, np.repeat(before, length), np.repeat(sums[begin], length))
    runs[begin] = values[begin]
    return runs
