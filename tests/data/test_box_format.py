"""Box formats: conversion to pixels, the inferred order, and warnings about boxes that fit another format."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_examples import regions, sentences, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from refdet.cli.common import BOX_FORMATS
from refdet.data.box_format import DEFAULT_FORMAT, FORMATS, INFERRED_ORDER, NAMES, resolve_box_format
from refdet.data.coco import CocoIndex
from refdet.errors import InputError
from refdet.evaluation.refer_benchmark import evaluate_on_refer
from refdet.extraction.boxes_from_file import load_boxes

SIZES = [(640, 480), (480, 640), (500, 375), (427, 640)]


def from_pixels(name: str, corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Convert xyxy boxes in pixels to a box format: the inverse of `BoxFormat.to_pixels`, computed independently."""
    unit = {"normalized": 1.0, "thousandths": 1000.0}.get(name.split("-")[0])
    scaled = corners if unit is None else corners / np.concatenate([sizes, sizes], axis=1) * unit
    return scaled if name.endswith("xyxy") else np.concatenate([scaled[:, :2], scaled[:, 2:] - scaled[:, :2]], axis=1)


def random_boxes(seed: int, count: int, sizes: list[tuple[int, int]] = SIZES) -> tuple[np.ndarray, np.ndarray]:
    """Random xyxy boxes of at least 8 pixels, (N, 4), and the widths and heights of their images, (N, 2)."""
    random = np.random.default_rng(seed)
    image_sizes = np.array([sizes[i] for i in random.integers(0, len(sizes), count)], np.float64).reshape(-1, 2)
    extent = 8 + random.random((count, 2)) ** 2 * (image_sizes - 8)
    low = random.random((count, 2)) * (image_sizes - extent)
    return np.concatenate([low, low + extent], axis=1), image_sizes


def test_the_command_line_option_accepts_every_format_name() -> None:
    assert BOX_FORMATS == NAMES and DEFAULT_FORMAT in NAMES
    assert {"xywh", "xyxy", "normalized", "thousandths"} <= set(NAMES)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from(sorted(FORMATS)))
def test_every_format_converts_to_pixels(seed: int, count: int, name: str) -> None:
    corners, sizes = random_boxes(seed, count)
    np.testing.assert_allclose(FORMATS[name].to_pixels(from_pixels(name, corners, sizes), sizes), corners, atol=1e-9)
    assert not FORMATS[name].misfits(from_pixels(name, corners, sizes), sizes).any()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.sampled_from(sorted(FORMATS)))
def test_boxes_in_the_requested_format_give_no_notes(seed: int, count: int, name: str) -> None:
    corners, sizes = random_boxes(seed, count)
    assert resolve_box_format(name, from_pixels(name, corners, sizes), sizes) == (name, [])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(FORMATS)), st.sampled_from(sorted(FORMATS)))
def test_a_warning_names_the_format_that_the_boxes_fit(seed: int, name: str, requested: str) -> None:
    corners, sizes = random_boxes(seed, 60)
    resolved, lines = resolve_box_format(requested, from_pixels(name, corners, sizes), sizes)
    assert resolved == requested and len(lines) == (requested != name)
    if requested != name:
        (line,) = lines
        advised = line.rsplit("`box_format='", 1)[1].rstrip("`'")
        assert line.startswith("warning: ") and "60 boxes" in line and line.count("\n") == 0
        assert resolve_box_format(advised, from_pixels(name, corners, sizes), sizes)[0] == name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from(INFERRED_ORDER), st.sampled_from(["xyxy", "xywh"]))
def test_the_order_is_inferred_from_the_boxes(seed: int, unit: str, order: str) -> None:
    corners, sizes = random_boxes(seed, 30)
    resolved, lines = resolve_box_format(unit, from_pixels(f"{unit}-{order}", corners, sizes), sizes)
    assert resolved == f"{unit}-{order}" and len(lines) == 1
    assert lines[0].startswith("note: reading boxes as [x") and "which fits 30 of 30, rather than [x" in lines[0]


def test_boxes_that_fit_both_orders_are_read_as_xyxy_with_a_note() -> None:
    resolved, lines = resolve_box_format("normalized", np.array([[0.1, 0.1, 0.3, 0.3]]), np.array([[640, 480]]))
    assert resolved == "normalized-xyxy"
    assert "if they are [x, y, width, height] in 0..1 of the image, which equally many (1 of 1) fit" in lines[0]
    assert "`box_format='normalized-xywh'`" in lines[0]
    assert resolve_box_format("thousandths", np.zeros((0, 4)), np.zeros((0, 2))) == ("thousandths-xyxy", [])


