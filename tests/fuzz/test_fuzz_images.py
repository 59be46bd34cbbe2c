"""Images and zips of images changed at random: read as what was declared, or refused in a line."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from damaged_images import encoded
from fuzzing import changed_bytes, fuzz

from refdet.data.coco import ImageRecord
from refdet.data.image_source import ImageSource
from refdet.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
FORMATS = ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"]
RECORD = ImageRecord(7, "7.img", 24, 32)


def read_all(source: ImageSource, records: list[ImageRecord]) -> None:
    for record in records:
        try:
            pixels = source.read(record)
        except InputError:
            continue
        assert pixels.shape == (record.height, record.width, 3) and pixels.dtype == np.uint8


@pytest.mark.parametrize("kind", FORMATS)
def test_images(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    data = encoded(PIXELS, kind)

    def change(chance: random.Random) -> None:
        (folder / RECORD.file_name).write_bytes(changed_bytes(data, chance))

    def work() -> None:
        source = ImageSource.open(folder, random.choice(("ignore", "apply")))
        source.read(RECORD)

    fuzz(10, change, work, tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_zips(tmp_path: Path, method: int) -> None:
    path, memory = tmp_path / "images.zip", io.BytesIO()
    records = [ImageRecord(n, f"a/{n}.png", 24, 32) for n in range(3)]
    with zipfile.ZipFile(memory, "w", method) as archive:
        for record in records:
            archive.writestr(record.file_name, encoded(PIXELS, "PNG"))
    data = memory.getvalue()

    def change(chance: random.Random) -> None:
        # most changes to the directory at the end, where a zip is what it is
        if chance.random() < 0.6:
            end = data.rindex(b"PK\x01\x02") - 100
            path.write_bytes(data[:end] + changed_bytes(data[end:], chance))
        else:
            path.write_bytes(changed_bytes(data, chance))

    fuzz(11, change, lambda: read_all(ImageSource.open(path), records), tmp_path)
