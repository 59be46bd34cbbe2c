"""The answers of a report are read and compared as its metrics were."""

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
    """A store, refs and answers in xyxy; the last has an IoU of 0.52 and a generalized IoU of 0.48."""
    objects = [{"image_id": i, "bbox": box, "category_id": 1, "split": "val"} for i, box in BOXES.items()]
    write_refer(tmp_path / "refer", objects)
    write_store(tmp_path / "a.h5", [regions(i, [[x, y, x + w, y + h]]) for i, (x, y, w, h) in BOXES.items()], False)
    answers = [{"sent_id": 0, "box": [10, 10, 30, 30]}, {"sent_id": 10, "box": [60, 30, 80, 80]},
               {"sent_id": 11, "box": [69, 36, 109, 86]}]  # fmt: skip
    (tmp_path / "p.json").write_text(json.dumps(answers))
    return tmp_path


def metrics_of(folder: Path, **how: Any) -> dict[str, Any]:
    return evaluate_on_refer(folder / "a.h5", folder / "refer", "toy", "me", **how)


@pytest.mark.parametrize("protocol", ["standard", "mattnet", "mdetr"])
@pytest.mark.parametrize("again", [False, True])
def test_wrong_answers_are_those_of_the_metrics(folder: Path, protocol: Any, again: bool) -> None:
    """Whether the metrics already have the answers, or the report evaluates these."""
    predictions = folder / "p.json"
    if again:
        answers = json.loads(predictions.read_text())
        for answer in answers:
            x1, y1, x2, y2 = answer["box"]
            answer["box"] = [x1, y1, x2 - x1, y2 - y1]
        predictions.write_text(json.dumps(answers))
        metrics = metrics_of(folder, protocol=protocol)
    else:
        metrics = metrics_of(folder, protocol=protocol, predictions=predictions, box_format="xyxy")
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
def test_an_unknown_form_of_metrics_is_refused(folder: Path, name: str, value: Any) -> None:
    metrics = metrics_of(folder) | {name: value}
    with pytest.raises(InputError, match=f"'{name}' must be"):
        pair_up([folder / "a.h5"], [metrics], None)


def test_metrics_go_to_the_store_of_their_detector(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine, other = metrics_of(folder), metrics_of(folder)
    other["provenance"] = PROVENANCE | {"note": "of another detector"}
    parts = pair_up([folder / "a.h5"], [other, mine], None, "toy/me")
    assert parts[0].metrics is not None and parts[0].metrics["provenance"] == PROVENANCE
    for metrics, said in ((mine, False), (other, True)):
        with ExitStack() as stack:
            open_part(stack, ReferPart(folder / "a.h5", metrics), folder / "refer")
        assert ("metrics of toy/me are of another detector than" in caplog.text) == said


def test_no_other_store_takes_the_metrics_of_a_store(folder: Path) -> None:
    """Of two stores of one dataset only the second was evaluated."""
    write_store(folder / "b.h5", [regions(1, [[10, 10, 30, 30]])], False, provenance=PROVENANCE | {"note": "another"})
    metrics = metrics_of(folder)
    for paths in (("b.h5", "a.h5"), ("a.h5", "b.h5")):
        parts = pair_up([folder / path for path in paths], [metrics], None, "toy/me")
        assert {part.store and part.store.name: part.metrics is not None for part in parts} == {
            "a.h5": True,
            "b.h5": False,
        }


@pytest.mark.parametrize("dataset", ["", "toy/me"])
def test_metrics_of_a_single_store_are_its_own(folder: Path, dataset: str) -> None:
    """A store of an instances file does not say for which refs it was extracted."""
    metrics = metrics_of(folder)
    (part,) = pair_up([folder / "a.h5"], [metrics], None, dataset)
    assert part.store == folder / "a.h5" and part.metrics == metrics
    rest = pair_up([folder / "a.h5"], [metrics, metrics | {"dataset": "other"}], None)
    assert [one.metrics and one.metrics["dataset"] for one in rest] == [None, "toy", "other"]


def test_metrics_of_another_dataset_than_the_given_one_stand_alone(folder: Path) -> None:
    parts = pair_up([folder / "a.h5"], [metrics_of(folder)], None, "toy/other")
    assert [(part.store is None, part.metrics is None, part.dataset) for part in parts] == [
        (False, True, "toy/other"),
        (True, False, ""),
    ]


def test_answers_are_never_dropped(folder: Path) -> None:
    """Of a store without all images of a split, or of a dataset that is not there."""
    (folder / "a.h5").unlink()
    write_store(folder / "a.h5", [regions(1, [[10, 10, 30, 30]])], False)
    for dataset, error, says in (("toy/me", InputError, "has all images of no split"), ("x/y", ReferError, "'x'")):
        with ExitStack() as stack, pytest.raises(error, match=says):
            open_part(stack, ReferPart(folder / "a.h5", None, folder / "p.json", dataset), folder / "refer")


def test_answers_to_grefcoco_are_shown(tmp_path: Path) -> None:
    objects = [{"image_id": 1, "bbox": BOXES[1], "category_id": 1}]
    write_grefer(tmp_path / "refer", objects, [(1, [0], "val"), (1, [], "val")])
    write_store(tmp_path / "a.h5", [regions(1, [[10, 10, 30, 30]])], False)
    (tmp_path / "p.json").write_text(json.dumps([{"sent_id": 0, "box": BOXES[1]}, {"sent_id": 10, "boxes": []}]))
    parts = pair_up([tmp_path / "a.h5"], [], tmp_path / "p.json", "toy/me")
    write(tmp_path / "r.html", ReportInputs(refer_root=tmp_path / "refer", parts=parts))
    text = (tmp_path / "r.html").read_text()
    row = text[text.rindex(">toy me val<") :].partition("</tr>")[0]
    cells = [cell.partition("<")[0] for cell in row.split("<td>")[1:]]
    assert cells == ["4", "2", "2", "0.500", "0.500", "0.500", "–", "–"]


def test_failed_images_are_said(folder: Path) -> None:
    metrics = metrics_of(folder)
    metrics["splits"]["val"]["unusable"] = 1
    write(folder / "r.html", ReportInputs(parts=pair_up([], [metrics], None)))
    assert "toy me val: 1 of 2 images could not be used" in (folder / "r.html").read_text()
