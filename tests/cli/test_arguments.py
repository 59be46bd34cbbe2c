"""Errors in arguments name the option and say what the given file is, before torch is imported."""

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

# the start of a file of torch.save: a zip whose first member is archive/data.pkl
TORCH_FILE = b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + bytes(40)


class Files:
    """One file or folder of each kind, of minimal contents."""

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
        self.store, self.unfinished = root / "store.h5", root / "unfinished.h5.parts"
        with h5py.File(self.store, "w") as file:
            file["x"] = 1
        self.unfinished.mkdir()
        (self.unfinished / "plan.json").write_text("{}")
        self.torch, self.pickle, self.text, self.empty = (root / name for name in ("w.pth", "w.pkl", "a.txt", "empty"))
        self.torch.write_bytes(TORCH_FILE)
        self.pickle.write_bytes(b"\x80\x02}q\x00.")
        self.text.write_text("hello")
        self.empty.touch()
        self.pipe = root / "pipe"
        os.mkfifo(self.pipe)
        save_file({"a": np.zeros(2, np.float32)}, root / "other.safetensors")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("arguments"))


def test_kind_of_each_file_and_folder(files: Files) -> None:
    image = files.images / "000000000002.jpg"
    safetensors = files.root / "other.safetensors"
    assert {kind_of(path) for path in (files.run, files.run / "../first")} == {FileKind.RUN}
    for path, kind in (
        (files.run / "model.json", FileKind.RUN_FILE), (files.run / "model.safetensors", FileKind.RUN_FILE),
        (files.run / "state", FileKind.STATES), (files.run / "state/step-00000005.safetensors", FileKind.STATE),
        (files.runs, FileKind.RUNS), (files.store, FileKind.STORE), (files.unfinished, FileKind.UNFINISHED),
        (files.torch, FileKind.TORCH), (files.pickle, FileKind.PICKLE), (files.text, FileKind.TEXT),
        (files.empty, FileKind.EMPTY), (files.pipe, FileKind.SPECIAL), (Path("/dev/null"), FileKind.SPECIAL),
        (files.instances, FileKind.JSON), (files.refer, FileKind.REFER), (files.refer / "refcoco", FileKind.DATASET),
        (image, FileKind.IMAGE), (files.images, FileKind.FOLDER), (safetensors, FileKind.SAFETENSORS),
        (files.root / "no", FileKind.MISSING), (Path("a\0b"), FileKind.MISSING), (Path("x" * 5000), FileKind.MISSING),
        (files.text / "below", FileKind.MISSING), (Path("http://a.org/b"), FileKind.URL),
        (Path("s3://b/k"), FileKind.URL),
    ):  # fmt: skip
        assert kind_of(path) is kind, path


def command_line(command: str, **options: Any) -> list[str]:
    """The words of a command, with those options that are not None."""
    words = [command]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def extract(files: Files, **changes: Any) -> list[str]:
    options = {"checkpoint": files.run, "images": files.images, "instances": files.instances}
    return command_line("extract-features", **(options | {"out": files.root / "x.h5"} | changes))


REFCOCO = {"dataset": "refcoco", "split_by": "unc"}


def build_split(files: Files, **changes: Any) -> list[str]:
    options = {"instances": files.instances, "refer_root": files.refer, "out": files.root / "s.json"}
    return command_line("build-split", **(options | changes))


def export(files: Files, store: Path, out: Path | None = None) -> list[str]:
    return command_line("export", features=store, format="npz", out=out or files.root / "e")


def evaluate_on_refer(files: Files, **changes: Any) -> list[str]:
    options = {"features": files.store, "refer_root": files.refer, "out": files.root / "m", **REFCOCO}
    return command_line("evaluate-on-refer", **(options | changes))


def import_weights(files: Files, source: str | Path, out: Path | None = None) -> list[str]:
    return command_line("import-weights", **{"from": source}, out=out or files.root / "w")


