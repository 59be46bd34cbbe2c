"""Weights that validation chose are clean only if it saw none of the held-out images; unknown is never clean."""

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
from safetensors.numpy import save_file
from split_examples import coco, write, write_refs

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
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """REFER, and the split of a training without its held-out images."""
    root = tmp_path_factory.mktemp("world")
    write_refs(root / "refer", {("refcoco", "unc"): [(2, "val"), (3, "testA")], ("refcocog", "umd"): [(8, "test")]})
    build_split(write(root / "all.json", coco([1, 2, 3, 4], [1, 2])), root / "refer", root / "split.json")
    return root


def of_file(path: Path) -> Provenance:
    return provenance_of_instances(CocoIndex.load(path))


def run_directory(folder: Path, provenance: Provenance, **files: str) -> Path:
    folder.mkdir(parents=True)
    save_file({"w": np.zeros(3, np.float32)}, folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps({"step": 1, "categories": [], "provenance": provenance.to_json()}))
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def store(path: Path, provenance: Provenance, recipe: dict[str, Any] = RECIPE) -> Path:
    with h5py.File(path, "w") as file:
        attributes = {"schema": "refdet-features/1", "classes": "[]", "options": "{}", "recipe": json.dumps(recipe)}
        file.attrs.update(attributes | {"provenance": json.dumps(provenance.to_json())})
        file["images/id"] = np.array([2])
        file.create_dataset("images/error", data=[""], dtype=h5py.string_dtype())
        file["regions/box"] = np.zeros((0, 4), np.float32)
    return path


def audited(world: Path, path: Path, *more: Any, **options: Any) -> ProvenanceAudit:
    return audit_provenance(path, world / "refer", world / "split.json", *more, **options)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    ids=st.sets(st.integers(1, 9), min_size=1),
    chosen=st.booleans(),
    is_store=st.booleans(),
    shown=st.booleans(),
    built=st.booleans(),
)
def test_it_is_clean_exactly_if_no_held_out_image_chose_the_weights(
    world: Path,
    tmp_path_factory: pytest.TempPathFactory,
    ids: set[int],
    chosen: bool,
    is_store: bool,
    shown: bool,
    built: bool,
) -> None:
    folder = tmp_path_factory.mktemp("case")
    file = write(folder / "val.json", coco(sorted(ids), []))
    built = built and bool(ids - HELD_OUT)  # as a file of no image is not written
    if built:
        file = build_split(file, world / "refer", folder / "built.json").out
    seen = set() if built else ids & HELD_OUT
    provenance = replace(of_file(world / "split.json"), selection=Selection(chosen, (of_file(file),)))
    path = store(folder / "f.h5", provenance) if is_store else run_directory(folder / "run", provenance)
    found = audited(world, path, val_instances=file if shown else None)
    about = [note for note in found.notes if ": was validated on " in note]
    if not chosen:
        assert not found.problem and found.proven and len(about) == 1
        if shown:
            assert f", with {len(seen)} held-out image{'' if len(seen) == 1 else 's'})" in about[0]
        else:
            assert ("may hold held-out images" in about[0]) == (not built)
        return
    assert not about
    assert bool(found.problem) == (bool(seen) if shown else not built)
    assert found.proven == (shown and not seen)  # a claim alone is no proof
    if seen and shown:
        assert (
            f"was chosen by validation on {file}, which contains {format_count(len(seen), 'held-out image')}"
            in found.problem
        )
    elif found.problem:
        assert "validation data unknown" in found.problem and "`val_instances`" in found.problem


def test_another_validation_file_proves_nothing(world: Path, tmp_path: Path) -> None:
    file, other = (write(tmp_path / f"{i}.json", coco([i], [])) for i in (5, 6))
    for by_validation, message in ((True, "was not chosen by validation on"), (False, "was not validated on")):
        selection = Selection(by_validation, (of_file(file),))
        run = run_directory(tmp_path / message, replace(of_file(world / "split.json"), selection=selection))
        assert message in audited(world, run, val_instances=other).problem
        assert audited(world, run, val_instances=file).proven
    run = run_directory(tmp_path / "never", replace(of_file(world / "split.json"), selection=Selection(False)))
    assert "was not validated on" in audited(world, run, val_instances=file).problem and audited(world, run).proven
    foreign = write(tmp_path / "foreign.json", coco([5], [], {5: "COCO_train2014_000000000002.jpg"}))
    selection = Selection(True, (replace(of_file(foreign), source_sha256="ab" * 32),))
    run = run_directory(tmp_path / "foreign", replace(of_file(world / "split.json"), selection=selection))
    assert "which contains 1 held-out image" in audited(world, run, val_instances=foreign).problem
    assert (
        "cannot be proven: 1 image in"
        in audited(
            world, run, val_instances=write(tmp_path / "f.json", coco([5], [], {5: "COCO_train2014_000000000077.jpg"}))
        ).problem
    )


