"""What is wrong with an argument is said before torch is imported, by the option's name and what the file is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import save_file
from split_examples import coco, write, write_refs

from refdet.cli.main import main
from refdet.errors import InputError
from refdet.extraction.options import ExtractOptions
from refdet.files.file_kinds import FileKind, kind_of

SAVED = b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + bytes(40)


class Files:
    """One file of each kind, made without a detector."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.refer = write_refs(root / "refer", {("refcoco", "unc"): [(2, "val"), (3, "train")]})
        self.instances = write(root / "f.json", coco([2, 3], [2]))
        self.images = root / "images"
        self.images.mkdir()
        Image.new("RGB", (9, 9)).save(self.images / "000000000002.jpg")
        self.runs = root / "runs"
        self.run = self.runs / "first"
        (self.run / "state").mkdir(parents=True)
        (self.run / "model.json").write_text("{}")
        for name in ("model.safetensors", "state/step-00000005.safetensors"):
            save_file({"a": np.zeros(2, np.float32)}, self.run / name)
        self.store, self.parts = root / "store.h5", root / "begun.h5.parts"
        with h5py.File(self.store, "w") as file:
            file["x"] = 1
        self.parts.mkdir()
        (self.parts / "plan.json").write_text("{}")
        self.torch, self.pickle, self.text, self.empty = (root / name for name in ("w.pth", "w.pkl", "a.txt", "empty"))
        self.torch.write_bytes(SAVED)
        self.pickle.write_bytes(b"\x80\x02}q\x00.")
        self.text.write_text("hello")
        self.empty.touch()
        self.pipe = root / "pipe"
        os.mkfifo(self.pipe)
        save_file({"a": np.zeros(2, np.float32)}, root / "lone.safetensors")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("arguments"))


def test_kinds(files: Files) -> None:
    image = files.images / "000000000002.jpg"
    lone = files.root / "lone.safetensors"
    assert {kind_of(path) for path in (files.run, files.run / "../first")} == {FileKind.RUN}
    for path, kind in (
        (files.run / "model.json", FileKind.RUN_FILE), (files.run / "model.safetensors", FileKind.RUN_FILE),
        (files.run / "state", FileKind.STATES), (files.run / "state/step-00000005.safetensors", FileKind.STATE),
        (files.runs, FileKind.RUNS), (files.store, FileKind.STORE), (files.parts, FileKind.UNFINISHED),
        (files.torch, FileKind.TORCH), (files.pickle, FileKind.PICKLE), (files.text, FileKind.TEXT),
        (files.empty, FileKind.EMPTY), (files.pipe, FileKind.SPECIAL), (Path("/dev/null"), FileKind.SPECIAL),
        (files.instances, FileKind.JSON), (files.refer, FileKind.REFER), (files.refer / "refcoco", FileKind.DATASET),
        (image, FileKind.IMAGE), (files.images, FileKind.FOLDER), (lone, FileKind.SAFETENSORS),
        (files.root / "no", FileKind.MISSING), (Path("a\0b"), FileKind.MISSING), (Path("x" * 5000), FileKind.MISSING),
        (files.text / "below", FileKind.MISSING), (Path("http://a.org/b"), FileKind.URL),
        (Path("s3://b/k"), FileKind.URL),
    ):  # fmt: skip
        assert kind_of(path) is kind, path


def extract(files: Files, **changes: Any) -> list[str]:
    given = {"checkpoint": files.run, "images": files.images, "instances": files.instances, "out": files.root / "x.h5"}
    return ["extract-features", *(word for name, value in (given | changes).items() if value is not None
                                  for word in (f"--{name.replace('_', '-')}", str(value)))]  # fmt: skip


def other(command: str, **options: Any) -> list[str]:
    return [command, *(word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value)))]


