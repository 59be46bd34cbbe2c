"""Decode image files to pixels."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
from PIL import Image

from refdet.errors import ArgumentError
from refer.pixels import (
    FORMATS,
    SIDEWAYS,
    UPRIGHT,
    apply_orientation,
    as_rgb,
    exif_orientation,
    stored_pixels,
    stored_size,
    undo_pillow_rotation,
)

# Pillow warns about odd metadata, which does no harm, and about many pixels, which are an error here.
warnings.filterwarnings("ignore", module=r"PIL\.")

EXIF_MODES = ("ignore", "apply")
"""Handling of EXIF orientation: keep the pixels as stored, as COCO does, or rotate them upright."""

_MAX_DECLARED_PIXELS = 1 << 29  # of an image whose size the instances file declares; 6 GiB as float32 RGB
_MAX_UNDECLARED_PIXELS = 1 << 28  # of an image of unknown size that becomes a thumbnail; 1 GiB
# The limit of a file: so much for metadata, and so many bytes per pixel, twice those of 16-bit RGBA.
_METADATA_BYTES, _BYTES_PER_PIXEL = 64 << 20, 16
_LARGE_IMAGE_PIXELS = 1 << 25  # larger images are decoded one at a time
_TIFF_TILE_PIXELS = 1 << 24  # by which a tile may exceed its image
_MAX_SCANS = 500  # of a JPEG; a scan of a few bytes can cover the whole image
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF tags

_large_image_lock = threading.Lock()


class SizeError(ValueError):
    """An image has another size than declared, or too many pixels; the message has the sizes or the limit.

    Args:
        message: the error message.
        orientation: EXIF orientation of the image, 1 to 8, or 1 if unknown.
    """

    def __init__(self, message: str, orientation: int = 1) -> None:
        super().__init__(message)
        self.orientation = orientation


class DecodedImage(NamedTuple):
    """A decoded image.

    Attributes:
        pixels: (H, W, 3) uint8 RGB, a new, writable array.
        orientation: its EXIF orientation, 1 to 8, or 1 if it has none.
    """

    pixels: np.ndarray
    orientation: int


def check_exif_mode(exif: str) -> None:
    """Raise an ArgumentError if ``exif`` is not one of the `EXIF_MODES`."""
    if exif not in EXIF_MODES:
        raise ArgumentError("exif", f"must be one of {', '.join(EXIF_MODES)}, not {exif!r}")


def max_file_size(height: int, width: int) -> int:
    """Maximum file size in bytes of an image of a size in pixels: 64 MiB plus 16 bytes per pixel."""
    return _METADATA_BYTES + _BYTES_PER_PIXEL * height * width


def decode(data: bytes, height: int, width: int, exif: str = "ignore") -> DecodedImage:
    """Decode the first frame of an image file as `refer.pixels.as_rgb` does.

    Args:
        data: contents of a file in one of the `FORMATS`.
        height: expected height in pixels, after rotation by ``exif``.
        width: expected width in pixels, after rotation by ``exif``.
        exif: "ignore" to keep the pixels as stored, or "apply" to rotate them upright by their EXIF orientation.

    Returns:
        The pixels and the EXIF orientation.

    Raises:
        SizeError: the image has another size or too many pixels. It is then not decoded, unless only height and width
            are swapped: the message has the EXIF orientation, which may follow the pixels in the file.
        Exception: any exception that Pillow raises for a file it cannot decode.
    """
    declared = f"the instances file says {width}x{height}"
    if height * width > _MAX_DECLARED_PIXELS:
        limit = _MAX_DECLARED_PIXELS / 1e6
        raise SizeError(f"{declared}, more than the limit of {limit:.0f} megapixels; scale it down")
    try:
        with _allow_pixels(height * width), _open(data) as image:
            size = stored_size(image)
            if size not in ((height, width), (width, height)):
                raise SizeError(f"is {size[1]}x{size[0]}, but {declared}")
            orientation = exif_orientation(image)
            swap_sides = exif == "apply" and orientation in SIDEWAYS
            if (size[::-1] if swap_sides else size) != (height, width):
                raise SizeError(
                    f"is {size[1]}x{size[0]}, but {declared}{_orientation_hint(orientation, exif)}", orientation
                )
            pixels = stored_pixels(as_rgb(image), image, orientation)
    except Image.DecompressionBombError:
        limit = max(Image.MAX_IMAGE_PIXELS or 0, height * width)
        raise SizeError(f"claims more than {limit} pixels, but {declared}") from None
    if exif == "apply":
        pixels = apply_orientation(pixels, orientation)
    return DecodedImage(np.array(pixels, order="C"), orientation)


def decode_any_size(data: bytes) -> DecodedImage:
    """Like `decode`, for an image of unknown size; the pixels are as stored.

    Raises:
        SizeError: the image has more pixels than Pillow's limit, twice ``Image.MAX_IMAGE_PIXELS``.
        Exception: any exception that Pillow raises for a file it cannot decode.
    """
    try:
        with _open(data) as image:
            height, width = stored_size(image)
    except Image.DecompressionBombError as error:
        raise SizeError(f"too many pixels: {error}; scale it down") from None
    return decode(data, height, width)


def gray_thumbnails(data: bytes, side: int) -> list[np.ndarray]:
    """Decode an image file of any size to gray thumbnails, downscaled by averaging.

    An image with an EXIF orientation has two, as stored and rotated upright, since a detector may have been trained on
    either.

    Args:
        data: contents of a file in one of the `FORMATS`.
        side: height and width of the thumbnails in pixels.

    Returns:
        One or two (side, side) uint8 arrays.

    Raises:
        SizeError: the image has too many pixels.
        Exception: any exception that Pillow raises for a file it cannot decode.
    """
    # Beyond the first limit, only one image is decoded at a time (`_allow_pixels`); most images are below it.
    for limit in (_LARGE_IMAGE_PIXELS, _MAX_UNDECLARED_PIXELS):
        with suppress(Image.DecompressionBombError), _allow_pixels(limit), _open(data) as image:
            if image.width * image.height <= limit:
                return _gray_thumbnails(image, side)
    raise SizeError(f"more than the limit of {_MAX_UNDECLARED_PIXELS / 1e6:.0f} megapixels")


def rgb_thumbnail(data: bytes, side: int, height: int, width: int) -> Image.Image:
    """Decode an image file to an RGB thumbnail for display, with the pixels as stored.

    Args:
        data: contents of a file in one of the `FORMATS`.
        side: longest side of the thumbnail in pixels.
        height: height in pixels as stored, according to the store of features.
        width: width in pixels as stored, likewise.

    Returns:
        The thumbnail, in the proportions of the image.

    Raises:
        SizeError: the image has another size; it is then not decoded.
        Exception: any exception that Pillow raises for a file it cannot decode.
    """
    with _allow_pixels(height * width), _open(data) as image:
        if (size := stored_size(image)) != (height, width):
            raise SizeError(f"is {size[1]}x{size[0]}, but the store says {width}x{height}")
        if image.mode in ("L", "RGB"):
            image.draft("RGB", (side, side))  # decodes a JPEG at the smallest eighth, quarter or half that is enough
        orientation = exif_orientation(image)
        thumbnail = Image.fromarray(stored_pixels(as_rgb(image), image, orientation))
    thumbnail.thumbnail((side, side), Image.Resampling.BILINEAR)
    return thumbnail


def orient_points(points: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and mirror points as `apply_orientation` does pixels.

    Args:
        points: (N, 2) x and y as fractions of the width and height of the image as stored.
        orientation: EXIF orientation, 1 to 8.

    Returns:
        (N, 2) x and y as fractions of the width and height of the upright image.
    """
    transposed = points[:, ::-1] if orientation in SIDEWAYS else points
    x = 1 - transposed[:, 0] if orientation in (2, 3, 6, 7) else transposed[:, 0]
    y = 1 - transposed[:, 1] if orientation in (3, 4, 7, 8) else transposed[:, 1]
    return np.stack([x, y], axis=1)


