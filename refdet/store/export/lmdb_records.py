"""Encode the record of an image in an LMDB for ViLBERT or UNITER."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import numpy as np

from refdet.errors import InputError
from refdet.store.export import portable_pickle
from refdet.structures.regions import Regions

PROTOCOL = 4  # of pickle, for readers on Python 3.6
CLASS_PROB = "class_prob"  # the feature with the probabilities of all classes, the background first


def vilbert_multi_task(regions: Regions, feature: str) -> bytes:
    """Encode a record for facebookresearch/vilbert-multi-task.

    Args:
        regions: regions of an image.
        feature: the feature to write.

    Returns:
        A pickled dict: ``image_id`` (text), ``image_h``, ``image_w``, ``num_boxes`` (int), and float32 arrays ``boxes``
        (N, 4), half-open xyxy in pixels, ``features`` (N, width) and, if the store has class probabilities,
        ``cls_prob`` (N, 1 + classes) with the background first.
    """
    return portable_pickle.dumps(_vilbert_record(regions, feature), PROTOCOL)


def vilbert_beta(regions: Regions, feature: str) -> bytes:
    """Encode a record for jiasenlu/vilbert_beta: as `vilbert_multi_task`, with arrays as base64 in row-major order."""
    record = {
        name: base64.b64encode(value.tobytes()) if isinstance(value, np.ndarray) else value
        for name, value in _vilbert_record(regions, feature).items()
    }
    return portable_pickle.dumps(record, PROTOCOL)


def uniter(regions: Regions, feature: str, soft_labels: np.ndarray) -> bytes:
    """Encode a record for ChenRocks/UNITER, for an uncompressed database.

    Args:
        regions: regions of an image.
        feature: the feature to write.
        soft_labels: (N, 1 + classes) probabilities with the background first.

    Returns:
        MessagePack of a dict of float16 arrays in msgpack-numpy's format: ``norm_bb`` (N, 6), x1 y1 x2 y2 w h as
        fractions of the image size; ``features`` (N, width); ``conf`` (N,), the scores; ``soft_labels``.

    Raises:
        InputError: a number is out of the range of float16.
    """
    with np.errstate(all="ignore"):  # checked below
        corners = regions.boxes.astype(np.float64) / ([regions.width, regions.height] * 2)
        arrays = {
            "norm_bb": np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1),
            "features": regions.features[feature],
            "conf": regions.scores,
            "soft_labels": soft_labels,
        }
        halves = {name: np.ascontiguousarray(values, np.float16) for name, values in arrays.items()}
    for name, values in halves.items():
        if not np.isfinite(values).all():
            raise InputError(
                f"image {regions.image_id}: {name} is out of the range of float16, which UNITER uses; "
                "export another `feature`"
            )
    return msgspec.msgpack.encode({name: _msgpack_numpy(values) for name, values in halves.items()})


def derive_soft_labels(regions: Regions, column_of: dict[int, int]) -> np.ndarray:
    """Derive probabilities from scores: a region's score for its category, the rest for the background.

    Args:
        regions: regions of an image.
        column_of: category id -> column, from 1 to the number of classes; column 0 is the background.

    Returns:
        (N, 1 + classes) float32 probabilities.
    """
    probabilities = np.zeros((len(regions), 1 + len(column_of)), np.float32)
    columns = [column_of[category] for category in regions.category_ids.tolist()]
    scores = np.clip(regions.scores, 0, 1)  # boxes from a file may have any scores
    probabilities[np.arange(len(regions)), columns] = scores
    probabilities[:, 0] = 1 - scores
    return probabilities


def _vilbert_record(regions: Regions, feature: str) -> dict[str, Any]:
    """The dict that `vilbert_multi_task` describes."""
    record: dict[str, Any] = {
        "image_id": str(regions.image_id),
        "image_h": regions.height,
        "image_w": regions.width,
        "num_boxes": len(regions),
        "boxes": np.ascontiguousarray(regions.boxes, np.float32),
        "features": np.ascontiguousarray(regions.features[feature], np.float32),
    }
    if CLASS_PROB in regions.features:
        record["cls_prob"] = np.ascontiguousarray(regions.features[CLASS_PROB], np.float32)
    return record


def _msgpack_numpy(values: np.ndarray) -> dict[bytes, Any]:
    """Encode an array as msgpack-numpy does, which recognizes arrays by the bytes key ``nd``."""
    return {b"nd": True, b"type": values.dtype.str, b"kind": b"", b"shape": values.shape, b"data": values.tobytes()}
