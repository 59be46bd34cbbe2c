"""Published weights: what is known about the images they were trained on, and what the audit reports."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from foreign_weights import call, of_one_number, resnet_shapes
from split_examples import write_refs

from refdet.detector.checkpoint import load_meta
from refdet.structures import known_weights
from refdet.structures.known_weights import COCO, IMAGENET, LVIS, KnownFile, TrainingSet, identify_known_file
from refdet.structures.provenance import Provenance


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save(of_one_number(resnet_shapes(18)), tmp_path / "renamed.pth")
    return tmp_path / "renamed.pth"


@pytest.fixture
def refer(tmp_path: Path) -> Path:
    """Refs of a val image and of two test images."""
    pairs = [(1, "train"), (2, "val"), (3, "testA"), (4, "testA")]
    return write_refs(tmp_path / "refer", {("refcoco", "unc"): pairs})


def know(monkeypatch: pytest.MonkeyPatch, path: Path, known: KnownFile) -> None:
    start = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(known_weights._TORCHVISION, start, known)


def test_a_published_coco_detector_is_known_to_leak(
    source: Path, refer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(monkeypatch, source, KnownFile("somebody's detector", COCO))
    done = call("import-weights", "--from", source, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    said = (
        "is somebody's detector, trained on COCO train2017, without exclusions: leaks all 3,000 val/test images of "
        "RefCOCO and RefCOCO+"
    )
    assert said in done.stderr
    meta = load_meta(tmp_path / "run")
    assert any(said in line for line in meta.warnings())
    assert Provenance.from_json(meta.provenance.to_json()).training_set is COCO
    audited = call("audit", "--checkpoint", tmp_path / "run", "--refer-root", refer)
    assert audited.exit_code == 1
    assert "leaks all 3 val/test images of refcoco/unc/testA, refcoco/unc/val: imported" in audited.stderr
    tree = json.loads(call("audit", "--checkpoint", tmp_path / "run", "--refer-root", refer, "--json").stdout)
    assert tree["clean"] is False


def test_a_published_imagenet_network_is_known_not_to_leak(
    source: Path, refer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(monkeypatch, source, KnownFile("somebody's backbone", IMAGENET))
    assert call("import-weights", "--from", source, "--out", tmp_path / "run").exit_code == 0
    audited = call("audit", "--checkpoint", tmp_path / "run", "--refer-root", refer)
    assert audited.exit_code == 0, audited.output
    assert "trained on ImageNet-1k, which has no image of COCO" in audited.stdout


@pytest.mark.parametrize("images", [(1,), (1, 2)])
def test_an_instances_file_proves_nothing_about_imagenet_weights(
    source: Path, refer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: tuple[int, ...]
) -> None:
    know(monkeypatch, source, KnownFile("somebody's backbone", IMAGENET))
    assert call("import-weights", "--from", source, "--out", tmp_path / "run").exit_code == 0
    files = [{"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "height": 9, "width": 9} for i in images]
    (tmp_path / "any.json").write_text(json.dumps({"images": files, "annotations": [], "categories": []}))
    options = ("--checkpoint", tmp_path / "run", "--refer-root", refer, "--instances", tmp_path / "any.json")
    audited = call("audit", *options)
    assert audited.exit_code == 1 and "proven" not in audited.stdout
    tree = json.loads(call("audit", *options, "--json").stdout)
    assert tree["proven"] is False and tree["clean"] is False
    assert "ImageNet-1k, about which" in tree["problem"] and "leave out --instances" in tree["problem"]


@pytest.mark.parametrize(("training_set", "leaks"), [(COCO, True), (LVIS, True), (IMAGENET, False)])
def test_a_published_files_leak_is_noted_beside_the_users_instances_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training_set: TrainingSet, leaks: bool
) -> None:
    know(monkeypatch, source, KnownFile("somebody's detector", training_set))
    images = [{"id": 5, "file_name": "COCO_train2014_000000000005.jpg", "height": 4, "width": 4}]
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}))
    done = call("import-weights", "--from", source, "--out", tmp_path / "run", "--trained-on", split)
    assert done.exit_code == 0, done.output
    assert "is the user's word" in done.stderr
    provenance = load_meta(tmp_path / "run").provenance
    assert provenance.training_set is None and provenance.source == "split.json" and provenance.images == 1
    known = f", but the file is somebody's detector, {training_set.leak_note()}"
    assert (known in done.stderr) == leaks == any(known in line for line in load_meta(tmp_path / "run").warnings())


def test_a_different_file_of_the_same_name_is_unknown(source: Path, tmp_path: Path) -> None:
    path = source.rename(tmp_path / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth")
    assert identify_known_file(path, hashlib.sha256(path.read_bytes()).hexdigest()) is None


def test_model_zoo_files_are_known_by_their_md5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pkl").write_bytes(b"weights")
    start = hashlib.md5(b"weights", usedforsecurity=False).hexdigest()[:6]
    for config, data in (("COCO-Detection/x", COCO), ("LVISv0.5-InstanceSegmentation/x", known_weights.LVIS)):
        monkeypatch.setitem(known_weights._DETECTRON2, start, config)
        known = identify_known_file(tmp_path / "a.pkl", "0" * 64)
        assert known is not None and known.trained_on is data and known.model == f"detectron2's {config}"
        assert "leaks" in data.leak_note()
