"""Validate many of COCO's compressed RLEs at once and add up their runs.

The encoding is that of rleFrString in COCO's maskApi.c: groups of five bits, lowest first, as characters from "0", with
the sixth bit set if more groups follow. From the fourth number of a mask on, each is the difference from the number two
before it.
"""

from __future__ import annotations

import numpy as np

_MAX_GROUPS = 7  # of five bits; numbers have 32 bits in maskApi.c
_LIMIT = 2**32


def total_run_lengths(counts: np.ndarray, starts: np.ndarray) -> np.ndarray | None:
    """Add up the runs of each of N compressed RLEs, inside and outside the mask: the pixels of its image.

    To be compared with the size of the image before decoding: pycocotools decodes an RLE of another size to garbage, or
    writes out of bounds. Vectorized over all masks of an image.

    Args:
        counts: (bytes,) uint8, the concatenated RLEs.
        starts: (N + 1,) integers ascending from 0 to ``len(counts)``: RLE i is ``counts[starts[i]:starts[i + 1]]``.

    Returns:
        (N,) int64 numbers of pixels; None if an RLE is invalid, or has a run below 0 or of more than 32 bits.
    """
    if len(starts) < 2:
        return np.zeros(0, np.int64)
    codes = counts - np.uint8(48)  # characters below "0" wrap around to values above 63
    if (starts[1:] <= starts[:-1]).any() or codes.max() > 63:
        return None
    ends = np.flatnonzero(codes < 32)  # last character of each number
    last = np.searchsorted(ends, starts[1:] - 1)  # last number of each RLE
    if not len(ends) or last[-1] >= len(ends) or (ends[last] != starts[1:] - 1).any():
        return None
    first = np.empty_like(ends)
    first[0], first[1:] = 0, ends[:-1] + 1
    extra_groups = ends - first  # characters of each number, minus one
    if extra_groups.max() >= _MAX_GROUPS:
        return None
    values = (codes[ends] & 31).astype(np.int64)
    values -= (values & 16) << 1  # the last group has the sign
    for _ in range(int(extra_groups.max())):
        longer = np.flatnonzero(extra_groups)
        extra_groups[longer] -= 1
        values[longer] = (values[longer] << 5) | (codes[first[longer] + extra_groups[longer]] & 31)
    value_starts = np.concatenate([[0], last + 1])  # RLE i has values[value_starts[i]:value_starts[i + 1]]
    runs = _runs(values, value_starts)
    if runs.min() < 0 or runs.max() >= _LIMIT:
        return None
    return np.add.reduceat(runs, value_starts[:-1])


def _runs(values: np.ndarray, value_starts: np.ndarray) -> np.ndarray:
    """Decode the values of concatenated RLEs to runs: all but the first three are sums of every second value."""
    sums = values.copy()
    sums[::2], sums[1::2] = np.cumsum(values[::2]), np.cumsum(values[1::2])
    # In an RLE that starts at s, runs s + 1, s + 3, ... are sums of the values from s + 1 on, so the sum up to s - 1 is
    # subtracted; runs s + 2, s + 4, ... are sums from s + 2 on, so the sum up to s is subtracted.
    start, length = value_starts[:-1], np.diff(value_starts)
    before = np.where(start > 0, sums[start - 1], 0)
    position = np.arange(len(values)) - np.repeat(start, length)
    runs = sums - np.where(position & 1, np.repeat(before, length), np.repeat(sums[start], length))
    runs[start] = values[start]
    return runs
