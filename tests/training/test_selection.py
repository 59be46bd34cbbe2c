"""What a run, its best/ and their stores say of the images that chose their weights; and what train says before."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from split_examples import write_refs
from training_examples import squares, tiny

from refdet.data.coco import CocoIndex
from refdet.data.instances_provenance import provenance_of_instances
from refdet.extraction.extract import extract_features
from refdet.extraction.image_list import ImageList
from refdet.splits.build import build_split
from refdet.splits.detector_audit import ProvenanceAudit, audit_provenance
from refdet.structures.provenance import UNKNOWN
from refdet.training.selection import held_out_notes
from refdet.training.train import dry_run, train

pytestmark = pytest.mark.slow


def keep(ids: set[int]) -> Callable[[dict[str, Any]], None]:
    def change(tree: dict[str, Any]) -> None:
        tree["images"] = [image for image in tree["images"] if image["id"] in ids]
        tree["annotations"] = [entry for entry in tree["annotations"] if entry["image_id"] in ids]

    return change


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images 1 to 9, of which 5 and 6 are held out; a split of the first six, and validation files."""
    write_refs(tmp_path / "refer", {("refcoco", "unc"): [(5, "val"), (6, "testA")]})

    for name, ids in (("all", {1, 2, 3, 4, 5, 6}), ("leaking", {5, 6, 7}), ("clean", {7, 8, 9})):
        squares(tmp_path, keep(ids), images=9).rename(tmp_path / f"{name}.json")
    build_split(tmp_path / "all.json", tmp_path / "refer", tmp_path / "split.json")
    return tmp_path


def trained(data: Path, validate: str | None = None, *changes: str, resume: bool = False) -> Path:
    more = {} if validate is None else {"val_instances": data / f"{validate}.json"}
    recipe = tiny("train.steps=1", *changes)
    train(recipe, data / "split.json", data / "images", data / "run", device="cpu", resume=resume, **more)
    return data / "run"


def audited(data: Path, path: Path, validate: str | None = None) -> ProvenanceAudit:
    file = None if validate is None else data / f"{validate}.json"
    return audit_provenance(path, data / "refer", data / "split.json", val_instances=file)


def store_of(data: Path, checkpoint: Path) -> Path:
    images = ImageList.of_instances(data / "clean.json")
    extract_features(checkpoint, data / "images", data / "f.h5", images, device="cpu", batch_size=1)
    return data / "f.h5"


