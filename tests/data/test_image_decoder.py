"""The image decoder of training and the audit: the same pixels, sizes checked before decoding, EXIF, and limits."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damaged_images import bomb, encoded, photograph, png
from PIL import Image, ImageOps
from split_examples import coco, write, write_refs

from refdet.data import image_decoder
from refdet.data.coco import CocoIndex, ImageRecord
from refdet.data.image_decoder import SizeError, apply_orientation, decode, decode_any_size, gray_thumbnails
from refdet.data.image_pixels import read_pixels
from refdet.data.image_source import ImageError, ImageSource
from refdet.errors import ArgumentError
from refdet.splits.duplicates import audit_content
from refdet.splits.perceptual_hash import SIDE
from refdet.splits.perceptual_hash import thumbnails as hash_thumbnails

RANDOM = np.random.default_rng(3)
PHOTO = photograph(RANDOM, 120, 160)
PHOTO_16_BIT = (PHOTO[:, :, 0].astype(np.uint16) << 8) + RANDOM.integers(0, 256, (120, 160)).astype(np.uint16)
RGB = Image.fromarray(PHOTO)


def encode_rotated(orientation: int, kind: str = "PNG", pixels: np.ndarray = PHOTO) -> bytes:
    exif = Image.Exif()
    exif[0x112] = orientation
    return encoded(pixels, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


ENCODERS: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: encoded(PHOTO, "PNG"),
    "16-bit PNG": lambda: encoded(PHOTO_16_BIT, "PNG"),
    "16-bit TIFF": lambda: encoded(PHOTO_16_BIT, "TIFF"),
    "16-bit PPM": lambda: encoded(PHOTO_16_BIT, "PPM"),
    "dark 16-bit PNG": lambda: encoded(PHOTO_16_BIT >> 4, "PNG"),
    "BMP": lambda: encoded(PHOTO, "BMP"),
    "gray": lambda: encoded(PHOTO[:, :, 1], "PNG"),
    "palette": lambda: encoded(RGB.quantize(64), "PNG", transparency=3),
    "alpha": lambda: encoded(np.dstack([PHOTO, PHOTO_16_BIT.astype(np.uint8)]), "PNG"),
    "gray and alpha": lambda: encoded(np.dstack([PHOTO[:, :, 0], PHOTO_16_BIT.astype(np.uint8)]), "PNG"),
    "CMYK TIFF": lambda: encoded(RGB.convert("CMYK"), "TIFF"),
    "GIF": lambda: encoded(RGB.quantize(64), "GIF"),
    "WebP": lambda: encoded(PHOTO, "WEBP", lossless=True),
    "JPEG": lambda: encoded(PHOTO, "JPEG", quality=95),
    "CMYK JPEG": lambda: encoded(RGB.convert("CMYK"), "JPEG", quality=95),
    "rotated TIFF": lambda: encode_rotated(6, "TIFF"),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_audit_sees_the_pixels_that_training_reads(kind: str) -> None:
    data = ENCODERS[kind]()
    height, width = 120, 160
    pixels = decode(data, height, width).pixels
    expected = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    for found in (gray_thumbnails(data, SIDE)[0], hash_thumbnails(data)[0]):
        difference = np.abs(found.astype(int) - np.asarray(expected))
        # the audit decodes a JPEG at a smaller size, and averages a TIFF after Pillow has rotated it
        assert difference.max() <= (3 if "JPEG" in kind else 0) or ("rotated" in kind and difference.mean() < 1.5)
    darkest, brightest = expected.getextrema()
    assert brightest - darkest > 5  # neither all white nor all black


@pytest.mark.parametrize("kind", ENCODERS)
def test_decode_any_size_equals_decode(kind: str) -> None:
    data = ENCODERS[kind]()
    np.testing.assert_array_equal(decode_any_size(data).pixels, decode(data, 120, 160).pixels)


def test_decode_any_size_has_a_limit() -> None:
    with pytest.raises(SizeError, match="too many pixels: .*; scale it down"):
        decode_any_size(bomb(40_000, 40_000))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_reported_or_applied(kind: str, orientation: int) -> None:
    data = encode_rotated(orientation, kind)
    with Image.open(io.BytesIO(data)) as image:  # as image viewers show it
        shown = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    stored, found = decode(data, 120, 160)
    assert found == orientation
    if kind != "JPEG":
        np.testing.assert_array_equal(stored, PHOTO)
    upright = decode(data, *shown.shape[:2], exif="apply").pixels
    np.testing.assert_array_equal(upright, shown)
    np.testing.assert_array_equal(apply_orientation(stored, orientation), shown)
    for pixels in (stored, upright):
        assert pixels.flags.c_contiguous and pixels.flags.writeable and min(pixels.strides) > 0
    thumbnails = gray_thumbnails(data, SIDE)
    assert len(thumbnails) == (1 if orientation == 1 else 2)
    for thumbnail, image_pixels in ((thumbnails[0], stored), (thumbnails[-1], shown)):
        expected = gray_thumbnails(encoded(image_pixels, "PNG"), SIDE)[0]
        difference = np.abs(thumbnail.astype(int) - expected)  # rotation may shift the averaged cells by one pixel
        assert difference.mean() < 1.5 and np.corrcoef(thumbnail.ravel(), expected.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_16_bit_images(orientation: int) -> None:
    for kind in ("PNG", "TIFF"):
        data = encode_rotated(orientation, kind, PHOTO_16_BIT)
        gray = np.stack([(PHOTO_16_BIT >> 8).astype(np.uint8)] * 3, axis=2)
        np.testing.assert_array_equal(decode(data, 120, 160).pixels, gray)
        size = (160, 120) if orientation > 4 else (120, 160)
        np.testing.assert_array_equal(decode(data, *size, exif="apply").pixels, apply_orientation(gray, orientation))


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 2)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_extreme_shapes(shape: tuple[int, int], orientation: int) -> None:
    pixels = RANDOM.integers(0, 256, (*shape, 3), dtype=np.uint8)
    data = encode_rotated(orientation, pixels=pixels)
    size = shape[::-1] if orientation > 4 else shape
    upright = decode(data, *size, exif="apply").pixels
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(upright, np.asarray(ImageOps.exif_transpose(image)))
    assert min(upright.strides) > 0


def test_the_error_for_an_image_annotated_upright_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "6.jpg").write_bytes(encode_rotated(6, "JPEG"))
    (tmp_path / "3.jpg").write_bytes(encode_rotated(3, "JPEG"))
    (tmp_path / "1.jpg").write_bytes(encoded(PHOTO, "JPEG"))
    records = [ImageRecord(1, "6.jpg", 160, 120), ImageRecord(2, "3.jpg", 120, 160), ImageRecord(3, "1.jpg", 120, 160)]
    source = ImageSource.open(tmp_path)
    with pytest.raises(
        ImageError, match="6.jpg: is 160x120, but .* says 120x160 and its EXIF orientation is 6; add `exif='apply'`"
    ):
        source.read(records[0])
    for record in records[1:]:
        source.read(record)
    assert source.orientations == {"6.jpg": 6, "3.jpg": 3}
    applied = ImageSource.open(tmp_path, "apply")
    assert [applied.read(record).shape[:2] for record in records] == [(160, 120), (120, 160), (120, 160)]
    assert applied.orientations_of(records) == {"6.jpg": 6, "3.jpg": 3} and not applied.orientations_of(records[2:])
    with pytest.raises(ImageError, match="is 160x120, .* orientation 6 rotates it; omit `exif='apply'`"):
        applied.read(ImageRecord(1, "6.jpg", 120, 160))


def test_an_unknown_exif_mode_is_refused(tmp_path: Path) -> None:
    (tmp_path / "6.jpg").write_bytes(encode_rotated(6, "JPEG"))
    for read in (lambda: ImageSource.open(tmp_path, "Apply"), lambda: read_pixels(tmp_path / "6.jpg", "Apply")):
        with pytest.raises(ArgumentError, match="exif: must be one of ignore, apply, not 'Apply'"):
            read()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_an_image_of_another_size_than_declared_is_not_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(PHOTO, kind)

    def fail(image: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(image_decoder, "as_rgb", fail)  # which decodes the pixels
    for size in ((119, 160), (1, 1), (120, 161), (160, 119), (20_000, 20_000)):
        with pytest.raises(SizeError, match=f"is 160x120, but the instances file says {size[1]}x{size[0]}"):
            decode(data, *size)


def test_large_images_of_the_declared_size_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even beyond Pillow's limit, which is restored afterwards; other images beyond the limit are refused."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    monkeypatch.setattr(image_decoder, "_LARGE_IMAGE_PIXELS", 10_000)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        data = encoded(PHOTO, kind)
        assert decode(data, 120, 160).pixels.shape == (120, 160, 3)
        assert gray_thumbnails(data, SIDE)[0].shape == (SIDE, SIDE)
        with pytest.raises(SizeError, match="claims more than 5000 pixels, but the instances file says 9x6"):
            decode(data, 6, 9)
        assert Image.MAX_IMAGE_PIXELS == 5_000


def test_too_large_declared_or_claimed_sizes_are_refused() -> None:
    with pytest.raises(SizeError, match="says 40000x40000, more than the limit of 537 megapixels"):
        decode(bomb(10, 10), 40_000, 40_000)
    header = png(b"\0\0\x80\0\0\0\x80\0\x08\0\0\0\0", b"")  # 32768 x 32768
    with pytest.raises(SizeError, match="more than the limit of 268 megapixels"):
        gray_thumbnails(header, SIDE)


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_decoder, "_LARGE_IMAGE_PIXELS", 100)
    running, most_at_once, as_rgb = 0, 0, image_decoder.as_rgb

    def count_running(image: Image.Image) -> Image.Image:
        nonlocal running, most_at_once
        running += 1
        most_at_once = max(most_at_once, running)
        time.sleep(0.02)  # long enough for the other threads to get here, were it not for the lock
        try:
            return as_rgb(image)
        finally:
            running -= 1

    monkeypatch.setattr(image_decoder, "as_rgb", count_running)
    data = encoded(PHOTO, "PNG")
    threads = [threading.Thread(target=decode, args=(data, 120, 160)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most_at_once == 1


def test_huge_tiles_and_hundreds_of_scans_are_refused() -> None:
    tiff = encoded(PHOTO, "TIFF", tiffinfo={305: "a", 315: "b"})
    for old, new in ((305, 322), (315, 323)):  # turn the text tags Software and Artist into TileWidth and TileLength
        at = tiff.index(struct.pack("<HH", old, 2))
        tiff = tiff[:at] + struct.pack("<HHII", new, 4, 1, 60_000) + tiff[at + 12 :]
    with pytest.raises(ValueError, match="tiles of 3600000000 pixels are far larger than the image"):
        decode(tiff, 120, 160)
    jpeg = encoded(PHOTO, "JPEG", progressive=True)
    start = jpeg.rindex(b"\xff\xda")
    with pytest.raises(ValueError, match="a JPEG with more than 500 scans"):
        decode(jpeg[:start] + jpeg[start:-2] * 600 + jpeg[-2:], 120, 160)


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_metadata_that_unpacks_to_300_mebibytes_is_not_unpacked(name: bytes) -> None:
    packer = zlib.compressobj(1)
    packed = b"".join([packer.compress(bytes(1 << 20)) for _ in range(300)]) + packer.flush()
    chunk = name + (b"a\0\1\0\0\0" if name == b"iTXt" else b"a\0\0") + packed
    whole = encoded(PHOTO, "PNG")
    # inserted behind the signature and IHDR, which end at byte 33
    data = whole[:33] + (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + whole[33:]
    code = (
        "import re, sys\nfrom pathlib import Path\nfrom refdet.data.image_decoder import decode, gray_thumbnails\n"
        "def peak_kib(): return int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "data = sys.stdin.buffer.read()\nbefore = peak_kib()\n"
        "for read in (lambda: decode(data, 120, 160), lambda: gray_thumbnails(data, 32)):\n"
        "    try: read()\n    except Exception: pass\n"
        "print((peak_kib() - before) >> 10)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert int(done.stdout) < 200  # MiB by which the largest resident memory (VmHWM) grew


def test_the_audit_finds_rotated_and_16_bit_copies(tmp_path: Path) -> None:
    """Copies of held-out images: one that EXIF rotates, and one of 16 bits, which Pillow alone would turn white."""
    root = write_refs(tmp_path / "refer", {("refcoco", "unc"): [(1, "val"), (2, "val")]})
    (tmp_path / "images").mkdir()
    other = photograph(np.random.default_rng(8), 120, 160)
    for number, pixels in ((1, PHOTO), (2, other)):
        (tmp_path / "images" / f"{number:012d}.jpg").write_bytes(encoded(pixels, "JPEG"))
    (tmp_path / "images/rotated.png").write_bytes(encode_rotated(8, pixels=np.rot90(PHOTO, -1)))
    (tmp_path / "images/16_bit.png").write_bytes(
        encoded(np.asarray(Image.fromarray(other).convert("L")).astype(np.uint16) << 8, "PNG")
    )
    listed = coco([10, 11, 12], [], {10: "rotated.png", 11: "16_bit.png", 12: "gone.png"})
    found = audit_content(write(tmp_path / "f.json", listed), root, tmp_path / "images")
    assert [(copy.image, copy.refer_image_id) for copy in found.copies] == [(10, 1), (11, 2)]
    assert (found.compared, found.missing) == (2, [12])
    assert "first: 12 (no file of that name)" in found.notes()[0]


def test_the_audit_reads_the_file_that_training_reads(tmp_path: Path) -> None:
    """Found by ``file_name``, whatever other names the entry has; without one by ``id``, unless ``coco_id`` is null."""
    root = write_refs(tmp_path / "refer", {("refcoco", "unc"): [(1, "val")]})
    (tmp_path / "images").mkdir()
    copy, other = encoded(PHOTO, "JPEG"), encoded(photograph(np.random.default_rng(8)), "JPEG")
    for name, data in (
        (f"{1:012d}.jpg", copy),
        ("kitchen.jpg", copy),
        ("garden.jpg", other),
        (f"{20:012d}.jpg", copy),
        (f"{22:012d}.jpg", copy),
    ):
        (tmp_path / "images" / name).write_bytes(data)
    entries = [
        {"id": 10, "file_name": "kitchen.jpg", "filename": "garden.jpg", "coco_id": None},
        {"id": 11, "file_name": "garden.jpg", "filename": "kitchen.jpg", "coco_id": None},
        {"id": 20, "coco_id": None},
        {"id": 22},
        {"id": 21, "file_name": "x/garden.jpg", "coco_id": None},
    ]
    images = [{**entry, "height": 120, "width": 160} for entry in entries]
    path = tmp_path / "f.json"
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    found = audit_content(path, root, tmp_path / "images")
    assert [copy.image for copy in found.copies] == [10, 22] and found.missing == [20, 21]
    source = ImageSource.open(tmp_path / "images")
    records = [*CocoIndex.load(path).images.values()]
    source.locate(records)
    read = [source.find(record) for record in records]
    assert read == ["kitchen.jpg", "garden.jpg", None, f"{22:012d}.jpg", None]


@pytest.mark.parametrize(
    "data", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n", b"%PDF-1.7"]
)
def test_formats_that_pillow_reads_by_running_a_program_are_refused(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a program was run")

    monkeypatch.setattr(subprocess, "Popen", fail)
    for read in (lambda: decode(data, 9, 9), lambda: gray_thumbnails(data, SIDE)):
        with pytest.raises(Exception, match="cannot identify image file"):
            read()
