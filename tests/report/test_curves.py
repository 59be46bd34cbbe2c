"""AP during training, the confusion map, and how much of a large store a report reads."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_examples import regions, write_refer, write_store

from refdet import store
from refdet.errors import InputError
from refdet.evaluation.detection_errors import DetectionErrors
from refdet.report import ReferPart, ReportInputs, page, stores
from refdet.report.charts import Axes, Chart
from refdet.report.confusions import MAX_CATEGORIES, confusion_map
from refdet.report.inputs import read_log
from refdet.report.samples import images_of, scenes_of_splits
from refdet.report.sections import loss_section
from refdet.report.validations import read_validations, validation_chart
from refer import REFER


def write_log(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_validation_rows_are_separated_from_loss_rows_and_charted(tmp_path: Path) -> None:
    path = write_log(
        tmp_path,
        {"step": 1, "loss": 2.0},
        {"step": 2, "val_bbox_AP": 0.1, "val_bbox_AP50": 0.3},
        {"step": 3, "loss": 1.0},
        {"step": 4, "val_bbox_AP": 0.9},
        {"step": 4, "val_bbox_AP": 0.2, "val_segm_AP": 0.15},  # replaces the row before: the run was resumed
        {"step": 4, "val_bbox_AP": 0.25, "weights": "ema"},
    )
    assert [row["step"] for row in read_log(path)] == [1, 3]
    rows, on_other_data = read_validations(path)
    assert on_other_data == 0
    assert [(row["step"], row["val_bbox_AP"]) for row in rows] == [(2, 0.1), (4, 0.2), (4, 0.25)]
    chart = validation_chart(rows)
    names = [name for _, name in chart.legend]
    assert names == ["box AP", "box AP50", "mask AP", "box AP (averaged weights)"]
    assert "box AP 0.200 at step 4, highest 0.200" in chart.description and chart.svg.count('id="series-') == 4


def test_an_invalid_validation_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 1: 'val_bbox_AP' must be a number"):
        read_validations(write_log(tmp_path, {"step": 1, "val_bbox_AP": "high"}))
    with pytest.raises(InputError, match="line 1: 'step' must be an integer of 0 or more"):
        read_validations(write_log(tmp_path, {"step": -1, "val_bbox_AP": 0.1}))
    assert read_validations(tmp_path / "none.jsonl") == ([], 0)


def test_validations_on_other_data_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_log(
        tmp_path,
        {"step": 2, "val_bbox_AP": 0.5},  # of an older refdet, which wrote no hash
        {"step": 2, "val_bbox_AP": 0.9, "data_sha256": "a"},
        {"step": 4, "val_bbox_AP": 0.8, "data_sha256": "a"},
        {"step": 4, "val_bbox_AP": 0.1, "data_sha256": "b"},
        {"step": 6, "val_bbox_AP": 0.2, "data_sha256": "b"},
    )
    rows, on_other_data = read_validations(path)
    assert [(row["step"], row["val_bbox_AP"]) for row in rows] == [(4, 0.1), (6, 0.2)] and on_other_data == 3
    section = loss_section([], rows, on_other_data)
    assert "box AP 0.200 at step 6, highest 0.200." in section
    assert "Left out: 3 validations on other images or annotations" in section
    assert "Left out" not in loss_section([], rows)


def test_the_confusion_map_shows_fractions_of_the_objects_of_a_category(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[np.ndarray] = []
    monkeypatch.setattr("refdet.report.confusions._draw", lambda plot, shares, labels: drawn.append(shares))
    confused = Counter({(1, 1): 5, (1, 2): 3, (2, 2): 4, (3, 3): 7, (2, 9): 1})
    errors = DetectionErrors(1, 25, objects_by_category=Counter({1: 10, 2: 5, 3: 7}), confusions=confused)
    chart = confusion_map(errors, {1: "cat", 2: "dog"})
    # rows: dog, confused most often, and cat; 3 is never confused, and 9 has no objects
    # columns: dog, cat, another category, no region
    np.testing.assert_allclose(drawn[0], [[0.8, 0, 0.2, 0], [0.3, 0.5, 0, 0.2]])
    assert "cat: 50% correct, most often taken for dog (30%)" in chart.description
    assert confusion_map(DetectionErrors(), {}).svg == ""


@pytest.mark.slow
def test_a_confusion_map_of_many_categories_is_limited_and_escaped() -> None:
    names = {i: f"<b>{i}&" * 9 for i in range(40)}
    confused = Counter({(i, (i + 1) % 40): 1 for i in range(40)})
    errors = DetectionErrors(1, 40, objects_by_category=Counter(range(40)), confusions=confused)
    svg = confusion_map(errors, names).svg
    assert "<b>" not in svg and svg.count(">100<") <= MAX_CATEGORIES and len(svg) < 200_000


@pytest.mark.parametrize("scores", [[0.9, 0.2, 0.1], [3.5, 0.2, -2.5], [-1.0, -2.0, -3e38], [3e38, 0.5, -3e38]])
def test_scores_that_are_no_probabilities_have_a_histogram_but_no_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float]
) -> None:
    heights: dict[str, list[int]] = {}
    bar_chart = stores.bar_chart

    def record_heights(title: str, description: str, values: list[int], axes: Axes) -> Chart:
        heights[title] = values
        return bar_chart(title, description, values, axes)

    monkeypatch.setattr(stores, "bar_chart", record_heights)
    write_refer(tmp_path, [{"image_id": 1, "bbox": [10, 10, 20, 20], "category_id": 1, "split": "val"}])
    image = replace(regions(1, [[10, 10, 30, 30]] * 3), scores=np.array(scores, np.float32))
    write_store(tmp_path / "s.h5", [image], masks=False)
    inputs = ReportInputs(
        parts=[ReferPart(tmp_path / "s.h5")], instances=tmp_path / "toy" / "instances.json", pictures=0
    )
    text = page.render_page(inputs, "x")
    assert sum(heights["s.h5: score"]) == 3
    n_outside = sum(not 0 <= score <= 1 for score in scores)
    assert ("Regions by score" in text) == (n_outside == 0)
    share = f"Not shown: {n_outside} of 3 regions have a score outside of 0 to 1, so the scores are not probabilities."
    assert (share in text) == (n_outside > 0)


def test_regions_are_read_only_when_a_scene_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = [10.0, 10.0, 30.0, 30.0]
    write_store(tmp_path / "s.h5", [regions(i, [box]) for i in range(1, 9)], masks=False)
    objects = [{"image_id": i, "bbox": [10, 10, 20, 20], "category_id": 1, "split": "val"} for i in range(1, 9)]
    read: list[int] = []
    store_read = store.Store.read
    with store.open(tmp_path / "s.h5") as opened:

        def record_read(self: store.Store, image_id: int, *args: Any, **kwargs: Any) -> Any:
            read.append(image_id)
            return store_read(self, image_id, *args, **kwargs)

        monkeypatch.setattr(store.Store, "read", record_read)
        every = scenes_of_splits(opened, REFER(write_refer(tmp_path, objects), "toy", "me"), "toy/me", ["val"])
        assert len(every) == 8 and all(scene.referents[0].iou == 1 for scene in every) and read == []
        assert every[2].regions.image_id == 3 and read == [3]
        assert images_of(opened)[3] == every[2].image


@pytest.mark.slow
def test_a_sample_of_a_large_store_is_compared_with_annotations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = [{"image_id": i, "bbox": [10, 10, 20, 20], "category_id": 1, "split": "val"} for i in range(1, 9)]
    write_refer(tmp_path, objects)
    write_store(tmp_path / "s.h5", [regions(i, [[10, 10, 30, 30]]) for i in range(1, 9)], masks=False)
    inputs = ReportInputs(
        parts=[ReferPart(tmp_path / "s.h5")], instances=tmp_path / "toy" / "instances.json", pictures=0
    )
    assert "of this sample" not in page.render_page(inputs, "x")
    monkeypatch.setattr(page, "MAX_EVALUATED_IMAGES", 3)
    text = page.render_page(inputs, "x")
    assert (
        "The regions of 3 images" in text
        and "an evenly spaced sample of the 8 images" in text
        and "of this sample" in text
    )
