"""Drawing a ref on its image with matplotlib, for notebooks."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ReferDataError, ReferError, ReferNotFoundError
from .records import Image

_MASK_COLOUR = (2 / 255, 166 / 255, 101 / 255, 0.5)


def axes() -> Any:
    """The current axes of pyplot; ReferError if matplotlib is not installed."""
    return _matplotlib("pyplot").gca()


def draw_image(ax: Any, folder: str, image: Image) -> None:
    """Show an image. ReferNotFoundError names the file that is not there."""
    name = image.get("file_name")
    path = Path(folder) / name if isinstance(name, str) and name else None
    if path is None or not path.is_file():
        raise ReferNotFoundError(f"{path or folder}: no such image; set IMAGE_DIR to the folder of the images")
    try:
        pixels = _matplotlib("pyplot").imread(path)
    except (OSError, ValueError, SyntaxError) as error:  # what matplotlib and pillow raise for a damaged file
        raise ReferDataError(f"{path}: cannot be read as an image ({error})") from None
    ax.imshow(pixels)


def draw_outline(ax: Any, segmentation: Any, mask: np.ndarray) -> None:
    """Polygons as red lines with a yellow rim; the mask of RLEs, (height, width), as a green veil."""
    if isinstance(segmentation, list) and all(isinstance(part, list) for part in segmentation):
        outlines = [np.reshape(polygon, (-1, 2)) for polygon in segmentation if polygon]
        collection = _matplotlib("collections").PolyCollection
        for colour, width in (("yellow", 3), ("red", 1)):
            ax.add_collection(collection(outlines, facecolors="none", edgecolors=colour, linewidths=width))
    else:
        ax.imshow(mask[:, :, None] * np.array(_MASK_COLOUR))


def draw_box(ax: Any, box: list[float]) -> None:
    """A green frame around ``[x, y, width, height]``."""
    corner, width, height = box[:2], box[2], box[3]
    frame = _matplotlib("patches").Rectangle(corner, width, height, fill=False, edgecolor="green", linewidth=3)
    ax.add_patch(frame)


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError:
        raise ReferError("showRef and showMask need matplotlib: pip install matplotlib") from None
