"""How the bytes of an image file become pixels: for training, extraction, evaluation and the audit by content."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image

from refer.pixels import FORMATS, as_rgb

# Pillow warns of odd metadata, and of many pixels; here the instances file says how many there must be.
warnings.filterwarnings("ignore", module=r"PIL\.")

EXIF = ("ignore", "apply")
"""What may be done with EXIF orientation: leave the pixels as they are stored, as COCO's are, or turn them upright."""

MOST_PIXELS = 1 << 29  # of an image whose size is declared: as float32 RGB it takes 6 GiB
MOST_UNDECLARED_PIXELS = 1 << 28  # of one to be looked at only, which takes 1 GiB
_METADATA_BYTES, _PIXEL_BYTES = 64 << 20, 16  # twice what 16-bit colour with alpha takes uncompressed
_LARGE_PIXELS = 1 << 25  # 32 megapixels: such images are decoded one at a time
_TIFF_TILE_PIXELS = 1 << 24  # a tile or strip may be larger than its image, by this much
_MOST_SCANS = 500  # of a JPEG: each goes over the whole image, and takes no more than a few bytes
_ORIENTATION, _TILE_WIDTH, _TILE_LENGTH, _WIDTH, _LENGTH = 274, 322, 323, 256, 257
_UPRIGHT = 1
_SIDEWAYS = (5, 6, 7, 8)

_large = threading.Lock()


class SizeError(ValueError):
    """An image is not of the size that was declared for it; the message says of which it is.

    Attributes:
        orientation: EXIF's, 1 to 8, where it is known.
    """

    def __init__(self, message: str, orientation: int = 1) -> None:
        super().__init__(message)
        self.orientation = orientation


class Decoded(NamedTuple):
    """An image.

    Attributes:
        pixels: (H, W, 3) uint8 RGB, new and writable.
        orientation: EXIF's, 1 to 8; 1 where there is none.
    """

    pixels: np.ndarray
    orientation: int


def most_bytes(height: int, width: int) -> int:
    """How large the file of an image of so many pixels may be: 64 MiB, and 16 bytes a pixel."""
    return _METADATA_BYTES + _PIXEL_BYTES * height * width


def decode(data: bytes, height: int, width: int, exif: str = "ignore") -> Decoded:
    """The first picture in an image file, as `refer.pixels.as_rgb` reads it.

    Args:
        data: the file; see `FORMATS`.
        height, width: that the image must have, after it is turned if it is; with another size it is not decoded.
        exif: see `EXIF`.

    Raises:
        SizeError: it has another size.
        Exception: of any kind that Pillow has for a file it cannot decode.
    """
    declared = f"the instances file says {width}x{height}"
    if height * width > MOST_PIXELS:
        raise SizeError(f"{declared}, more than the {MOST_PIXELS / 1e6:.0f} megapixels that are read; scale it down")
    try:
        with _pixels_allowed(height * width), _opened(data) as image:
            size = _stored_size(image)
            if size not in ((height, width), (width, height)):
                raise SizeError(f"is {size[1]}x{size[0]}, but {declared}")
            orientation = _orientation(image)
            sideways = orientation in _SIDEWAYS
            if (size[::-1] if sideways and exif == "apply" else size) != (height, width):
                raise SizeError(f"is {size[1]}x{size[0]}, but {declared}{_why_turned(orientation, exif)}", orientation)
            pixels = _stored_pixels(image, orientation)
    except Image.DecompressionBombError:
        raise SizeError(f"claims more than {Image.MAX_IMAGE_PIXELS} pixels, but {declared}") from None
    return Decoded(np.array(upright(pixels, orientation) if exif == "apply" else pixels, order="C"), orientation)


def decode_any_size(data: bytes) -> Decoded:
    """As `decode`, an image whose size nobody declared, as it is stored; up to the limit that Pillow has.

    Raises:
        SizeError: it has more pixels.
        Exception: of any kind that Pillow has for a file it cannot decode.
    """
    try:
        with _opened(data) as image:
            height, width = _stored_size(image)
    except Image.DecompressionBombError as error:
        raise SizeError(f"too many pixels: {error}; scale it down") from None
    return decode(data, height, width)


