"""Polygons of instances files: which are refused, which are dropped, and that all readers of the file agree."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polygon_files import HEIGHT, SQUARE, WIDTH, check, load, write

from refdet.data.coco import CocoIndex
from refdet.data.polygons import can_be_drawn_in_any_image
from refdet.data.segmentations import to_rle
from refdet.errors import InputError
from refdet.extraction.given_regions import regions_from_annotations
from refdet.files.short_text import format_count
from refer.masks import can_be_drawn

REFUSED = {
    "odd": ([[1, 1, 5, 1, 5, 5, 1]], "a polygon has an odd number of coordinates (7); it must be numbers [x, y, x"),
    "flat": (SQUARE, "'segmentation' is a flat list of numbers; wrap it in another list"),
    "points": ([[[1, 1], [5, 1], [5, 5]]], "a polygon is a list of points [[x, y], ...]"),
    "text": ([[1, 1, 5, 1, 5, "5"]], "a polygon contains '5', not a number"),
    "null": ([[1, 1, 5, 1, 5, None]], "a polygon contains None, not a number"),
    "a number among polygons": ([SQUARE, 5], "a polygon is 5, not a list"),
    "nan": ([[1, 1, 5, 1, 5, math.nan]], "a polygon contains nan"),
    "infinite": ([[1, 1, 5, 1, 5, -math.inf]], "a polygon contains -inf"),
    "too large": ([[1, 1, 5, 1, 5, 10**400]], "numbers that are too large"),
    "far away": ([[1, 1, 5, 1, 30_000_000, 5]], "reaches 3e+07, more than 10000 pixels outside its image of 16x12"),
    "far away below": ([SQUARE, [1, 1, 5, 1, -1e300, 5]], "reaches 1e+300"),
    "huge integers": ([[10**400, 1, -(10**400), 1, 5, 5]], "reaches 1e+300"),
    "to and fro": ([[-9000, 0, 9000, 0] * 100], "the outlines of its polygons are longer than 1000000 pixels"),
    "a string": ("abc", "'segmentation' is a string"),
}  # fmt: skip


@pytest.mark.parametrize("annotations_first", [False, True])
@pytest.mark.parametrize("kind", REFUSED)
def test_polygons_that_cannot_be_drawn_are_refused_with_a_reason(
    tmp_path: Path, kind: str, annotations_first: bool
) -> None:
    segmentation, message = REFUSED[kind]
    path = write(tmp_path / "f.json", segmentation, annotations_first=annotations_first)
    error = load(path)
    assert isinstance(error, str) and error.startswith(f"{path}: annotation 7: ") and message in error
    assert "\n" not in error and check(path) == error


DROPPED = {
    "two points": ([[1, 1, 5, 5]], "(2 points; a box [x, y, width, height] is not a polygon)"),
    "one point": ([[80.0, 60.0]], "(1 point)"),
    "points for polygons": (
        [[1, 1], [5, 1], [5, 5]],
        "(1 point each; a polygon is one list of numbers [x, y, x, y, ...])",
    ),
    "an empty one": ([[]], "(0 points)"),
    "several": ([[1, 1, 5, 5], [1, 1]], "(1 or 2 points)"),
}


@pytest.mark.parametrize("others", [[], [SQUARE]])
@pytest.mark.parametrize("kind", DROPPED)
def test_polygons_of_fewer_than_three_points_are_dropped_and_listed(tmp_path: Path, kind: str, others: list) -> None:
    short, points = DROPPED[kind]
    path = write(tmp_path / "f.json", [*short, *others])
    index = load(path)
    assert isinstance(index, CocoIndex)
    assert index.annotations[3][0].segmentation == (others or None)
    polygons = format_count(len(short), "polygon")
    assert index.dropped == [f"annotation 7: {polygons} with fewer than three points {points}"]
    assert check(path) == ""


def test_the_limit_depends_on_the_image_size(tmp_path: Path) -> None:
    far = [[0, 0, 10_050, 0, 10_050, 5, 0, 5]]
    assert isinstance(load(write(tmp_path / "a.json", far, width=100)), CocoIndex)
    assert "10050" in str(load(write(tmp_path / "b.json", far, width=49)))
    assert check(tmp_path / "a.json") == "" and "10050" in check(tmp_path / "b.json")


NUMBERS = st.one_of(st.integers(-60, 60), st.floats(-30_000, 30_000), st.sampled_from([10**9, 1e308, 10**400]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.lists(NUMBERS, max_size=12), max_size=4))
def test_polygons_that_load_can_be_extracted(tmp_path_factory: pytest.TempPathFactory, polygons: list) -> None:
    path = write(tmp_path_factory.mktemp("polygons") / "f.json", polygons)
    index = load(path)
    if isinstance(index, str):
        assert "annotation 7" in index and check(path) == index
        return
    assert check(path) == ""
    [regions] = [regions_from_annotations(record, index.annotations[record.id]) for record in index.images.values()]
    assert len(regions) == 1
    kept = index.annotations[3][0].segmentation
    if kept:
        assert isinstance(kept, list) and to_rle(kept, HEIGHT, WIDTH)["size"] == [HEIGHT, WIDTH]
        assert can_be_drawn(kept, HEIGHT, WIDTH)


def polygons_within(reach: int) -> st.SearchStrategy[list[list[float]]]:
    """Lists of triangles and quadrilaterals, each of them up to 60 times, with coordinates of at most this size."""
    polygon = st.sampled_from([6, 8]).flatmap(lambda n: st.lists(st.floats(-reach, reach), min_size=n, max_size=n))
    polygons = st.lists(polygon, min_size=1, max_size=3)
    return st.tuples(polygons, st.sampled_from([1, 10, 60])).map(lambda drawn: drawn[0] * drawn[1])


# On both sides of the limits: 10,000 pixels outside the image, and outlines of 1,000,000 pixels in total.
POLYGONS = st.sampled_from([500, 9_999, 10_001, 20_000]).flatmap(polygons_within)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(POLYGONS)
def test_the_check_without_image_sizes_accepts_only_what_the_exact_check_accepts(polygons: list) -> None:
    assert can_be_drawn(polygons, 1, 1) or not can_be_drawn_in_any_image(polygons)


@pytest.mark.parametrize("polygons", [[], [[]], [[1, 2, 3, 4]]])
def test_polygons_without_three_points_are_named(polygons: list) -> None:
    with pytest.raises(InputError, match="has no polygon of at least three points"):
        to_rle(polygons, HEIGHT, WIDTH)
