"""Draw a ref on its image with matplotlib, for notebooks."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from . import image_folder, image_lookup, plain_files
from .errors import ReferDataError, ReferError, ReferNotFoundError
from .types import Image

_MAX_BYTES = 1 << 29  # of an image file
_MASK_COLOR = (2 / 255, 166 / 255, 101 / 255, 0.5)


def axes() -> Any:
    """Return pyplot's current axes; raises ReferError if matplotlib is not installed."""
    return _matplotlib("pyplot").gca()


def draw_image(ax: Any, folder: str, image: Image, images: Iterable[Image]) -> None:
    """Draw an image, found in a folder by the rules of `refer.image_lookup`.

    Args:
        ax: matplotlib axes.
        folder: folder of the images.
        image: the image.
        images: all images of the dataset, as two of them may match the same file.

    Raises:
        ReferNotFoundError: the image is not found.
        ReferDataError: the file is not a readable image, or its size is not that of ``image``.
    """
    path = _path_of(Path(folder), image, images)
    try:
        pixels = _pixels(path, (image["width"], image["height"]))
    except ReferDataError:
        raise
    except Exception as error:  # decoders can raise anything on damaged or hostile files
        # Pillow's message for this one has only the address of a buffer.
        reason = "no known image format" if type(error).__name__ == "UnidentifiedImageError" else error
        raise ReferDataError(f"{path}: not a readable image ({reason}); replace it") from None
    ax.imshow(pixels)


def _path_of(folder: Path, image: Image, images: Iterable[Image]) -> Path:
    """Path of an image's file; raises ReferNotFoundError if there is none."""
    name = _name(image)
    parts = image_lookup.parts_of(name)
    if parts and (folder / Path(*parts)).is_file():  # faster than listing a folder of COCO's size
        return folder / Path(*parts)
    try:
        listing = image_folder.list_folder(folder)
    except OSError:
        raise ReferNotFoundError(f"{folder}: no such folder; set IMAGE_DIR to the folder of the images") from None
    names = image_lookup.FileNames(
        listing.files,
        folder.absolute().parts,
        listing.link_targets,
        lambda paths: image_folder.same_file([folder / path for path in paths]),
    )
    match = names.locate((other["id"], _name(other)) for other in images)[name or image["id"]]
    if match.path is None:
        raise ReferNotFoundError(
            f"{folder}/{name}: no such image ({match.reason}); set IMAGE_DIR to the folder of the images"
        )
    return folder / match.path


def _name(image: Image) -> str:
    """The file name of an image, "" if it has none."""
    name = image.get("file_name")
    return name if isinstance(name, str) else ""


def _pixels(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Decode an image of (width, height) to (height, width, 3) uint8 RGB, ignoring its EXIF orientation."""
    from PIL import Image as Pillow

    from .pixels import FORMATS, as_rgb, exif_orientation, stored_pixels, stored_size

    data = plain_files.read_file(path, _MAX_BYTES, "an image")
    with Pillow.open(io.BytesIO(data), formats=FORMATS) as pillow_image:
        height, width = stored_size(pillow_image)
        if (width, height) != size:
            raise ReferDataError(
                f"{path}: is {width}x{height}, but instances.json says {size[0]}x{size[1]}; set IMAGE_DIR to the "
                "folder of the images"
            )
        orientation = exif_orientation(pillow_image)
        return stored_pixels(as_rgb(pillow_image), pillow_image, orientation)


def draw_outline(ax: Any, segmentation: Any, mask: np.ndarray) -> None:
    """Draw a segmentation: polygons as red lines with yellow edges, an RLE as its mask in translucent green.

    Args:
        ax: matplotlib axes.
        segmentation: the segmentation.
        mask: its mask, (height, width) uint8 of 0 and 1.
    """
    if isinstance(segmentation, list) and all(isinstance(part, list) for part in segmentation):
        outlines = [np.reshape(polygon, (-1, 2)) for polygon in segmentation if polygon]
        collection = _matplotlib("collections").PolyCollection
        for color, width in (("yellow", 3), ("red", 1)):
            ax.add_collection(collection(outlines, facecolors="none", edgecolors=color, linewidths=width))
    else:
        ax.imshow(mask[:, :, None] * np.array(_MASK_COLOR))


def draw_box(ax: Any, box: list[float]) -> None:
    """Draw a box ``[x, y, width, height]`` in pixels in green."""
    corner, width, height = box[:2], box[2], box[3]
    rectangle = _matplotlib("patches").Rectangle(corner, width, height, fill=False, edgecolor="green", linewidth=3)
    ax.add_patch(rectangle)


def _matplotlib(module: str) -> Any:
    """Import a module of matplotlib; raises ReferError if matplotlib is not installed."""
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError:
        raise ReferError("matplotlib is not installed; showRef and showMask need it: pip install matplotlib") from None
