"""Convert opened images to RGB or gray, with the pixels as stored: COCO's boxes ignore the EXIF orientation."""

from __future__ import annotations

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""Supported formats. Pillow has more, some of which run other programs on the file."""

_ORIENTATION, _WIDTH, _LENGTH = 274, 256, 257  # EXIF and TIFF tags
UPRIGHT = 1
"""EXIF orientation of pixels that are stored as seen."""
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


def stored_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of the stored pixels; Pillow reports a TIFF's size after rotation."""
    if image.format == "TIFF":
        return image.tag_v2[_LENGTH], image.tag_v2[_WIDTH]  # type: ignore[attr-defined]
    return image.height, image.width


def exif_orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, of an image that is not decoded yet; 1 if there is none or it is damaged."""
    if image.format != "TIFF":  # a TIFF loses it when decoded; other formats may store it after the pixels
        image.load()
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata can raise anything
        return UPRIGHT
    return value if isinstance(value, int) and 1 < value <= 8 else UPRIGHT


def stored_pixels(converted: Image.Image, image: Image.Image, orientation: int) -> np.ndarray:
    """Pixels as stored.

    Args:
        converted: the image as converted by `as_rgb`.
        image: the image.
        orientation: its `exif_orientation` before it was converted.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    pixels = np.asarray(converted)
    return undo_pillow_rotation(np.stack([pixels] * 3, axis=2) if pixels.ndim == 2 else pixels, image, orientation)


def undo_pillow_rotation(pixels: np.ndarray, image: Image.Image, orientation: int) -> np.ndarray:
    """Undo the rotation of a TIFF by Pillow, which removes the orientation from the tags when it has applied it."""
    if image.format == "TIFF" and _ORIENTATION not in image.getexif():
        # 6 and 8 are quarter turns in opposite directions; every other orientation is its own inverse
        return apply_orientation(pixels, {6: 8, 8: 6}.get(orientation, orientation))
    return pixels


def apply_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and mirror pixels (H, W, ...) by an EXIF orientation of 1 to 8."""
    if orientation in SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert the first frame of an image to mode RGB, or to L for 16-bit gray.

    Grayscale, palette and CMYK images become RGB; transparency is dropped. Of 16 bits the upper 8 are kept.

    Args:
        image: an opened image.

    Returns:
        The converted image, in Pillow's orientation.

    Raises:
        ValueError: the range of its pixels is unknown.
        Exception: any exception that Pillow raises for a file it cannot decode.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow would clip values at 255 of 65535. For 16-bit color it keeps the upper byte.
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of unknown range (Pillow's mode {image.mode})")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")
