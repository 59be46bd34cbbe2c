"""What the page shows: a part of a list, one image, and the list as a file."""

from __future__ import annotations

import json
from typing import Any

from refdet.errors import ArgumentError
from refdet.report.browse.catalog import SIZES
from refdet.report.browse.collection import Collection
from refdet.report.browse.queries import Filter

_PREVIEWED = 100  # regions in a thumbnail
_OBJECT = "o.key, o.label, o.position, o.split, o.category, o.size, o.boxes, o.iou0, o.best0, o.iou1, o.best1"


def about(collection: Collection) -> dict[str, Any]:
    """What there is to show, for the controls of the page."""
    catalog = collection.catalog
    splits = [row[0] for row in catalog.rows("SELECT DISTINCT split FROM object WHERE split != '' ORDER BY split")]
    first = collection.stores[0]
    return {
        "stores": [{"name": one.path.name, "images": len(one), "regions": one.regions} for one in collection.stores],
        "categories": sorted([[i, name] for i, name in collection.names.items()], key=lambda pair: str(pair[1])),
        "splits": splits,
        "refs": catalog.count("object"),
        "sentences": catalog.count("sentence"),
        "annotations": catalog.count("annotation"),
        "failed": catalog.count("image", "error != ''"),
        "masks": any(one.has_masks for one in collection.stores),
        "images": collection.source is not None,
        "predictions": collection.inputs.predictions is not None,
        "notes": collection.notes if len(first) else [*collection.notes, f"{first.path.name} has no images"],
    }


def items(collection: Collection, chosen: Filter, offset: int, limit: int) -> dict[str, Any]:
    """A part of a list for the grid, and its length."""
    keys = chosen.keys(collection.catalog, offset, limit)
    make = _ref_item if chosen.show == "refs" else _image_item
    return {
        "total": chosen.count(collection.catalog),
        "offset": offset,
        "items": [make(collection, key) for key in keys],
    }


def single(collection: Collection, image_id: int) -> dict[str, Any]:
    """One image: its regions in each store, its referents with their sentences, and its annotations.

    Raises:
        ArgumentError: the first store has no such image.
    """
    position = collection.position(image_id)
    if position is None:
        raise ArgumentError("image", f"no image {image_id} in {collection.stores[0].path.name}")
    record, catalog = collection.record(position), collection.catalog
    why = ""
    if collection.source is None:
        why = "no images were given; start refdet browse with --images"
    elif collection.source.find(record) is None:
        why = f"no file for this image: {collection.source.why_missing(record)}"
    found = catalog.rows(f"SELECT {_OBJECT} FROM object o WHERE o.position = ? ORDER BY o.key", (position,))
    annotated = catalog.rows("SELECT category, box FROM annotation WHERE position = ?", (position,))
    return {
        **_image(collection, position),
        "missing": why,
        "stores": [collection.regions(number, image_id) for number in range(len(collection.stores))],
        "objects": [{**_object(row), "sentences": _sentences(collection, row[0])} for row in found],
        "annotations": [{"category": category, "box": json.loads(box)} for category, box in annotated],
    }


def whole_list(collection: Collection, chosen: Filter) -> list[dict[str, Any]]:
    """All entries of a list, for a file."""
    catalog, positions = collection.catalog, chosen.keys(collection.catalog, limit=-1)
    images = {row[0]: row for row in catalog.rows("SELECT position, id, name, regions, error FROM image")}
    if chosen.show == "images":
        rows = [images[position] for position in positions]
        return [{"image_id": i, "file_name": name, "regions": n, "error": why} for _, i, name, n, why in rows]
    objects = {row[0]: _object(row) for row in catalog.rows(f"SELECT {_OBJECT} FROM object o")}
    sentences: dict[int, list[dict[str, Any]]] = {}
    for key, sent_id, text, wrong in catalog.rows("SELECT object, sent_id, text, wrong FROM sentence ORDER BY key"):
        entry = {"sent_id": sent_id, "sent": text} | ({} if wrong is None else {"wrong": bool(wrong)})
        sentences.setdefault(key, []).append(entry)
    listed = []
    for key in positions:
        one = objects[key]
        _, image_id, name, _, _ = images[one["position"]]
        about_it = {"label": one["label"], "image_id": image_id, "file_name": name, "split": one["split"]}
        what = {"category_id": one["category"], "size": one["size"], "boxes": one["boxes"]}
        listed.append({**about_it, **what, "best_iou": one["iou"], "sentences": sentences.get(key, [])})
    return listed


def _image(collection: Collection, position: int) -> dict[str, Any]:
    row = collection.catalog.rows(
        "SELECT position, id, name, width, height, regions, error FROM image WHERE position = ?", (position,)
    )[0]
    return dict(zip(("position", "image_id", "name", "width", "height", "regions", "error"), row, strict=True))


def _object(row: tuple) -> dict[str, Any]:
    key, label, position, split, category, size, boxes, iou0, best0, iou1, best1 = row
    return {
        "key": key,
        "label": label,
        "position": position,
        "split": split,
        "category": category,
        "size": None if size is None else SIZES[size],
        "boxes": json.loads(boxes),
        "iou": [iou0, iou1],
        "best": [best0, best1],
    }


def _sentences(collection: Collection, key: int) -> list[dict[str, Any]]:
    rows = collection.catalog.rows(
        "SELECT sent_id, text, answer, iou, wrong FROM sentence WHERE object = ? ORDER BY key", (key,)
    )
    return [
        {"sent_id": sent_id, "text": text, "answer": json.loads(answer or "[]"), "iou": iou, "wrong": wrong}
        for sent_id, text, answer, iou, wrong in rows
    ]


def _image_item(collection: Collection, position: int) -> dict[str, Any]:
    return {**_image(collection, position), **collection.boxes(position, _PREVIEWED)}


def _ref_item(collection: Collection, key: int) -> dict[str, Any]:
    row = collection.catalog.rows(f"SELECT {_OBJECT} FROM object o WHERE o.key = ?", (key,))[0]
    one = _object(row)
    best = one["best"][0]
    return {
        **_image(collection, one["position"]),
        "object": {**one, "sentences": _sentences(collection, key)},
        "best_box": None if best is None else collection.box(one["position"], best),
    }
