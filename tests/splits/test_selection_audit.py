"""Weights chosen by validation are clean only if its images are known and none of them is held out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from foreign_weights import call
from hypothesis import given, settings
from hypothesis import strategies as st
from split_examples import coco, write, write_refs, write_run_directory

from refdet.config.renamed_keys import KEYS, KEYS_BEFORE_VALIDATION
from refdet.data.coco import CocoIndex
from refdet.data.instances_provenance import provenance_of_instances
from refdet.errors import InputError
from refdet.files.short_text import format_count
from refdet.splits.build import build_split
from refdet.splits.detector_audit import ProvenanceAudit, audit_provenance
from refdet.structures.provenance import Provenance, Selection

HELD_OUT = {2, 3, 8}
OLD_RECIPE, RECIPE = ({"model": {key: False}} for key in ("inclusive", "legacy_plus_one"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A REFER root and a split without its held-out images."""
    root = tmp_path_factory.mktemp("world")
    write_refs(root / "refer", {("refcoco", "unc"): [(2, "val"), (3, "testA")], ("refcocog", "umd"): [(8, "test")]})
    build_split(write(root / "all.json", coco([1, 2, 3, 4], [1, 2])), root / "refer", root / "split.json")
    return root


def provenance_of(path: Path) -> Provenance:
    return provenance_of_instances(CocoIndex.load(path))


def write_store(path: Path, provenance: Provenance, recipe: dict[str, Any] = RECIPE) -> Path:
    with h5py.File(path, "w") as file:
        attributes = {"schema": "refdet-features/1", "classes": "[]", "options": "{}", "recipe": json.dumps(recipe)}
        file.attrs.update(attributes | {"provenance": json.dumps(provenance.to_json())})
        file["images/id"] = np.array([2])
        file.create_dataset("images/error", data=[""], dtype=h5py.string_dtype())
        file["regions/box"] = np.zeros((0, 4), np.float32)
    return path


def audit_against_split(dataset: Path, path: Path, *more: Any, **options: Any) -> ProvenanceAudit:
    return audit_provenance(path, dataset / "refer", dataset / "split.json", *more, **options)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    ids=st.sets(st.integers(1, 9), min_size=1),
    chosen=st.booleans(),
    is_store=st.booleans(),
    with_file=st.booleans(),
    built=st.booleans(),
)
def test_weights_are_clean_iff_no_held_out_image_chose_them(
    dataset: Path,
    tmp_path_factory: pytest.TempPathFactory,
    ids: set[int],
    chosen: bool,
    is_store: bool,
    with_file: bool,
    built: bool,
) -> None:
    folder = tmp_path_factory.mktemp("case")
    file = write(folder / "val.json", coco(sorted(ids), []))
    built = built and bool(ids - HELD_OUT)  # build-split refuses to write a file without images
    if built:
        file = build_split(file, dataset / "refer", folder / "built.json").out
    seen = set() if built else ids & HELD_OUT
    provenance = replace(provenance_of(dataset / "split.json"), selection=Selection(chosen, (provenance_of(file),)))
    path = write_store(folder / "f.h5", provenance) if is_store else write_run_directory(folder / "run", provenance)
    found = audit_against_split(dataset, path, val_instances=file if with_file else None)
    validation_notes = [note for note in found.notes if ": was validated on " in note]
    if not chosen:
        assert not found.problem and found.proven and len(validation_notes) == 1
        if with_file:
            assert f", with {len(seen)} held-out image{'' if len(seen) == 1 else 's'})" in validation_notes[0]
        else:
            assert ("may hold held-out images" in validation_notes[0]) == (not built)
        return
    assert not validation_notes
    assert bool(found.problem) == (bool(seen) if with_file else not built)
    assert found.proven == (with_file and not seen)  # without the validation file, nothing is proven
    if seen and with_file:
        count = format_count(len(seen), "held-out image")
        assert f"was chosen by validation on {file}, which contains {count}" in found.problem
    elif found.problem:
        assert "validation data unknown" in found.problem and "`val_instances`" in found.problem