# a command line, and text that its error message contains; {root} is the folder of the files
INVALID: dict[str, tuple[Callable[[Files], list[str]], str]] = {
    # run directories
    "missing run directory": (
        lambda f: extract(f, checkpoint=f.root / "no"),
        "no: no such file or folder; a run directory is",
    ),
    "URL as run directory": (
        lambda f: extract(f, checkpoint="https://a.org/run"),
        "--checkpoint https:/a.org/run: a URL; download it",
    ),
    "folder of run directories": (
        lambda f: extract(f, checkpoint=f.runs),
        "runs: a folder of run directories, not a run directory; give one",
    ),
    "state folder as run directory": (
        lambda f: extract(f, checkpoint=f.run / "state"),
        "state: the folder of a run's training states; give the",
    ),
    "state file as run directory": (
        lambda f: extract(f, checkpoint=f.run / "state/step-00000005.safetensors"),
        "a training state for refdet train --resume; give the run directory",
    ),
    "missing file of a run directory": (lambda f: extract(f, checkpoint=f.run / "model.pth"), "give the run directory"),
    "store as run directory": (
        lambda f: extract(f, checkpoint=f.store),
        "an HDF5 file, such as a feature store, not a run directory",
    ),
    "split as run directory": (
        lambda f: extract(f, checkpoint=f.instances),
        "f.json: a JSON file, not a run directory; give a folder written by refdet",
    ),
    "PyTorch weights as run directory": (
        lambda f: extract(f, checkpoint=f.torch),
        "a PyTorch checkpoint, not a run directory; convert it with refdet i",
    ),
    "safetensors as run directory": (
        lambda f: extract(f, checkpoint=f.root / "other.safetensors"),
        "convert it with refdet import-weights",
    ),
    "pipe as run directory": (lambda f: extract(f, checkpoint=f.pipe), "a pipe or a device, not a regular file"),
    "store as run directory to evaluate": (
        lambda f: command_line("evaluate", checkpoint=f.store, instances=f.instances, images=f.images),
        "--checkpoint {root}/store.h5: an HDF5 file, such as a feature store, not a run directory",
    ),
    "state folder to audit": (
        lambda f: command_line("audit", checkpoint=f.run / "state", refer_root=f.refer),
        "give the run directory",
    ),
    "folder of run directories as weights": (
        lambda f: command_line(
            "train", recipe="demo", weights=f.runs, instances=f.instances, images=f.images, out=f.root / "r"
        ),
        "--weights {root}/runs: a folder of run directories, not a run directory",
    ),
    # splits
    "split of a store": (lambda f: build_split(f, instances=f.store), "not an instances JSON or a list of images"),
    "split of a pipe": (lambda f: build_split(f, instances=f.pipe), "a pipe or a device"),
    "split of a URL": (lambda f: build_split(f, instances="http://a.org/f.json"), "a URL; download it"),
    "split into a folder": (
        lambda f: build_split(f, out="."),
        "--out .: a folder; give a file name, such as split.json",
    ),
    "split of one dataset": (lambda f: build_split(f, refer_root=f.refer / "refcoco"), "give the folder above it"),
    "audit of a pipe": (lambda f: command_line("audit", instances=f.pipe, refer_root=f.refer), "a pipe or a device"),
    "inspect a pipe": (lambda f: ["inspect", str(f.pipe)], "a pipe or a device, not a regular file"),
    "inspect a URL": (lambda f: ["inspect", "https://a.org/b"], "a URL; download it"),
    "inspect a state": (
        lambda f: ["inspect", str(f.run / "state/step-00000005.safetensors")],
        "give its run directory",
    ),
    "inspect an image": (
        lambda f: ["inspect", str(f.images / "000000000002.jpg")],
        "an image, not an instances JSON, run directory or feature store",
    ),
    # images
    "missing images": (lambda f: extract(f, images=f.root / "no"), "--images {root}/no: no such file or folder"),
    "run directory as images": (lambda f: extract(f, images=f.run), "a run directory; give a folder or zip of images"),
    "split as images": (
        lambda f: extract(f, images=f.instances),
        "a JSON file; give a folder or readable zip of images",
    ),
    "pipe as images": (lambda f: extract(f, images=f.pipe), "a pipe or a device"),
    # lists of images
    "missing instances": (lambda f: extract(f, instances=f.root / "no.json"), "no.json: no such file"),
    "store as instances": (lambda f: extract(f, instances=f.store), "--instances {root}/store.h5: an HDF5 file"),
    "folder as instances": (lambda f: extract(f, instances=f.images), "a folder, not an instances JSON"),
    "pipe as instances": (lambda f: extract(f, instances=f.pipe), "a pipe or a device"),
    "run directory as boxes": (lambda f: extract(f, boxes=f.run), "a run directory, not COCO results JSON or a store"),
    "dataset folder as REFER root": (
        lambda f: extract(f, instances=None, refer_root=f.refer / "refcoco", **REFCOCO),
        "one dataset's folder of REFER data; give the folder above it",
    ),
    "unknown split": (
        lambda f: extract(f, instances=None, refer_root=f.refer, split="tset", **REFCOCO),
        "--split tset: no such split in {root}/refer/refcoco",
    ),
    "empty list of splits": (
        lambda f: extract(f, instances=None, refer_root=f.refer, split=" ,", **REFCOCO),
        "--split ' ,': no",
    ),
    "unknown device": (lambda f: extract(f, device="gpu"), "--device gpu: not a device; give cpu, cuda, cuda:1"),
    "unknown device to evaluate": (
        lambda f: command_line("evaluate", checkpoint=f.run, instances=f.instances, images=f.images, device="cuda:x"),
        "--device cuda:x: not a device",
    ),
    "empty list of features": (lambda f: extract(f, features=""), "--features '': no names in it"),
    "NaN as score threshold": (
        lambda f: extract(f, score_threshold="nan"),
        "--score-threshold: must be a number from 0 to 1, not nan",
    ),
    "NaN as NMS threshold": (lambda f: extract(f, nms_threshold="nan"), "--nms-threshold: must be"),
    "NaN as score threshold of an export": (
        lambda f: command_line("export", store=f.store, format="coco", score_threshold="nan", out=f.root / "new"),
        "--score-threshold: must be a number from 0 to 1, not nan",
    ),
    "NaN as score threshold of a drawing": (
        lambda f: ["draw", "a.jpg", *command_line("", store=f.store, score_threshold="nan", out="a.png")[1:]],
        "--score-threshold: must be a number from 0 to 1, not nan",
    ),
    # outputs
    "out exists": (lambda f: extract(f, out=f.text), "a.txt exists; choose another --out or remove it"),
    "out is a folder": (
        lambda f: extract(f, out=f.images),
        "--out {root}/images: a folder; give a file name, such as {root}/images/images.h5",
    ),
    "out is the current folder": (
        lambda f: extract(f, out="."),
        "--out .: a folder; give a file name, such as features.h5",
    ),
    "out is the parent folder": (lambda f: extract(f, out=".."), "--out ..: a folder"),
    "out is below a file": (lambda f: extract(f, out=f.text / "a.h5"), "a.txt is a file, not a folder"),
    "out is a device": (lambda f: extract(f, out="/dev/null"), "/dev/null: a pipe or a device"),
    "out is a URL": (lambda f: extract(f, out="s3://bucket/a.h5"), "a URL; give a local path"),
    "out is too long": (lambda f: extract(f, out="x" * 250), "name is too long"),
    "out is not UTF-8": (
        lambda f: extract(f, out=os.fsdecode(b"a\xff.h5")),
        r"--out a\udcff.h5: name is not valid UTF-8",
    ),
    "out is an unfinished extraction": (
        lambda f: extract(f, out=f.root / "unfinished.h5"),
        "unfinished.h5.parts holds an unfinished extraction; add",
    ),
    # stores
    "run directory as store": (
        lambda f: export(f, f.run),
        "a run directory, not a feature store; give an HDF5 file",
    ),
    "unfinished extraction as store": (
        lambda f: export(f, f.unfinished),
        "finish it with the same refdet extract-features command and --resume",
    ),
    "name of an unfinished extraction as store": (
        lambda f: export(f, f.root / "unfinished.h5"),
        "not finished yet (parts in ",
    ),
    "text file to resume": (lambda f: [*extract(f, out=f.text), "--resume"], "not a feature store to resume"),
    "split as store": (lambda f: export(f, f.instances), "--store {root}/f.json: a JSON file, not a feature store"),
    "export into a folder with files": (
        lambda f: export(f, f.store, out=f.images),
        "exists and is not an empty folder",
    ),
    "split as store to evaluate": (
        lambda f: evaluate_on_refer(f, features=f.instances),
        "a JSON file, not a feature store",
    ),
    "file as folder of metrics": (lambda f: evaluate_on_refer(f, out=f.text), "a file, not a folder"),
    "missing predictions": (
        lambda f: evaluate_on_refer(f, predictions=f.root / "no"),
        "--predictions {root}/no: no such file",
    ),
    "store as predictions": (
        lambda f: evaluate_on_refer(f, predictions=f.store),
        "--predictions {root}/store.h5: an HDF5 file",
    ),
    # other outputs
    "report is a folder": (
        lambda f: command_line("report", store=f.store, out="."),
        "--out .: a folder; give a file name, such as report.html",
    ),
    "picture is a folder": (
        lambda f: ["draw", "a.jpg", f"--store={f.store}", f"--out={f.images}"],
        "--out {root}/images: a folder; give a file name, such as {root}/images/images.png",
    ),
    "exported weights are a folder": (
        lambda f: command_line("export-weights", checkpoint=f.run, format="torchvision", out=".."),
        "--out ..: a folder; give a file name, such as ../model.pth",
    ),
    # weights
    "missing weights": (lambda f: import_weights(f, f.root / "no"), "--from {root}/no: no such file"),
    "split as weights": (
        lambda f: import_weights(f, f.instances),
        "a JSON file, damaged or not weights; give a file of torch.save",
    ),
    "store as weights": (lambda f: import_weights(f, f.store), "--from {root}/store.h5: an HDF5 file"),
    "run directory as weights to import": (
        lambda f: import_weights(f, f.run),
        "a run directory of refdet; pass the run directory itself to",
    ),
    "pipe as weights": (lambda f: import_weights(f, f.pipe), "a pipe or a device"),
    "URL as weights": (lambda f: import_weights(f, "https://a.org/w.pth"), "a URL; download it"),
    "weights into a folder with files": (
        lambda f: import_weights(f, f.torch, out=f.images),
        "exists and is not an empty folder",
    ),
}


