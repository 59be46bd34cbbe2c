"""Bad input to commands: one error line that names the file, the right exit code, and no partial output."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from refdet.cli.main import main
from refdet.data.segmentations import rle_pixels
from refdet.errors import is_disk_full
from refdet.files import atomic

pytestmark = pytest.mark.slow

TINY = ("train.steps=2", "train.batch_size=2", "train.log_every=1", "model.width=8", "model.fpn_channels=16",
        "model.fc_dim=32", "input.min_sizes=[64]")  # fmt: skip
SETTINGS = [word for change in TINY for word in ("--set", change)]


class Files:
    """A dataset, a split, a run and a store, and functions that run commands on them."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root, self.refer, self.images = root, data / "refer", data / "train2014"
        self.original = data / "annotations" / "instances_train2014.json"
        self.split, self.run, self.store = root / "split.json", root / "run", root / "store.h5"

    def call(self, *args: str | Path) -> Result:
        return CliRunner().invoke(main, [str(arg) for arg in args])

    def build_split(self, instances: Path, out: Path, refer: Path | None = None) -> Result:
        return self.call("build-split", "--instances", instances, "--refer-root", refer or self.refer, "--out", out)

    def audit(self, instances: Path, refer: Path | None = None) -> Result:
        return self.call("audit", "--json", "--instances", instances, "--refer-root", refer or self.refer)

    def train(self, instances: Path, out: Path, *args: str | Path, images: Path | None = None) -> Result:
        return self.call("train", "--recipe", "demo", *SETTINGS, "--instances", instances, "--device", "cpu",
                         "--images", images or self.images, "--out", out, *args)  # fmt: skip

    def evaluate(self, instances: Path, run: Path | None = None, images: Path | None = None) -> Result:
        return self.call("evaluate", "--checkpoint", run or self.run, "--instances", instances, "--device", "cpu",
                         "--images", images or self.images, "--json")  # fmt: skip

    def extract(self, out: Path, *args: str | Path, run: Path | None = None, images: Path | None = None) -> Result:
        return self.call("extract-features", "--checkpoint", run or self.run, "--images", images or self.images,
                         "--device", "cpu", "--json", "--out", out, *args)  # fmt: skip

    def evaluate_on_refer(self, out: Path, refer: Path | None = None, *args: str | Path) -> Result:
        return self.call("evaluate-on-refer", "--features", self.store, "--refer-root", refer or self.refer, "--json",
                         "--dataset", "refcoco", "--split-by", "unc", "--out", out, *args)  # fmt: skip


REFCOCO = ("--dataset", "refcoco", "--split-by", "unc", "--split", "testA,testB,val")


