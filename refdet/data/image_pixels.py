"""Read single images, given as arrays, PIL images or paths."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from refdet.data.image_decoder import apply_orientation, decode_any_size
from refdet.data.image_source import ImageError, why_unreadable
from refdet.files.json_files import read_bytes
from refdet.structures.pixels import rgb_pixels

if TYPE_CHECKING:
    from PIL import Image

MAX_BYTES = 1 << 28  # of an image file


def read_pixels(image: np.ndarray | Image.Image | str | Path, exif: str = "ignore") -> np.ndarray:
    """The pixels of an image, (H, W, 3) uint8 RGB.

    A file is decoded as in an extraction: by default its EXIF orientation is ignored, as COCO's boxes refer to the
    pixels as stored. Of 16 bits the upper 8 are kept; transparency is dropped.

    Args:
        image: (H, W, 3) uint8 RGB, a PIL image, or the path of an image file.
        exif: "apply" to rotate the image of a file upright by its EXIF orientation.

    Raises:
        ArgumentError: an array of another shape or dtype, or an image without pixels.
        InputError: no such file, or not a readable image.
    """
    if not isinstance(image, str | Path):
        pixels = rgb_pixels(image)
        return pixels if pixels.flags.writeable else pixels.copy()  # PyTorch warns about read-only arrays
    data = read_bytes(Path(image), MAX_BYTES)
    try:
        decoded = decode_any_size(data)
        return np.array(apply_orientation(decoded.pixels, decoded.orientation)) if exif == "apply" else decoded.pixels
    except Exception as error:  # decoders can raise anything on damaged or hostile files
        raise ImageError(f"{image}: not a readable image ({why_unreadable(error)}); give another file") from error