@pytest.mark.parametrize(
    "boxes",
    [
        [[0, 0, 0, 0]] * 5,  # a model that found nothing
        [[10, 10, 20, 20]],
        [[0, 0, 1, 1]] + [[10, 10, 20, 20]] * 9,
        [[0, 0, 640, 480]],
        [[-1, -1, 643, 483]] * 10,  # a detector that does not clip its boxes
        [[600, 400, 60, 40], *[[10, 10, 20, 20]] * 30],  # one of 31 is outside
        [[5, 5, 635.4, 475.2]] * 3,
    ],
)
def test_plausible_pixel_boxes_give_no_warning(boxes: list) -> None:
    assert resolve_box_format("xywh", np.array(boxes), np.array([[640, 480]] * len(boxes))) == ("xywh", [])


@pytest.mark.parametrize(
    ("requested", "boxes", "size", "message"),
    [
        ("xywh", [[100, 100, 1200, 900]] * 4, (640, 480), "4 of 4 boxes reach outside their images"),
        ("xywh", [[0.1, 0.2, 0.5, 1.2]], (640, 480), "1 of 1 box lies within -1.5..1.5"),
        ("xyxy", [[-1.4, -0.2, 0.5, 1.2]], (640, 480), "1 of 1 box lies within -1.5..1.5"),
        ("xywh", [[500, 300, -20, 20]], (640, 480), "1 of 1 box reaches outside its image or has a negative width or"),
        (
            "xywh",
            [[100, 100, 1200, 900]] * 2 + [[0, 0, 1, 1]],
            (640, 480),
            "3 of 3 boxes reach outside their images or lie within -1.5..1.5 when read as",
        ),
        ("xywh", [[500, 300, 600, 400]], (640, 480), "give `box_format='xyxy'`"),
        ("xyxy", [[500, 300, 100, 100]], (640, 480), "give `box_format='xywh'`"),
        ("normalized", [[50, 30, 100, 100]], (640, 480), "give `box_format='xywh'`"),
        ("xyxy", [[10 * i, 10, 900 + 5 * i, 700] for i in range(20)], (4000, 3000), "give `box_format='thousandths'`"),
        (
            "thousandths-xyxy",
            [[10 * i, 10, 400 + 5 * i, 300] for i in range(20)],
            (640, 480),
            "give `box_format='xyxy'`",
        ),
    ],
)
def test_warnings_about_few_boxes(requested: str, boxes: list, size: tuple[int, int], message: str) -> None:
    _, lines = resolve_box_format(requested, np.array(boxes), np.array([size] * len(boxes)))
    assert message in lines[-1] and lines[-1].startswith("warning: ")


def test_pixel_boxes_in_large_images_are_not_mistaken_for_thousandths() -> None:
    corners, sizes = random_boxes(0, 60, [(4000, 3000), (1600, 1200)])
    for name in FORMATS:
        assert resolve_box_format(name, from_pixels(name, corners, sizes), sizes) == (name, [])
    _, (warning,) = resolve_box_format("xyxy", from_pixels("thousandths-xyxy", corners, sizes), sizes)
    assert "`box_format='thousandths'`" in warning


def refer_folder(root: Path, corners: np.ndarray, sizes: np.ndarray) -> Path:
    """A REFER folder with an image, an object and a ref of one sentence for each box."""
    root.joinpath("toy").mkdir(parents=True)
    images = [{"id": i, "width": int(w), "height": int(h), "file_name": f"{i}.jpg"} for i, (w, h) in enumerate(sizes)]
    xywh = from_pixels("xywh", corners, sizes).tolist()
    objects = [{"id": i, "image_id": i, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
                "segmentation": []} for i, box in enumerate(xywh)]  # fmt: skip
    data = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "a"}]}
    (root / "toy/instances.json").write_text(json.dumps(data))
    refs = [{"ref_id": i, "ann_id": i, "image_id": i, "category_id": 1, "split": "val", "file_name": f"{i}.jpg",
             **sentences(i, ("it",))} for i in range(len(xywh))]  # fmt: skip
    (root / "toy/refs(me).p").write_bytes(pickle.dumps(refs, protocol=2))
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    folder = tmp_path_factory.mktemp("formats")
    corners, sizes = random_boxes(3, 25)
    refer_folder(folder / "refer", corners, sizes)
    images = [replace(regions(i, [[0, 0, 5, 5]]), height=int(h), width=int(w)) for i, (w, h) in enumerate(sizes)]
    write_store(folder / "a.h5", images, masks=False)
    return folder, corners, sizes


