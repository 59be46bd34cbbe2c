"""Ids and sizes that a store cannot hold are refused when an instances file is read, not when a store is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from polygon_files import check, load

from refdet.data.coco import CocoIndex
from refdet.store import Columns, Header, ImageRow, create
from refdet.store import open as open_store
from refdet.structures.limits import ID_RANGE, MAX_PIXELS, is_id, size_problem
from refdet.structures.regions import Regions

SMALLEST, LARGEST = ID_RANGE


def instances(
    image: int = 3, annotation: int = 7, category: int = 1, height: int = 4, width: int = 4
) -> dict[str, Any]:
    return {
        "images": [{"id": image, "file_name": "a.png", "height": height, "width": width}],
        "annotations": [{"id": annotation, "image_id": image, "category_id": category, "bbox": [1, 1, 2, 2]}],
        "categories": [{"id": category, "name": "dog"}],
    }


def describe_size(value: object) -> str | None:
    """Test id of a large integer."""
    return f"{value.bit_length()} bits" if isinstance(value, int) else None


@pytest.mark.parametrize("value", [LARGEST + 1, SMALLEST - 1, 10**30, -(10**30), 10**4000], ids=describe_size)
@pytest.mark.parametrize("what", ["image", "annotation", "category"])
def test_ids_beyond_64_bits_are_refused(tmp_path: Path, what: str, value: int) -> None:
    path = tmp_path / "f.json"
    path.write_text(json.dumps(instances(**{what: value})))
    text = load(path)
    assert isinstance(text, str) and text.startswith(f"{path}: ") and "more than 64 bits" in text and len(text) < 300
    assert "more than 64 bits" in check(path)  # it may name another entry with the id


@pytest.mark.parametrize("value", [LARGEST, SMALLEST, -1, 0, 2**53 + 1])
@pytest.mark.parametrize("what", ["image", "annotation", "category"])
def test_ids_of_64_bits_are_accepted(tmp_path: Path, what: str, value: int) -> None:
    path = tmp_path / "f.json"
    path.write_text(json.dumps(instances(**{what: value})))
    assert isinstance(load(path), CocoIndex) and check(path) == ""


@pytest.mark.parametrize(
    ("height", "width"),
    [(3_000_000_000, 5), (5, 3_000_000_000), (2**31, 1), (2**20, 2**20), (2**15 + 1, 2**15), (10**4000, 5), (0, 5),
     (5, -1), (-(10**4000), 1)],
    ids=describe_size,
)  # fmt: skip
def test_impossible_image_sizes_are_refused(tmp_path: Path, height: int, width: int) -> None:
    path = tmp_path / "f.json"
    path.write_text(json.dumps(instances(height=height, width=width)))
    text = load(path)
    assert isinstance(text, str) and text.startswith(f"{path}: image 3: ") and len(text) < 300
    assert "its size is" in text or "more than 64 bits" in text
    assert check(path) == text


def test_the_largest_image_sizes_are_accepted() -> None:
    assert size_problem(2**15, 2**15) == size_problem(MAX_PIXELS, 1) == ""
    assert np.iinfo(np.int32).max >= MAX_PIXELS


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(SMALLEST - 1, LARGEST + 1) | st.integers(-(2**70), 2**70),
    st.integers(0, 2**15) | st.integers(-(2**40), 2**40),
    st.integers(0, 2**15) | st.integers(-(2**40), 2**40),
)
@example(SMALLEST, MAX_PIXELS, 1)
@example(LARGEST, 2**15, 2**15)
def test_accepted_ids_and_sizes_can_be_stored(
    tmp_path_factory: pytest.TempPathFactory, image_id: int, height: int, width: int
) -> None:
    if not is_id(image_id) or size_problem(height, width):
        return
    path = tmp_path_factory.mktemp("limits") / "a.h5"
    row = ImageRow(image_id, "a.png", height, width, "missing", 0, 0)
    with create(path, Header([], "", {}, {}), Columns(), [row]) as writer:
        writer.put(Regions.empty(image_id, "a.png", height, width, "missing"))
    with open_store(path) as found:
        assert (found.image_ids.tolist(), found.heights.tolist(), found.widths.tolist()) == (
            [image_id],
            [height],
            [width],
        )


def test_only_python_integers_are_ids() -> None:
    assert not any(map(is_id, (True, 1.0, "1", None, np.int64(1)))) and is_id(1)