def test_notes_are_given_once_and_those_of_a_file_are_its_own(world: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "val.json", coco([5], [], {5: "5.jpg"}))
    selection = Selection(True, (of_file(file),))
    run = run_directory(tmp_path / "run", replace(of_file(world / "split.json"), selection=selection))
    found = audited(world, run, val_instances=file)
    assert len(set(found.notes)) == len(found.notes) and found.proof is not None
    assert any(str(file) in note for note in found.notes) and not any(str(file) in note for note in found.proof.notes)


def test_without_a_record_a_validated_run_is_not_clean(world: Path, tmp_path: Path) -> None:
    older = of_file(world / "split.json")
    run = run_directory(tmp_path / "run", older)
    assert audited(world, run).proven  # it has no best/
    best = run_directory(run / "best", older, validation="{}")
    for path in (run, best):
        for trust in (False, True):
            found = audited(world, path, trust_weights=trust)
            assert "without recording on which images" in found.problem and not found.proven
    assert audited(world, store(tmp_path / "old.h5", older, OLD_RECIPE)).proven  # before there was a best/
    unknown = store(tmp_path / "f.h5", older)
    assert "whether its weights are those of a run's best/" in audited(world, unknown).problem
    assert not audited(world, unknown, trust_weights=True).problem
    assert (
        "has no record of a validation"
        in audited(world, unknown, trust_weights=True, val_instances=world / "split.json").problem
    )


def test_both_problems_are_told(world: Path, tmp_path: Path) -> None:
    leaking = write(tmp_path / "val.json", coco([2, 3, 5], []))
    provenance = replace(of_file(world / "all.json"), selection=Selection(True, (of_file(leaking),)))
    run = run_directory(tmp_path / "run", provenance)
    found = audit_provenance(run, world / "refer", world / "all.json", val_instances=leaking)
    assert "was trained on" in found.problem and any("was chosen by validation on" in note for note in found.notes)


def test_weights_that_start_from_chosen_ones_name_the_file(world: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "val.json", coco([2, 5], []))
    chosen = replace(of_file(world / "split.json"), selection=Selection(True, (of_file(file),)))
    assert "chosen by their AP on val.json (2 images, ids " in chosen.one_line()
    provenance = of_file(world / "split.json").with_weights(f"best (sha256 0123456789ab; {chosen.one_line()})")
    run = run_directory(tmp_path / "run", replace(provenance, selection=Selection(False)))
    assert "chosen by their AP on val.json" in audited(world, run).problem


def test_the_command(world: Path, tmp_path: Path) -> None:
    clean, leaking = (write(tmp_path / f"{i}.json", coco([i, 7], [])) for i in (5, 2))
    common = ["--refer-root", world / "refer", "--instances", world / "split.json"]
    for file in (clean, leaking):
        provenance = replace(of_file(world / "split.json"), selection=Selection(True, (of_file(file),)))
        run = run_directory(tmp_path / f"run-{file.stem}", provenance)
        bare = call("audit", "--checkpoint", run, *common)
        assert bare.exit_code == 1 and "with --val-instances" in bare.stderr
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
    provenance = replace(of_file(world / "split.json"), selection=Selection(True, (of_file(unknown),)))
    run = run_directory(tmp_path / "vg", provenance)
    done = call("audit", "--checkpoint", run, *common, "--val-instances", unknown)
    assert done.exit_code == 1 and "not proven: 1 image unknown (first: 5) in" in done.stderr
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
def test_a_damaged_record_is_refused(world: Path, change: Any) -> None:
    file = of_file(world / "split.json")
    with pytest.raises(InputError, match="provenance"):
        Provenance.from_json(file.to_json() | {"selection": change})
    nested = {"by_validation": False, "validated_on": [replace(file, selection=Selection(False)).to_json()]}
    with pytest.raises(InputError, match="provenance: selection"):
        Provenance.from_json(file.to_json() | {"selection": nested})


def test_the_record_goes_through_json(world: Path) -> None:
    file = of_file(world / "split.json")
    for selection in (Selection(False), Selection(True, (file,)), Selection(False).with_file(file).with_file(file)):
        value = replace(file, selection=selection)
        assert Provenance.from_json(json.loads(json.dumps(value.to_json()))) == value
        assert len(selection.validated_on) <= 1
    assert "selection" not in file.to_json()
