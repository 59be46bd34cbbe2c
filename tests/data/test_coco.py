"""CocoIndex: what it reads, drops and refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refdet.data.coco import CocoIndex
from refdet.errors import InputError

SQUARE = [[1.0, 1.0, 5.0, 1.0, 5.0, 5.0]]


def instances(**changes: Any) -> dict[str, Any]:
    """A small valid file; ``changes`` replace fields of its only annotation."""
    annotation = {"id": 7, "image_id": 3, "category_id": 18, "bbox": [1, 2, 3, 4], "segmentation": SQUARE,
                  "area": 9.5, "iscrowd": 0} | changes  # fmt: skip
    return {
        "info": {"year": 2014},
        "images": [
            {"id": 3, "file_name": "COCO_train2014_000000000003.jpg", "height": 10, "width": 20},
            {"id": 1, "height": 5, "width": 5},
        ],
        "annotations": [annotation],
        "categories": [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 2, "name": "bicycle"}],
    }


def load(tmp_path: Path, data: Any, **options: Any) -> CocoIndex:
    path = tmp_path / "f.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return CocoIndex.load(path, **options)


def test_reads_everything_in_file_order(tmp_path: Path) -> None:
    index = load(tmp_path, instances())
    assert list(index.images) == [3, 1]
    assert index.images[1].file_name == "" and index.images[3].width == 20
    assert list(index.categories.items()) == [(18, "dog"), (2, "bicycle")]
    [annotation] = index.annotations[3]
    assert annotation.box == (1, 2, 4, 6) and annotation.area == 9.5 and not annotation.iscrowd
    assert index.annotations[1] == [] and index.dropped == [] and index.info == {"year": 2014}


def test_missing_fields_have_defaults(tmp_path: Path) -> None:
    data = instances(iscrowd=1)
    for key in ("area", "segmentation"):
        del data["annotations"][0][key]
    [annotation] = load(tmp_path, data).annotations[3]
    assert annotation.area == 12 and annotation.segmentation is None and annotation.iscrowd


@pytest.mark.parametrize(
    ("bbox", "reason"),
    [
        ([1, 1, 0, 4], "no area"),
        ([1, 1, 4, -1], "no area"),
        ([1, 1, 4, 1e-9], "no area"),  # in float32, in which 1 + 1e-9 is 1
        ([20 - 1e-9, 1, 4, 4], "no area"),  # within the image
        ([1, -1e-50, 4, 2e-50], "no area"),
        ([20, 1, 4, 4], "outside image 3 (20x10)"),
        ([-5, 1, 5, 4], "outside"),
        ([1, 1, math.nan, 4], "not finite"),
        ([1, 1, math.inf, 4], "not finite"),
        ([10**400, 1, 1.5, 4], "not finite"),
        ([1e308, 1, 1e308, 4], "not finite"),
    ],
)
def test_degenerate_boxes_are_dropped_and_listed(tmp_path: Path, bbox: list, reason: str) -> None:
    index = load(tmp_path, instances(bbox=bbox))
    assert index.annotations[3] == []
    assert len(index.dropped) == 1 and "annotation 7" in index.dropped[0] and reason in index.dropped[0]


def test_each_annotation_with_dropped_parts_is_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = load(tmp_path, instances(bbox=[1, 1, 0, 4], segmentation=[[0, 0, 1, 1], *SQUARE]))
    assert index.dropped == ["annotation 7: box has no area"] and "1 annotation dropped" in caplog.text
    caplog.clear()
    assert load(tmp_path, instances(segmentation=[[0, 0, 1, 1], *SQUARE])).annotations[3]
    assert "unusable annotation" not in caplog.text and "used without some polygons" in caplog.text


def test_boxes_across_the_border_are_not_clipped(tmp_path: Path) -> None:
    [annotation] = load(tmp_path, instances(bbox=[-2, -2, 50, 5])).annotations[3]
    assert annotation.box == (-2, -2, 48, 3)


def test_polygons_of_two_points_are_dropped_and_listed(tmp_path: Path) -> None:
    index = load(tmp_path, instances(segmentation=[[0, 0, 1, 1], *SQUARE]))
    assert index.annotations[3][0].segmentation == SQUARE and "three points" in index.dropped[0]


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"image_id": 4}, "image 4"),
        ({"category_id": 5}, "category 5"),
        ({"bbox": [1, 2, 3]}, "bbox"),
        ({"bbox": [1, 2, "3", 4]}, "bbox"),
        ({"bbox": None}, "bbox"),
        ({"id": "7"}, "'id'"),
        ({"id": True}, "'id'"),
        ({"segmentation": 3}, "segmentation"),
        ({"segmentation": [[1, 2, 3, 4, 5]]}, "polygon"),
        ({"segmentation": [[1, 2, 3, 4, 5, "6"]]}, "polygon"),
        ({"segmentation": [[1, 2, 3, 4, 5, math.nan]]}, "polygon"),
        ({"segmentation": {"size": [9, 20], "counts": "x"}}, "size"),
        ({"segmentation": {"size": [10, 20], "counts": [5, 5]}}, "pixels"),
        ({"iscrowd": 2}, "iscrowd"),
        ({"area": "big"}, "area"),
    ],
)
def test_an_invalid_annotation_is_named(tmp_path: Path, changes: dict, culprit: str) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, instances(**changes))
    text = str(caught.value)
    assert "f.json" in text and culprit in text and "\n" not in text
    assert "annotation 7" in text or "annotations[0]" in text


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_duplicate_ids_and_missing_lists_are_refused(tmp_path: Path, key: str) -> None:
    data = instances()
    data[key].append(data[key][0])
    with pytest.raises(InputError, match="duplicate"):
        load(tmp_path, data)
    del data[key]
    with pytest.raises(InputError, match=key):
        load(tmp_path, data)


def test_an_image_without_a_size_is_refused(tmp_path: Path) -> None:
    data = instances()
    del data["images"][1]["height"]
    with pytest.raises(InputError, match="image 1: 'height' is missing"):
        load(tmp_path, data)


@pytest.mark.parametrize("value", [0, 7, False, [], {}, [""]])
def test_a_file_name_must_be_a_string(tmp_path: Path, value: Any) -> None:
    """An empty value of another type does not count as a missing name, for which the image is looked up by its id."""
    data = instances()
    data["images"][1]["file_name"] = value
    with pytest.raises(InputError, match="image 1: 'file_name' is a .*; it must be a string"):
        load(tmp_path, data)


@pytest.mark.parametrize("text", ['{\n"images": [\n,]}', "[1]", '"x"', "", "[" * 100_000])
def test_malformed_json_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="f.json"):
        load(tmp_path, text)


def test_errors_name_the_line_of_malformed_json_or_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 3"):
        load(tmp_path, '{\n"images": [\n,]}')
    with pytest.raises(InputError, match="nothing.json: no such file"):
        CocoIndex.load(tmp_path / "nothing.json")


def test_need_segmentation_refuses_a_file_without_masks(tmp_path: Path) -> None:
    assert load(tmp_path, instances(), need_segmentation=True).annotations[3]
    with pytest.raises(InputError, match="`model.masks=false`"):
        load(tmp_path, instances(segmentation=None), need_segmentation=True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "size", "counts"]), inner),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    where=st.sampled_from(["images", "annotations", "categories"]),
    key=st.sampled_from(
        [
            "id",
            "image_id",
            "category_id",
            "bbox",
            "segmentation",
            "area",
            "iscrowd",
            "height",
            "file_name",
            "name",
        ]
    ),
    value=JSON,
)
def test_any_value_in_any_field_loads_or_is_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, where: str, key: str, value: Any
) -> None:
    data = instances()
    data[where][0][key] = value
    try:
        index = load(tmp_path_factory.mktemp("any"), data)
    except InputError as error:
        assert "f.json" in str(error)
    else:
        assert sum(map(len, index.annotations.values())) + len(index.dropped) >= 1


def test_a_real_file_loads_completely(shared: Path) -> None:
    index = CocoIndex.load(shared / "data/coco_mini/annotations/instances_train2017.json", need_segmentation=True)
    annotations = [a for of_image in index.annotations.values() for a in of_image]
    assert (len(index.images), len(annotations), len(index.categories)) == (80, 739, 80)
    assert index.dropped == [] and any(a.iscrowd for a in annotations)
