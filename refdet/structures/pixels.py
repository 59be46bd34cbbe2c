"""RGB pixels of NumPy arrays and PIL images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from refdet.errors import ArgumentError, InputError
from refdet.structures.limits import size_problem
from refer.pixels import FORMATS, apply_orientation, as_rgb, exif_orientation, stored_pixels

if TYPE_CHECKING:
    from PIL import Image


def read_stored_pixels(path: str | Path, exif: str = "ignore") -> np.ndarray:
    """Read an image file for display, (H, W, 3) uint8 RGB, with the pixels that the detector sees.

    The detector reads its inputs with `refdet.data.image_decoder`, which has stricter limits.

    Args:
        path: the file.
        exif: "ignore" to keep the pixels as stored, or "apply" to rotate them upright by their EXIF orientation.

    Raises:
        InputError: the file is missing or not a readable image.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            orientation = exif_orientation(image)
            pixels = stored_pixels(as_rgb(image), image, orientation)
            return np.array(apply_orientation(pixels, orientation) if exif == "apply" else pixels)
    except Exception as error:  # decoders can raise anything on a damaged file
        raise InputError(f"{path}: not a readable image ({error}); give another file") from error


def rgb_pixels(image: np.ndarray | Image.Image) -> np.ndarray:
    """The pixels of an image, (H, W, 3) uint8 RGB. Arrays are not copied.

    16-bit grayscale keeps its upper 8 bits; transparency is dropped.

    Args:
        image: (H, W, 3) uint8 RGB, or a PIL image of any mode whose values have a known range (not "F", nor "I" unless
            it is a 16-bit PNG or PPM).

    Raises:
        ArgumentError: wrong type, shape, dtype or mode; no pixels, or more than `limits.MAX_PIXELS`; or an image that
            PIL cannot decode.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ArgumentError("image", f"uint8 (H, W, 3) RGB is needed, not {image.dtype} {image.shape}")
        problem = size_problem(*image.shape[:2])
    else:
        if not hasattr(image, "getbands"):  # not a PIL image; isinstance would need PIL imported
            raise ArgumentError("image", f"a NumPy array, a PIL image or a path is needed, not {type(image).__name__}")
        problem = size_problem(image.height, image.width)
    if problem:
        raise ArgumentError("image", problem)
    if isinstance(image, np.ndarray):
        return image
    try:
        return np.array(as_rgb(image).convert("RGB"))
    except (ValueError, OSError) as error:
        raise ArgumentError("image", f"cannot be read as RGB: {error}; convert it first") from error
