"""The records of one image, as the readers of LMDBs unpack them."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import numpy as np

from refdet.errors import InputError
from refdet.store.export import portable_pickle
from refdet.structures.regions import Regions

PROTOCOL = 4  # of pickles: the readers run on Python 3.6 too
CLASS_PROB = "class_prob"


def vilbert_multi_task(regions: Regions, feature: str) -> bytes:
    """The record of facebookresearch/vilbert-multi-task.

    Returns:
        a pickled dict: ``image_id`` (text), ``image_h``, ``image_w``, ``num_boxes`` (int), and as float32 arrays
        ``boxes`` (n, 4), half-open xyxy in pixels, ``features`` (n, width) and, if the store has class probabilities,
        ``cls_prob`` (n, 1 + classes), the background first.
    """
    return portable_pickle.dumps(_vilbert(regions, feature), PROTOCOL)


def vilbert_beta(regions: Regions, feature: str) -> bytes:
    """The record of jiasenlu/vilbert_beta: as `vilbert_multi_task`, each array as base64 of its values row by row."""
    record = {name: base64.b64encode(value.tobytes()) if isinstance(value, np.ndarray) else value
              for name, value in _vilbert(regions, feature).items()}  # fmt: skip
    return portable_pickle.dumps(record, PROTOCOL)


def uniter(regions: Regions, feature: str, soft_labels: np.ndarray) -> bytes:
    """The record of ChenRocks/UNITER, of a database that is not compressed.

    Args:
        regions: those of one image.
        feature: which feature is written.
        soft_labels: (n, 1 + classes) probabilities, the background first.

    Returns:
        MessagePack of a dict of float16 arrays in the form of msgpack-numpy: ``norm_bb`` (n, 6), x1 y1 x2 y2 w h as
        fractions of the image's sides; ``features`` (n, width); ``conf`` (n,), the scores; ``soft_labels``.

    Raises:
        InputError: a number is beyond float16.
    """
    with np.errstate(all="ignore"):  # looked for below
        corners = regions.boxes.astype(np.float64) / ([regions.width, regions.height] * 2)
        arrays = {
            "norm_bb": np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1),
            "features": regions.features[feature], "conf": regions.scores, "soft_labels": soft_labels,
        }  # fmt: skip
        halves = {name: np.ascontiguousarray(values, np.float16) for name, values in arrays.items()}
    for name, values in halves.items():
        if not np.isfinite(values).all():
            raise InputError(f"image {regions.image_id}: {name} has numbers beyond float16, which UNITER's files hold; "
                             "export another --feature")  # fmt: skip
    return msgspec.msgpack.encode({name: _msgpack_numpy(values) for name, values in halves.items()})


def soft_labels_of(regions: Regions, places: dict[int, int]) -> np.ndarray:
    """Probabilities where the store has none: a region's score for its category, the rest for the background.

    Args:
        regions: those of one image.
        places: category id -> its column, from 1 on.

    Returns:
        (n, 1 + classes) float32.
    """
    probabilities = np.zeros((len(regions), 1 + len(places)), np.float32)
    columns = [places[category] for category in regions.category_ids.tolist()]
    scores = np.clip(regions.scores, 0, 1)  # of given boxes they may be anything
    probabilities[np.arange(len(regions)), columns] = scores
    probabilities[:, 0] = 1 - scores
    return probabilities


def _vilbert(regions: Regions, feature: str) -> dict[str, Any]:
    record: dict[str, Any] = {
        "image_id": str(regions.image_id), "image_h": regions.height, "image_w": regions.width,
        "num_boxes": len(regions), "boxes": np.ascontiguousarray(regions.boxes, np.float32),
        "features": np.ascontiguousarray(regions.features[feature], np.float32),
    }  # fmt: skip
    if CLASS_PROB in regions.features:
        record["cls_prob"] = np.ascontiguousarray(regions.features[CLASS_PROB], np.float32)
    return record


def _msgpack_numpy(values: np.ndarray) -> dict[bytes, Any]:
    """An array as the package msgpack-numpy packs it; it tells arrays from maps by the key ``nd``, which is bytes."""
    return {b"nd": True, b"type": values.dtype.str, b"kind": b"", b"shape": values.shape, b"data": values.tobytes()}
