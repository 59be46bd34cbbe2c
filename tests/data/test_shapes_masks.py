"""Outlines, tracing and segmentations of the synthetic dataset."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from refdet.data.shapes.categories import CATEGORIES
from refdet.data.shapes.masks import box_of, rasterize, segmentation, trace, uncompressed_rle
from refdet.data.shapes.outlines import area, clip, unit_outline

MASKS = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32), st.floats(0.2, 0.9)).map(
    lambda t: np.random.default_rng(t[2]).random((t[0], t[1])) < t[3]
)


def _count_components(mask: np.ndarray) -> int:
    """Number of 4-connected components, by flood fill."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    parts = 0
    while left:
        parts += 1
        front = [left.pop()]
        while front:
            y, x = front.pop()
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    front.append(near)
    return parts


def _has_hole(mask: np.ndarray) -> bool:
    """Whether some background is not 8-connected to the outside."""
    free = np.pad(~mask, 1, constant_values=True)
    left = {(int(y), int(x)) for y, x in np.argwhere(free)}
    left.remove((0, 0))
    front = [(0, 0)]
    while front:
        y, x = front.pop()
        for near in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
            if near in left:
                left.remove(near)
                front.append(near)
    return bool(left)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(MASKS)
def test_traced_polygons_fill_exactly_the_mask(mask: np.ndarray) -> None:
    polygons, hole = trace(mask)
    assert hole == _has_hole(mask)
    assert len(polygons) == _count_components(mask)
    if not hole:
        assert np.array_equal(rasterize(polygons, *mask.shape), mask)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(MASKS)
def test_rle_and_segmentation_decode_to_the_mask(mask: np.ndarray) -> None:
    rle = uncompressed_rle(mask)
    assert sum(rle["counts"]) == mask.size
    decoded = coco_mask.decode(coco_mask.frPyObjects(rle, *mask.shape))
    assert np.array_equal(decoded.astype(bool), mask)
    form = segmentation(mask)
    assert isinstance(form, dict) == _has_hole(mask)


def test_tracing_a_rectangle_gives_its_corners() -> None:
    mask = np.zeros((5, 6), dtype=bool)
    mask[1:4, 2:5] = True
    polygons, hole = trace(mask)
    assert not hole
    assert polygons == [[2.0, 1.0, 5.0, 1.0, 5.0, 4.0, 2.0, 4.0]]
    assert box_of(mask) == (2, 1, 5, 4)


def test_pixels_that_touch_only_at_a_corner_are_separate_polygons() -> None:
    polygons, hole = trace(np.eye(2, dtype=bool))
    assert len(polygons) == 2 and not hole


@pytest.mark.parametrize("category", CATEGORIES, ids=lambda c: c.name)
def test_outlines_fill_the_unit_square(category) -> None:
    outline = unit_outline(category.name)
    points = np.concatenate(outline.parts)
    assert 0.9 <= np.ptp(points, axis=0).max() <= 1.06
    assert np.abs(points).max() <= 0.56
    assert (len(outline.parts) > 1) == (category.name == "person")
    assert bool(outline.holes) == (category.name == "ring")


def test_unknown_outline_is_refused() -> None:
    with pytest.raises(KeyError):
        unit_outline("dodo")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.floats(-15, 35), st.floats(-15, 35), st.floats(2, 25), st.sampled_from([c.name for c in CATEGORIES]))
def test_clipping_keeps_the_part_inside_the_image(x: float, y: float, size: float, name: str) -> None:
    height, width = 18, 22
    for part in unit_outline(name).parts:
        points = part * size + (x, y)
        cut = clip(points, height, width)
        if len(cut):
            assert cut.min() >= 0 and cut[:, 0].max() <= width and cut[:, 1].max() <= height
        # Compare with the area on a grid of 10x10 points per pixel, inside the polygon by the even-odd rule.
        gx, gy = np.meshgrid((np.arange(220) + 0.5) / 10, (np.arange(180) + 0.5) / 10)
        inside = np.zeros(gx.shape, dtype=bool)
        for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0), strict=True):
            if y1 != y2:
                spans = (y1 > gy) != (y2 > gy)
                inside ^= spans & (gx < x1 + (gy - y1) / (y2 - y1) * (x2 - x1))
        assert area(cut) == pytest.approx(inside.sum() / 100, abs=0.2 * size)
