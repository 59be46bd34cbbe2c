"""EXIF orientation in the commands: the warning, `exif="apply"`, and that resuming requires the same option."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from damaged_images import encoded, photograph
from PIL import Image

from refdet.cli.main import main
from refdet.config import recipe
from refdet.data.coco import CocoIndex
from refdet.data.image_orientation import OrientationNote
from refdet.data.image_source import ImageSource
from refdet.data.training_batches import TrainingBatches
from refdet.errors import InputError
from refdet.training.train import train
from refer.pixels import apply_orientation

TINY = ["model.width=8", "model.mask_channels=8", "model.rpn_channels=16", "train.batch_size=2", "train.steps=6",
        "head.batch_size_per_image=8", "train.warmup_steps=2", "train.log_every=2", "input.min_sizes=[48]"]  # fmt: skip
WARNING = "an EXIF orientation other than 1"


def write_dataset(root: Path, orientations: Sequence[int]) -> Path:
    """Images that are 64x48 when displayed upright, stored rotated by the given orientations, with an object each."""
    (root / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    images, annotations = [], []
    for number, orientation in enumerate(orientations, start=1):
        upright = photograph(random, 48, 64)
        exif = Image.Exif()
        exif[0x112] = orientation
        inverse = {6: 8, 8: 6}.get(orientation, orientation)  # the other orientations are their own inverses
        stored = apply_orientation(upright, inverse)
        (root / "images" / f"{number}.png").write_bytes(encoded(stored, "PNG", exif=exif))
        images.append({"id": number, "file_name": f"{number}.png", "height": 48, "width": 64})
        box = [4 + number, 6, 30, 20]
        x, y, w, h = box
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        annotations.append({"id": number, "image_id": number, "category_id": 1, "iscrowd": 0, "bbox": box, "area": 600,
                            "segmentation": outline})  # fmt: skip
    path = root / "instances.json"
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    path.write_text(json.dumps(content))
    return path


def tiny(*changes: str) -> recipe.Recipe:
    return recipe.load("demo").with_changes([*TINY, *changes])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven images with orientations 1, 1, 2, 3, 4, 6 and 8, and a detector that was trained on them upright."""
    root = tmp_path_factory.mktemp("exif")
    write_dataset(root, (1, 1, 2, 3, 4, 6, 8))
    train(tiny("train.steps=2", "input.exif=apply"), root / "instances.json", root / "images", root / "run")
    return root


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return done.exit_code, done.stderr + done.stdout


def extract(dataset: Path, out: Path, *more: object) -> tuple[int, str]:
    return run("extract-features", "--checkpoint", dataset / "run", "--images", dataset / "images",
               "--instances", dataset / "instances.json", "--regions", "annotations", "--features", "pool5",
               "--out", out, *more)  # fmt: skip


