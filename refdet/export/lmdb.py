"""An LMDB of the form that the image feature readers of ViLBERT and its kin open."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from refdet.errors import InputError, WorkError
from refdet.export.folder import new_folder
from refdet.export.record import Exported, write_record
from refdet.export.source import Source
from refdet.regions import Regions

VILBERT_WIDTH = 2048  # what its reader reshapes to
PICKLE_PROTOCOL = 4  # the readers run on Python 3.6 too
COMMIT_IMAGES = 32  # what memory holds at most


def export_lmdb(features: Path, out: Path, feature: str = "fc7") -> Exported:
    """Write an LMDB: image id in decimal -> pickled dict, and "keys" -> pickled list of the ids as bytes.

    The dicts are those of facebookresearch/vilbert-multi-task, see `item`. Images without regions are left out: its
    reader divides by their number. It puts the region that is the whole image before the others itself.

    Arguments:
        features: the store; out: the folder that is the database; feature: which feature is written.

    Raises:
        InputError: the package lmdb is missing, ``out`` is not empty, or the store lacks the feature.
        WorkError: lmdb cannot write; of a full disk it only says "input/output error".
    """
    lmdb = _package()
    try:
        return _export(lmdb, features, out, feature)
    except lmdb.Error as error:
        raise WorkError(f"{out}: lmdb cannot write it ({error}); is the disk full?") from error


def _export(lmdb: ModuleType, features: Path, out: Path, feature: str) -> Exported:
    with Source(features) as source, new_folder(out) as folder:
        width = source.width(feature)
        probabilities = "class_prob" in source.store.feature_names
        read = (feature, "class_prob") if probabilities else (feature,)
        numbers = width + 4 + (source.width("class_prob") if probabilities else 0)
        empty = {i: why for i in source.store if (why := source.why_empty(i))}
        kept = [i for i in source.store if i not in empty]
        size = _map_size([len(source.store.rows(i)) for i in kept], numbers)
        with lmdb.open(str(folder), map_size=size, lock=False, sync=False) as database:
            for first in tqdm(range(0, len(kept), COMMIT_IMAGES), desc="export", unit="batch", disable=None):
                with database.begin(write=True) as transaction:
                    for image_id in kept[first : first + COMMIT_IMAGES]:
                        regions = source.store.read(image_id, read)
                        transaction.put(_key(image_id), pickle.dumps(item(regions, feature), PICKLE_PROTOCOL))
            with database.begin(write=True) as transaction:
                keys = [_key(image_id) for image_id in kept]
                transaction.put(b"keys", pickle.dumps(keys, PICKLE_PROTOCOL))
        notes = [f"{len(empty)} images have no regions and are left out; provenance.json lists them"] if empty else []
        if width != VILBERT_WIDTH:
            notes.append(f"{feature} has {width} numbers a region; ViLBERT's reader takes {VILBERT_WIDTH}")
        done = Exported("lmdb", len(kept), source.store.regions, ["data.mdb"], empty, notes)
        write_record(folder, done, {"feature": feature}, {"features": source})
    return done


def item(regions: Regions, feature: str) -> dict[str, Any]:
    """The record of one image.

    Returns:
        ``image_id`` (text), ``image_h``, ``image_w``, ``num_boxes`` (int), and as base64 of float32, row by row:
        ``boxes`` (n, 4), half-open xyxy in pixels; ``features`` (n, width); if the store has class probabilities,
        ``cls_prob`` (n, 1 + classes), the background first.
    """
    found: dict[str, Any] = {
        "image_id": str(regions.image_id),
        "image_h": regions.height,
        "image_w": regions.width,
        "num_boxes": len(regions),
        "boxes": _base64(regions.boxes),
        "features": _base64(regions.features[feature]),
    }
    if "class_prob" in regions.features:
        found["cls_prob"] = _base64(regions.features["class_prob"])
    return found


def _key(image_id: int) -> bytes:
    return str(image_id).encode()


def _base64(values: np.ndarray) -> bytes:
    return base64.b64encode(np.ascontiguousarray(values, np.float32).tobytes())


def _map_size(regions: list[int], numbers: int) -> int:
    """Bytes that surely hold images of so many regions, each of so many float32; the file takes what it needs."""
    page = 16384  # the largest a system has
    values = sum(-(-n * numbers * 16 // 3) + 2 * page for n in regions)
    return (values // page + len(regions) // 8 + 1024) * page


def _package() -> ModuleType:
    try:
        import lmdb
    except ImportError:
        raise InputError(
            "--format lmdb needs the package lmdb: pip install 'refdet[lmdb]', or pip install lmdb"
        ) from None
    return lmdb
