"""Bad input through the command line: one line that names the culprit, the right exit code, nothing half-written."""

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
        "model.fpn_hidden=32", "input.min_sizes=[64]")  # fmt: skip
SETTINGS = [word for change in TINY for word in ("--set", change)]


class Files:
    """A folder with a dataset, a split, a run and a store, and the command line over them."""

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
    made = Files(tmp_path_factory.mktemp("bad_input"), shapes_root)
    for done in (
        made.build_split(made.original, made.split),
        made.train(made.split, made.run),
        made.extract(made.store, "--refer-root", made.refer, *REFCOCO),
    ):
        assert done.exit_code == 0, done.output
    return made


def fails(done: Result, *names: str, code: int = 2) -> None:
    """It ended in one line on stderr that has all of these in it; a progress bar may stand before it."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.exit_code, len(lines)) == (code, 1), done.output
    assert done.stderr.rstrip("\n").endswith(lines[0])
    assert "Traceback" not in done.output and "unexpected" not in done.output
    for name in names:
        assert name in lines[0]


def changed(source: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    tree = json.loads(source.read_text())
    change(tree)
    out.write_text(json.dumps(tree))
    return out


def with_refs(files: Files, root: Path, change: Callable[[list[dict[str, Any]]], object]) -> Path:
    shutil.copytree(files.refer, root)
    path = root / "refcoco" / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    change(refs)
    path.write_bytes(pickle.dumps(refs, protocol=2))
    return root


def bad_rle(tree: dict[str, Any]) -> None:
    annotation = tree["annotations"][0]
    image = next(image for image in tree["images"] if image["id"] == annotation["image_id"])
    annotation["segmentation"] = {"size": [image["height"], image["width"]], "counts": "@garbage"}


INSTANCES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no list": (lambda t: t.pop("annotations"), "no list 'annotations'"),
    "image twice": (lambda t: t["images"].append(t["images"][0]), "duplicate image id"),
    "annotation twice": (lambda t: t["annotations"].append(t["annotations"][0]), "duplicate annotation id"),
    "category twice": (lambda t: t["categories"].append(t["categories"][0]), "duplicate category id"),
    "unknown category": (lambda t: t["annotations"][0].update(category_id=999), "category 999"),
    "unknown image": (lambda t: t["annotations"][0].update(image_id=999), "image 999"),
    "damaged mask": (bad_rle, "its RLE is damaged"),
    "no images": (lambda t: t.update(images=[], annotations=[]), "no image"),
}
TEXTS = {"cut short": ('{"images": [\n1,,', "malformed JSON in line 2"), "empty": ("", "malformed JSON in line 1")}


@pytest.mark.parametrize("kind", [*INSTANCES, *TEXTS, "missing"])
def test_bad_instances(files: Files, tmp_path: Path, kind: str) -> None:
    bad, says = tmp_path / "bad.json", "no such file"
    if kind in INSTANCES:
        change, says = INSTANCES[kind]
        changed(files.split, bad, change)
    elif kind in TEXTS:
        text, says = TEXTS[kind]
        bad.write_text(text)
    fails(files.build_split(bad, tmp_path / "out.json"), str(bad), says)
    fails(files.train(bad, tmp_path / "run"), str(bad), "no image" if kind == "no images" else says)
    fails(files.evaluate(bad), str(bad), says)
    fails(files.extract(tmp_path / "out.h5", "--instances", bad), str(bad), says)
    if kind in ("image twice", "no images", "missing", *TEXTS):
        fails(files.audit(bad), str(bad), says)
    if kind not in ("no images", "empty"):
        fails(files.call("inspect", bad), str(bad), says)
    assert sorted(path.name for path in tmp_path.iterdir()) in (["bad.json"], [])


def test_annotations_without_segmentation(files: Files, tmp_path: Path) -> None:
    bare = changed(files.split, tmp_path / "bare.json", lambda t: [a.pop("segmentation") for a in t["annotations"]])
    fails(files.train(bare, tmp_path / "run"), str(bare), "--set model.masks=false")
    assert files.train(bare, tmp_path / "run", "--set", "model.masks=false").exit_code == 0
    assert files.evaluate(bare, tmp_path / "run").exit_code == 0


def test_annotations_without_area_or_outside_are_told_and_left_out(
    files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(tree: dict[str, Any]) -> None:
        first = tree["images"][0]["id"]
        for annotation in tree["annotations"][:3]:
            annotation["bbox"][2] = 0
        for annotation in tree["annotations"]:
            if annotation["image_id"] == first:  # an image with nothing else
                annotation["bbox"][0] = 5000

    bad = changed(files.split, tmp_path / "bad.json", spoil)
    dropped = json.loads(files.call("inspect", "--json", bad).stdout)["dropped"]
    assert any("no area" in line for line in dropped) or any("outside" in line for line in dropped)
    caplog.clear()
    assert files.train(bad, tmp_path / "run").exit_code == 0
    assert f"{bad}: {len(dropped)} annotations dropped" in caplog.text and dropped[0] in caplog.text
    done = files.extract(tmp_path / "a.h5", "--instances", bad, "--regions", "annotations")
    assert done.exit_code == 0 and json.loads(done.stdout)["errors"] == 0
    crowds = changed(files.split, tmp_path / "crowds.json", lambda t: [a.update(iscrowd=1) for a in t["annotations"]])
    fails(files.train(crowds, tmp_path / "no"), str(crowds), "iscrowd is 1 on all 296 annotations", "--crowd-as-object")


def test_bad_refs(files: Files, tmp_path: Path) -> None:
    def no_annotation(refs: list[dict[str, Any]]) -> None:
        next(ref for ref in refs if ref["split"] == "val")["ann_id"] = 99999999

    stray = with_refs(files, tmp_path / "stray", no_annotation)
    fails(files.extract(tmp_path / "a.h5", "--refer-root", stray, *REFCOCO), "refcoco/instances.json", "99999999")
    fails(files.evaluate_on_refer(tmp_path / "m", stray), "refcoco", "ref 3 has annotation 99999999, which is not in")
    twice = with_refs(files, tmp_path / "twice", lambda refs: refs.append(refs[0]))
    fails(files.build_split(files.original, tmp_path / "s.json", twice), "refs(unc).p", "twice")
    fails(files.audit(files.split, twice), "refs(unc).p", "twice")
    fails(files.extract(tmp_path / "a.h5", "--refer-root", twice, *REFCOCO), "refs(unc).p", "twice")
    same = with_refs(files, tmp_path / "same", lambda refs: refs[0]["sentences"].append(refs[1]["sentences"][0]))
    (tmp_path / "p.json").write_text("[]")
    fails(files.evaluate_on_refer(tmp_path / "m", same, "--predictions", tmp_path / "p.json"), "duplicate sent_id")
    assert not (tmp_path / "m").exists() and not (tmp_path / "a.h5").exists()


def test_bad_images(files: Files, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    names = [image["file_name"] for image in json.loads(files.split.read_text())["images"]]
    some = tmp_path / "some"
    shutil.copytree(files.images, some)
    (some / names[0]).write_bytes(b"not an image")
    for folder, says in ((tmp_path / "none", names[0]),
                         (tmp_path / "no", "no such file or folder; give a folder or zip"),
                         (files.split, "give a folder or readable zip")):  # fmt: skip
        fails(files.train(files.split, tmp_path / "run", images=folder), f"--images {folder}", says)
        fails(files.evaluate(files.split, images=folder), f"--images {folder}", says)
        done = files.extract(tmp_path / "a.h5", "--instances", files.split, images=folder)
        fails(done, f"--images {folder}", says)
    fails(files.evaluate(files.split, images=some), str(some / names[0]), "no known image format", "replace it")
    done = files.train(files.split, tmp_path / "run", "--set", "train.steps=40", images=some)
    fails(done, str(some / names[0]), "replace it")
    done = files.extract(tmp_path / "a.h5", "--instances", files.split, images=some)  # one image costs one image
    assert done.exit_code == 0 and json.loads(done.stdout)["errors"] == 1


def test_a_zip_of_images(files: Files, tmp_path: Path) -> None:
    whole = Path(shutil.make_archive(str(tmp_path / "images"), "zip", files.images))

    def few(tree: dict[str, Any]) -> None:
        tree["images"] = tree["images"][:3]
        ids = {image["id"] for image in tree["images"]}
        tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] in ids]

    split = changed(files.split, tmp_path / "few.json", few)
    results = [files.evaluate(split, images=images) for images in (whole, files.images)]
    assert results[0].exit_code == 0 and json.loads(results[0].stdout) == json.loads(results[1].stdout)
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole.read_bytes()[:-100])
    fails(files.evaluate(files.split, images=cut), str(cut), "readable zip")


def test_bad_checkpoints(files: Files, tmp_path: Path) -> None:
    def fewer(tree: dict[str, Any]) -> None:
        kept = {category["id"] for category in tree["categories"][:4]}
        tree["categories"] = tree["categories"][:4]
        tree["annotations"] = [a for a in tree["annotations"] if a["category_id"] in kept]

    other = changed(files.split, tmp_path / "other.json", fewer)
    fails(files.evaluate(other), str(files.run), "other classes", "(10 and 4; ")
    done = files.train(other, tmp_path / "new", "--weights", files.run)
    fails(done, str(files.run), "the instances file 4", "train.reset_predictors=true")
    for name, content in (("model.json", b"{"), ("model.safetensors", b"cut")):
        damaged = tmp_path / name.replace(".", "_")
        shutil.copytree(files.run, damaged)
        (damaged / name).write_bytes(content)
        culprit = str(damaged / name)
        fails(files.evaluate(files.split, damaged), culprit)
        fails(files.extract(tmp_path / "a.h5", "--instances", files.split, run=damaged), culprit)
        fails(files.train(files.split, tmp_path / "new", "--weights", damaged), culprit)
        fails(files.call("inspect", damaged), culprit)
    fails(files.evaluate(files.split, tmp_path / "none"), f"{tmp_path / 'none'}", "run directory")


@pytest.mark.parametrize(
    ("change", "says"),
    [("train.step=5", "did you mean train.steps?"), ("train.steps", "key=value"), ("train.steps=x", "must be int")],
)
def test_a_wrong_setting(files: Files, tmp_path: Path, change: str, says: str) -> None:
    fails(files.train(files.split, tmp_path / "run", "--set", change), change.partition("=")[0], says)
    fails(files.call("demo", "--out", tmp_path / "demo", "--set", change), change.partition("=")[0], says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"model: {dept: 18}", b"a: [", b"\xff\xfe\x00", b"[1]"])
def test_a_wrong_recipe(files: Files, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    done = files.call("train", "--recipe", path, "--instances", files.split, "--images", files.images,
                      "--out", tmp_path / "run")  # fmt: skip
    fails(done, str(path))


def test_an_output_that_exists(files: Files, tmp_path: Path) -> None:
    for done in (
        files.build_split(files.original, files.split),
        files.train(files.split, files.run),
        files.extract(files.store, "--instances", files.split),
        files.call("demo", "--out", files.run),
    ):
        fails(done, "exists", "choose another")
    assert files.evaluate_on_refer(tmp_path).exit_code == 0
    fails(files.evaluate_on_refer(tmp_path), str(tmp_path / "metrics.json"), "exists; choose another --out")
    fails(files.evaluate_on_refer(files.split), str(files.split), "a file, not a folder; choose another --out")


def test_a_damaged_store(files: Files, tmp_path: Path) -> None:
    content = bytearray(files.store.read_bytes())
    content[3000:9000] = b"\xff" * 6000
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(content)
    fails(files.call("inspect", damaged), str(damaged), "damaged")
    done = files.call("evaluate-on-refer", "--features", damaged, "--refer-root", files.refer, "--dataset", "refcoco",
                      "--split-by", "unc", "--out", tmp_path / "m")  # fmt: skip
    fails(done, str(damaged), "damaged")


def test_a_device_that_is_not_there(files: Files, tmp_path: Path) -> None:
    for name, fix in (("gpu", "give cpu, cuda"), ("cuda:99", "try --device cpu")):
        done = files.call("evaluate", "--checkpoint", files.run, "--instances", files.split, "--images", files.images,
                          "--device", name)  # fmt: skip
        fails(done, f"--device {name}", fix)
        done = files.extract(tmp_path / "a.h5", "--instances", files.split, "--device", name)
        fails(done, f"--device {name}", fix)


@pytest.fixture
def disk_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # without a name, as writing to a file has it

    monkeypatch.setattr(atomic, "fsync", full)


@pytest.mark.usefixtures("disk_is_full")
def test_a_full_disk(files: Files, tmp_path: Path) -> None:
    fails(files.build_split(files.original, tmp_path / "s.json"), str(tmp_path / "s"), "space", code=1)
    fails(files.train(files.split, tmp_path / "run"), str(tmp_path / "run"), "space", "--resume", code=1)
    done = files.extract(tmp_path / "a.h5", "--instances", files.split, "--regions", "annotations")
    fails(done, str(tmp_path / "a.h5"), "space", code=1)
    fails(files.evaluate_on_refer(tmp_path / "m"), str(tmp_path / "m" / "metrics.json"), "space", code=1)
    done = files.call("demo", "--out", tmp_path / "demo", "--images", "20", *SETTINGS)
    fails(done, str(tmp_path / "demo"), "space", code=1)
    for path in ("s.json", "s.report.json", "run/model.json", "run/model.safetensors", "a.h5", "m/metrics.json"):
        assert not (tmp_path / path).exists()


def test_a_full_disk_is_known_by_number_or_text() -> None:
    text = os.strerror(errno.ENOSPC)
    assert is_disk_full(OSError(errno.ENOSPC, text)) and is_disk_full(RuntimeError(f"I/O error: {text}"))
    assert is_disk_full(OSError("write failed (file write failed: errno = 28, ...)"))
    assert not is_disk_full(OSError(errno.EIO, "Input/output error"))


def test_pixels_of_an_rle() -> None:
    import numpy as np
    from pycocotools import mask as coco_mask

    random = np.random.default_rng(0)
    for share in (0, 0.01, 0.5, 1):
        mask = np.asfortranarray((random.random((37, 53)) < share).astype(np.uint8))
        assert rle_pixels(coco_mask.encode(mask)["counts"].decode()) == 37 * 53
    assert [rle_pixels(text) for text in ("", "@garbage", "\xff", "o", "00")] == [-1, -1, -1, -1, 0]
