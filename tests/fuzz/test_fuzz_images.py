"""Images and zips of images, damaged at random: read in the declared size, or a one-line error."""

from __future__ import annotations

import contextlib
import io
import random
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from damaged_images import encoded
from fuzzing import change_bytes, fuzz

from refdet.data.coco import ImageRecord
from refdet.data.image_source import ImageSource
from refdet.errors import InputError
from refdet.splits.perceptual_hash import thumbnails

pytestmark = pytest.mark.slow

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


def change_png(png: bytes, rng: random.Random) -> bytes:
    """Change a chunk of a PNG, pixels before compression, and correct its length and checksum."""
    chunks, start = [], 8
    while start < len(png):
        end = start + 8 + int.from_bytes(png[start : start + 4], "big")
        chunks.append((png[start + 4 : start + 8], png[start + 8 : end]))
        start = end + 4
    chosen = rng.randrange(len(chunks))
    name, body = chunks[chosen]
    body = zlib.compress(change_bytes(zlib.decompress(body), rng)) if name == b"IDAT" else change_bytes(body, rng)
    chunks[chosen] = (name, body)
    parts = [
        len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big") for name, body in chunks
    ]
    return png[:8] + b"".join(parts)


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_images(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    path = folder / RECORD.file_name
    data = encoded(PIXELS, kind)

    def change(rng: random.Random) -> None:
        change_data = change_png if kind == "PNG" and rng.random() < 0.7 else change_bytes
        path.write_bytes(change_data(data, rng))

    def work() -> None:
        with contextlib.suppress(Exception):  # the audit reports whatever a decoder raises
            thumbnails(path.read_bytes())
        with contextlib.suppress(InputError):
            ImageSource.open(folder, "apply").read(RECORD)  # with EXIF orientation
        ImageSource.open(folder).read(RECORD)

    fuzz(change, work, tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_damaged_zips(tmp_path: Path, method: int) -> None:
    path, buffer = tmp_path / "images.zip", io.BytesIO()
    records = [ImageRecord(n, f"a/{n}.png", 24, 32) for n in range(3)]
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for record in records:
            archive.writestr(record.file_name, encoded(PIXELS, "PNG"))
    data = buffer.getvalue()

    def change(rng: random.Random) -> None:
        # most changes are in the central directory, at the end
        if rng.random() < 0.6:
            end = data.rindex(b"PK\x01\x02") - 100
            path.write_bytes(data[:end] + change_bytes(data[end:], rng))
        else:
            path.write_bytes(change_bytes(data, rng))

    fuzz(change, lambda: read_all(ImageSource.open(path), records), tmp_path)
