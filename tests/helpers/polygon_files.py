"""Instances files with one annotation, and what their readers return or raise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from refdet.data.coco import CocoIndex
from refdet.errors import InputError
from refdet.splits.instances_check import InstancesCheck
from refdet.splits.list_reading import read_image_list

HEIGHT, WIDTH = 12, 16
SQUARE = [1, 1, 5, 1, 5, 5, 1, 5]


def write(
    path: Path, segmentation: Any, height: int = HEIGHT, width: int = WIDTH, annotations_first: bool = False
) -> Path:
    parts = {
        "images": [{"id": 3, "file_name": "a.png", "height": height, "width": width}],
        "annotations": [{"id": 7, "image_id": 3, "category_id": 1, "bbox": [1, 1, 4, 4], "segmentation": segmentation}],
        "categories": [{"id": 1, "name": "dog"}],
    }  # fmt: skip
    order = ["annotations", "categories", "images"] if annotations_first else list(parts)
    path.write_text(json.dumps({name: parts[name] for name in order}))
    return path


def load(path: Path) -> CocoIndex | str:
    """The `CocoIndex` of a file, or its error."""
    try:
        return CocoIndex.load(path)
    except InputError as error:
        return str(error)


def check(path: Path) -> str:
    """The error of build-split's check of a file, "" for none."""
    entries = InstancesCheck(path)
    try:
        entries.finish(read_image_list(path, entries))
    except InputError as error:
        return str(error)
    return ""
