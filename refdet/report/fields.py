"""Read and validate the JSON values that a report shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from refdet.data.box_format import NAMES as BOX_FORMATS
from refdet.errors import InputError
from refdet.evaluation.metrics import Protocol
from refdet.files.short_text import short_repr, shorten

GENERALIZED = ("N-acc", "T-acc", "precision@F1=1,IoU>=0.5", "gIoU", "cIoU")
"""The metrics of answers to gRefCOCO that a report shows."""


def field(tree: Any, key: str, where: str) -> Any:
    """The value at a key.

    Args:
        tree: a JSON object.
        key: the key.
        where: the file and the place in it, with which error messages start.

    Raises:
        InputError: ``tree`` is not an object, or lacks the key.
    """
    if not isinstance(tree, Mapping) or key not in tree:
        raise InputError(f"{where}: {shorten(key)!r} is missing")
    return tree[key]


def text(tree: Any, key: str, where: str) -> str:
    """The string at a key; InputError if there is none."""
    value = field(tree, key, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: {shorten(key)!r} must be a string, not {short_repr(value)}")
    return value


def count(tree: Any, key: str, where: str) -> int:
    """The integer of 0 or more at a key; InputError if there is none."""
    value = field(tree, key, where)
    if type(value) is not int or value < 0:
        raise InputError(f"{where}: {shorten(key)!r} must be an integer of 0 or more, not {short_repr(value)}")
    return value


def optional_number(tree: Any, key: str, where: str) -> float | None:
    """The finite number at a key, or None if it is null, for an undefined metric; InputError otherwise."""
    value = field(tree, key, where)
    if value is not None and not is_number(value):
        raise InputError(f"{where}: {shorten(key)!r} must be a number, not {short_repr(value)}")
    return value


def finite_number(tree: Any, key: str, where: str) -> float:
    """The finite number at a key; InputError if there is none."""
    value = optional_number(tree, key, where)
    if value is None:
        raise InputError(f"{where}: {shorten(key)!r} must be a number, not null")
    return value


def is_number(value: object) -> bool:
    """Whether a value is a finite number (not a bool)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_metrics(metrics: Any, where: str) -> None:
    """Check the metrics of evaluate-on-refer that a report shows.

    Raises:
        InputError: a field is missing or invalid; the message starts with `where` and names the field.
    """
    text(metrics, "dataset", where)
    text(metrics, "split_by", where)
    for key, choices in (("protocol", get_args(Protocol)), ("box_format", BOX_FORMATS)):
        if key in metrics and text(metrics, key, where) not in choices:
            raise InputError(f"{where}: {key!r} must be one of {', '.join(choices)}, not {short_repr(metrics[key])}")
    splits = field(metrics, "splits", where)
    if not isinstance(splits, Mapping) or not splits or not all(isinstance(name, str) for name in splits):
        raise InputError(f"{where}: 'splits' must be an object with at least one split, not {short_repr(splits)}")
    for name, values in splits.items():
        _check_split(values, f"{where}, split {shorten(name)}")
    # the keys of recall@k are numbers of regions
    region_counts = [list(values["recall@k"]) for values in splits.values()]
    if any(other != region_counts[0] for other in region_counts):
        raise InputError(f"{where}: 'recall@k' must have the same numbers of regions in every split")


def _check_split(values: Any, where: str) -> None:
    """Check the metrics of one split, like `check_metrics`."""
    for key in ("images", "refs", "sentences"):
        count(values, key, where)
    detection = field(values, "detection", where)
    optional_number(field(detection, "bbox", where), "AP50", where)
    if field(detection, "segm", where) is not None:
        optional_number(detection["segm"], "AP50", where)
    recall = field(values, "referent_recall", where)
    for key in ("0.5", "0.6", "0.7", "0.8", "0.9", "mean_best_iou"):
        finite_number(recall, key, f"{where}, referent_recall")
    recall_at_k = field(values, "recall@k", where)
    if not isinstance(recall_at_k, Mapping) or not recall_at_k or not all(map(is_number, recall_at_k.values())):
        raise InputError(f"{where}: 'recall@k' must be an object of numbers, not {short_repr(recall_at_k)}")
    if "comprehension" in values:
        for key in ("random_baseline@0.5", "accuracy@0.5"):
            optional_number(values["comprehension"], key, where)
        if field(values, "segmentation", where) is not None:
            optional_number(values["segmentation"], "overall_iou", where)
    if "unusable" in values:
        count(values, "unusable", where)
    if "generalized" in values:
        for key in ("no_target", "missing"):
            count(values["generalized"], key, where)
        for key in GENERALIZED:
            optional_number(values["generalized"], key, where)
