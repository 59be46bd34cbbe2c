"""Convert opened images to RGB or gray."""

from __future__ import annotations

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""Supported formats. Pillow has more, some of which run other programs on the file."""


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
