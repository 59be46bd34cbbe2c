"""A model's answers in a report are matched with their store and judged as the metrics judge them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from evaluate_examples import PROVENANCE, regions, write_grefer, write_refer, write_store

from refdet.errors import InputError
from refdet.evaluation.refer_benchmark import evaluate_on_refer
from refdet.report import write
from refdet.report.inputs import ReferPart, ReportInputs
from refdet.report.pictures import wrong_answers
from refdet.report.refer_parts import open_part, pair_up
from refer import ReferError

BOXES = {1: [10, 10, 20, 20], 2: [60, 30, 40, 50]}  # xywh


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store, refs, and answers in xyxy to three of the four sentences.

    The first two answers are correct. The last has an IoU of 0.52 and a generalized IoU of 0.48: mdetr, which compares
    the latter with 0.5, calls it wrong.
    """
    objects = [{"image_id": i, "bbox": box, "category_id": 1, "split": "val"} for i, box in BOXES.items()]
    write_refer(tmp_path / "refer", objects)
    write_store(tmp_path / "a.h5", [regions(i, [[x, y, x + w, y + h]]) for i, (x, y, w, h) in BOXES.items()], False)
    answers = [{"sent_id": 0, "box": [10, 10, 30, 30]}, {"sent_id": 10, "box": [60, 30, 80, 80]},
               {"sent_id": 11, "box": [69, 36, 109, 86]}]  # fmt: skip
    (tmp_path / "p.json").write_text(json.dumps(answers))
    return tmp_path


def evaluate_folder(folder: Path, **options: Any) -> dict[str, Any]:
    return evaluate_on_refer(folder / "a.h5", folder / "refer", "toy", "me", **options)


@pytest.mark.parametrize("protocol", ["standard", "mattnet", "mdetr"])
@pytest.mark.parametrize("evaluated_by_report", [False, True])
def test_the_report_counts_the_wrong_answers_of_the_metrics(
    folder: Path, protocol: Any, evaluated_by_report: bool
) -> None:
    """The metrics include the answers, or the report evaluates these by the protocol of the metrics."""
    predictions = folder / "p.json"
    if evaluated_by_report:
        answers = json.loads(predictions.read_text())
        for answer in answers:
            x1, y1, x2, y2 = answer["box"]
            answer["box"] = [x1, y1, x2 - x1, y2 - y1]
        predictions.write_text(json.dumps(answers))
        metrics = evaluate_folder(folder, protocol=protocol)
    else:
        metrics = evaluate_folder(folder, protocol=protocol, predictions=predictions, box_format="xyxy")
    (part,) = pair_up([folder / "a.h5"], [metrics], predictions)
    with ExitStack() as stack:
        opened = open_part(stack, part, folder / "refer")
        counts = wrong_answers([opened], None, 4)
    assert opened.metrics is not None and opened.metrics["protocol"] == protocol
    rates = opened.metrics["splits"]["val"]["comprehension"]
    right = counts["answers"] - counts["wrong"]
    assert counts["answers"] == 3 and right == round(4 * rates["accuracy@0.5"])
    assert right == (2 if protocol == "mdetr" else 3)


@pytest.mark.parametrize(("name", "value"), [("protocol", "other"), ("box_format", "yxyx"), ("box_format", 3)])
def test_metrics_of_an_unknown_protocol_or_box_format_are_an_error(folder: Path, name: str, value: Any) -> None:
    metrics = evaluate_folder(folder) | {name: value}
    with pytest.raises(InputError, match=f"'{name}' must be"):
        pair_up([folder / "a.h5"], [metrics], None)