@pytest.fixture(scope="module")
def files(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    files = Files(tmp_path_factory.mktemp("bad_input"), shapes_root)
    for done in (
        files.build_split(files.original, files.split),
        files.train(files.split, files.run),
        files.extract(files.store, "--refer-root", files.refer, *REFCOCO),
    ):
        assert done.exit_code == 0, done.output
    return files


def assert_fails(done: Result, *texts: str, code: int = 2) -> None:
    """Assert that a command failed with one error line, the last of stderr, that contains all of the texts."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.exit_code, len(lines)) == (code, 1), done.output
    assert done.stderr.rstrip("\n").endswith(lines[0])
    assert "Traceback" not in done.output and "unexpected" not in done.output
    for text in texts:
        assert text in lines[0]


def write_changed(source: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    tree = json.loads(source.read_text())
    change(tree)
    out.write_text(json.dumps(tree))
    return out


def copy_refer(files: Files, root: Path, change: Callable[[list[dict[str, Any]]], object]) -> Path:
    shutil.copytree(files.refer, root)
    path = root / "refcoco" / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    change(refs)
    path.write_bytes(pickle.dumps(refs, protocol=2))
    return root


def damage_first_rle(tree: dict[str, Any]) -> None:
    annotation = tree["annotations"][0]
    image = next(image for image in tree["images"] if image["id"] == annotation["image_id"])
    annotation["segmentation"] = {"size": [image["height"], image["width"]], "counts": "@garbage"}


# changes of an instances file, and text of the error
INSTANCES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no list": (lambda t: t.pop("annotations"), "no list 'annotations'"),
    "duplicate image": (lambda t: t["images"].append(t["images"][0]), "duplicate image id"),
    "duplicate annotation": (lambda t: t["annotations"].append(t["annotations"][0]), "duplicate annotation id"),
    "duplicate category": (lambda t: t["categories"].append(t["categories"][0]), "duplicate category id"),
    "unknown category": (lambda t: t["annotations"][0].update(category_id=999), "category 999"),
    "unknown image": (lambda t: t["annotations"][0].update(image_id=999), "image 999"),
    "damaged mask": (damage_first_rle, "its RLE is damaged"),
    "no images": (lambda t: t.update(images=[], annotations=[]), "no image"),
}
# contents of an instances file, and text of the error
TEXTS = {"cut short": ('{"images": [\n1,,', "malformed JSON in line 2"), "empty": ("", "malformed JSON in line 1")}


@pytest.mark.parametrize("kind", [*INSTANCES, *TEXTS, "missing"])
def test_invalid_instances_files_are_named_by_every_command(files: Files, tmp_path: Path, kind: str) -> None:
    bad, message = tmp_path / "bad.json", "no such file"
    if kind in INSTANCES:
        change, message = INSTANCES[kind]
        write_changed(files.split, bad, change)
    elif kind in TEXTS:
        text, message = TEXTS[kind]
        bad.write_text(text)
    assert_fails(files.build_split(bad, tmp_path / "out.json"), str(bad), message)
    assert_fails(files.train(bad, tmp_path / "run"), str(bad), message)
    assert_fails(files.evaluate(bad), str(bad), message)
    assert_fails(files.extract(tmp_path / "out.h5", "--instances", bad), str(bad), message)
    if kind in ("duplicate image", "no images", "missing", *TEXTS):
        assert_fails(files.audit(bad), str(bad), message)
    if kind not in ("no images", "empty"):
        assert_fails(files.call("inspect", bad), str(bad), message)
    assert sorted(path.name for path in tmp_path.iterdir()) in (["bad.json"], [])


def test_annotations_without_segmentation_can_be_used_without_masks(files: Files, tmp_path: Path) -> None:
    bare = write_changed(
        files.split, tmp_path / "bare.json", lambda t: [a.pop("segmentation") for a in t["annotations"]]
    )
    assert_fails(files.train(bare, tmp_path / "run"), str(bare), "--set model.masks=false")
    assert files.train(bare, tmp_path / "run", "--set", "model.masks=false").exit_code == 0
    assert files.evaluate(bare, tmp_path / "run").exit_code == 0


def test_annotations_without_area_or_outside_the_image_are_reported_and_ignored(
    files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def damage(tree: dict[str, Any]) -> None:
        first = tree["images"][0]["id"]
        for annotation in tree["annotations"][:3]:
            annotation["bbox"][2] = 0
        for annotation in tree["annotations"]:
            if annotation["image_id"] == first:  # no usable annotation of this image is left
                annotation["bbox"][0] = 5000

    bad = write_changed(files.split, tmp_path / "bad.json", damage)
    dropped = json.loads(files.call("inspect", "--json", bad).stdout)["dropped"]
    assert any("no area" in line for line in dropped) and any("outside" in line for line in dropped)
    caplog.clear()
    assert files.train(bad, tmp_path / "run").exit_code == 0
    assert f"{bad}: {len(dropped)} annotations dropped" in caplog.text and dropped[0] in caplog.text
    done = files.extract(tmp_path / "a.h5", "--instances", bad, "--regions", "annotations")
    assert done.exit_code == 0 and json.loads(done.stdout)["errors"] == 0
    crowds = write_changed(
        files.split, tmp_path / "crowds.json", lambda t: [a.update(iscrowd=1) for a in t["annotations"]]
    )
    count = len(json.loads(crowds.read_text())["annotations"])
    done = files.train(crowds, tmp_path / "no")
    assert_fails(done, str(crowds), f"iscrowd is 1 on all {count} annotations", "--crowd-as-object")


def test_invalid_refs_are_named_by_every_command(files: Files, tmp_path: Path) -> None:
    def remove_annotation(refs: list[dict[str, Any]]) -> None:
        next(ref for ref in refs if ref["split"] == "val")["ann_id"] = 99999999

    dangling = copy_refer(files, tmp_path / "dangling", remove_annotation)
    done = files.extract(tmp_path / "a.h5", "--refer-root", dangling, *REFCOCO)
    assert_fails(done, "refcoco/instances.json", "99999999")
    done = files.evaluate_on_refer(tmp_path / "m", dangling)
    assert_fails(done, "refcoco", "ref 3 has annotation 99999999, which is not in")
    doubled = copy_refer(files, tmp_path / "doubled", lambda refs: refs.append(refs[0]))
    done = files.build_split(files.original, tmp_path / "s.json", doubled)
    assert_fails(done, "refs(unc).p", "ref_id 0 is a duplicate")
    assert_fails(files.audit(files.split, doubled), "refs(unc).p", "ref_id 0 is a duplicate")
    done = files.extract(tmp_path / "a.h5", "--refer-root", doubled, *REFCOCO)
    assert_fails(done, "refs(unc).p", "ref_id 0 is a duplicate")
    shared = copy_refer(files, tmp_path / "shared", lambda refs: refs[0]["sentences"].append(refs[1]["sentences"][0]))
    (tmp_path / "p.json").write_text("[]")
    done = files.evaluate_on_refer(tmp_path / "m", shared, "--predictions", tmp_path / "p.json")
    assert_fails(done, "duplicate sent_id")
    assert not (tmp_path / "m").exists() and not (tmp_path / "a.h5").exists()


def test_missing_and_unreadable_images_are_named_by_every_command(files: Files, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    names = [image["file_name"] for image in json.loads(files.split.read_text())["images"]]
    some = tmp_path / "some"
    shutil.copytree(files.images, some)
    (some / names[0]).write_bytes(b"not an image")
    for folder, message in ((tmp_path / "none", names[0]),
                         (tmp_path / "no", "no such file or folder; give a folder or zip"),
                         (files.split, "give a folder or readable zip")):  # fmt: skip
        assert_fails(files.train(files.split, tmp_path / "run", images=folder), f"--images {folder}", message)
        assert_fails(files.evaluate(files.split, images=folder), f"--images {folder}", message)
        done = files.extract(tmp_path / "a.h5", "--instances", files.split, images=folder)
        assert_fails(done, f"--images {folder}", message)
    assert_fails(files.evaluate(files.split, images=some), str(some / names[0]), "no known image format", "replace it")
    done = files.train(files.split, tmp_path / "run", "--set", "train.steps=40", images=some)
    assert_fails(done, str(some / names[0]), "replace it")
    done = files.extract(tmp_path / "a.h5", "--instances", files.split, images=some)  # only that image is lost
    assert done.exit_code == 0 and json.loads(done.stdout)["errors"] == 1


def test_images_in_a_zip_give_the_results_of_a_folder(files: Files, tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "images"), "zip", files.images))

    def keep_three_images(tree: dict[str, Any]) -> None:
        tree["images"] = tree["images"][:3]
        ids = {image["id"] for image in tree["images"]}
        tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] in ids]

    split = write_changed(files.split, tmp_path / "few.json", keep_three_images)
    results = [files.evaluate(split, images=images) for images in (archive, files.images)]
    assert results[0].exit_code == 0 and json.loads(results[0].stdout) == json.loads(results[1].stdout)
    cut = tmp_path / "cut.zip"
    cut.write_bytes(archive.read_bytes()[:-100])
    assert_fails(files.evaluate(files.split, images=cut), str(cut), "readable zip")


def test_run_directories_of_other_classes_or_damaged_are_named_by_every_command(files: Files, tmp_path: Path) -> None:
    def keep_four_categories(tree: dict[str, Any]) -> None:
        kept = {category["id"] for category in tree["categories"][:4]}
        tree["categories"] = tree["categories"][:4]
        tree["annotations"] = [a for a in tree["annotations"] if a["category_id"] in kept]

    other = write_changed(files.split, tmp_path / "other.json", keep_four_categories)
    assert_fails(files.evaluate(other), str(files.run), "other classes", "(10 and 4; ")
    done = files.train(other, tmp_path / "new", "--weights", files.run)
    assert_fails(done, str(files.run), "the instances file 4", "train.reset_predictors=true")
    for name, content, message in (("model.json", b"{", "malformed JSON"), ("model.safetensors", b"cut", "header")):
        damaged = tmp_path / name.replace(".", "_")
        shutil.copytree(files.run, damaged)
        (damaged / name).write_bytes(content)
        path = str(damaged / name)
        assert_fails(files.evaluate(files.split, damaged), path, message)
        assert_fails(files.extract(tmp_path / "a.h5", "--instances", files.split, run=damaged), path, message)
        assert_fails(files.train(files.split, tmp_path / "new", "--weights", damaged), path, message)
        assert_fails(files.call("inspect", damaged), path, message)
    assert_fails(files.evaluate(files.split, tmp_path / "none"), f"{tmp_path / 'none'}: no such file", "run directory")


@pytest.mark.parametrize(
    ("change", "message"),
    [("train.step=5", "did you mean train.steps?"), ("train.steps", "key=value"), ("train.steps=x", "must be int")],
)
def test_an_invalid_recipe_change_is_named(files: Files, tmp_path: Path, change: str, message: str) -> None:
    assert_fails(files.train(files.split, tmp_path / "run", "--set", change), change.partition("=")[0], message)
    assert_fails(files.call("demo", "--out", tmp_path / "demo", "--set", change), change.partition("=")[0], message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"model: {dept: 18}", "model.dept: no such recipe key", id="unknown key"),
        pytest.param(b"a: [", "invalid or unsupported YAML", id="not YAML"),
        pytest.param(b"\xff\xfe\x00", "invalid or unsupported YAML", id="not UTF-8"),
        pytest.param(b"[1]", "must be a YAML mapping", id="list"),
    ],
)
def test_an_invalid_recipe_file_is_named(files: Files, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    done = files.call("train", "--recipe", path, "--instances", files.split, "--images", files.images,
                      "--out", tmp_path / "run")  # fmt: skip
    assert_fails(done, str(path), message)


def test_existing_outputs_are_not_overwritten(files: Files, tmp_path: Path) -> None:
    for done in (
        files.build_split(files.original, files.split),
        files.train(files.split, files.run),
        files.extract(files.store, "--instances", files.split),
        files.call("demo", "--out", files.run),
    ):
        assert_fails(done, "exists", "choose another")
    assert files.evaluate_on_refer(tmp_path).exit_code == 0
    assert_fails(files.evaluate_on_refer(tmp_path), str(tmp_path / "metrics.json"), "exists; choose another --out")
    assert_fails(files.evaluate_on_refer(files.split), str(files.split), "a file, not a folder; choose another --out")


def test_a_damaged_store_is_named(files: Files, tmp_path: Path) -> None:
    content = bytearray(files.store.read_bytes())
    content[3000:9000] = b"\xff" * 6000
    store = tmp_path / "bad.h5"
    store.write_bytes(content)
    assert_fails(files.call("inspect", store), str(store), "damaged")
    done = files.call("evaluate-on-refer", "--features", store, "--refer-root", files.refer, "--dataset", "refcoco",
                      "--split-by", "unc", "--out", tmp_path / "m")  # fmt: skip
    assert_fails(done, str(store), "damaged")


def test_an_unknown_or_missing_device_is_named(files: Files, tmp_path: Path) -> None:
    for name, fix in (("gpu", "give cpu, cuda"), ("cuda:99", "try --device cpu")):
        done = files.call("evaluate", "--checkpoint", files.run, "--instances", files.split, "--images", files.images,
                          "--device", name)  # fmt: skip
        assert_fails(done, f"--device {name}", fix)
        done = files.extract(tmp_path / "a.h5", "--instances", files.split, "--device", name)
        assert_fails(done, f"--device {name}", fix)


@pytest.fixture
def disk_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # without a file name, as write() raises it

    monkeypatch.setattr(atomic, "fsync", fail)


@pytest.mark.usefixtures("disk_is_full")
def test_a_full_disk_names_the_output_and_leaves_no_partial_file(files: Files, tmp_path: Path) -> None:
    assert_fails(files.build_split(files.original, tmp_path / "s.json"), str(tmp_path / "s"), "space", code=1)
    assert_fails(files.train(files.split, tmp_path / "run"), str(tmp_path / "run"), "space", "--resume", code=1)
    done = files.extract(tmp_path / "a.h5", "--instances", files.split, "--regions", "annotations")
    assert_fails(done, str(tmp_path / "a.h5"), "space", code=1)
    assert_fails(files.evaluate_on_refer(tmp_path / "m"), str(tmp_path / "m" / "recall.svg"), "space", code=1)
    done = files.call("demo", "--out", tmp_path / "demo", "--images", "20", *SETTINGS)
    assert_fails(done, str(tmp_path / "demo"), "space", code=1)
    for path in (
        "s.json",
        "s.report.json",
        "run/model.json",
        "run/model.safetensors",
        "a.h5",
        "m/metrics.json",
        "m/metrics.csv",
        "m/recall.svg",
    ):
        assert not (tmp_path / path).exists()


def test_a_full_disk_is_recognized_by_its_errno_or_message() -> None:
    text = os.strerror(errno.ENOSPC)
    assert is_disk_full(OSError(errno.ENOSPC, text)) and is_disk_full(RuntimeError(f"I/O error: {text}"))
    assert is_disk_full(OSError("write failed (file write failed: errno = 28, ...)"))
    assert not is_disk_full(OSError(errno.EIO, "Input/output error"))


def test_rle_pixels_counts_the_pixels_or_is_minus_1_if_damaged() -> None:
    import numpy as np
    from pycocotools import mask as coco_mask

    random = np.random.default_rng(0)
    for density in (0, 0.01, 0.5, 1):
        mask = np.asfortranarray((random.random((37, 53)) < density).astype(np.uint8))
        assert rle_pixels(coco_mask.encode(mask)["counts"].decode()) == 37 * 53
    assert [rle_pixels(text) for text in ("", "@garbage", "\xff", "o", "00")] == [-1, -1, -1, -1, 0]
