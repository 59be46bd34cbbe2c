"""refdet audit of files with the real splits' ids, and of checkpoints and stores by provenance; published counts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from split_examples import coco, write, write_refs, write_run_directory

from refdet.cli.main import main
from refdet.data.coco import CocoIndex
from refdet.data.instances_provenance import provenance_of_instances
from refdet.data.refer_statistics import compare_with_published, count_refs
from refdet.errors import InputError
from refdet.splits.build import build_split
from refdet.splits.detector_audit import audit_provenance, why_unproven
from refdet.splits.held_out import held_out
from refdet.splits.leak_audit import audit
from refdet.structures.provenance import UNKNOWN, Provenance
from refer.statistics import COUNTS, Counts

IMAGES = 10_000  # in the file; benchmarks/build_split.py builds one as large as train2014


def test_all_real_held_out_ids_are_found_among_others(shared: Path, tmp_path: Path) -> None:
    real = json.loads((shared / "data/refer_split_images.json").read_text())
    refs: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name, split in real.items():
        dataset, split_by, which = name.split("/")
        refs.setdefault((dataset, split_by), []).extend((image, which) for image in split["images"])
    root = write_refs(tmp_path / "refer", refs)
    held = {image for split in real.values() for image in split["images"]}
    assert len(held) == 4190
    rng = random.Random(0)
    others = rng.sample(sorted(set(range(1, 581_930)) - held), IMAGES - len(held))
    ids = [*held, *others]
    rng.shuffle(ids)
    owners = rng.sample(ids, 2000)
    source = write(tmp_path / "all.json", coco(ids, owners))
    found = audit(source, root)
    assert set(found.leaked) == held and found.held_out_images == 4190
    assert {leak.name: len(leak.image_ids) for leak in found.splits} == {
        name: len(set(split["images"])) for name, split in real.items()
    }
    result = build_split(source, root, tmp_path / "out.json")
    report = result.report
    assert set(report["removed_image_ids"]) == held and report["images_after"] == IMAGES - 4190
    assert (report["refer_images_found"], report["refer_images_missing"]) == (4190, 0)
    assert report["annotations_after"] == sum(owner not in held for owner in owners)
    assert audit(result.out, root).leaked == []
    # A file of other images contains none of the held-out ones.
    clean = build_split(write(tmp_path / "others.json", coco(others, [])), root, tmp_path / "same.json").report
    assert (clean["images_removed"], clean["refer_images_found"], clean["refer_images_missing"]) == (0, 0, 4190)


def test_counts_per_split_on_real_images(shared: Path, tmp_path: Path) -> None:
    mini = shared / "data/coco_mini"
    source = mini / "annotations/instances_train2017.json"
    names = {image["id"] for image in json.loads(source.read_text())["images"]}
    real = json.loads((shared / "data/refer_split_images.json").read_text())
    expected = {name: len(names & set(split["images"])) for name, split in real.items()}
    found = audit(source, mini / "refer")
    assert {leak.name: len(leak.image_ids) for leak in found.splits} == {n: k for n, k in expected.items() if k}
    assert len(found.leaked) == 5
    result = build_split(mini / "annotations/instances_val2017.json", mini / "refer", tmp_path / "val.json")
    assert result.report["images_removed"] == 0


def test_exclude_restricts_the_held_out_splits(tmp_path: Path) -> None:
    root = write_refs(tmp_path / "refer", {("refcoco", "unc"): [(2, "val"), (3, "testA")]})
    source = write(tmp_path / "f.json", coco([2, 3, 4], []))
    assert audit(source, root, exclude=["refcoco:unc:testA"]).leaked == [3]
    part = build_split(source, root, tmp_path / "part.json", exclude=["refcoco:unc:testA"])
    assert audit(part.out, root, exclude=["refcoco:unc:testA"]).leaked == [] and audit(part.out, root).leaked == [2]


def test_missing_standard_splits_are_noted(tmp_path: Path) -> None:
    _, notes = held_out(write_refs(tmp_path / "a", {("refcoco+", "unc"): [(2, "val")]}))
    assert [note for note in notes if "no refcocog/umd found" in note] and not any("refcoco/unc" in n for n in notes)
    _, notes = held_out(write_refs(tmp_path / "b", {("refcocog", "umd"): [(2, "val")]}))
    assert [note for note in notes if "no refcoco/unc nor refcoco+/unc found" in note]
    _, notes = held_out(tmp_path / "b", ["refcocog:umd"])
    assert notes == []


def published_counts_of(dataset: str, split_by: str) -> dict[str, Counts]:
    return {split: Counts(*(n or 0 for n in counts)) for split, counts in COUNTS[dataset, split_by].items()}


def test_deviations_from_the_published_counts_are_reported() -> None:
    for dataset, split_by in COUNTS:
        found = published_counts_of(dataset, split_by)
        assert compare_with_published(dataset, split_by, found) == []
        small = {split: Counts(counts.refs // 3, 5, 9) for split, counts in found.items()}
        # A small sample of the dataset is no reason for a warning.
        assert compare_with_published(dataset, split_by, small) == []
    found = published_counts_of("refcoco", "unc")
    found["val"] = found["val"]._replace(refs=3800, images=1499)
    [line] = compare_with_published("refcoco", "unc", found)
    assert line.startswith(
        "refcoco/unc/val: 3,800 refs instead of the published 3,811, 1,499 images instead of the published 1,500"
    )
    del found["testB"]
    assert any(
        "testB: 0 refs instead of the published 1,810" in line
        for line in compare_with_published("refcoco", "unc", found)
    )
    assert compare_with_published("mine", "unc", {"val": Counts(1, 1, 1)}) == []


def test_counts_of_a_damaged_download_give_a_note(tmp_path: Path) -> None:
    root = write_refs(tmp_path / "refer", {("refcocog", "umd"): [(n % 1299 + 1, "val") for n in range(2573)]})
    notes = held_out(root)[1]
    assert any(
        "refcocog/umd/val: 1,299 images instead of the published 1,300, 0 sentences instead of the published 4,896" in n
        for n in notes
    )
    assert any("may be a damaged download" in note for note in notes)
    refs: Any = [{"split": "val", "image_id": 1, "sentences": [1, 2]}, {"split": "val", "image_id": 1, "sentences": []}]
    assert count_refs(refs) == {"val": Counts(2, 1, 2)}


@pytest.fixture
def trained(tmp_path: Path) -> Iterator[tuple[Path, Path, Path]]:
    """A REFER root, a clean split and the run directory of a detector trained on it."""
    root = write_refs(
        tmp_path / "refer", {("refcoco", "unc"): [(2, "val"), (3, "testA")], ("refcoco+", "unc"): [(2, "val")]}
    )
    source = write(tmp_path / "all.json", coco([1, 2, 3, 4], [1, 2, 4]))
    split = build_split(source, root, tmp_path / "split.json").out
    yield root, split, write_run_directory(tmp_path / "run", provenance_of(split))


def provenance_of(split: Path) -> dict[str, Any]:
    return json.loads(split.read_text())["info"]["refdet"]


# The provenance of a run whose weights are those of the last step, without validation.
LAST_STEP = {"selection": {"by_validation": False, "validated_on": []}}


def test_a_checkpoint_is_proven_clean_only_with_its_split(trained: tuple[Path, Path, Path], tmp_path: Path) -> None:
    root, split, run = trained
    claim = audit_provenance(run, root)
    assert claim.problem == "" and not claim.proven and [c.uncovered for c in claim.claims] == [0, 0, 0]
    proof = audit_provenance(run, root, split)
    assert proof.proven and proof.to_json()["clean"] and proof.to_json()["audit"]["images"] == 2
    other = audit_provenance(run, root, tmp_path / "all.json")
    assert not other.proven and "was not trained on" in other.problem
    dirty = write_run_directory(tmp_path / "dirty", Provenance.from_json(provenance_of(split)).to_json())
    tree = json.loads((dirty / "model.json").read_text())
    tree["provenance"]["image_ids_sha256"] = audit(tmp_path / "all.json", root).image_ids_sha256
    (dirty / "model.json").write_text(json.dumps(tree))
    leaking = audit_provenance(dirty, root, tmp_path / "all.json")  # the file disproves its claim
    assert not leaking.proven and "which contains 2 held-out images" in leaking.problem
    assert audit_provenance(dirty, root).problem == ""


def test_a_claim_covers_only_the_images_that_it_excluded(trained: tuple[Path, Path, Path], tmp_path: Path) -> None:
    root, split, _ = trained
    provenance = provenance_of(split)
    del provenance["excluded"]["refcoco+/unc/val"]  # its only image is also excluded by refcoco/unc/val
    assert audit_provenance(write_run_directory(tmp_path / "a", provenance), root).problem == ""
    del provenance["excluded"]["refcoco/unc/testA"]
    partial = audit_provenance(write_run_directory(tmp_path / "b", provenance), root)
    assert "does not exclude refcoco/unc/testA (1 of 1 image)" in partial.problem
    assert audit_provenance(tmp_path / "b", root, exclude=["refcoco:unc:val"]).problem == ""
    provenance["excluded"]["refcoco/unc/val"]["images"] = 7  # not the val split of this REFER root
    assert "refcoco/unc/val" in audit_provenance(write_run_directory(tmp_path / "c", provenance), root).problem


def test_a_claim_covers_the_same_images_of_a_split_that_is_audited_alone(tmp_path: Path) -> None:
    pairs = [(2, "val"), (3, "testA"), (4, "train")]
    root = write_refs(tmp_path / "refer", {("refcoco", "unc"): pairs, ("refcoco+", "unc"): pairs})
    write_refs(root, {("refcocog", "umd"): [(3, "val"), (5, "val")]})
    source = write(tmp_path / "all.json", coco([1, 2, 3, 5], [1]))
    build_split(source, root, tmp_path / "split.json", exclude=["refcoco:unc"])
    run = write_run_directory(tmp_path / "run", provenance_of(tmp_path / "split.json"))
    assert audit_provenance(run, root, exclude=["refcoco+:unc"]).problem == ""
    problem = audit_provenance(run, root, exclude=["refcocog:umd"]).problem
    assert problem.endswith(
        "does not exclude refcocog/umd/val (1 of 2 images); give the file it was trained on with `instances`"
    )
    write_refs(root, {("refcoco", "unc"): [*pairs, (6, "val"), (7, "testA")]})
    assert "refcoco+/unc/testA (1 of 1 image)" in audit_provenance(run, root, exclude=["refcoco+:unc"]).problem


def test_unknown_training_data_is_a_problem(trained: tuple[Path, Path, Path], tmp_path: Path) -> None:
    root, split, _ = trained
    unknown = Provenance.imported("res101.pth", "ab" * 32).to_json()
    for name, provenance in (("a", None), ("b", unknown), ("c", provenance_of(split) | {"excluded": {}})):
        run = write_run_directory(tmp_path / name, provenance)
        assert "training data unknown" in audit_provenance(run, root).problem
    provenance = provenance_of(split) | {"excluded": {}} | LAST_STEP
    # The split itself proves what the record does not say.
    assert audit_provenance(write_run_directory(tmp_path / "d", provenance), root, split).proven
    done = CliRunner().invoke(main, ["audit", "--checkpoint", str(tmp_path / "b"), "--refer-root", str(root)])
    assert done.exit_code == 1 and "training data unknown: imported: res101.pth" in done.stderr


def test_ids_that_contradict_file_names_prove_nothing(trained: tuple[Path, Path, Path], tmp_path: Path) -> None:
    root, _, _ = trained
    names = {1: "COCO_train2014_000000000002.jpg", 4: "COCO_train2014_000000000003.jpg"}
    leaking = write(tmp_path / "leaking.json", coco([1, 4], [], names))
    names = {1: "COCO_train2014_000000000077.jpg", 4: "COCO_train2014_000000000078.jpg"}
    clean = write(tmp_path / "clean.json", coco([1, 4], [], names))
    run = write_run_directory(tmp_path / "leaked", provenance_of_instances(CocoIndex.load(leaking)).to_json())
    found = audit_provenance(run, root, clean)
    assert not found.proven and "cannot be proven: 2 images in" in found.problem
    assert "which contains 2 held-out images" in audit_provenance(run, root, leaking).problem
    # Neither the ids alone nor COCO's images with these ids prove anything.
    ids = tmp_path / "ids.txt"
    ids.write_text("1\n4\n")
    for other in (ids, write(tmp_path / "named.json", coco([1, 4], []))):
        found = audit_provenance(run, root, other)
        assert not found.proven and "cannot be proven: the file it was trained on has file names" in found.problem
    # The very file that it was trained on does.
    run = write_run_directory(tmp_path / "good", provenance_of_instances(CocoIndex.load(clean)).to_json())
    assert audit_provenance(run, root, clean).proven
    split = build_split(clean, root, tmp_path / "rebuilt.json").out
    assert "cannot be proven" in audit_provenance(run, root, split).problem
    run = write_run_directory(tmp_path / "built", provenance_of_instances(CocoIndex.load(split)).to_json())
    assert audit_provenance(run, root, split).proven and not audit_provenance(run, root, clean).proven
    assert "training data unknown" in audit_provenance(run, root).problem


def test_older_records_without_exclusions_need_the_identical_file(
    trained: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    root, _, _ = trained
    names = {1: "COCO_train2014_000000000002.jpg", 4: "COCO_train2014_000000000003.jpg"}
    leaking = write(tmp_path / "leaking.json", coco([1, 4], [], names))
    # As written before refdet compared names with ids.
    older = replace(provenance_of_instances(CocoIndex.load(leaking)), note=UNKNOWN)
    run = write_run_directory(tmp_path / "older", older.to_json())
    ids = tmp_path / "ids.txt"
    ids.write_text("1\n4\n")
    clean = write(tmp_path / "clean.json", coco([1, 4], []))
    for other in (ids, clean):
        found = audit_provenance(run, root, other)
        assert not found.proven and "did not record whether the file names match the image ids" in found.problem
        assert why_unproven(older, audit(other, root), "run", other)
    run = write_run_directory(tmp_path / "good", provenance_of_instances(CocoIndex.load(clean)).to_json())
    assert audit_provenance(run, root, clean).proven and not audit_provenance(run, root, ids).proven
    # Newer records would say so if names and ids differed.
    newer = provenance_of_instances(CocoIndex.load(clean)).to_json() | LAST_STEP
    assert audit_provenance(write_run_directory(tmp_path / "newer", newer), root, ids).proven


def test_unidentified_images_are_not_proven_clean(trained: tuple[Path, Path, Path], tmp_path: Path) -> None:
    root, _, _ = trained
    source = write(tmp_path / "f.json", coco([1, 4], [], {4: "VG_100K/4.jpg"}))
    arguments = ["audit", "--instances", str(source), "--refer-root", str(root)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and "not proven: 1 image unknown (first: 4)" in done.stderr
    as_json = CliRunner().invoke(main, [*arguments, "--json"])
    assert as_json.exit_code == 1 and json.loads(as_json.stdout)["clean"] is False
    assert CliRunner().invoke(main, [*arguments, "--allow-unidentified"]).exit_code == 0
    run = write_run_directory(tmp_path / "vg", provenance_of_instances(CocoIndex.load(source)).to_json())
    both = CliRunner().invoke(main, [*arguments, "--checkpoint", str(run), "--json"])
    assert both.exit_code == 1 and json.loads(both.stdout)["proven"] is False and "not proven" in both.stderr
    found = audit_provenance(run, root, source)
    assert not found.problem and not found.proven and found.proven_if_identified
    # Accepting an unidentified image does not prove that it is clean.
    accepted = CliRunner().invoke(main, [*arguments, "--checkpoint", str(run), "--allow-unidentified", "--json"])
    assert accepted.exit_code == 0 and json.loads(accepted.stdout)["proven"] is False


def test_initial_weights_of_unknown_training_data_are_a_problem(
    trained: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    root, split, _ = trained
    run = write_run_directory(
        tmp_path / "from", provenance_of(split) | {"weights": "res101.pth, training data unknown"}
    )
    found = audit_provenance(run, root, split)
    assert not found.proven and "res101.pth, training data unknown" in found.problem
    assert "`trust_weights=True`" in found.problem
    trusted = audit_provenance(run, root, split, trust_weights=True)
    assert trusted.proven and any(
        "assumed that the initial weights have seen no held-out images" in note for note in trusted.notes
    )


def test_a_store_of_val_images_is_judged_by_its_detector(trained: tuple[Path, Path, Path], tmp_path: Path) -> None:
    root, split, _ = trained
    store = tmp_path / "f.h5"
    text = h5py.string_dtype()
    with h5py.File(store, "w") as file:
        file.attrs["schema"] = "refdet-features/1"
        file.attrs["classes"] = "[]"
        file.attrs["options"] = "{}"
        file.attrs["provenance"] = json.dumps(provenance_of(split) | LAST_STEP)
        file["images/id"] = np.array([2, 3])  # both held out
        file.create_dataset("images/error", data=["", ""], dtype=text)
        file["regions/box"] = np.zeros((0, 4), np.float32)
        file["regions/mask_start"] = np.zeros(1, np.int64)
    found = audit_provenance(store, root, split)
    assert found.kind == "store" and found.proven and not any("its boxes" in note for note in found.notes)
    with h5py.File(store, "a") as file:
        file.attrs["options"] = json.dumps({"regions": "boxes", "boxes_sha256": "ab" * 32})
    given = audit_provenance(store, root, split)
    assert any("its boxes, scores and categories are from a file (sha256 abab" in note for note in given.notes)
    other = audit_provenance(store, root, tmp_path / "all.json")
    assert other.problem.startswith(f"the detector of {store}: was not trained on")
    with h5py.File(store, "a") as file:
        del file.attrs["provenance"]
    assert "training data unknown: no provenance" in audit_provenance(store, root).problem
    with pytest.raises(InputError, match="use `instances` to audit"):
        audit_provenance(split, root)


def test_audit_command(trained: tuple[Path, Path, Path], tmp_path: Path) -> None:
    root, split, run = (str(path) for path in trained)
    call = CliRunner().invoke
    common = ["--refer-root", root]
    claim = call(main, ["audit", "--checkpoint", run, *common])
    assert claim.exit_code == 0 and "this is only a claim" in claim.stdout and "proven:" not in claim.stdout
    proof = call(main, ["audit", "--checkpoint", run, "--instances", split, *common])
    assert proof.exit_code == 0 and f"proven: {run} was trained on the images of this file" in proof.stdout
    as_json = call(main, ["audit", "--checkpoint", run, "--instances", split, *common, "--json"])
    assert as_json.exit_code == 0 and json.loads(as_json.stdout)["proven"] is True
    wrong = call(main, ["audit", "--checkpoint", run, "--instances", str(tmp_path / "all.json"), *common, "--json"])
    assert wrong.exit_code == 1 and json.loads(wrong.stdout)["clean"] is False and "was not trained on" in wrong.stderr
    for arguments, text in (
        ([], "nothing to audit"),
        (["--checkpoint", run, "--features", run], "one after the other"),
        (["--instances", split, "--find-duplicates"], "needs --instances and --images"),
        (["--instances", split, "--images", run], "are for --find-duplicates"),
        (["--instances", split, "--trust-weights"], "--trust-weights is for"),
        (["--checkpoint", str(tmp_path)], f"a folder of run directories, not a run directory; give one of them: {run}"),
        (["--features", str(tmp_path / "no.h5")], "no such file"),
        (["--checkpoint", split], "a JSON file, not a run directory"),
    ):
        done = call(main, ["audit", *arguments, *common])
        assert done.exit_code == 2 and text in done.stderr and "Traceback" not in done.output
    kept = call(main, ["build-split", "--instances", str(tmp_path / "all.json"), *common,
                       "--out", str(tmp_path / "val.json"), "--keep-only", "refcoco:unc:val"])  # fmt: skip
    assert kept.exit_code == 0 and "found 1 of 1 image to keep in" in kept.stdout