@pytest.fixture(autouse=True)
def valid_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the metadata of `Files.run` valid, so that errors in other arguments are reached."""
    from refdet.config import recipe
    from refdet.detector import checkpoint
    from refdet.structures.provenance import Provenance

    meta = checkpoint.CheckpointMetadata(recipe.load("demo"), ((1, "dog"),), Provenance.imported("x", "y"), 5)
    monkeypatch.setattr(checkpoint, "load_meta", lambda path: meta)


@pytest.mark.parametrize(("words_of", "message"), INVALID.values(), ids=INVALID)
def test_an_invalid_argument_prints_one_error_line_and_writes_nothing(
    files: Files, words_of: Callable[[Files], list[str]], message: str
) -> None:
    before = sorted(files.root.rglob("*"))
    done = CliRunner().invoke(main, words_of(files))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.exit_code, len(errors)) == (2, 1) and message.format(root=files.root) in errors[0], done.output
    assert "unexpected" not in done.output and sorted(files.root.rglob("*")) == before


def test_an_out_folder_without_write_permission_is_an_error(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as tests may run as root
    for words in (extract(files, out=files.root / "new/a.h5"), import_weights(files, files.torch)):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 2 and f"--out: {files.root} cannot be written to" in done.stderr


def test_invalid_arguments_are_found_without_importing_torch(files: Files) -> None:
    lines = [words_of(files) for words_of, _ in INVALID.values()]
    code = (
        "import json, os, sys\n"
        "from refdet.detector import checkpoint; from refdet.config import recipe\n"
        "from refdet.structures.provenance import Provenance\n"
        "from refdet.cli.main import main\n"
        "meta = checkpoint.CheckpointMetadata(recipe.load('demo'), ((1, 'dog'),), Provenance.imported('x', 'y'), 5)\n"
        "checkpoint.load_meta = lambda path: meta\n"
        "for line in json.load(sys.stdin):\n"
        "    try:\n        main(line)\n        raise AssertionError(line)\n"
        "    except SystemExit as end:\n        assert end.code == 2, line\n"
        "    assert 'torch' not in sys.modules, line\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(lines), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.1, float("inf")])
@pytest.mark.parametrize("name", ["score_threshold", "nms_threshold"])
def test_extract_options_reject_thresholds_outside_0_to_1(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{name}: must be a number from 0 to 1, not "):
        ExtractOptions(**{name: value})  # type: ignore[arg-type]
