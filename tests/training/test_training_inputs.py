"""Mistakes in the arguments of `refdet train`, reported before torch is imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from training_examples import TINY, run, squares, tiny

from refdet.cli.main import main
from refdet.training.train import train

RESUME = {"--resume": (), "--out": "run", "--set": TINY}  # resume the finished run of two steps
MISTAKES: dict[str, tuple[dict[str, str | Sequence[str]], str]] = {
    "no such device": ({"--device": "gpu"}, "--device gpu: not a device; give cpu, cuda"),
    "another recipe": (
        RESUME | {"--set": [*TINY, "head.batch_size_per_image=9"]},
        "--resume run: head.batch_size_per_image was 8 and is now 9",
    ),
    "another recipe of other data": (
        RESUME | {"--set": [*TINY, "train.seed=5"], "--instances": "other.json"},
        "train.seed was 0 and is now 5",
    ),
    "fewer steps": (RESUME | {"--set": [*TINY, "train.steps=1"]}, "train.steps=1, but 2 steps are done"),
    "classes of another file": (RESUME | {"--instances": "other.json"}, "the checkpoint has class (5, 'b') where"),
    "boxes of another file": (RESUME | {"--instances": "moved.json"}, "started with other boxes, masks"),
    "images of another file": (RESUME | {"--instances": "fewer.json"}, "with the images of another instances file"),
    "a damaged state": (RESUME | {"--out": "damaged"}, "step-00000002.safetensors: damaged ("),
    "no instances": ({"--instances": "no.json"}, "--instances no.json: no such file"),
    "no images": ({"--images": "no"}, "--images no: no such file or folder; give a folder or zip of images"),
    "no weights": ({"--weights": "no"}, "--weights no: no such file or folder"),
    "no recipe": ({"--recipe": "demoo"}, "--recipe demoo: no such recipe"),
    "no such key": ({"--set": "train.stepz=3"}, "train.stepz: no such recipe key; did you mean train.steps"),
    "no such value": ({"--set": "train.steps=0"}, "train.steps: must be greater than 0"),
    "out is a file": ({"--out": "notes.txt"}, "--out notes.txt: a file, not a folder"),
    "out is below a file": ({"--out": "notes.txt/run"}, "notes.txt is a file, not a folder"),
    "out is there": ({"--out": "run"}, "--out run exists; choose another"),
    "an address of instances": ({"--instances": "https://x.org/i.json"}, "a URL; download it"),
    "an address of images": ({"--images": "s3://bucket/images"}, "a URL; download it"),
    "an address of weights": ({"--weights": "http://x.org/w"}, "a URL; download it"),
    "a run as instances": ({"--instances": "run"}, "--instances run: a run directory, not"),
    "a folder as instances": ({"--instances": "images"}, "--instances images: a folder, not"),
    "weights as instances": ({"--instances": "run/model.safetensors"}, "a file of a run directory, not"),
    "a store as instances": ({"--instances": "store.h5"}, "an HDF5 file, such as a feature store"),
    "a zip as instances": ({"--instances": "a.zip"}, "a zip file, not"),
    "a pipe as instances": ({"--instances": "pipe"}, "a pipe or a device"),
    "an image as instances": ({"--instances": "images/1.png"}, "an image, not"),
    "instances as images": ({"--images": "instances.json"}, "a JSON file; give a folder or readable zip"),
    "a store as images": ({"--images": "store.h5"}, "an HDF5 file"),
    "resuming without a run": (
        {"--dry-run": (), "--resume": (), "--out": []},
        "--resume: without --out there is no run to resume",
    ),
    "frozen from nothing": ({"--set": "model.norm=frozen"}, "give --weights RUN_DIR"),
    "another network": (
        {"--weights": "run"},
        "a ResNet-18 of width 8 with a feature pyramid, but recipe demo has",
    ),
    "other classes": (
        {"--weights": "run", "--instances": "other.json", "--recipe": "tiny.yaml"},
        "the checkpoint has class",
    ),
    "another style": (
        {"--weights": "run", "--recipe": "tiny.yaml", "--set": "input.order=bgr"},
        "--set input.order=rgb",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, its data, and the files named in `MISTAKES`."""
    root = tmp_path_factory.mktemp("inputs")
    squares(root, lambda tree: tree["categories"][1].update(name="c")).rename(root / "other.json")
    squares(root, lambda tree: tree["annotations"][0].update(bbox=[9, 8, 30, 30])).rename(root / "moved.json")
    squares(root, images=3).rename(root / "fewer.json")
    squares(root)
    run(root)
    shutil.copytree(root / "run", root / "damaged")
    (root / "damaged/state/step-00000002.safetensors").write_bytes(b"\xff" * 40)
    (root / "notes.txt").write_text("mine")
    (root / "tiny.yaml").write_text("base: demo\nmodel: {width: 8}\n")
    (root / "store.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    (root / "a.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    os.mkfifo(root / "pipe")
    return root


def command_line(changes: dict[str, str | Sequence[str]]) -> list[str]:
    """Arguments of ``refdet train``; the changes are values of options: a text, several, or () for a flag."""
    given = {"--recipe": "demo", "--instances": "instances.json", "--images": "images", "--out": "new", **changes}
    arguments = ["train"]
    for option, value in given.items():
        if value == ():  # a flag
            arguments.append(option)
        for item in [value] if isinstance(value, str) else value:
            arguments += [option, item]
    return arguments


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_reported_in_one_line(
    folder: Path, changes: dict[str, str | Sequence[str]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(main, command_line(changes))
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr and not (folder / "new").exists()


def test_mistakes_are_reported_before_torch_is_imported(folder: Path) -> None:
    lines = [command_line(changes) for changes, _ in MISTAKES.values()]
    code = (
        "import sys\nfrom refdet.cli.main import main\n"
        f"for line in {lines!r}:\n"
        "    try: main(line)\n"
        "    except SystemExit as end: assert end.code == 2, line\n"
        "    assert 'torch' not in sys.modules, line\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_first_line_of_a_run_describes_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(folder, out="line", weights=folder / "run")
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("train: ")]
    for part in ("cpu (", "float32, kernels ", "4 images of instances.json", "recipe demo", "starts from run (",
                 "2 steps, batch size 2"):  # fmt: skip
        assert part in line
    assert "refdet audit --instances" in caplog.text and "was not checked" in caplog.text


def test_the_recipe_can_be_a_path(tmp_path: Path) -> None:
    squares(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny("train.steps=1").to_dict()))
    done = train(
        tmp_path / "tiny.yaml", tmp_path / "instances.json", tmp_path / "images", tmp_path / "run", device="cpu"
    )
    assert done.steps == 1
