"""refdet audit of all known published weights, against REFER's real val and test images, and of runs from them."""

import json
from pathlib import Path
from typing import Any

import pytest
from foreign_weights import call
from split_examples import coco, write, write_refs, write_run_directory

from refdet.data.coco import CocoIndex
from refdet.data.instances_provenance import provenance_of_instances
from refdet.splits.build import build_split
from refdet.splits.detector_audit import audit_provenance
from refdet.structures import known_weights
from refdet.structures.known_weights import COCO, IMAGENET, LVIS, KnownFile, imported_note, known_initial_weights
from refdet.structures.provenance import Provenance

SHA = "0676ba61" + "12" * 28
# Known files by the first digits of their SHA-256.
FILES = {start: file for start, file in known_weights._TORCHVISION.items()} | {
    start: KnownFile(f"detectron2's {config}", LVIS if config.startswith("LVIS") else COCO)
    for start, config in known_weights._DETECTRON2.items()
}


@pytest.fixture(scope="module")
def refer(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Refs on the images of the complete real splits, and the number of these images."""
    splits: dict[str, Any] = json.loads((shared / "data" / "refer_split_images.json").read_text())
    pairs: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name, split in splits.items():
        dataset, split_by, part = name.split("/")
        pairs.setdefault((dataset, split_by), []).extend((image, part) for image in split["images"])
    images = {image for refs in pairs.values() for image, _ in refs}
    return write_refs(tmp_path_factory.mktemp("refer"), pairs), len(images)


def test_every_known_file_is_audited(refer: tuple[Path, int], tmp_path: Path) -> None:
    root, images = refer
    assert images > 3000 and len(FILES) == 36
    for start, file in FILES.items():
        sha = (start + "0" * 64)[:64]
        run = write_run_directory(tmp_path / "run", Provenance.imported("a.pth", sha, file))
        found = audit_provenance(run, root)
        if file.trained_on is IMAGENET:
            assert not found.problem and not any(claim.uncovered for claim in found.claims), file
            continue
        assert [claim.uncovered for claim in found.claims] == [claim.images for claim in found.claims]
        share = f"all {images} val/test images" if file.trained_on is COCO else f"some of {images} val/test images"
        assert f"leaks {share} of refcoco+/unc/testA" in found.problem and file.model in found.problem


def test_the_command_exits_with_1_and_counts_leaked_images(refer: tuple[Path, int], tmp_path: Path) -> None:
    root, images = refer
    run = write_run_directory(tmp_path / "run", Provenance.imported("a.pkl", SHA, FILES["f10217"]))
    done = call("audit", "--checkpoint", run, "--refer-root", root)
    assert done.exit_code == 1 and f"leaks all {images} val/test images" in done.stderr
    run = write_run_directory(tmp_path / "own", Provenance.imported("a.pth", SHA, FILES["0676ba61"]))
    assert call("audit", "--checkpoint", run, "--refer-root", root).exit_code == 0


def test_a_run_from_imagenet_weights_is_proven_without_trust_weights(tmp_path: Path) -> None:
    root = write_refs(tmp_path / "refer", {("refcoco", "unc"): [(2, "val"), (3, "testA")]})
    split = build_split(write(tmp_path / "all.json", coco([1, 2, 3], [1, 2, 3])), root, tmp_path / "split.json").out
    note = imported_note("resnet50.pth", SHA, FILES["0676ba61"])
    provenance = provenance_of_instances(CocoIndex.load(split))
    run = write_run_directory(tmp_path / "run", provenance.with_weights(f"imagenet (sha256 0123456789ab; {note})"))
    found = audit_provenance(run, root, split)
    assert found.proven and found.notes[-1] == (
        "initial weights: torchvision's resnet50 IMAGENET1K_V1, trained on ImageNet-1k, which has no image of COCO"
    )
    # notes that only resemble that of a known file
    for text in (
        f"run (sha256 0123456789ab; {note.replace(SHA, '1' * 64)})",
        f"run (sha256 0123456789ab; {note.replace('resnet50 IMAGENET1K_V1', 'resnet18 IMAGENET1K_V1')})",
        f"run (sha256 0123456789ab; 5 images of a.json; ids 00; started from b (sha256 0123456789ab; {note}))",
        f"{note}; training data unknown",
    ):
        run = write_run_directory(tmp_path / "run", provenance.with_weights(text))
        assert "unproven" in audit_provenance(run, root, split).problem, text
        assert audit_provenance(run, root, split, trust_weights=True).proven


@pytest.mark.parametrize("start", ["bf2d0c1e", "571f7c"], ids=["COCO", "LVIS"])
def test_initial_weights_that_leak_cannot_be_vouched_for(tmp_path: Path, start: str) -> None:
    root = write_refs(tmp_path / "refer", {("refcoco", "unc"): [(2, "val"), (3, "testA")]})
    split = build_split(write(tmp_path / "all.json", coco([1, 2, 3], [1, 2, 3])), root, tmp_path / "split.json").out
    leaky = imported_note("x.pth", start + SHA[len(start) :], FILES[start])
    provenance = provenance_of_instances(CocoIndex.load(split))
    for text in (
        f"run (sha256 0123456789ab; {leaky})",
        f"run (sha256 0123456789ab; 5 images of a.json; ids 00; started from b (sha256 0123456789ab; {leaky}))",
    ):
        run = write_run_directory(tmp_path / "run", provenance.with_weights(text))
        for trust in (False, True):
            found = audit_provenance(run, root, split, trust_weights=trust)
            assert not found.proven and found.problem == f"{run}: its initial weights leak: {text}"
        done = call(
            "audit", "--checkpoint", run, "--refer-root", root, "--instances", split, "--trust-weights", "--json"
        )
        tree = json.loads(done.stdout)
        assert done.exit_code == 1 and "initial weights leak" in done.stderr
        assert not tree["proven"] and not tree["clean"]


def test_only_the_last_note_in_a_description_of_weights_counts() -> None:
    note = imported_note("a, sha256 " + "1" * 64 + ", is b", SHA, FILES["0676ba61"])
    assert known_initial_weights(f"odd (sha256 (sha256 0123456789ab; {note})") is FILES["0676ba61"]
    assert known_initial_weights("") is None and known_initial_weights(note) is None
