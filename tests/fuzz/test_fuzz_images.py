"""Images and zips of images changed at random: read as what was declared, or refused in a line."""

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
from fuzzing import changed_bytes, fuzz

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


def changed_png(png: bytes, chance: random.Random) -> bytes:
    """A PNG with a chunk changed, that of the pixels before it was packed, and with checksums that are right."""
    chunks, at = [], 8
    while at < len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        chunks.append((png[at + 4 : at + 8], png[at + 8 : end]))
        at = end + 4
    chosen = chance.randrange(len(chunks))
    name, body = chunks[chosen]
    body = (
        zlib.compress(changed_bytes(zlib.decompress(body), chance)) if name == b"IDAT" else changed_bytes(body, chance)
    )
    chunks[chosen] = (name, body)
    packed = (len(b).to_bytes(4, "big") + n + b + zlib.crc32(n + b).to_bytes(4, "big") for n, b in chunks)
    return png[:8] + b"".join(packed)


@pytest.mark.parametrize("kind", FORMATS)
def test_images(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    path = folder / RECORD.file_name
    data = encoded(PIXELS, kind)

    def change(chance: random.Random) -> None:
        change = changed_png if kind == "PNG" and chance.random() < 0.7 else changed_bytes
        path.write_bytes(change(data, chance))

    def work() -> None:
        with contextlib.suppress(Exception):  # whatever a decoder raises, the audit counts and names the file
            thumbnails(path.read_bytes())
        upright = ImageSource.open(folder, "apply")
        with contextlib.suppress(InputError):
            upright.read(RECORD)
        ImageSource.open(folder).read(RECORD)

    fuzz(change, work, tmp_path)


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

    fuzz(change, lambda: read_all(ImageSource.open(path), records), tmp_path)
