"""JSON for the page: what there is to show, a page of a list, one image, and a whole list to download."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from refdet.data.segmentations import to_rle
from refdet.errors import ArgumentError, InputError
from refdet.report.browse.catalog import SIZES
from refdet.report.browse.collection import Collection
from refdet.report.browse.queries import Filter, ListPage

# the columns that `_referent` takes
_REFERENT = "r.key, r.label, r.position, r.split, r.category, r.size, r.boxes, r.iou0, r.best0, r.iou1, r.best1"


def about(collection: Collection) -> dict[str, Any]:
    """What the collection contains, for the controls of the page."""
    catalog = collection.catalog
    splits = [row[0] for row in catalog.rows("SELECT DISTINCT split FROM referent WHERE split != '' ORDER BY split")]
    first = collection.stores[0]
    return {
        "stores": [
            {"name": store.path.name, "images": len(store), "regions": store.regions} for store in collection.stores
        ],
        "names": {
            "stores": [_pairs(names) for names in collection.names],
            "referents": _pairs(collection.referent_names),
            "annotations": _pairs(collection.annotation_names),
        },
        "most_regions": max(int(np.diff(store.region_start).max(initial=0)) for store in collection.stores),
        "splits": splits,
        "refs": catalog.count("referent"),
        "sentences": catalog.count("sentence"),
        "annotations": catalog.count("annotation"),
        "failed": catalog.count("image", "error != ''"),
        "masks": any(store.has_masks for store in collection.stores) or catalog.count("segmentation") > 0,
        "images": collection.source is not None,
        "predictions": collection.inputs.predictions is not None,
        "notes": collection.notes if len(first) else [*collection.notes, f"{first.path.name} has no images"],
    }


def items(collection: Collection, filter_: Filter, page: ListPage) -> dict[str, Any]:
    """A page of a list, for the grid, and the length of the whole list."""
    keys = filter_.keys(collection.catalog, page.offset, page.limit)
    if filter_.show == "refs":
        entries = [_referent_item(collection, key) for key in keys]
    else:
        entries = [
            {**_image(collection, position), "boxes": collection.preview_boxes(position, page.top, page.score)}
            for position in keys
        ]
    return {"total": filter_.count(collection.catalog), "offset": page.offset, "items": entries}


def image_details(collection: Collection, image_id: int) -> dict[str, Any]:
    """One image: its regions in each store, its referents with their sentences, and its annotations.

    Raises:
        ArgumentError: the first store has no such image.
    """
    position = collection.position(image_id)
    if position is None:
        raise ArgumentError("image", f"no image {image_id} in {collection.stores[0].path.name}")
    record, catalog = collection.record(position), collection.catalog
    rows = catalog.rows(f"SELECT {_REFERENT} FROM referent r WHERE r.position = ? ORDER BY r.key", (position,))
    size = (record.height, record.width)
    annotated = catalog.rows("SELECT category, box FROM annotation WHERE position = ?", (position,))
    return {
        **_image(collection, position),
        "stores": [collection.regions(number, image_id) for number in range(len(collection.stores))],
        "referents": [
            {**_referent(row), "sentences": _sentences(collection, row[0]), **_mask(collection, row[0], size)}
            for row in rows
        ],
        "annotations": [{"category": str(category), "box": json.loads(box)} for category, box in annotated],
    }


def _mask(collection: Collection, key: int, size: tuple[int, int]) -> dict[str, str]:
    """The mask of all objects of a referent, as compressed RLE, and why there is none although there should be.

    Both are "" if no object has a segmentation.
    """
    segmentations = collection.catalog.segmentations(key)
    try:
        rles = [to_rle(segmentation, *size) for segmentation in segmentations]
    except InputError as error:
        return {"mask": "", "mask_error": str(error)}
    counts = coco_mask.merge(rles)["counts"].decode("ascii") if rles else ""
    return {"mask": counts, "mask_error": ""}


def whole_list(collection: Collection, filter_: Filter) -> list[dict[str, Any]]:
    """All entries of a list, as they are downloaded."""
    catalog, keys = collection.catalog, filter_.keys(collection.catalog, limit=-1)
    images = {row[0]: row for row in catalog.rows("SELECT position, id, name, regions, error FROM image")}
    if filter_.show == "images":
        rows = [images[position] for position in keys]
        return [
            {"image_id": image_id, "file_name": name, "regions": regions, "error": error}
            for _, image_id, name, regions, error in rows
        ]
    referents = {row[0]: _referent(row) for row in catalog.rows(f"SELECT {_REFERENT} FROM referent r")}
    sentences = defaultdict[int, list[dict[str, Any]]](list)
    for key, sent_id, text, wrong in catalog.rows("SELECT referent, sent_id, text, wrong FROM sentence ORDER BY key"):
        sentence = {"sent_id": sent_id, "sent": text}
        sentences[key].append(sentence if wrong is None else {**sentence, "wrong": bool(wrong)})
    entries = []
    for key in keys:
        referent = referents[key]
        _, image_id, name, _, _ = images[referent["position"]]
        entries.append(
            {
                "label": referent["label"],
                "image_id": image_id,
                "file_name": name,
                "split": referent["split"],
                "category_id": None if referent["category"] is None else int(referent["category"]),
                "size": referent["size"],
                "boxes": referent["boxes"],
                "best_iou": referent["iou"],
                "sentences": sentences[key],
            }
        )
    return entries


def _image(collection: Collection, position: int) -> dict[str, Any]:
    """An image, by its position: its columns in the catalog, and why it cannot be shown, "" if it can."""
    row = collection.catalog.rows(
        "SELECT position, id, name, width, height, regions, error FROM image WHERE position = ?", (position,)
    )[0]
    image = dict(zip(("position", "image_id", "name", "width", "height", "regions", "error"), row, strict=True))
    return image | {"image_id": str(row[1]), "missing": _why_missing(collection, position)}


def _why_missing(collection: Collection, position: int) -> str:
    """Why an image cannot be shown, "" if there is a file for it."""
    if collection.source is None:
        return "no images were given; start refdet browse with --images"
    record = collection.record(position)
    if collection.source.find(record) is None:
        return f"no file for this image: {collection.source.why_missing(record)}"
    return ""


def _referent(row: tuple) -> dict[str, Any]:
    """A referent, from the columns `_REFERENT`; "iou" and "best" have an entry for each of two stores."""
    key, label, position, split, category, size, boxes, iou0, best0, iou1, best1 = row
    return {
        "key": key,
        "label": label,
        "position": position,
        "split": split,
        "category": None if category is None else str(category),
        "size": None if size is None else SIZES[size],
        "boxes": json.loads(boxes),
        "iou": [iou0, iou1],
        "best": [best0, best1],
    }


def _sentences(collection: Collection, key: int) -> list[dict[str, Any]]:
    """The sentences of a referent with a model's answers, by the key of the referent."""
    rows = collection.catalog.rows(
        "SELECT sent_id, text, answer, answer_masks, iou, wrong FROM sentence WHERE referent = ? ORDER BY key", (key,)
    )
    return [
        {
            "sent_id": str(sent_id),
            "text": text,
            "answer": json.loads(answer or "[]"),
            "answer_masks": json.loads(masks or "[]"),
            "iou": iou,
            "wrong": wrong,
        }
        for sent_id, text, answer, masks, iou, wrong in rows
    ]


def _pairs(names: Mapping[int, str]) -> list[list[str]]:
    """[category id, name] pairs, sorted by name; ids are strings, as numbers above 2^53 are not exact in JavaScript."""
    return sorted(([str(i), name] for i, name in names.items()), key=lambda pair: pair[1].casefold())


def _referent_item(collection: Collection, key: int) -> dict[str, Any]:
    """The entry of a referent in the grid: its image, the referent, and the box of its best region or None."""
    row = collection.catalog.rows(f"SELECT {_REFERENT} FROM referent r WHERE r.key = ?", (key,))[0]
    referent = _referent(row)
    best = referent["best"][0]
    return {
        **_image(collection, referent["position"]),
        "referent": {**referent, "sentences": _sentences(collection, key)},
        "best_box": None if best is None else collection.box(referent["position"], best),
    }