def test_held_out_images_that_choose_the_best_weights_are_told(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = trained(data, "leaking")
    assert "leaking.json: 2 of 3 images are held out of split.json" in caplog.text
    last = audited(data, out, "leaking")
    assert last.proven and any("(3 images, with 2 held-out images), which did not" in note for note in last.notes)
    for path in (out / "best", store_of(data, out / "best")):
        found = audited(data, path, "leaking")
        assert "leaking.json, which contains 2 held-out images" in found.problem and not found.proven
        assert "validation data unknown" in audited(data, path).problem
    card = (out / "best/README.md").read_text()
    assert "chosen by their AP on leaking.json (3 images" in card and "was not checked" in card
    assert "--val-instances leaking.json" in card and "weights of the last step" in (out / "README.md").read_text()


def test_other_images_that_choose_the_best_weights_are_proven(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = trained(data, "clean")
    assert "held out of" not in caplog.text and "clean.json, which chooses best/: not built by" in caplog.text
    for path in (out, out / "best", store_of(data, out / "best")):
        assert audited(data, path, "clean").proven
    caplog.clear()
    build_split(data / "leaking.json", data / "refer", data / "built.json")
    trained(data, "built", "train.steps=2", resume=True)
    assert "which chooses best/" not in caplog.text  # it excludes what split.json does
    assert {file.source for file in _selection(data, out).validated_on} == {"clean.json", "leaking.json"}
    assert not audited(data, out / "best").problem and audited(data, out / "best", "built").proven
    assert not audited(data, out / "best").proven


def _selection(data: Path, path: Path) -> Any:
    provenance = audited(data, path).provenance
    assert provenance is not None and provenance.selection is not None
    return provenance.selection


def test_a_resumed_run_notes_names_that_an_older_refdet_did_not(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = json.loads((data / "split.json").read_text())
    del tree["info"]
    for image, other in zip(tree["images"], reversed(tree["images"]), strict=True):
        image["file_name"] = f"{other['id']}.png"
    (data / "split.json").write_text(json.dumps(tree))
    with monkeypatch.context() as older:
        older.setattr(
            "refdet.training.train.provenance_of_instances",
            lambda index: replace(provenance_of_instances(index), note=UNKNOWN),
        )
        older.setattr("refdet.training.trainer.with_last_step_selection", lambda provenance, *_: provenance)
        out = trained(data)
    (data / "ids.txt").write_text("".join(f"{image['id']}\n" for image in tree["images"]))
    assert audited(data, out).proven and not audit_provenance(out, data / "refer", data / "ids.txt").proven
    trained(data, None, "train.steps=2", resume=True)
    assert audited(data, out).proven
    found = audit_provenance(out, data / "refer", data / "ids.txt")
    assert "cannot be proven: the file it was trained on has file names" in found.problem and not found.proven


def test_a_run_without_validation_was_not_chosen(data: Path) -> None:
    out = trained(data)
    assert audited(data, out).proven and not audited(data, out).notes[2:]
    assert not _selection(data, out).by_validation
    trained(data, "leaking", resume=True)  # the finished run is validated later
    (file,) = _selection(data, out).validated_on
    assert file.source == "leaking.json" and audited(data, out / "best", "leaking").problem


def test_a_validation_that_was_not_recorded_stays_unknown(data: Path) -> None:
    out = trained(data, "clean")
    before = [out / "model.json", out / "best/model.json"]
    for path in before:
        tree = json.loads(path.read_text())
        del tree["provenance"]["selection"]
        path.write_text(json.dumps(tree))
    for path in (out, out / "best"):
        assert "without recording on which images" in audited(data, path, "clean").problem
    assert "is not recorded" in audited(data, store_of(data, out / "best")).problem


def test_a_dry_run_tells_too(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    dry_run(tiny(), data / "split.json", data / "images", device="cpu", val_instances=data / "leaking.json")
    assert "2 of 3 images are held out of split.json" in caplog.text
    (data / "split.report.json").write_text("{")  # of which nothing can be known then
    dry_run(tiny(), data / "split.json", data / "images", device="cpu", val_instances=data / "leaking.json")
    assert "leaking.json, which chooses best/: not built by refdet build-split" in caplog.text


def notes_of(data: Path, validate: str, **options: Any) -> list[str]:
    """Notes on a validation file if the training file is built from all.json with the given options of build-split."""
    split = data / "other.json"
    build_split(data / "all.json", data / "refer", split, **options)
    training, validation = (provenance_of_instances(CocoIndex.load(p)) for p in (split, data / f"{validate}.json"))
    return held_out_notes(data / f"{validate}.json", validation, training, split)


def test_images_that_a_split_does_not_keep_are_not_called_held_out(data: Path) -> None:
    write_refs(data / "refer", {("refcoco", "unc"): [(5, "val"), (6, "testA"), (1, "train"), (2, "train")]})
    squares(data, keep({3, 4, 7}), images=9).rename(data / "unused.json")
    for validate in ("unused", "leaking"):
        (note,) = notes_of(data, validate, keep_only=["refcoco:unc:train"])
        assert "not built by refdet build-split" in note and "was not checked" in note
        for name in ("other.json", "other.report.json"):
            (data / name).unlink()


def test_held_out_images_of_a_benchmark_are_not_called_refers(data: Path) -> None:
    squares(data, keep({3, 4, 7}), images=9).rename(data / "listed.json")
    (data / "ref-l4.txt").write_text("000000000003.jpg\n000000000004.jpg\n")
    first, second = notes_of(data, "listed", benchmark=[data / "ref-l4.txt"])
    whose = "as images of benchmark/ref-l4.txt or REFER's val or test splits: "
    assert f"2 of 3 images are held out of other.json, {whose}" in first
    assert "refdet audit" not in first and "was not checked for REFER's val and test images" in second


def test_held_out_training_images_of_refer_are_not_called_val_or_test(data: Path) -> None:
    write_refs(data / "refer", {("refcoco", "unc"): [(5, "train"), (6, "testA")]})
    first, second = notes_of(data, "leaking", exclude=["refcoco:unc:train"])
    assert "1 of 3 images is held out of other.json, as images of refcoco/unc/train: " in first
    assert "refdet audit" not in first and "was not checked for REFER's val and test images" in second


def test_held_out_images_do_not_hide_that_other_splits_are_not_excluded(data: Path) -> None:
    first, second = notes_of(data, "leaking", exclude=["refcoco:unc:val"])
    assert "1 of 3 images is held out" in first and "refdet audit does not call best/ clean" in first
    assert "was not checked for REFER's val and test images" in second
    write_refs(data / "refer", {("refcocog", "umd"): [(7, "val")]})
    build_split(data / "leaking.json", data / "refer", data / "partly.json", exclude=["refcocog:umd"])
    for name in ("other.json", "other.report.json"):
        (data / name).unlink()
    first, second = notes_of(data, "partly", exclude=["refcoco:unc"])
    assert "2 of 2 images are held out" in first
    assert "does not exclude refcoco/unc/testA, refcoco/unc/val, as other.json does" in second


def test_the_report_of_another_split_says_nothing_of_this_one(data: Path) -> None:
    build_split(data / "all.json", data / "refer", data / "partial.json", exclude=["refcoco:unc:val"])
    (data / "partial.report.json").rename(data / "other.report.json")
    (data / "partial.json").rename(data / "other.json")
    training, validation = (provenance_of_instances(CocoIndex.load(data / f"{n}.json")) for n in ("other", "leaking"))
    assert len(held_out_notes(data / "leaking.json", validation, training, data / "other.json")) == 2
    (data / "split.report.json").rename(data / "other.report.json")
    (note,) = held_out_notes(data / "leaking.json", validation, training, data / "other.json")
    assert "was not checked" in note
