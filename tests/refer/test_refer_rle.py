"""The check of compressed RLEs, many at once: against the coding read number by number, and pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from refer.masks import rle_pixels
from refer.rle import covered_pixels

UNSOUND = [b"", b"o", b"\0", b"0\0", b"/", b"p", b"\xff", b"1O", b"N", b"PPPPPPP1", b"oooooo7",
           b"PPPPPP41PPPPPP4"]  # fmt: skip


def one_by_one(counts: bytes) -> int:
    """The pixels of an RLE as the format says, -1 for none."""
    found: list[int] = []
    value = groups = 0
    for byte in counts:
        group = byte - 48
        if not 0 <= group < 64:
            return -1
        value |= (group & 31) << 5 * groups
        groups += 1
        if groups > 7:
            return -1
        if not group & 32:
            value -= (group & 16) and 1 << 5 * groups
            found.append(value + (found[-2] if len(found) > 2 else 0))
            value = groups = 0
    return sum(found) if found and not groups and all(0 <= run < 2**32 for run in found) else -1


def together(rles: list[bytes]) -> list[int] | None:
    starts = np.cumsum([0, *map(len, rles)])
    found = covered_pixels(np.frombuffer(b"".join(rles), np.uint8), starts)
    return None if found is None else found.tolist()


def encoded(runs: list[int]) -> bytes:
    counts: bytes = coco_mask.frPyObjects({"size": [sum(runs), 1], "counts": runs}, sum(runs), 1)["counts"]
    return counts


runs = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 2**31 - 1)), min_size=1, max_size=12).filter(
    lambda numbers: 0 < sum(numbers) < 2**32
)
noise = st.one_of(
    st.binary(max_size=12), st.lists(st.integers(48, 111), max_size=12).map(bytes), st.sampled_from(UNSOUND)
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(runs, max_size=8))
def test_what_pycocotools_writes_covers_its_image(images: list[list[int]]) -> None:
    assert together([encoded(of_image) for of_image in images]) == [sum(of_image) for of_image in images]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.one_of(noise, runs.map(encoded)), max_size=6))
@example([b"0", b"1", b"00", b"000", b"0000"])
@example([b"PPPP4" * 3, b"N5"])
def test_any_bytes_are_counted_as_the_coding_says(rles: list[bytes]) -> None:
    wanted = [one_by_one(rle) for rle in rles]
    assert together(rles) == (None if -1 in wanted else wanted)
    assert [rle_pixels(rle) for rle in rles] == wanted


@pytest.mark.parametrize("bad", UNSOUND)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_unsound_rle_among_others_is_seen(bad: bytes, place: int) -> None:
    rles = [encoded([5, 7]), encoded([0, 12, 3])]
    rles.insert(place, bad)
    assert one_by_one(bad) == -1 and together(rles) is None
    assert together([rle for rle in rles if rle != bad]) == [12, 15]


def test_an_rle_that_takes_from_its_neighbor_is_seen() -> None:
    """Cut elsewhere, the same bytes are two numbers that do not end."""
    counts = np.frombuffer(encoded([100, 200]) + encoded([300]), np.uint8)
    good = len(encoded([100, 200]))
    assert covered_pixels(counts, np.array([0, good, len(counts)])) is not None
    assert covered_pixels(counts, np.array([0, good + 1, len(counts)])) is None
    assert covered_pixels(counts, np.array([0, 0, len(counts)])) is None


def test_a_run_beyond_32_bits_is_none() -> None:
    """The C code would keep its lower bits, which may well add up to the image."""
    wraps = b"PPPPPP4" + encoded([12_000])
    assert one_by_one(wraps) == -1 and together([wraps]) is None and rle_pixels(wraps) == -1
