"""Crowd annotations (iscrowd 1) in the extraction of annotated objects and in evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from training_examples import mark_crowds, run, squares

from refdet import store
from refdet.cli.main import main
from refdet.errors import ArgumentError
from refdet.extraction.extract import extract_features
from refdet.extraction.image_list import ImageList
from refdet.extraction.options import ExtractOptions


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("detector")
    squares(root)
    run(root)
    return root / "run"


def call(command: str, detector: Path, root: Path, *more: str) -> Result:
    given = ["--checkpoint", detector, "--instances", root / "instances.json", "--images", root / "images"]
    return CliRunner().invoke(main, [command, *map(str, given), "--device", "cpu", "--json", *more])


def extract(detector: Path, root: Path, out: str, *more: str) -> Result:
    return call("extract-features", detector, root, "--regions", "annotations", "--out", str(root / out), *more)


def test_extraction_counts_the_crowds_that_it_omits(detector: Path, tmp_path: Path) -> None:
    squares(tmp_path, mark_crowds(0, 3, 4))
    done = extract(detector, tmp_path, "a.h5")
    assert done.exit_code == 0 and json.loads(done.stdout)["regions"] == 5
    assert "3 of 8 annotations of the images have iscrowd 1" in done.stderr
    with store.open(tmp_path / "a.h5") as found:
        assert "crowd_as_object" not in found.options
    done = extract(detector, tmp_path, "b.h5", "--crowd-as-object")
    assert done.exit_code == 0 and json.loads(done.stdout)["regions"] == 8 and "iscrowd" not in done.stderr
    with store.open(tmp_path / "b.h5") as found:
        assert found.options["crowd_as_object"] is True
    done = extract(detector, tmp_path, "a.h5", "--crowd-as-object", "--resume")
    assert done.exit_code == 2 and "--crowd-as-object was false and is now true" in done.stderr


@pytest.mark.parametrize("which", [range(8), [0]])
def test_extraction_fails_if_all_annotations_are_crowds(detector: Path, tmp_path: Path, which: list[int]) -> None:
    def change(tree: dict[str, Any]) -> None:
        mark_crowds(*which)(tree)
        tree["annotations"] = [a for a in tree["annotations"] if a["iscrowd"]]

    squares(tmp_path, change)
    done = extract(detector, tmp_path, "a.h5")
    reason = "iscrowd is 1 on all 8 annotations" if len(which) > 1 else "iscrowd is 1 on the only annotation"
    assert done.exit_code == 2 and reason in done.stderr and "--crowd-as-object" in done.stderr
    assert not (tmp_path / "a.h5").exists()
    assert extract(detector, tmp_path, "a.h5", "--crowd-as-object").exit_code == 0


def test_extraction_without_annotations_prints_a_note(detector: Path, tmp_path: Path) -> None:
    squares(tmp_path, lambda tree: tree.update(annotations=[]))
    done = extract(detector, tmp_path, "a.h5")
    assert done.exit_code == 0 and "no annotations on the 4 images" in done.stderr


def test_crowd_as_object_is_refused_for_detected_regions(detector: Path, tmp_path: Path) -> None:
    squares(tmp_path)
    done = call("extract-features", detector, tmp_path, "--out", str(tmp_path / "a.h5"), "--crowd-as-object")
    assert done.exit_code == 2 and "--crowd-as-object is for --regions annotations" in done.stderr


def test_evaluation_warns_if_all_annotations_are_crowds(
    detector: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    squares(tmp_path, mark_crowds(*range(8)))
    assert json.loads(call("evaluate", detector, tmp_path).stdout)["bbox"]["AP"] is None
    assert "iscrowd is 1 on all 8 annotations" in caplog.text
    caplog.clear()
    assert json.loads(call("evaluate", detector, tmp_path, "--crowd-as-object").stdout)["bbox"]["AP"] >= 0
    assert "iscrowd" not in caplog.text


@pytest.mark.parametrize("of_list", [True, False])
def test_image_list_and_options_must_agree_on_crowd_as_object(detector: Path, tmp_path: Path, of_list: bool) -> None:
    squares(tmp_path, mark_crowds(0))
    images = ImageList.of_instances(tmp_path / "instances.json", crowd_as_object=of_list)
    options = ExtractOptions(regions="annotations", crowd_as_object=not of_list)
    with pytest.raises(ArgumentError, match="crowd_as_object"):
        extract_features(detector, tmp_path / "images", tmp_path / "a.h5", images, options=options, device="cpu")
    assert not list(tmp_path.glob("a.h5*"))
