"""What the readers of bottom-up-attention's npz files look for in them, reader by reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refdet.store.export.file_names import base_name, unusable
from refdet.structures.regions import Regions

Arrays = dict[str, Any]
NUMBERS_NOTE = ("objects_id numbers the detector's classes from 0, without the background, as bottom-up-attention "
                "has since September 2020; refdet's older exports count from 1")  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How the files of one reader look.

    Attributes:
        arrays: regions, which feature, the file's name and the places of the categories -> what the file holds.
        names: what its files are called by default, see `refdet.store.export.file_names`.
        folder: where in the export its files lie.
        image_id: the id that the reader makes of a file's name; ValueError where it cannot.
        notes: what a user should know.
        empty: what becomes of an image without regions.
    """

    arrays: Callable[[Regions, str, str, Mapping[int, int]], Arrays]
    names: str = "stem"
    folder: str = ""
    image_id: Callable[[str], str] | None = None
    notes: tuple[str, ...] = ()
    empty: str = "their files hold 0 boxes"


def check_names(path: Path, layout: Layout, names: Mapping[int, str]) -> list[str]:
    """InputError if the reader cannot tell the images apart by these names; notes on what it will read otherwise."""
    if layout.image_id is None:
        return []
    owner: dict[str, int] = {}
    for image_id, name in names.items():
        try:
            read = layout.image_id(name)
        except ValueError:
            raise unusable(path, f"the reader finds no image id in {name!r} of image {image_id}") from None
        other = owner.setdefault(read, image_id)
        if other != image_id:
            raise unusable(path, f"the reader takes images {other} and {image_id} both for {read!r}")
    others = [image_id for read, image_id in owner.items() if read != str(image_id)]
    if not others:
        return []
    read = layout.image_id(names[others[0]])
    return [f"{len(others)} images are read by another id than the store's (image {others[0]} as {read!r}); "
            "if that is wrong, export with --names id"]  # fmt: skip


def bottom_up_attention(regions: Regions, feature: str, name: str, places: Mapping[int, int]) -> Arrays:
    """The file of MILVLG/bottom-up-attention.pytorch.

    Returns:
        ``x`` (n, width) float32; ``bbox`` (n, 4) float32, half-open xyxy in pixels; ``num_bbox``, ``image_h``,
        ``image_w``; ``info``, a dict that numpy pickles, with ``image_id`` (the name), ``image_h``, ``image_w``,
        ``num_boxes``, ``objects_id`` (n,) int64, places in the detector's classes from 0 on, ``objects_conf`` (n,)
        float32, and, ours, ``category_id`` (n,) int64, COCO's.
    """
    info = {
        "image_id": name, "image_h": regions.height, "image_w": regions.width, "num_boxes": len(regions),
        "objects_id": _objects(regions, places), "objects_conf": regions.scores, "category_id": regions.category_ids,
    }  # fmt: skip
    return {
        "x": _features(regions, feature), "bbox": regions.boxes, "num_bbox": len(regions),
        "image_h": regions.height, "image_w": regions.width, "info": info,
    }  # fmt: skip


def transposed(regions: Regions, feature: str, name: str, places: Mapping[int, int]) -> Arrays:
    """The same with ``x`` (width, n), as openvqa's VQA loader and mcan-vqa transpose it back."""
    x = np.ascontiguousarray(_features(regions, feature).T)
    return bottom_up_attention(regions, feature, name, places) | {"x": x}


def openvqa_gqa(regions: Regions, feature: str, name: str, places: Mapping[int, int]) -> Arrays:
    """The file of openvqa's GQA loader: ``x`` (n, width), ``bbox`` (n, 4), and the image's ``height``, ``width``."""
    return {
        "x": _features(regions, feature), "bbox": regions.boxes, "num_bbox": len(regions),
        "height": regions.height, "width": regions.width,
    }  # fmt: skip


def rosita(regions: Regions, feature: str, name: str, places: Mapping[int, int]) -> Arrays:
    """The file of ROSITA, which its loaders and its converter to TSV read; the attributes are zeros."""
    n = len(regions)
    return {
        "filename": base_name(regions.file_name), "x": _features(regions, feature), "image_h": regions.height,
        "image_w": regions.width, "num_boxes": n, "boxes": regions.boxes, "objects_id": _objects(regions, places),
        "objects_conf": regions.scores, "attrs_id": np.zeros(n, np.int64), "attrs_conf": np.zeros(n, np.float32),
    }  # fmt: skip


def _features(regions: Regions, feature: str) -> np.ndarray:
    return regions.features[feature].astype(np.float32)


def _objects(regions: Regions, places: Mapping[int, int]) -> np.ndarray:
    return np.array([places[category] for category in regions.category_ids.tolist()], np.int64)


def _trailing_number(name: str) -> str:
    return str(int(name.split("_")[-1].split(".")[0]))


def _up_to_a_dot(name: str) -> str:
    return name.split(".")[0]


LAYOUTS = {
    "bottom-up-attention": Layout(bottom_up_attention, notes=(NUMBERS_NOTE,)),
    "openvqa": Layout(transposed, image_id=_trailing_number, notes=(NUMBERS_NOTE,)),
    "openvqa-gqa": Layout(openvqa_gqa, image_id=_up_to_a_dot,
                          notes=("openvqa's GQA loader reads grid features too, which are not in here",)),
    "mcan": Layout(transposed, image_id=_trailing_number, notes=(NUMBERS_NOTE,)),
    "rosita": Layout(rosita, "file", "npz_files",  # a folder of their own: its converter reads every file there
                     notes=(NUMBERS_NOTE, "attrs_id and attrs_conf are zeros: the detector knows no attributes"),
                     empty="their files hold 0 boxes, at which ROSITA's loaders stop"),
}  # fmt: skip
