"""What the machine fails to read stops the run, with what is finished kept; it never passes for a broken image."""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interrupted_extraction import BATCHES, RECORDS
from PIL import Image
from resumable_extraction import run
from store_examples import contents

from refdet.data import image_decoder, image_files
from refdet.data.coco import ImageRecord
from refdet.data.image_source import ImageError, ImageSource
from refdet.errors import RuntimeFailure

RECORD = ImageRecord(1, "1.png", 6, 9)
MACHINE = [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENETDOWN, errno.ETIMEDOUT]
FILE = [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    for record in (RECORD, ImageRecord(2, "2.png", 6, 9)):
        Image.fromarray(np.full((6, 9, 3), record.id, np.uint8)).save(path / record.file_name)
    return path


def raises(error: BaseException) -> Callable[..., Any]:
    def fails(*_: object, **__: object) -> None:
        raise error

    return fails


@pytest.mark.parametrize("number", MACHINE)
@pytest.mark.parametrize("where", ["data", "read_file"])
def test_errors_of_the_machine(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: str) -> None:
    source = ImageSource.open(folder)
    error = OSError(number, os.strerror(number), str(folder / "1.png"))
    if where == "data":
        monkeypatch.setattr(source, "data", raises(error))
    else:
        monkeypatch.setattr(image_files, "read_file", raises(error))
    with pytest.raises(
        RuntimeFailure, match=f"1.png: cannot be read now .{os.strerror(number)}.*the image may be intact"
    ):
        source.read(RECORD)
    monkeypatch.undo()
    assert source.read(RECORD).shape == (6, 9, 3)


@pytest.mark.parametrize("number", FILE)
def test_errors_of_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(image_files, "read_file", raises(OSError(number, os.strerror(number))))
    with pytest.raises(ImageError, match="1.png: not a readable image"):
        ImageSource.open(folder).read(RECORD)


def test_no_memory_to_decode_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_decoder, "as_rgb", raises(MemoryError()))
    with pytest.raises(RuntimeFailure, match="1.png: cannot be read now .MemoryError"):
        ImageSource.open(folder).read(RECORD)


def test_a_folder_that_is_no_longer_mounted(folder: Path) -> None:
    source = ImageSource.open(folder)
    shutil.rmtree(folder)
    with pytest.raises(RuntimeFailure, match="images/1.png: cannot be read now"):
        source.read(RECORD)
    folder.mkdir()  # what is left of a mount
    with pytest.raises(RuntimeFailure, match="1.png: cannot be read now"):
        source.read(RECORD)
    (folder / "2.png").write_bytes(b"")
    with pytest.raises(ImageError, match="1.png: not a readable image .*No such file"):  # that one alone is missing
        source.read(RECORD)


def test_a_zip_that_is_gone(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "1.png", "1.png")
    source = ImageSource.open(path)
    path.rename(tmp_path / "moved.zip")
    with pytest.raises(RuntimeFailure, match="images.zip: can no longer be read"):
        source.read(RECORD)
    (tmp_path / "moved.zip").rename(path)
    assert source.read(RECORD).shape == (6, 9, 3)


def test_the_run_stops_and_goes_on_to_the_same_store(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for record in RECORDS:
        pixels = np.full((record.height, record.width, 3), record.id, np.uint8)
        Image.fromarray(pixels).save(folder / record.file_name, format="PNG")
    source, out = ImageSource.open(folder), tmp_path / "a.h5"

    def hiccup(record: ImageRecord) -> np.ndarray:
        if record == BATCHES[2][1]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(source, "data", raises(OSError(errno.EIO, "Input/output error")))
                return source.read(record)
        return source.read(record)

    with pytest.raises(RuntimeFailure, match=r"Input/output error.*kept in .*a.h5.parts, continue with `resume=True`"):
        run(out, load=hiccup, workers=1)
    assert not out.exists()
    done = run(out, load=source.read, resume=True)
    assert (done.computed, done.errors) == (5, 0)
    run(tmp_path / "whole.h5", load=source.read)
    assert contents(out) == contents(tmp_path / "whole.h5")