@pytest.mark.parametrize("name", [n for n in NAMES if n not in INFERRED_ORDER])
@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("field", ["box", "ranked_boxes"])
def test_ground_truth_boxes_in_any_format_have_accuracy_1(
    dataset: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, explicit: bool, field: str
) -> None:
    folder, corners, sizes = dataset
    boxes = from_pixels(name, corners, sizes).tolist()
    answers = [{"sent_id": 10 * i, field: box if field == "box" else [box]} for i, box in enumerate(boxes)]
    (tmp_path / "p.json").write_text(json.dumps(answers))
    asked = name if explicit else name.split("-")[0]
    found = evaluate_on_refer(folder / "a.h5", folder / "refer", "toy", "me", predictions=tmp_path / "p.json",
                              box_format=asked)  # fmt: skip
    assert found["splits"]["val"]["comprehension"]["accuracy@0.5"] == 1.0
    assert found["splits"]["val"]["comprehension"]["mean_iou"] == pytest.approx(1.0)
    assert found.get("box_format", "xywh") == asked and "warning" not in caplog.text
    assert ("note: " in caplog.text and "p.json: reading boxes as" in caplog.text) == (asked in INFERRED_ORDER)


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "xywh"])
def test_predictions_in_another_format_than_requested_give_a_warning(
    dataset: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    folder, corners, sizes = dataset
    boxes = from_pixels(name, corners, sizes).tolist()
    (tmp_path / "p.json").write_text(json.dumps([{"sent_id": 10 * i, "box": box} for i, box in enumerate(boxes)]))
    evaluate_on_refer(folder / "a.h5", folder / "refer", "toy", "me", predictions=tmp_path / "p.json")
    assert f"give `box_format='{name.split('-')[0]}'`" in caplog.text and "of 25 boxes" in caplog.text


@pytest.mark.parametrize(
    ("box_format", "box", "expected"),
    [
        ("xyxy", [30, 30, 10, 40], r"four numbers \[x1, y1, x2, y2\] in pixels"),
        ("normalized-xywh", [0.1, 0.1, -0.1, 0.2], r"four numbers \[x, y, width, height\] in 0..1"),
        ("thousandths-xyxy", [1, 2, 3], r"four numbers \[x1, y1, x2, y2\] in 0..1000 of the image"),
    ],
)
def test_an_invalid_box_is_reported_with_its_format(
    dataset: tuple, tmp_path: Path, box_format: str, box: Any, expected: str
) -> None:
    folder, _, _ = dataset
    (tmp_path / "p.json").write_text(json.dumps([{"sent_id": 0, "box": box}]))
    with pytest.raises(InputError, match=rf"entry 0 \(sentence 0\): box .* must be {expected}"):
        evaluate_on_refer(folder / "a.h5", folder / "refer", "toy", "me", predictions=tmp_path / "p.json",
                          box_format=box_format)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_box_files_in_any_format_are_converted(
    dataset: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    folder, corners, sizes = dataset
    index = CocoIndex.load(folder / "refer/toy/instances.json")
    box_format = {"normalized": "normalized-xywh", "thousandths": "thousandths-xyxy"}.get(name, name)
    results = [{"image_id": i, "category_id": 1, "bbox": box, "score": 0.5}
               for i, box in enumerate(from_pixels(box_format, corners, sizes).tolist())]  # fmt: skip
    (tmp_path / "b.json").write_text(json.dumps(results))
    found = load_boxes(tmp_path / "b.json", index, name)
    assert found.box_format == box_format and "warning" not in caplog.text
    for i, record in index.images.items():
        np.testing.assert_allclose(
            found.for_image(record).boxes, corners[i : i + 1].astype(np.float32), rtol=1e-5, atol=1e-4
        )
    caplog.clear()
    # Read as the default xywh, boxes in another format give a warning, and an error if one has no area.
    error = ""
    try:
        load_boxes(tmp_path / "b.json", index, "xywh")
    except InputError as caught:
        error = str(caught)
    assert ("warning: `boxes`" in caplog.text) == (name != "xywh")
    assert not error or (name != "xywh" and "read as [x, y, width, height] in pixels" in error)


def test_boxes_of_the_synthetic_dataset_give_no_warning(
    shapes_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = CocoIndex.load(shapes_root / "annotations/instances_train2014.json")
    results = [{k: a[k] for k in ("image_id", "category_id", "bbox")} for a in index.raw["annotations"]]
    for subset in (results, results[:1], results[:3], results[-2:]):
        (tmp_path / "b.json").write_text(json.dumps(subset))
        load_boxes(tmp_path / "b.json", index)
        assert caplog.text == ""


def test_real_boxes_give_a_warning_only_as_corners(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = CocoIndex.load(shared / "data/coco_mini/annotations/instances_val2017.json")
    entries = [{k: a[k] for k in ("image_id", "category_id", "bbox")} for a in index.raw["annotations"]]
    (tmp_path / "b.json").write_text(json.dumps(entries))
    load_boxes(tmp_path / "b.json", index)
    assert caplog.text == ""
    for entry in entries:
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x, y, x + w, y + h]
    (tmp_path / "b.json").write_text(json.dumps(entries))
    load_boxes(tmp_path / "b.json", index)
    assert "give `box_format='xyxy'`" in caplog.text