def test_another_validation_file_proves_nothing(dataset: Path, tmp_path: Path) -> None:
    file, other = (write(tmp_path / f"{i}.json", coco([i], [])) for i in (5, 6))
    for by_validation, message in ((True, "was not chosen by validation on"), (False, "was not validated on")):
        selection = Selection(by_validation, (provenance_of(file),))
        run = write_run_directory(
            tmp_path / message, replace(provenance_of(dataset / "split.json"), selection=selection)
        )
        assert message in audit_against_split(dataset, run, val_instances=other).problem
        assert audit_against_split(dataset, run, val_instances=file).proven
    run = write_run_directory(
        tmp_path / "never", replace(provenance_of(dataset / "split.json"), selection=Selection(False))
    )
    assert (
        "was not validated on" in audit_against_split(dataset, run, val_instances=file).problem
        and audit_against_split(dataset, run).proven
    )
    foreign = write(tmp_path / "foreign.json", coco([5], [], {5: "COCO_train2014_000000000002.jpg"}))
    selection = Selection(True, (replace(provenance_of(foreign), source_sha256="ab" * 32),))
    run = write_run_directory(tmp_path / "foreign", replace(provenance_of(dataset / "split.json"), selection=selection))
    assert "which contains 1 held-out image" in audit_against_split(dataset, run, val_instances=foreign).problem
    renamed = write(tmp_path / "f.json", coco([5], [], {5: "COCO_train2014_000000000077.jpg"}))
    assert "cannot be proven: 1 image in" in audit_against_split(dataset, run, val_instances=renamed).problem


def test_notes_are_not_repeated(dataset: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "val.json", coco([5], [], {5: "5.jpg"}))
    selection = Selection(True, (provenance_of(file),))
    run = write_run_directory(tmp_path / "run", replace(provenance_of(dataset / "split.json"), selection=selection))
    found = audit_against_split(dataset, run, val_instances=file)
    assert len(set(found.notes)) == len(found.notes) and found.proof is not None
    assert any(str(file) in note for note in found.notes) and not any(str(file) in note for note in found.proof.notes)


def test_a_validated_run_without_a_record_is_not_clean(dataset: Path, tmp_path: Path) -> None:
    older = provenance_of(dataset / "split.json")
    run = write_run_directory(tmp_path / "run", older)
    assert audit_against_split(dataset, run).proven  # it has no best/, so it was not validated
    best = write_run_directory(run / "best", older)
    (best / "validation.json").write_text("{}")
    for path in (run, best):
        for trust in (False, True):
            found = audit_against_split(dataset, path, trust_weights=trust)
            assert "without recording on which images" in found.problem and not found.proven
    # A store with an old recipe key was written before there was a best/.
    assert audit_against_split(dataset, write_store(tmp_path / "old.h5", older, OLD_RECIPE)).proven
    for key in KEYS.keys() - KEYS_BEFORE_VALIDATION.keys():  # renamed later, so it may be in a store of a best/
        part, _, name = key.partition(".")
        later = write_store(tmp_path / f"{key}.h5", older, {part: {name: 64}})
        assert "whether its weights are those of a run's best/" in audit_against_split(dataset, later).problem
    unknown = write_store(tmp_path / "f.h5", older)
    assert "whether its weights are those of a run's best/" in audit_against_split(dataset, unknown).problem
    assert not audit_against_split(dataset, unknown, trust_weights=True).problem
    trusted = audit_against_split(dataset, unknown, trust_weights=True, val_instances=dataset / "split.json")
    assert "has no record of a validation" in trusted.problem


def test_problems_of_training_and_of_validation_are_both_reported(dataset: Path, tmp_path: Path) -> None:
    leaking = write(tmp_path / "val.json", coco([2, 3, 5], []))
    provenance = replace(provenance_of(dataset / "all.json"), selection=Selection(True, (provenance_of(leaking),)))
    run = write_run_directory(tmp_path / "run", provenance)
    found = audit_provenance(run, dataset / "refer", dataset / "all.json", val_instances=leaking)
    assert "was trained on" in found.problem and any("was chosen by validation on" in note for note in found.notes)


