"""Instances files of drawn scenes, in the format of COCO 2014."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refdet.data.shapes.categories import CATEGORIES
from refdet.data.shapes.scene import Thing


@dataclass(frozen=True)
class Picture:
    """An image file of a scene and its annotated things, with one annotation id per thing."""

    id: int
    file_name: str
    height: int
    width: int
    things: tuple[Thing, ...]
    annotation_ids: tuple[int, ...]


def file_name(split: str, image_id: int) -> str:
    """Name of an image file in COCO 2014; `split` is "train2014" or "val2014"."""
    return f"COCO_{split}_{image_id:012d}.jpg"


def annotation_ids(things: Sequence[Thing], image_id: int, first: int) -> tuple[int, ...]:
    """Annotation ids of the things of a picture, consecutive from `first`.

    A crowd, which is the last thing, has an id as in COCO: the digit 9, its category id (3 digits) and its image id
    (8 digits).
    """
    return tuple(
        int(f"9{thing.category.id:03d}{image_id:08d}") if thing.crowd else first + k for k, thing in enumerate(things)
    )


def _image_record(picture: Picture) -> dict[str, Any]:
    return {
        "license": 1,
        "file_name": picture.file_name,
        "coco_url": "",
        "height": picture.height,
        "width": picture.width,
        "date_captured": "2014-01-01 00:00:00",
        "flickr_url": "",
        "id": picture.id,
    }


def _annotation_record(thing: Thing, annotation_id: int, image_id: int) -> dict[str, Any]:
    x1, y1, x2, y2 = thing.box
    return {
        "segmentation": thing.segmentation,
        "area": float(thing.area),
        "iscrowd": int(thing.crowd),
        "image_id": image_id,
        "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
        "category_id": thing.category.id,
        "id": annotation_id,
    }


def instances(pictures: Sequence[Picture], only: Collection[int] | None = None) -> dict[str, Any]:
    """Make the JSON object of an instances file, of all pictures or of those with an id in `only`."""
    kept = [p for p in pictures if only is None or p.id in only]
    return {
        "info": {
            "description": "Drawn scenes in the layout of COCO 2014",
            "url": "",
            "version": "1.0",
            "year": 2014,
            "contributor": "refdet",
            "date_created": "2014/01/01",
        },
        "images": [_image_record(p) for p in kept],
        "licenses": [{"url": "", "id": 1, "name": "MIT License"}],
        "annotations": [
            _annotation_record(thing, i, p.id)
            for p in kept
            for thing, i in zip(p.things, p.annotation_ids, strict=True)
        ],
        "categories": [{"supercategory": c.supercategory, "id": c.id, "name": c.name} for c in CATEGORIES],
    }


def write_instances(path: Path, pictures: Sequence[Picture], only: Collection[int] | None = None) -> None:
    """Write an instances file, as by `instances`, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(instances(pictures, only)), encoding="utf-8")