ON_REFER = {"dataset": "refcoco", "split_by": "unc"}
# What is given -> what is said of it.
WRONG: dict[str, tuple[Callable[[Files], list[str]], str]] = {
    # a run directory
    "no checkpoint": (lambda f: extract(f, checkpoint=f.root / "no"), "no: no such file or folder; a run directory is"),
    "an address": (
        lambda f: extract(f, checkpoint="https://a.org/run"),
        "--checkpoint https:/a.org/run: a URL; download it",
    ),
    "above": (
        lambda f: extract(f, checkpoint=f.runs),
        "runs: a folder of run directories, not a run directory; give one",
    ),
    "below": (
        lambda f: extract(f, checkpoint=f.run / "state"),
        "state: the folder of a run's training states; give the",
    ),
    "a state": (
        lambda f: extract(f, checkpoint=f.run / "state/step-00000005.safetensors"),
        "a training state for refdet train --resume; give the run directory",
    ),
    "a lost file of a run": (lambda f: extract(f, checkpoint=f.run / "model.pth"), "give the run directory"),
    "a store": (
        lambda f: extract(f, checkpoint=f.store),
        "an HDF5 file, such as a feature store, not a run directory",
    ),
    "a split": (
        lambda f: extract(f, checkpoint=f.instances),
        "f.json: a JSON file, not a run directory; give a folder written by refdet",
    ),
    "weights of others": (
        lambda f: extract(f, checkpoint=f.torch),
        "a PyTorch checkpoint, not a run directory; convert it with refdet i",
    ),
    "safetensors alone": (
        lambda f: extract(f, checkpoint=f.root / "lone.safetensors"),
        "convert it with refdet import-weights",
    ),
    "a pipe": (lambda f: extract(f, checkpoint=f.pipe), "a pipe or a device, not a regular file"),
    "evaluate": (
        lambda f: other("evaluate", checkpoint=f.store, instances=f.instances, images=f.images),
        "--checkpoint",
    ),
    "audit": (lambda f: other("audit", checkpoint=f.run / "state", refer_root=f.refer), "give the run directory"),
    "train": (
        lambda f: other(
            "train", recipe="demo", weights=f.runs, instances=f.instances, images=f.images, out=f.root / "r"
        ),
        "--weights",
    ),
    # splits
    "split of a store": (lambda f: split(f, instances=f.store), "not an instances JSON or a list of images"),
    "split of a pipe": (lambda f: split(f, instances=f.pipe), "a pipe or a device"),
    "split of an address": (lambda f: split(f, instances="http://a.org/f.json"), "a URL; download it"),
    "split into a folder": (lambda f: split(f, out="."), "--out .: a folder; give a file name"),
    "split of one dataset": (lambda f: split(f, refer_root=f.refer / "refcoco"), "give the folder above it"),
    "audit of a pipe": (lambda f: other("audit", instances=f.pipe, refer_root=f.refer), "a pipe or a device"),
    "inspect a pipe": (lambda f: ["inspect", str(f.pipe)], "a pipe or a device, not a regular file"),
    "inspect an address": (lambda f: ["inspect", "https://a.org/b"], "a URL; download it"),
    "inspect a state": (
        lambda f: ["inspect", str(f.run / "state/step-00000005.safetensors")],
        "give its run directory",
    ),
    "inspect an image": (
        lambda f: ["inspect", str(f.images / "000000000002.jpg")],
        "an image, not an instances JSON, run directory or feature store",
    ),
    # images
    "no images": (lambda f: extract(f, images=f.root / "no"), "--images"),
    "images in a run": (lambda f: extract(f, images=f.run), "a run directory; give a folder or zip of images"),
    "images in a file": (
        lambda f: extract(f, images=f.instances),
        "a JSON file; give a folder or readable zip of images",
    ),
    "a pipe of images": (lambda f: extract(f, images=f.pipe), "a pipe or a device"),
    # lists
    "no instances": (lambda f: extract(f, instances=f.root / "no.json"), "no.json: no such file"),
    "instances in a store": (lambda f: extract(f, instances=f.store), "--instances"),
    "instances in a folder": (lambda f: extract(f, instances=f.images), "a folder, not an instances JSON"),
    "instances in a pipe": (lambda f: extract(f, instances=f.pipe), "a pipe or a device"),
    "boxes in a run": (lambda f: extract(f, boxes=f.run), "a run directory, not COCO results JSON or a store"),
    "REFER's dataset": (
        lambda f: extract(f, instances=None, refer_root=f.refer / "refcoco", **ON_REFER),
        "one dataset's folder of REFER data; give the folder above it",
    ),
    "no such split": (
        lambda f: extract(f, instances=None, refer_root=f.refer, split="tset", **ON_REFER),
        "--split tset",
    ),
    "an empty split": (
        lambda f: extract(f, instances=None, refer_root=f.refer, split=" ,", **ON_REFER),
        "--split ' ,': no",
    ),
    "no device": (lambda f: extract(f, device="gpu"), "--device gpu: not a device; give cpu, cuda, cuda:1"),
    "no device to evaluate": (
        lambda f: other("evaluate", checkpoint=f.run, instances=f.instances, images=f.images, device="cuda:x"),
        "--device cuda:x: not a device",
    ),
    "no features": (lambda f: extract(f, features=""), "--features '': no names in it"),
    "a NaN": (lambda f: extract(f, score_threshold="nan"), "--score-threshold: must be a number from 0 to 1, not nan"),
    "another NaN": (lambda f: extract(f, nms_threshold="nan"), "--nms-threshold: must be"),
    # what is written
    "out exists": (lambda f: extract(f, out=f.text), "a.txt exists; choose another --out or remove it"),
    "out is a folder": (lambda f: extract(f, out=f.images), "images: a folder; give a file name, such as"),
    "out is this folder": (
        lambda f: extract(f, out="."),
        "--out .: a folder; give a file name, such as features.h5",
    ),
    "out is above": (lambda f: extract(f, out=".."), "--out ..: a folder"),
    "out in a file": (lambda f: extract(f, out=f.text / "a.h5"), "a.txt is a file, not a folder"),
    "out is a device": (lambda f: extract(f, out="/dev/null"), "/dev/null: a pipe or a device"),
    "out is an address": (lambda f: extract(f, out="s3://bucket/a.h5"), "a URL; give a local path"),
    "out is too long": (lambda f: extract(f, out="x" * 250), "name is too long"),
    "out is no text": (
        lambda f: extract(f, out=os.fsdecode(b"a\xff.h5")),
        r"--out a\udcff.h5: name is not valid UTF-8",
    ),
    "out is begun": (
        lambda f: extract(f, out=f.root / "begun.h5"),
        "begun.h5.parts holds an unfinished extraction; add",
    ),
    # stores
    "a store that is none": (
        lambda f: export(f, f.run),
        "a run directory, not a feature store; give an HDF5 file",
    ),
    "an unfinished store": (
        lambda f: export(f, f.parts),
        "finish it with the same refdet extract-features command and --resume",
    ),
    "the name of one": (lambda f: export(f, f.root / "begun.h5"), "not finished yet (parts in "),
    "a text to resume": (lambda f: [*extract(f, out=f.text), "--resume"], "not a feature store to resume"),
    "a split for a store": (lambda f: export(f, f.instances), "--store"),
    "export over files": (lambda f: export(f, f.store, out=f.images), "exists and is not an empty folder"),
    "evaluation of a split": (lambda f: on_refer(f, features=f.instances), "a JSON file, not a feature store"),
    "evaluation into a file": (lambda f: on_refer(f, out=f.text), "a file, not a folder"),
    "no predictions": (lambda f: on_refer(f, predictions=f.root / "no"), "--predictions"),
    "predictions in a store": (lambda f: on_refer(f, predictions=f.store), "--predictions"),
    # weights
    "no weights": (lambda f: weights(f, f.root / "no"), "--from"),
    "a split for weights": (
        lambda f: weights(f, f.instances),
        "a JSON file, damaged or not weights; give a file of torch.save",
    ),
    "a store for weights": (lambda f: weights(f, f.store), "an HDF5 file"),
    "own weights": (lambda f: weights(f, f.run), "a run directory of refdet; pass the run directory itself to"),
    "weights in a pipe": (lambda f: weights(f, f.pipe), "a pipe or a device"),
    "weights at an address": (lambda f: weights(f, "https://a.org/w.pth"), "a URL; download it"),
    "weights over files": (lambda f: weights(f, f.torch, out=f.images), "exists and is not an empty folder"),
}