def test_extraction_reports_rotated_images_or_rotates_them_upright(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By default, the number of rotated images is reported; with apply, the result is that of upright images."""
    code, text = extract(dataset, tmp_path / "stored.h5")
    assert code == 0 and "2 of 7 images could not be used" in text
    assert caplog.text.count(WARNING) == 1 and f": 5 of the images read have {WARNING}, such as 3.png" in caplog.text
    caplog.clear()
    assert extract(dataset, tmp_path / "turned.h5", "--exif", "apply")[0] == 0
    assert caplog.text.count(WARNING) == 1 and ": rotated upright" in caplog.text
    caplog.clear()
    (tmp_path / "images").mkdir()
    applied, entries = ImageSource.open(dataset / "images", "apply"), CocoIndex.load(dataset / "instances.json").images
    for record in entries.values():
        Image.fromarray(applied.read(record)).save(tmp_path / "images" / record.file_name)
    assert extract(dataset, tmp_path / "upright.h5", "--images", tmp_path / "images")[0] == 0
    assert WARNING not in caplog.text
    with h5py.File(tmp_path / "turned.h5") as turned, h5py.File(tmp_path / "upright.h5") as right:
        np.testing.assert_array_equal(turned["features/pool5"][:], right["features/pool5"][:])
        assert "exif" not in json.loads(right.attrs["options"])
        assert json.loads(turned.attrs["options"])["exif"] == "apply"
    with h5py.File(tmp_path / "stored.h5") as stored:
        errors = [error.decode() for error in stored["images/error"][:]]
        assert [bool(error) for error in errors] == [False] * 5 + [True] * 2
        assert "its EXIF orientation is 6; add `exif='apply'`" in errors[5]
    code, text = extract(dataset, tmp_path / "stored.h5", "--resume", "--exif", "apply")
    assert code == 2 and "--exif was ignore and is now apply" in text


def test_evaluation_refuses_a_rotated_image_unless_exif_is_applied(
    dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ("evaluate", "--checkpoint", dataset / "run", "--images", dataset / "images", "--instances",
                 dataset / "instances.json")  # fmt: skip
    code, text = run(*arguments)
    assert code == 2 and "6.png: is 48x64, but the instances file says 64x48 and its EXIF orientation is 6" in text
    caplog.clear()
    assert run(*arguments, "--exif", "apply")[0] == 0
    assert caplog.text.count(WARNING) == 1 and f": 5 of the images read have {WARNING}," in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_training_warns_once_with_and_without_workers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    instances = write_dataset(tmp_path, (1, 2, 3, 4))
    # An epoch has two steps, so the warning is due before the end.
    train(tiny("train.steps=5", f"train.workers={workers}"), instances, tmp_path / "images", tmp_path / "run")
    assert caplog.text.count(WARNING) == 1
    assert f": 3 of the images read have {WARNING}, such as 2.png: used as stored" in caplog.text
    index = CocoIndex.load(instances)
    batches = TrainingBatches(index, ImageSource.open(tmp_path / "images"), tiny())
    found: dict[str, int] = {}
    for step in range(batches.steps_per_epoch):
        found |= batches[step].orientations  # type: ignore[union-attr]
    assert found == {"2.png": 2, "3.png": 3, "4.png": 4}


def test_resuming_with_another_exif_mode_is_refused(tmp_path: Path) -> None:
    instances = write_dataset(tmp_path, (1, 3))
    arguments = ("train", "--recipe", "demo", "--instances", instances, "--images", tmp_path / "images", "--out",
                 tmp_path / "run", *(part for change in TINY for part in ("--set", change)))  # fmt: skip
    assert run(*arguments, "--set", "train.steps=2", "--set", "train.workers=0")[0] == 0
    code, text = run(*arguments, "--set", "train.steps=2", "--exif", "apply", "--resume")
    assert code == 2 and "input.exif was ignore and is now apply" in text


def test_the_default_exif_mode_is_not_written_to_recipes() -> None:
    """Recipes in older stores and unfinished extractions have no such key, and must still compare equal."""
    assert "exif" not in tiny().to_dict()["input"]
    applied = tiny("input.exif=apply")
    assert applied.to_dict()["input"]["exif"] == "apply" and recipe.from_dict(applied.to_dict()) == applied
    assert recipe.from_dict(tiny().to_dict()) == tiny()
    with pytest.raises(InputError, match="input.exif: must be one of ignore, apply, not 'upright'"):
        tiny("input.exif=upright")


def test_the_warning_counts_the_image_that_ends_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    instances = write_dataset(tmp_path, (1, 6, 1, 1, 1))
    with pytest.raises(InputError, match="its EXIF orientation is 6; add `exif='apply'`"):
        train(tiny("train.workers=0"), instances, tmp_path / "images", tmp_path / "run")
    assert caplog.text.count(WARNING) == 1 and f": 1 of the images read has {WARNING}, such as 2.png" in caplog.text


@pytest.mark.parametrize(("batches", "calls"), [(None, 3), (2, 3), (9, 3), (None, 0)])
def test_the_note_is_printed_once_for_all_batches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, batches: int | None, calls: int
) -> None:
    caplog.set_level(logging.WARNING)
    source = ImageSource.open(tmp_path)
    with pytest.raises(KeyError), OrientationNote(source, batches) as note:
        for number in range(calls):
            note.add({f"{number}.jpg": 6})
        raise KeyError  # the note is printed even if the block fails
    assert caplog.text.count(WARNING) == min(calls, 1)
    if calls:
        assert f": {2 if batches == 2 else 3} of the images read have {WARNING}," in caplog.text
