"""500 image files, damaged or unusual as some in practice, each with the expected result of reading it."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 64


@dataclass(frozen=True)
class Damaged:
    """A file and the expected result of reading it.

    Attributes:
        kind: kind of the damage or file.
        write: writes it to a path.
        pixels: the expected pixels (H, W, 3) uint8 RGB, None if it cannot be read.
        tolerance: maximum difference from a value of ``pixels``.
        may_be_readable: whether reading it may also succeed, with any pixels: not every changed byte can be detected.
        says: text that the error must contain.
        zipped: whether it can be in a zip.
    """

    kind: str
    write: Callable[[Path], object]
    pixels: np.ndarray | None = None
    tolerance: int = 0
    may_be_readable: bool = False
    says: str = "not a readable image"
    zipped: bool = True


def photograph(random: np.random.Generator, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A synthetic image (H, W, 3) uint8: colored waves, which JPEG preserves well, with some noise."""
    y, x = np.mgrid[:height, :width]
    phase, slope = random.random((2, 3)) * 6, random.random((2, 3)) * 0.2
    waves = np.sin(y[..., None] * slope[0] + x[..., None] * slope[1] + phase[0])
    return (128 + 90 * waves + random.normal(0, 3, (height, width, 3))).clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray | Image.Image, kind: str, **how: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def jpeg(random: np.random.Generator) -> bytes:
    return encoded(photograph(random), "JPEG", quality=90)


