"""Read single images, given as arrays, PIL images or paths."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from refdet.data.image_decoder import check_exif_mode, decode_any_size
from refdet.data.image_source import MAX_UNDECLARED_BYTES, ImageError, why_unreadable
from refdet.files.json_files import read_bytes
from refdet.structures.pixels import rgb_pixels
from refer.pixels import apply_orientation

if TYPE_CHECKING:
    from PIL import Image


def read_pixels(image: np.ndarray | Image.Image | str | Path, exif: str = "ignore") -> np.ndarray:
    """Return the pixels of an image.

    A file is decoded as in an extraction: by default its EXIF orientation is ignored, as COCO's boxes refer to the
    pixels as stored; 16-bit channels are reduced to their upper 8 bits, and transparency is dropped.

    Args:
        image: (H, W, 3) uint8 RGB, a PIL image, or the path of an image file.
        exif: "ignore" to keep the pixels of a file as stored, or "apply" to rotate them upright by their EXIF
            orientation.

    Returns:
        (H, W, 3) uint8 RGB, writable; ``image`` itself if it is such an array.

    Raises:
        ArgumentError: an array of another shape or dtype, an image without pixels, or an unknown ``exif``.
        InputError: no such file, or not a readable image.
    """
    check_exif_mode(exif)
    if not isinstance(image, str | Path):
        pixels = rgb_pixels(image)
        return pixels if pixels.flags.writeable else pixels.copy()  # torch.from_numpy warns about read-only arrays
    data = read_bytes(Path(image), MAX_UNDECLARED_BYTES)
    try:
        decoded = decode_any_size(data)
        return np.array(apply_orientation(decoded.pixels, decoded.orientation)) if exif == "apply" else decoded.pixels
    except Exception as error:  # decoders can raise anything on damaged or hostile files
        raise ImageError(f"{image}: not a readable image ({why_unreadable(error)}); give another file") from error
