"""Layouts of npz files, as bottom-up-attention writes them and as other programs read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refdet.files.short_text import format_count
from refdet.store.export.file_names import base_name, unusable_names
from refdet.structures.regions import Regions

Arrays = dict[str, Any]
OBJECTS_ID_NOTE = (
    "objects_id counts the detector's classes from 0, without the background, as bottom-up-attention does "
    "since September 2020; older exports of refdet count from 1"
)


@dataclass(frozen=True)
class Layout:
    """Layout of the files for a program.

    Attributes:
        arrays: returns the contents of a file, from regions, feature name, file name and category id -> index.
        names: kind of file names that the program expects, "stem", "file" or "id" (`file_names.file_names`).
        folder: folder of the files in the export; "" for the export's own.
        image_id: returns the image id that the program parses from a file name, and raises ValueError if there is none;
            None if the program parses no ids.
        notes: human-readable notes.
        empty: what happens to images without regions, for a note.
    """

    arrays: Callable[[Regions, str, str, Mapping[int, int]], Arrays]
    names: str = "stem"
    folder: str = ""
    image_id: Callable[[str], str] | None = None
    notes: tuple[str, ...] = ()
    empty: str = "written with 0 boxes"


def check_names(path: Path, layout: Layout, names: Mapping[int, str]) -> list[str]:
    """Check that the program can identify images by their file names.

    Args:
        path: the store, for error messages.
        layout: layout of the files.
        names: image id -> file name.

    Returns:
        Notes about images that the program identifies by another id.

    Raises:
        InputError: a name without an image id, or two names with the same id.
    """
    if layout.image_id is None:
        return []
    image_of: dict[str, int] = {}  # id that the program parses -> image id
    for image_id, name in names.items():
        try:
            parsed = layout.image_id(name)
        except ValueError:
            raise unusable_names(path, f"no image id in {name!r} of image {image_id}") from None
        other = image_of.setdefault(parsed, image_id)
        if other != image_id:
            raise unusable_names(path, f"images {other} and {image_id} are both read as {parsed!r}")
    mismatched = [(image_id, parsed) for parsed, image_id in image_of.items() if parsed != str(image_id)]
    if not mismatched:
        return []
    image_id, parsed = mismatched[0]
    images = format_count(len(mismatched), "image", "is")
    return [
        f"{images} read with another id than in the store (image {image_id} as {parsed!r}); if that is wrong, export "
        "with `names='id'`"
    ]


def bottom_up_attention(regions: Regions, feature: str, name: str, category_index: Mapping[int, int]) -> Arrays:
    """Contents of a file for MILVLG/bottom-up-attention.pytorch.

    Args:
        regions: regions of an image.
        feature: the feature to write.
        name: name of the file.
        category_index: category id -> index in the classes of the store.

    Returns:
        ``x`` (N, width) float32; ``bbox`` (N, 4) float32, half-open xyxy in pixels; ``num_bbox``, ``image_h``,
        ``image_w``; ``info``, a pickled dict with ``image_id`` (the name), ``image_h``, ``image_w``, ``num_boxes``,
        ``objects_id`` (N,) int64, indices into the detector's classes from 0, ``objects_conf`` (N,) float32, and in
        addition ``category_id`` (N,) int64, COCO's category ids.
    """
    info = {
        "image_id": name,
        "image_h": regions.height,
        "image_w": regions.width,
        "num_boxes": len(regions),
        "objects_id": _object_ids(regions, category_index),
        "objects_conf": regions.scores,
        "category_id": regions.category_ids,
    }
    return {
        "x": _features(regions, feature),
        "bbox": regions.boxes,
        "num_bbox": len(regions),
        "image_h": regions.height,
        "image_w": regions.width,
        "info": info,
    }


def openvqa_vqa(regions: Regions, feature: str, name: str, category_index: Mapping[int, int]) -> Arrays:
    """As `bottom_up_attention` with ``x`` (width, N), which openvqa's VQA loader and mcan-vqa transpose back."""
    x = np.ascontiguousarray(_features(regions, feature).T)
    return bottom_up_attention(regions, feature, name, category_index) | {"x": x}


def openvqa_gqa(regions: Regions, feature: str, name: str, category_index: Mapping[int, int]) -> Arrays:
    """Contents of a file for openvqa's GQA loader: `bottom_up_attention` with shorter names and without ``info``."""
    return {
        "x": _features(regions, feature),
        "bbox": regions.boxes,
        "num_bbox": len(regions),
        "height": regions.height,
        "width": regions.width,
    }


def rosita(regions: Regions, feature: str, name: str, category_index: Mapping[int, int]) -> Arrays:
    """Contents of a file for ROSITA's loaders and TSV converter: its attributes are zeros."""
    n = len(regions)
    return {
        "filename": base_name(regions.file_name),
        "x": _features(regions, feature),
        "image_h": regions.height,
        "image_w": regions.width,
        "num_boxes": n,
        "boxes": regions.boxes,
        "objects_id": _object_ids(regions, category_index),
        "objects_conf": regions.scores,
        "attrs_id": np.zeros(n, np.int64),
        "attrs_conf": np.zeros(n, np.float32),
    }


def _features(regions: Regions, feature: str) -> np.ndarray:
    return regions.features[feature].astype(np.float32)


def _object_ids(regions: Regions, category_index: Mapping[int, int]) -> np.ndarray:
    """Index of each region's category in the detector's classes, (N,) int64."""
    return np.array([category_index[category] for category in regions.category_ids.tolist()], np.int64)


def _trailing_number(name: str) -> str:
    """The number at the end of a name, without zeros in front: "9" in COCO_train2014_000000000009."""
    return str(int(name.split("_")[-1].split(".")[0]))


def _before_first_dot(name: str) -> str:
    return name.split(".")[0]


LAYOUTS = {
    "bottom-up-attention": Layout(bottom_up_attention, notes=(OBJECTS_ID_NOTE,)),
    "openvqa": Layout(openvqa_vqa, image_id=_trailing_number, notes=(OBJECTS_ID_NOTE,)),
    "openvqa-gqa": Layout(
        openvqa_gqa,
        image_id=_before_first_dot,
        notes=("openvqa's GQA loader also reads grid features, which are not exported",),
    ),
    "mcan": Layout(openvqa_vqa, image_id=_trailing_number, notes=(OBJECTS_ID_NOTE,)),
    "rosita": Layout(
        rosita,
        names="file",
        folder="npz_files",  # ROSITA's converter reads every file in the folder
        notes=(OBJECTS_ID_NOTE, "attrs_id and attrs_conf are zero, as the detector has no attributes"),
        empty="written with 0 boxes, at which ROSITA's loaders fail",
    ),
}