def png(header: bytes, rows: bytes) -> bytes:
    """A PNG with the given IHDR and unfiltered rows, for color types that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bomb(width: int, height: int) -> bytes:
    """A small PNG file with a huge number of 1-bit pixels."""
    return png(struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0), bytes((1 + (width + 7) // 8) * height))


def file_of(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def all_damaged() -> list[Damaged]:
    """All 500 files in random order, the same at each call."""
    random = np.random.default_rng(0)
    files = [*_truncated(random), *_overwritten(random), *_not_images(random), *_readable(random), *_not_files(random)]
    assert len(files) == 500, len(files)
    return [files[i] for i in random.permutation(len(files))]


def _truncated(random: np.random.Generator) -> Iterator[Damaged]:
    for kind, count in (("JPEG", 72), ("PNG", 40)):
        for _ in range(count):
            data = encoded(photograph(random), kind)
            yield Damaged(f"{kind} cut short", file_of(data[: int(random.integers(1, len(data) - 20))]))
    for _ in range(10):
        progressive = encoded(photograph(random), "JPEG", progressive=True)
        yield Damaged("progressive JPEG cut short", file_of(progressive[: len(progressive) * 2 // 3]))


def _overwritten(random: np.random.Generator) -> Iterator[Damaged]:
    for kind, count in (("JPEG", 72), ("PNG", 40), ("GIF", 10), ("TIFF", 10)):
        for _ in range(count):
            data = np.frombuffer(encoded(photograph(random), kind), np.uint8).copy()
            places = random.integers(0, len(data), int(random.integers(1, 20)))
            data[places] ^= random.integers(1, 256, len(places)).astype(np.uint8)
            yield Damaged(f"{kind} with other bytes", file_of(data.tobytes()), may_be_readable=True)
    for _ in range(20):
        data = bytearray(jpeg(random))
        start = int(random.integers(0, len(data) - 200))
        data[start : start + 200] = bytes(200)
        yield Damaged("JPEG with a hole", file_of(bytes(data)), may_be_readable=True)
    for length in random.integers(1, 5000, 20).tolist():
        yield Damaged("zeros", file_of(bytes(length)), says="no known image format")


def _not_images(random: np.random.Generator) -> Iterator[Damaged]:
    page = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\nshowpage\n"
    for data in (b"no image", page, b"%PDF-1.7\n", b'{"error": "expired"}', postscript, b"PK\x03\x04", b"\xff\xd8\xff"):
        for end in (b"", b"\n", b"\0", bytes(1000)):
            yield Damaged("text and others", file_of(data + end))
    for length in random.integers(10, 3000, 12).tolist():
        yield Damaged("noise", file_of(random.bytes(length)), says="no known image format")
    for _ in range(10):
        yield Damaged("empty", file_of(b""), says="no known image format")
    for height, width in random.integers(1, 200, (14, 2)).tolist():
        says = f"is {width}x{height}, but the instances file says {WIDTH}x{HEIGHT}"
        yield Damaged("another size", file_of(encoded(photograph(random, height, width), "JPEG")), says=says)
    for kind in ("JPEG", "PNG", "GIF", "BMP"):
        yield Damaged("1x1", file_of(encoded(photograph(random, 1, 1), kind)), says="is 1x1, but")
    yield Damaged("turned", file_of(encoded(photograph(random, WIDTH, HEIGHT), "JPEG")), says="is 48x64, but")
    yield Damaged("turned", file_of(encoded(photograph(random, WIDTH, HEIGHT), "PNG")), says="is 48x64, but")
    for side in (9_000, 10_000, 11_000):
        yield Damaged("bomb", file_of(bomb(side, side)), says=f"is {side}x{side}, but")
    for side in (15_000, 30_000, 2**31 - 1):
        header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        yield Damaged("bomb", file_of(png(header, bytes(9999))), says="claims more than")
    for text in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
        packed = zlib.compress(bytes(4 << 20))
        chunk = text + b"a\0\0" + packed if text != b"iTXt" else text + b"a\0\1\0\0\0" + packed
        whole = png(struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0), bytes((1 + 3 * WIDTH) * HEIGHT))
        data = (
            whole[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[33:]
        )
        yield Damaged("PNG with a bomb of text", file_of(data), may_be_readable=True)
    for mode in ("F", "I", "LAB"):
        image = Image.new(mode, (WIDTH, HEIGHT))
        yield Damaged(f"TIFF of mode {mode}", file_of(encoded(image, "TIFF")), may_be_readable=mode == "LAB")


def _readable(random: np.random.Generator) -> Iterator[Damaged]:
    for _ in range(15):
        pixels = photograph(random)
        inks = Image.fromarray(pixels).convert("CMYK")
        yield Damaged("CMYK", file_of(encoded(inks, "JPEG", quality=100)), np.asarray(inks.convert("RGB")), 8)
    for number in range(15):
        gray = photograph(random)[:, :, 0]
        kind = ("PNG", "JPEG", "BMP", "TIFF", "PPM")[number % 5]
        data = encoded(gray, kind, **({"quality": 100} if kind == "JPEG" else {}))
        yield Damaged(f"gray {kind}", file_of(data), np.stack([gray] * 3, axis=2), 3 if kind == "JPEG" else 0)
    for number in range(15):
        deep = random.integers(0, 2**16, (HEIGHT, WIDTH)).astype(np.uint16)
        kind = ("PNG", "TIFF", "PPM")[number % 3]
        yield Damaged(
            f"16-bit gray {kind}", file_of(encoded(deep, kind)), np.stack([(deep >> 8).astype(np.uint8)] * 3, 2)
        )
    for _ in range(5):
        deep = random.integers(0, 2**16, (HEIGHT, WIDTH, 3)).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in deep)
        data = png(struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0), rows)
        yield Damaged("16-bit color", file_of(data), (deep >> 8).astype(np.uint8))
    for number in range(10):
        palette = Image.fromarray(photograph(random)).quantize(40)
        expected = np.asarray(palette.convert("RGB"))
        clear = [int(number), bytes(range(40))][number % 2]  # one color, or more or less of each
        yield Damaged("palette and transparency", file_of(encoded(palette, "PNG", transparency=clear)), expected)
    for number in range(8):
        pixels = photograph(random)
        alpha = random.integers(0, 256, (HEIGHT, WIDTH, 1)).astype(np.uint8)
        data = np.concatenate([pixels[..., :1] if number % 2 else pixels, alpha], axis=2)
        yield Damaged("alpha", file_of(encoded(data, "PNG")), pixels[..., [0, 0, 0]] if number % 2 else pixels)
    for number in range(8):
        exif = Image.Exif()
        exif[0x112] = number + 1
        pixels = photograph(random)
        yield Damaged(
            "EXIF orientation", file_of(encoded(pixels, "JPEG", exif=exif, quality=100, subsampling=0)), pixels, 8
        )
    for number in range(8):
        first, *others = (Image.fromarray(photograph(random)).quantize(256) for _ in range(3))
        data = encoded(first, "GIF", save_all=number < 5, append_images=others)
        yield Damaged("animated GIF", file_of(data), np.asarray(first.convert("RGB")))
    for _ in range(5):
        bits = random.random((HEIGHT, WIDTH)) < 0.5
        expected = np.stack([bits * np.uint8(255)] * 3, axis=2)
        yield Damaged("black and white", file_of(encoded(Image.fromarray(bits), "PNG")), expected)
    for _ in range(3):
        pixels = photograph(random)
        data = encoded(pixels, "JPEG", quality=100, subsampling=0)
        yield Damaged("rubbish behind the end", file_of(data + random.bytes(500)), pixels, 8)
        yield Damaged(
            "odd metadata", file_of(encoded(pixels, "JPEG", exif=b"Exif\0\0nonsense", quality=100)), pixels, 30
        )


def _not_files(random: np.random.Generator) -> Iterator[Damaged]:
    for _ in range(7):
        yield Damaged("a folder", lambda path: path.mkdir(), says="no file for image", zipped=False)
        yield Damaged("nothing", lambda path: None, says="no file for image")
    for _ in range(4):
        yield Damaged("a link to nothing", lambda path: path.symlink_to("gone"), says="is a broken link", zipped=False)
        yield Damaged("a link to itself", lambda path: path.symlink_to(path.name), says="symbolic", zipped=False)
        yield Damaged("a pipe", os.mkfifo, says="is a named pipe, not a file", zipped=False)
    for _ in range(2):
        yield Damaged("2 GiB of nothing", _huge, says="bytes, the limit for an image", zipped=False)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2 << 30)


def write_zip(path: Path, folder: Path, names: list[str], damaged: list[str]) -> None:
    """Write files of a folder into a zip, and change a byte in the middle of those in ``damaged``."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.write(folder / name, f"train2014/{name}")
        offsets = {name: archive.getinfo(f"train2014/{name}").header_offset for name in damaged}
    data = bytearray(path.read_bytes())
    for name, offset in offsets.items():
        start = offset + 30 + len(f"train2014/{name}")  # a local header has 30 bytes and the name
        data[start + (folder / name).stat().st_size // 2] ^= 1
    path.write_bytes(data)