def test_weights_initialized_from_chosen_weights_name_the_validation_file(dataset: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "val.json", coco([2, 5], []))
    chosen = replace(provenance_of(dataset / "split.json"), selection=Selection(True, (provenance_of(file),)))
    assert "chosen by their AP on val.json (2 images, ids " in chosen.one_line()
    provenance = provenance_of(dataset / "split.json").with_weights(f"best (sha256 0123456789ab; {chosen.one_line()})")
    run = write_run_directory(tmp_path / "run", replace(provenance, selection=Selection(False)))
    assert "chosen by their AP on val.json" in audit_against_split(dataset, run).problem


def test_audit_command_with_val_instances(dataset: Path, tmp_path: Path) -> None:
    clean, leaking = (write(tmp_path / f"{i}.json", coco([i, 7], [])) for i in (5, 2))
    common = ["--refer-root", dataset / "refer", "--instances", dataset / "split.json"]
    for file in (clean, leaking):
        provenance = replace(provenance_of(dataset / "split.json"), selection=Selection(True, (provenance_of(file),)))
        run = write_run_directory(tmp_path / f"run-{file.stem}", provenance)
        without_file = call("audit", "--checkpoint", run, *common)
        assert without_file.exit_code == 1 and "with --val-instances" in without_file.stderr
        done = call("audit", "--checkpoint", run, *common, "--val-instances", file)
        as_json = call("audit", "--checkpoint", run, *common, "--val-instances", file, "--json")
        tree = json.loads(as_json.stdout)
        assert done.exit_code == as_json.exit_code == (1 if file == leaking else 0)
        assert tree["clean"] == tree["proven"] == tree["selection"]["proven"] == (file == clean)
        assert tree["selection"]["audit"]["leaked_image_ids"] == ([2] if file == leaking else [])
        if file == clean:
            assert "proven: its weights are chosen by their AP on 5.json" in done.stdout
        else:
            assert "2.json, which contains 1 held-out image" in done.stderr
        assert "chosen by their AP on" in call("inspect", run).stdout
    alone = call("audit", *common, "--val-instances", clean)
    assert alone.exit_code == 2 and "--val-instances is for --checkpoint and --store" in alone.stderr
    unknown = write(tmp_path / "vg.json", coco([5], [], {5: "VG_100K/5.jpg"}))
    provenance = replace(provenance_of(dataset / "split.json"), selection=Selection(True, (provenance_of(unknown),)))
    run = write_run_directory(tmp_path / "vg", provenance)
    done = call("audit", "--checkpoint", run, *common, "--val-instances", unknown)
    assert done.exit_code == 1 and "not proven: 1 image unknown (first: 5) in" in done.stderr
    assert "compare them with --find-duplicates in an audit of that file alone" in done.stderr
    accepted = ["audit", "--checkpoint", run, *common, "--val-instances", unknown, "--allow-unidentified"]
    done, as_json = call(*accepted), call(*accepted, "--json")
    assert done.exit_code == as_json.exit_code == 0 and "proven: its weights" not in done.stdout
    assert "(1 image, ids " in done.stdout and "1 image not identified by id; not proven" in done.stdout
    assert not json.loads(as_json.stdout)["proven"] and not json.loads(as_json.stdout)["selection"]["proven"]


@pytest.mark.parametrize(
    "change",
    [
        None, {}, [], {"by_validation": 1, "validated_on": []}, {"by_validation": True, "validated_on": []},
        {"by_validation": False, "validated_on": {}}, {"by_validation": False, "validated_on": [3]},
        {"by_validation": False, "validated_on": [], "more": 1},
    ],
)  # fmt: skip
def test_a_damaged_record_is_refused(dataset: Path, change: Any) -> None:
    file = provenance_of(dataset / "split.json")
    with pytest.raises(InputError, match="provenance"):
        Provenance.from_json(file.to_json() | {"selection": change})
    nested = {"by_validation": False, "validated_on": [replace(file, selection=Selection(False)).to_json()]}
    with pytest.raises(InputError, match="provenance: selection"):
        Provenance.from_json(file.to_json() | {"selection": nested})


def test_the_selection_record_round_trips_through_json(dataset: Path) -> None:
    file = provenance_of(dataset / "split.json")
    for selection in (Selection(False), Selection(True, (file,)), Selection(False).with_file(file).with_file(file)):
        value = replace(file, selection=selection)
        assert Provenance.from_json(json.loads(json.dumps(value.to_json()))) == value
        assert len(selection.validated_on) <= 1
    assert "selection" not in file.to_json()
