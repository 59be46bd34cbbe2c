"""The vectorized check of compressed RLEs, compared with a byte-by-byte decoder and with pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from refer.masks import rle_pixels
from refer.rle import total_run_lengths

INVALID = [b"", b"o", b"\0", b"0\0", b"/", b"p", b"\xff", b"1O", b"N", b"PPPPPPP1", b"oooooo7",
           b"PPPPPP41PPPPPP4"]  # fmt: skip


def decode_pixels(counts: bytes) -> int:
    """The number of pixels of an RLE, decoded byte by byte; -1 if it is invalid."""
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


def count_pixels(rles: list[bytes]) -> list[int] | None:
    """The number of pixels of each RLE by the vectorized check; None if any is invalid."""
    starts = np.cumsum([0, *map(len, rles)])
    found = total_run_lengths(np.frombuffer(b"".join(rles), np.uint8), starts)
    return None if found is None else found.tolist()


def encoded(runs: list[int]) -> bytes:
    counts: bytes = coco_mask.frPyObjects({"size": [sum(runs), 1], "counts": runs}, sum(runs), 1)["counts"]
    return counts


runs = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 2**31 - 1)), min_size=1, max_size=12).filter(
    lambda numbers: 0 < sum(numbers) < 2**32
)
noise = st.one_of(
    st.binary(max_size=12), st.lists(st.integers(48, 111), max_size=12).map(bytes), st.sampled_from(INVALID)
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(runs, max_size=8))
def test_rles_by_pycocotools_cover_their_image(images: list[list[int]]) -> None:
    assert count_pixels([encoded(of_image) for of_image in images]) == [sum(of_image) for of_image in images]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.one_of(noise, runs.map(encoded)), max_size=6))
@example([b"0", b"1", b"00", b"000", b"0000"])
@example([b"PPPP4" * 3, b"N5"])
def test_any_bytes_are_counted_like_the_byte_by_byte_decoder(rles: list[bytes]) -> None:
    expected = [decode_pixels(rle) for rle in rles]
    assert count_pixels(rles) == (None if -1 in expected else expected)
    assert [rle_pixels(rle) for rle in rles] == expected


@pytest.mark.parametrize("invalid", INVALID)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_invalid_rle_among_others_is_detected(invalid: bytes, place: int) -> None:
    rles = [encoded([5, 7]), encoded([0, 12, 3])]
    rles.insert(place, invalid)
    assert decode_pixels(invalid) == -1 and count_pixels(rles) is None
    assert count_pixels([rle for rle in rles if rle != invalid]) == [12, 15]


def test_a_boundary_within_a_number_is_detected() -> None:
    """If the boundary is one byte off, both RLEs end in the middle of a number."""
    counts = np.frombuffer(encoded([100, 200]) + encoded([300]), np.uint8)
    good = len(encoded([100, 200]))
    assert total_run_lengths(counts, np.array([0, good, len(counts)])) is not None
    assert total_run_lengths(counts, np.array([0, good + 1, len(counts)])) is None
    assert total_run_lengths(counts, np.array([0, 0, len(counts)])) is None


def test_a_run_beyond_32_bits_is_invalid() -> None:
    """pycocotools would keep its lower 32 bits, with which the runs may well add up to the image size."""
    wraps = b"PPPPPP4" + encoded([12_000])
    assert decode_pixels(wraps) == -1 and count_pixels([wraps]) is None and rle_pixels(wraps) == -1


def test_characters_outside_ascii_make_an_rle_invalid() -> None:
    """An unpaired surrogate, which JSON can contain, would be replaced by "?", a run of 15 pixels."""
    assert rle_pixels("?") == 15
    assert rle_pixels("\ud800") == rle_pixels("\xe9") == -1