def split(files: Files, **changes: Any) -> list[str]:
    given = {"instances": files.instances, "refer_root": files.refer, "out": files.root / "s.json"}
    return other("build-split", **(given | changes))


def export(files: Files, store: Path, out: Path | None = None) -> list[str]:
    return other("export", features=store, format="npz", out=out or files.root / "e")


def on_refer(files: Files, **changes: Any) -> list[str]:
    given = {"features": files.store, "refer_root": files.refer, "out": files.root / "m", **ON_REFER}
    return other("evaluate-on-refer", **(given | changes))


def weights(files: Files, source: str | Path, out: Path | None = None) -> list[str]:
    return other("import-weights", **{"from": source}, out=out or files.root / "w")


@pytest.fixture(autouse=True)
def metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run directory here is none that could be read; what is wrong elsewhere must be found all the same."""
    from refdet.config import recipe
    from refdet.detector import checkpoint
    from refdet.structures.provenance import Provenance

    meta = checkpoint.CheckpointMetadata(recipe.load("demo"), ((1, "dog"),), Provenance.imported("x", "y"), 5)
    monkeypatch.setattr(checkpoint, "load_meta", lambda path: meta)


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_argument_is_one_line(files: Files, kind: str) -> None:
    make, says = WRONG[kind]
    before = sorted(files.root.rglob("*"))
    done = CliRunner().invoke(main, make(files))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.exit_code, len(errors)) == (2, 1) and says in errors[0], done.output
    assert "unexpected" not in done.output and sorted(files.root.rglob("*")) == before


def test_a_folder_that_cannot_be_written_to(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    for line in (extract(files, out=files.root / "new/a.h5"), weights(files, files.torch)):
        done = CliRunner().invoke(main, line)
        assert done.exit_code == 2 and f"--out: {files.root} cannot be written to" in done.stderr


def test_none_of_it_imports_torch(files: Files) -> None:
    """All command lines above in one process, which also times them: together under what torch alone takes."""
    lines = [make(files) for make, _ in WRONG.values()]
    code = (
        "import json, os, sys\n"
        "from refdet.detector import checkpoint; from refdet.config import recipe\n"
        "from refdet.structures.provenance import Provenance\n"
        "from refdet.cli.main import main\n"
        "meta = checkpoint.CheckpointMetadata(recipe.load('demo'), ((1, 'dog'),), Provenance.imported('x', 'y'), 5)\n"
        "checkpoint.load_meta = lambda path: meta\n"
        "for line in json.load(sys.stdin):\n"
        "    try:\n        main(line)\n    except SystemExit as left:\n        assert left.code == 2, line\n"
        "    assert 'torch' not in sys.modules, line\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(lines), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.1, float("inf")])
@pytest.mark.parametrize("name", ["score_threshold", "nms_threshold"])
def test_thresholds_of_the_library(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{name}: must be a number from 0 to 1, not "):
        ExtractOptions(**{name: value})  # type: ignore[arg-type]
