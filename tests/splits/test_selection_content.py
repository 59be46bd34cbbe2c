"""Validation images that cannot be identified by id are proven clean by their content, if all of it was compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from damaged_images import encoded
from foreign_weights import call
from split_examples import coco, scene, write, write_refs, write_run_directory

from refdet.data.coco import CocoIndex
from refdet.data.instances_provenance import provenance_of_instances
from refdet.splits.build import build_split
from refdet.structures.provenance import Provenance, Selection


def provenance_of(path: Path) -> Provenance:
    return provenance_of_instances(CocoIndex.load(path))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A detector that was trained on image 4 and chosen on the unidentified images 50 and 51, and all the images.

    The held-out images are 1 and 2. The validation images are in val/, the others in images/.
    """
    write_refs(tmp_path / "refer", {("refcoco", "unc"): [(1, "val"), (2, "testA")]})
    build_split(write(tmp_path / "all.json", coco([1, 4], [])), tmp_path / "refer", tmp_path / "split.json")
    validation = write(tmp_path / "val.json", coco([50, 51], [], {50: "a/kitchen.png", 51: "a/garden.png"}))
    for folder, names in (("images", (1, 2, 4)), ("val/a", ("kitchen", "garden"))):
        (tmp_path / folder).mkdir(parents=True)
        for seed, name in enumerate(names):
            stem = f"COCO_train2014_{name:012d}.jpg" if isinstance(name, int) else f"{name}.png"
            pixels = scene(name if isinstance(name, int) else 20 + seed)
            (tmp_path / folder / stem).write_bytes(encoded(pixels, "PNG"))
    chosen = Selection(True, (provenance_of(validation),))
    write_run_directory(tmp_path / "best", replace(provenance_of(tmp_path / "split.json"), selection=chosen))
    return tmp_path


def audit(world: Path, *more: object, run: str = "best", val_instances: str = "val.json") -> tuple[Result, Any]:
    """Audit the run; returns the result of the command and what it prints with --json."""
    line = ["audit", "--checkpoint", world / run, "--instances", world / "split.json", "--refer-root", world / "refer"]
    line += ["--find-duplicates", "--images", world / "images", "--val-instances", world / val_instances, *more]
    done, as_json = call(*line), call(*line, "--json")
    assert done.exit_code == as_json.exit_code
    return done, json.loads(as_json.stdout) if as_json.stdout else None


def test_compared_validation_images_are_proven_clean(world: Path) -> None:
    done, tree = audit(world)
    assert done.exit_code == 1 and "not proven: 2 images unknown (first: 50) in" in done.stderr
    assert "or here with --val-images" in done.stderr and not tree["proven"] and not tree["selection"]["proven"]
    done, tree = audit(world, "--val-images", world / "val")
    assert done.exit_code == 0 and "proven: its weights are chosen by their AP on val.json" in done.stdout, done.stderr
    assert "no copies: 2 images compared with 2 held-out images of that file" in done.stdout
    assert tree["clean"] and tree["proven"] and tree["selection"]["proven"] and tree["unproven"] == ""
    assert tree["selection"]["content"]["compared"] == 2


def test_copies_among_validation_images_are_a_leak(world: Path) -> None:
    (world / "val/a/garden.png").write_bytes(encoded(scene(2), "PNG"))
    done, tree = audit(world, "--val-images", world / "val")
    assert (
        done.exit_code == 1 and "val.json: contains copies of held-out images under other ids (1 image)" in done.stderr
    )
    assert "refcoco/unc/testA" in done.stdout and not (tree["clean"] or tree["proven"] or tree["selection"]["proven"])


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("val/a/garden.png", "not proven: 1 image not compared (first: 51) in"),
        ("images/COCO_train2014_000000000002.jpg", "not proven: 1 held-out image not compared (first: 2)"),
    ],
)
def test_what_was_not_compared_is_not_proven(world: Path, file: str, problem: str) -> None:
    (world / file).unlink()
    done, tree = audit(world, "--val-images", world / "val")
    assert done.exit_code == 1 and problem in done.stderr and not tree["proven"]
    assert "add or repair their files" in done.stderr and not tree["selection"]["proven"]
    done, tree = audit(world, "--val-images", world / "val", "--allow-unidentified")
    assert done.exit_code == 0 and not tree["proven"] and not tree["selection"]["proven"]
    assert "not compared" in done.stdout and "proven: its weights are" not in done.stdout


def test_content_of_another_file_proves_nothing(world: Path) -> None:
    """Two files with the same ids but other names have the same hash, but not the same images."""
    write(world / "other.json", coco([50, 51], [], {50: "a/kitchen.png", 51: "a/kitchen.png"}))
    done, tree = audit(world, "--val-images", world / "val", val_instances="other.json")
    assert done.exit_code == 1 and "cannot be proven" in done.stderr and not tree["proven"]


def test_validation_images_that_chose_nothing_are_not_compared(world: Path) -> None:
    selection = Selection(False, (provenance_of(world / "val.json"),))
    write_run_directory(world / "last", replace(provenance_of(world / "split.json"), selection=selection))
    done, tree = audit(world, "--val-images", world / "val", run="last")
    assert done.exit_code == 0 and tree["proven"] and "content" not in tree["selection"]
    assert "note: --val-images: not compared, as no validation chose these weights" in done.stderr


def test_val_images_need_find_duplicates_and_val_instances(world: Path) -> None:
    common = ["audit", "--refer-root", world / "refer", "--checkpoint", world / "best", "--val-images", world / "val"]
    for more in ([], ["--val-instances", world / "val.json"]):
        done = call(*common, *more)
        assert done.exit_code == 2 and "--val-images is for --val-instances with --find-duplicates" in done.stderr
    done, _ = audit(world, "--val-images", world / "refer")
    assert done.exit_code == 2 and "--val-images" in done.stderr and "none of 2 images in" in done.stderr
