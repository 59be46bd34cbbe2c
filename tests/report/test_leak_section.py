"""The report says that nothing leaked only where `refdet audit` proves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from split_examples import coco, write, write_refs

from refdet import report
from refdet.data.coco import CocoIndex
from refdet.data.instances_provenance import provenance_of_instances
from refdet.report.inputs import ReferPart, ReportInputs
from refdet.splits.build import build_split
from refdet.structures.known_weights import _TORCHVISION, imported_note

CLEAN = "It has never seen the REFER images it is evaluated on"
SHA256 = "0676ba61" + "0" * 56  # starts as that of torchvision's resnet50
IMAGENET = f"w (sha256 {'0' * 12}; {imported_note('r.pth', SHA256, _TORCHVISION['0676ba61'])})"


def render_page(
    folder: Path,
    instances: dict[str, Any],
    built: bool = True,
    weights: str | None = None,
    metrics: tuple[Any, ...] = (),
    reformatted: bool = False,
) -> str:
    """The report page of a run.

    Args:
        folder: where the files are written.
        instances: the instances file.
        built: whether the run was trained on the split that build-split makes of the file, or on the file itself.
        weights: description of the run's initial weights.
        metrics: metrics of the run on REFER.
        reformatted: whether the file is rewritten with the same contents after the training.
    """
    root = write_refs(folder / "refer", {("refcoco", "unc"): [(2, "val"), (3, "testA"), (9, "train")]})
    trained_on = write(folder / "f.json", instances)
    if built:
        trained_on = build_split(trained_on, root, folder / "split.json").out
    provenance = provenance_of_instances(CocoIndex.load(trained_on))
    if weights is not None:
        provenance = provenance.with_weights(weights)
    if reformatted:
        trained_on.write_text(json.dumps(json.loads(trained_on.read_text()), indent=1))
    run = folder / "run"
    run.mkdir()
    model = {"recipe": {"name": "demo"}, "step": 4, "provenance": provenance.to_json()}
    write(run / "model.json", model)
    parts = [ReferPart(None, entry) for entry in metrics]
    report.write(folder / "r.html", ReportInputs(run=run, refer_root=root, trained_on=trained_on, parts=parts))
    return (folder / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("weights", [None, IMAGENET])
@pytest.mark.parametrize("built", [True, False])
def test_known_images_and_clean_initial_weights_prove_that_nothing_leaked(
    tmp_path: Path, weights: str | None, built: bool
) -> None:
    text = render_page(tmp_path, coco([9, 25], []), built, weights)
    assert ">No leaks<" in text and CLEAN in text and "Not proven" not in text
    assert "no refcocog/umd found, so their val and test images are not held out" in text  # a note of the audit


def test_unidentified_images_are_not_called_clean(tmp_path: Path) -> None:
    text = render_page(tmp_path, coco([9, 25], [], {25: "kitchen.jpg"}), built=False)
    assert ">No leaks<" not in text and CLEAN not in text
    assert "1 image cannot be identified as COCO&#39;s or others (first: 25)" in text
    assert "in the training file; 1 image of this file unknown<" in text


def test_ids_that_differ_from_file_names_are_not_called_clean_for_a_changed_file(tmp_path: Path) -> None:
    text = render_page(tmp_path, coco([9, 25], [], {25: "000000000030.jpg"}), reformatted=True)
    assert ">No leaks<" not in text and CLEAN not in text
    assert "has an id that is not COCO&#39;s, so other images may have the same hash" in text


@pytest.mark.parametrize(
    "weights", ["coco_run (sha256 0; trained on COCO)", IMAGENET.replace("is torchvision", "is x")]
)
def test_a_run_with_unknown_initial_weights_is_not_called_clean(tmp_path: Path, weights: str) -> None:
    text = render_page(tmp_path, coco([9, 25], []), weights=weights)
    assert ">No leaks<" not in text and CLEAN not in text
    assert "its initial weights may have seen held-out images" in text


def metrics_of(split: str) -> dict[str, Any]:
    recall = dict.fromkeys(("0.5", "0.6", "0.7", "0.8", "0.9", "mean_best_iou"), 0.5)
    values = {"images": 1, "refs": 1, "sentences": 1, "detection": {"bbox": {"AP50": 0.5}, "segm": None},
              "referent_recall": recall, "recall@k": {"1": 0.1, "all": 0.5}}  # fmt: skip
    return {"dataset": "refcoco", "split_by": "unc", "splits": {split: values}}


@pytest.mark.parametrize(("split", "clean"), [("val", True), ("train", False), ("testB", False)])
def test_only_metrics_of_audited_splits_are_called_clean(tmp_path: Path, split: str, clean: bool) -> None:
    """Training images of REFER are in the file, and testB, which has no refs here, was not audited."""
    text = render_page(tmp_path, coco([9, 25], []), metrics=(metrics_of(split),))
    assert ">No leaks<" in text and (CLEAN in text) == clean


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({}, True),
        ({"selection": {"by_validation": False, "validated_on": []}}, True),
        ({"weights": "coco_run (sha256 0; trained on COCO)"}, False),
        ({"image_ids_sha256": "2" * 64}, False),
        ({"images": "all"}, False),
    ],
)
def test_only_metrics_of_the_same_detector_are_called_clean(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any], is_same: bool
) -> None:
    """The run did not see the images, but the detector of the metrics may have."""
    render_page(tmp_path, coco([9, 25], []))
    provenance = json.loads((tmp_path / "run" / "model.json").read_text())["provenance"] | change
    parts = [ReferPart(None, metrics_of("val") | {"provenance": provenance})]
    inputs = ReportInputs(run=tmp_path / "run", refer_root=tmp_path / "refer", trained_on=tmp_path / "split.json",
                          parts=parts)  # fmt: skip
    report.write(tmp_path / "other.html", inputs)
    text = (tmp_path / "other.html").read_text(encoding="utf-8")
    assert ">No leaks<" in text and (CLEAN in text) == is_same
    assert ("the metrics of refcoco/unc" in text) == ("the metrics of refcoco/unc" in caplog.text) == (not is_same)
