"""The pixels of an opened image as everything here reads them."""

from __future__ import annotations

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""What photographs come in. Pillow knows many more, some of which run other programs on the file."""


def as_rgb(image: Image.Image) -> Image.Image:
    """The first picture of an image in mode RGB, or L where it has 16 bits of grey, of which the upper 8 are kept.

    Greyscale, palette and CMYK become RGB; transparency is left out. Pixels are as Pillow orders them.

    Raises:
        ValueError: its pixels have no known range.
        Exception: of any kind that Pillow has for a file it cannot decode.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow would cut off what is brighter than 255 of 65535. Of 16-bit colour it keeps the upper byte itself.
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are numbers without a known range, Pillow's mode {image.mode}")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")