def _gray_thumbnails(image: Image.Image, side: int) -> list[np.ndarray]:
    """`gray_thumbnails` of an opened image."""
    if image.mode in ("L", "RGB"):
        # decodes a JPEG at as little as an eighth of its size, which is much faster; at 4 times the size of the
        # thumbnail, there is enough to average
        image.draft("L", (4 * side, 4 * side))
    orientation = exif_orientation(image)
    gray = as_rgb(image).convert("L").resize((side, side), Image.Resampling.BOX)
    stored = undo_pillow_rotation(np.asarray(gray), image, orientation)
    return [stored] if orientation == UPRIGHT else [stored, apply_orientation(stored, orientation)]


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    """Open an image of a supported format, refusing files that take far more memory or time than their pixels."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.format == "TIFF":
            tags = image.tag_v2  # type: ignore[attr-defined]
            tile = tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_LENGTH, 0)
            if tile > image.width * image.height + _TIFF_TILE_PIXELS:
                raise ValueError(f"its tiles of {tile} pixels are far larger than the image")
        elif image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > _MAX_SCANS:
            raise ValueError(f"a JPEG with more than {_MAX_SCANS} scans")
        yield image


@contextmanager
def _allow_pixels(pixels: int) -> Iterator[None]:
    """Let Pillow decode an image of this many pixels within the block, large images one at a time.

    Pillow's limit against decompression bombs is global to the process, so it is raised only within the block.
    """
    if pixels <= _LARGE_IMAGE_PIXELS:
        yield
        return
    with _large_image_lock:
        before = Image.MAX_IMAGE_PIXELS
        if before is not None:
            Image.MAX_IMAGE_PIXELS = max(before, pixels)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _orientation_hint(orientation: int, exif: str) -> str:
    """The end of a message about an image of another size: what its EXIF orientation explains, "" for nothing."""
    if orientation not in SIDEWAYS:
        return ""
    if exif == "apply":
        return f" and its EXIF orientation {orientation} rotates it; omit `exif='apply'` if it was annotated as stored"
    return f" and its EXIF orientation is {orientation}; add `exif='apply'` if it was annotated upright"
