"""Errors of the machine while reading images stop an extraction and keep its shards; no image is taken for broken."""

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
# errors that say nothing about the image, and errors of the image file itself
MACHINE_ERRORS = [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENETDOWN, errno.ETIMEDOUT]
FILE_ERRORS = [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    for record in (RECORD, ImageRecord(2, "2.png", 6, 9)):
        Image.fromarray(np.full((6, 9, 3), record.id, np.uint8)).save(path / record.file_name)
    return path


def raising(error: BaseException) -> Callable[..., Any]:
    """A function that raises an error."""

    def fails(*_: object, **__: object) -> None:
        raise error

    return fails


@pytest.mark.parametrize("number", MACHINE_ERRORS)
@pytest.mark.parametrize("where", ["data", "read_file"])
def test_machine_errors_raise_a_runtime_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    source = ImageSource.open(folder)
    error = OSError(number, os.strerror(number), str(folder / "1.png"))
    if where == "data":
        monkeypatch.setattr(source, "data", raising(error))
    else:
        monkeypatch.setattr(image_files, "read_file", raising(error))
    with pytest.raises(
        RuntimeFailure, match=f"1.png: cannot be read now .{os.strerror(number)}.*the image may be intact"
    ):
        source.read(RECORD)
    monkeypatch.undo()
    assert source.read(RECORD).shape == (6, 9, 3)


@pytest.mark.parametrize("number", FILE_ERRORS)
def test_file_errors_raise_an_image_error(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(image_files, "read_file", raising(OSError(number, os.strerror(number))))
    with pytest.raises(ImageError, match="1.png: not a readable image"):
        ImageSource.open(folder).read(RECORD)


def test_a_lack_of_memory_to_decode_raises_a_runtime_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_decoder, "as_rgb", raising(MemoryError()))
    with pytest.raises(RuntimeFailure, match="1.png: cannot be read now .MemoryError"):
        ImageSource.open(folder).read(RECORD)


def test_an_unmounted_folder_raises_a_runtime_failure(folder: Path) -> None:
    source = ImageSource.open(folder)
    shutil.rmtree(folder)
    with pytest.raises(RuntimeFailure, match="images/1.png: cannot be read now"):
        source.read(RECORD)
    folder.mkdir()  # an empty mount point
    with pytest.raises(RuntimeFailure, match="1.png: cannot be read now"):
        source.read(RECORD)
    (folder / "2.png").write_bytes(b"")  # now the folder is there, and only 1.png is missing
    with pytest.raises(ImageError, match="1.png: not a readable image .*No such file"):
        source.read(RECORD)


def test_a_zip_that_was_removed_raises_a_runtime_failure(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "1.png", "1.png")
    source = ImageSource.open(path)
    path.rename(tmp_path / "moved.zip")
    with pytest.raises(RuntimeFailure, match="images.zip: can no longer be read"):
        source.read(RECORD)
    (tmp_path / "moved.zip").rename(path)
    assert source.read(RECORD).shape == (6, 9, 3)


def test_a_machine_error_stops_an_extraction_which_resumes_to_the_same_store(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for record in RECORDS:
        pixels = np.full((record.height, record.width, 3), record.id, np.uint8)
        Image.fromarray(pixels).save(folder / record.file_name, format="PNG")
    source, out = ImageSource.open(folder), tmp_path / "a.h5"

    def read_with_one_disk_error(record: ImageRecord) -> np.ndarray:
        if record == BATCHES[2][1]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(source, "data", raising(OSError(errno.EIO, "Input/output error")))
                return source.read(record)
        return source.read(record)

    with pytest.raises(RuntimeFailure, match=r"Input/output error.*kept in .*a.h5.parts, continue with `resume=True`"):
        run(out, load=read_with_one_disk_error, workers=1)
    assert not out.exists()
    done = run(out, load=source.read, resume=True)
    assert (done.computed, done.errors) == (5, 0)  # the first two batches, of 5 images, were finished
    run(tmp_path / "whole.h5", load=source.read)
    assert contents(out) == contents(tmp_path / "whole.h5")