def thumbnails(data: bytes, side: int) -> list[np.ndarray]:
    """The picture as (side, side) uint8 grey, each pixel the mean of its part.

    It is seen as `decode` reads it, whatever its size; where it has an EXIF orientation, as it is stored and turned
    upright, since a detector can be trained on either.

    Raises:
        Exception: of any kind that Pillow has for a file it cannot decode.
    """
    try:
        with _opened(data) as image:
            if image.width * image.height <= _LARGE_PIXELS:
                return _thumbnails(image, side)
    except Image.DecompressionBombError:
        pass
    try:
        with _pixels_allowed(MOST_UNDECLARED_PIXELS), _opened(data) as image:
            if image.width * image.height <= MOST_UNDECLARED_PIXELS:
                return _thumbnails(image, side)
    except Image.DecompressionBombError:
        pass
    raise SizeError(f"more than the {MOST_UNDECLARED_PIXELS / 1e6:.0f} megapixels that are compared")


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (H, W, ...) turned and mirrored as an EXIF orientation of 1 to 8 says."""
    if orientation in _SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _thumbnails(image: Image.Image, side: int) -> list[np.ndarray]:
    if image.mode in ("L", "RGB"):
        image.draft("L", (4 * side, 4 * side))  # a JPEG is decoded at an eighth of its size, which is much faster
    orientation = _orientation(image)
    grey = as_rgb(image).convert("L").resize((side, side), Image.Resampling.BOX)
    stored = _turned_back(np.asarray(grey), image, orientation)
    return [stored] if orientation == _UPRIGHT else [stored, upright(stored, orientation)]


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """An image of a format that is read here, with nothing in it that takes much more than its pixels to decode."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.format == "TIFF":
            tags = image.tag_v2  # type: ignore[attr-defined]
            tile = tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_LENGTH, 0)
            if tile > image.width * image.height + _TIFF_TILE_PIXELS:
                raise ValueError(f"its tiles of {tile} pixels are far larger than itself")
        elif image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > _MOST_SCANS:
            raise ValueError(f"a JPEG of more than {_MOST_SCANS} scans")
        yield image


@contextmanager
def _pixels_allowed(pixels: int) -> Iterator[None]:
    """Let Pillow decode an image of so many pixels; large ones one at a time.

    Its limit, beyond which it takes an image for an attack, is one for the whole process, so it is raised for as long
    as it must be.
    """
    if pixels <= _LARGE_PIXELS:
        yield
        return
    with _large:
        before = Image.MAX_IMAGE_PIXELS
        if before is not None:
            Image.MAX_IMAGE_PIXELS = max(before, pixels)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of the pixels as they are stored. Of a TIFF Pillow says how they are once it has turned them."""
    if image.format == "TIFF":
        return image.tag_v2[_LENGTH], image.tag_v2[_WIDTH]  # type: ignore[attr-defined]
    return image.height, image.width


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8."""
    if image.format != "TIFF":  # a TIFF forgets it when it is decoded, others may have it behind their pixels
        image.load()
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception:  # the metadata may be anything
        return _UPRIGHT
    return found if isinstance(found, int) and 1 < found <= 8 else _UPRIGHT


def _stored_pixels(image: Image.Image, orientation: int) -> np.ndarray:
    """(H, W, 3) uint8."""
    pixels = np.asarray(as_rgb(image))
    return _turned_back(np.stack([pixels] * 3, axis=2) if pixels.ndim == 2 else pixels, image, orientation)


def _turned_back(pixels: np.ndarray, image: Image.Image, orientation: int) -> np.ndarray:
    """The pixels as they are stored: Pillow turns those of a TIFF by its orientation and takes it out of the tags."""
    if image.format == "TIFF" and _ORIENTATION not in image.getexif():
        return upright(pixels, {6: 8, 8: 6}.get(orientation, orientation))
    return pixels


def _why_turned(orientation: int, exif: str) -> str:
    if orientation not in _SIDEWAYS:
        return ""
    if exif == "apply":
        return f" and its EXIF orientation {orientation} turns it: leave out --exif apply if it was annotated as stored"
    return f": its EXIF orientation is {orientation}; --exif apply turns images upright, as they were annotated then"