def test_metrics_are_paired_with_the_store_of_the_same_detector(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    matching, other = evaluate_folder(folder), evaluate_folder(folder)
    other["provenance"] = PROVENANCE | {"note": "of another detector"}
    parts = pair_up([folder / "a.h5"], [other, matching], None, "toy/me")
    assert parts[0].metrics is not None and parts[0].metrics["provenance"] == PROVENANCE
    for metrics, warns in ((matching, False), (other, True)):
        with ExitStack() as stack:
            open_part(stack, ReferPart(folder / "a.h5", metrics), folder / "refer")
        assert ("metrics of toy/me are of another detector than" in caplog.text) == warns


def test_metrics_of_one_store_are_not_paired_with_another_of_the_dataset(folder: Path) -> None:
    """Of two stores of one dataset, only a.h5 was evaluated."""
    write_store(folder / "b.h5", [regions(1, [[10, 10, 30, 30]])], False, provenance=PROVENANCE | {"note": "another"})
    metrics = evaluate_folder(folder)
    for paths in (("b.h5", "a.h5"), ("a.h5", "b.h5")):
        parts = pair_up([folder / path for path in paths], [metrics], None, "toy/me")
        assert {part.store and part.store.name: part.metrics is not None for part in parts} == {
            "a.h5": True,
            "b.h5": False,
        }


@pytest.mark.parametrize("dataset", ["", "toy/me"])
def test_metrics_of_one_dataset_are_paired_with_the_only_store(folder: Path, dataset: str) -> None:
    """A store of an instances file does not say for which refs it was extracted."""
    metrics = evaluate_folder(folder)
    (part,) = pair_up([folder / "a.h5"], [metrics], None, dataset)
    assert part.store == folder / "a.h5" and part.metrics == metrics
    parts = pair_up([folder / "a.h5"], [metrics, metrics | {"dataset": "other"}], None)
    assert [part.metrics and part.metrics["dataset"] for part in parts] == [None, "toy", "other"]


def test_metrics_of_another_dataset_than_the_given_one_are_a_part_without_store(folder: Path) -> None:
    parts = pair_up([folder / "a.h5"], [evaluate_folder(folder)], None, "toy/other")
    assert [(part.store is None, part.metrics is None, part.dataset) for part in parts] == [
        (False, True, "toy/other"),
        (True, False, ""),
    ]


def test_answers_that_cannot_be_evaluated_are_an_error(folder: Path) -> None:
    """The store lacks an image of every split, or there is no such dataset."""
    (folder / "a.h5").unlink()
    write_store(folder / "a.h5", [regions(1, [[10, 10, 30, 30]])], False)
    for dataset, error, message in (("toy/me", InputError, "lacks images of every split"), ("x/y", ReferError, "'x'")):
        with ExitStack() as stack, pytest.raises(error, match=message):
            open_part(stack, ReferPart(folder / "a.h5", None, folder / "p.json", dataset), folder / "refer")


def test_metrics_of_answers_to_grefcoco_are_a_table_row(tmp_path: Path) -> None:
    objects = [{"image_id": 1, "bbox": BOXES[1], "category_id": 1}]
    write_grefer(tmp_path / "refer", objects, [(1, [0], "val"), (1, [], "val")])
    write_store(tmp_path / "a.h5", [regions(1, [[10, 10, 30, 30]])], False)
    (tmp_path / "p.json").write_text(json.dumps([{"sent_id": 0, "box": BOXES[1]}, {"sent_id": 10, "boxes": []}]))
    parts = pair_up([tmp_path / "a.h5"], [], tmp_path / "p.json", "toy/me")
    write(tmp_path / "r.html", ReportInputs(refer_root=tmp_path / "refer", parts=parts))
    text = (tmp_path / "r.html").read_text()
    # sentences, those without a target, those without an answer; N-acc, T-acc, precision, and no gIoU and cIoU
    row = text[text.rindex(">toy me val<") :].partition("</tr>")[0]
    cells = [cell.partition("<")[0] for cell in row.split("<td>")[1:]]
    assert cells == ["4", "2", "2", "0.500", "0.500", "0.500", "–", "–"]


def test_images_that_evaluation_could_not_use_are_reported(folder: Path) -> None:
    metrics = evaluate_folder(folder)
    metrics["splits"]["val"]["unusable"] = 1
    write(folder / "r.html", ReportInputs(parts=pair_up([], [metrics], None)))
    assert "toy me val: 1 of 2 images could not be used" in (folder / "r.html").read_text()
