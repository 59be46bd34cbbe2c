"""Stores that do not fit the refs: other image sizes, failed images, NaN and other category names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from evaluate_examples import regions, write_refer, write_store

from refdet.errors import InputError
from refdet.evaluation.refer_benchmark import evaluate_on_refer
from refdet.evaluation.tables import to_dataframe
from refdet.structures.regions import Regions

BOX = [10, 10, 30, 30]
OBJECTS = [{"image_id": i, "bbox": [10, 10, 20, 20], "category_id": 1, "split": "val"} for i in (1, 2, 3)]


def evaluate(folder: Path, images: list[Regions], **store: Any) -> dict[str, Any]:
    root = write_refer(folder / "refer", OBJECTS)
    write_store(folder / "a.h5", images, masks=False, **store)
    return evaluate_on_refer(folder / "a.h5", root, "toy", "me")


@pytest.mark.parametrize(("height", "width"), [(120, 100), (50, 60), (100, 121)])
def test_regions_of_resized_images_are_refused(tmp_path: Path, height: int, width: int) -> None:
    """Their boxes are in pixels of the resized images, so every overlap would be wrong."""
    resized = Regions(
        3, "3.jpg", height, width, np.array([BOX], np.float32), np.ones(1, np.float32), np.ones(1, np.int64)
    )
    message = (
        rf"of split val, 1 of 3 images has .*image 3 is {width}x{height}, not 120x100\); extract them with: refdet"
    )
    with pytest.raises(InputError, match=message):
        evaluate(tmp_path, [regions(1, [BOX]), regions(2, [BOX]), resized])


def test_unusable_images_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failed = [Regions.empty(i, f"{i}.jpg", 100, 120, f"{i}.jpg: truncated") for i in (2, 3)]
    metrics = evaluate(tmp_path, [regions(1, [BOX]), *failed])
    val = metrics["splits"]["val"]
    assert (val["images"], val["unusable"], val["referent_recall"]["0.5"]) == (3, 2, pytest.approx(1 / 3))
    assert "split val: 2 of 3 images are unusable in the extraction" in caplog.text
    assert "(first: 2.jpg: truncated)" in caplog.text
    frame = to_dataframe(metrics)
    assert frame[frame["metric"] == "unusable"]["value"].tolist() == [2.0]


def test_images_without_regions_are_not_failures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    val = evaluate(tmp_path, [regions(1, [BOX]), regions(2, []), regions(3, [BOX])])["splits"]["val"]
    assert "unusable" not in val and caplog.text == ""


@pytest.mark.parametrize("name", ["box", "score"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_boxes_and_scores_must_be_finite(tmp_path: Path, name: str, value: float) -> None:
    """A NaN would make every region after it uncovered, and metrics.json invalid."""
    evaluate(tmp_path, [regions(i, [BOX]) for i in (1, 2, 3)])
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file[f"regions/{name}"][1] = value
    with pytest.raises(InputError, match=r"a\.h5: image 2: a box or score is not finite"):
        evaluate_on_refer(tmp_path / "a.h5", tmp_path / "refer", "toy", "me")


@pytest.mark.parametrize(("name", "is_noted"), [("c1", False), ("aerosol can", True)])
def test_categories_with_other_names_are_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, is_noted: bool
) -> None:
    evaluate(tmp_path, [regions(i, [BOX]) for i in (1, 2, 3)], names={1: name, 7: "unknown to the refs"})
    assert ("1 of 2 categories has another name in" in caplog.text) == is_noted
    assert ("(first: 1 is 'aerosol can', not 'c1')" in caplog.text) == is_noted
