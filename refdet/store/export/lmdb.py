"""Export to LMDB for ViLBERT and UNITER."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType

from refdet.errors import InputError, RuntimeFailure, is_disk_full
from refdet.files.atomic import write_json
from refdet.files.progress import progress
from refdet.files.short_text import agree, format_count
from refdet.store.export import consumers, lmdb_records, portable_pickle
from refdet.store.export.folder import new_folder, require_space
from refdet.store.export.lmdb_records import CLASS_PROB, PROTOCOL
from refdet.store.export.record import ExportResult, write_record
from refdet.store.export.source import Source

IMAGES_PER_COMMIT = 32  # records of these images are held in memory until they are committed
INITIAL_MAP_SIZE = 64 << 20  # bytes; doubled when the map is full
ALMOST_FULL = 1 << 20  # bytes; if less of the disk is free, an input/output error is taken for a full disk
UNITER_FOLDER = "feat_numbb100"  # opened by UNITER with conf_th -1 and num_bb 100, as in its RefCOCO configs
UNITER_REGIONS = 100  # regions of an image that UNITER reads, its num_bb


@dataclass(frozen=True)
class _Layout:
    """Layout of the database for a program.

    Attributes:
        key: returns the key of an image's record, from the image id.
        record: returns an image's record, from the image id.
        list_keys: returns the key and value of the entry that lists all keys.
        region_bytes: minimum size of a region in bytes.
        folder: folder of the database in the export; "" for the export's own.
        notes: human-readable notes.
    """

    key: Callable[[int], str]
    record: Callable[[int], bytes]
    list_keys: Callable[[list[str]], tuple[bytes, bytes]]
    region_bytes: int
    folder: str = ""
    notes: list[str] = field(default_factory=list)


def export_lmdb(store: Path, out: Path, feature: str = "fc7", consumer: str | None = None) -> ExportResult:
    """Write an LMDB with a record per image (`refdet.store.export.lmdb_records`) and a list of its keys.

    Images without regions are omitted: ViLBERT's reader divides by their number, and UNITER indexes into them.
    ViLBERT's reader adds the region of the whole image itself.

    Args:
        store: the store.
        out: the folder, which is the database or, for UNITER, contains it.
        feature: the feature to write.
        consumer: one of `consumers.LMDB`, None for the first.

    Returns:
        What was written, with notes.

    Raises:
        InputError: the package lmdb is missing, ``out`` is not empty, the store lacks the feature, or its numbers are
            out of range.
        RuntimeFailure: the disk is full, or lmdb fails for another reason.
    """
    program = consumer or consumers.LMDB[0]
    consumers.check_consumer("lmdb", program)
    lmdb = _import_lmdb()
    with Source(store) as source, new_folder(out) as folder:
        empty = {i: why for i in source.store if (why := source.why_empty(i))}
        nonempty = [i for i in source.store if i not in empty]
        layout = _make_layout(source, feature, program)
        require_space(out, source.store.regions * layout.region_bytes)
        database = folder / layout.folder
        database.mkdir(exist_ok=True)  # exists if the layout has no folder of its own
        _write_database(lmdb, database, _encode_records(layout, nonempty), out)
        notes = list(layout.notes)
        if consumer is None:
            notes.insert(
                0,
                "written as arrays for vilbert-multi-task; give `consumer='vilbert-beta'` for base64 as in older "
                "exports of refdet",
            )
        if empty:
            without_regions = f"{format_count(len(empty), 'image')} without regions {agree(len(empty), 'is')}"
            notes.append(f"{without_regions} omitted, listed in provenance.json")
        files = ["/".join(filter(None, (layout.folder, "data.mdb")))]
        if layout.folder and source.store.has_ann_ids:
            write_json(folder / "iid_to_ann_ids.json", {"iid_to_ann_ids": _read_ann_ids(source, nonempty)})
            files.append("iid_to_ann_ids.json")
        result = ExportResult("lmdb", len(nonempty), source.store.regions, files, empty, notes)
        options = {"for": program, "feature": feature}
        write_record(folder, result, options, {"features": source})
    return result


def _make_layout(source: Source, feature: str, consumer: str) -> _Layout:
    notes = consumers.width_note(feature, source.width(feature), consumer)
    features = (feature, CLASS_PROB) if CLASS_PROB in source.store.feature_names else (feature,)
    if consumer == "uniter":
        return _make_uniter_layout(source, feature, features, notes)
    num_values = 4 + sum(source.width(name) for name in features)  # of a region: its box and features
    as_arrays = consumer == "vilbert-multi-task"
    encode = lmdb_records.vilbert_multi_task if as_arrays else lmdb_records.vilbert_beta

    def list_keys(names: list[str]) -> tuple[bytes, bytes]:
        return b"keys", portable_pickle.dumps([name.encode() for name in names], PROTOCOL)

    return _Layout(
        key=str,
        record=lambda image_id: encode(source.read(image_id, features, categories=False), feature),
        list_keys=list_keys,
        region_bytes=4 * num_values if as_arrays else 16 * num_values // 3,  # base64 has 4 characters for 3 bytes
        notes=notes,
    )


def _make_uniter_layout(source: Source, feature: str, features: tuple[str, ...], notes: list[str]) -> _Layout:
    """The layout for UNITER.

    Args:
        source: the store.
        feature: the feature to write.
        features: the features to read: the one to write and, if the store has it, `CLASS_PROB`.
        notes: the notes so far, to which others are added.
    """
    prefix = "visual_grounding_coco_gt" if source.store.has_ann_ids else "visual_grounding_det_coco"
    column_of = {category: i for i, category in enumerate(source.names, start=1)}
    has_probabilities = CLASS_PROB in features
    if not has_probabilities:
        notes.append(
            f"soft_labels are derived from scores and categories, as {source.path.name} has no {CLASS_PROB}; "
            "UNITER reads them only in pretraining"
        )
    truncated = sum(len(source.store.rows(image_id)) > UNITER_REGIONS for image_id in source.store)
    if truncated:
        images = format_count(truncated, "image", "has")
        notes.append(f"{images} more than {UNITER_REGIONS} regions; UNITER reads only the first {UNITER_REGIONS}")

    def record(image_id: int) -> bytes:
        regions = source.read(image_id, features, categories=not has_probabilities)
        if has_probabilities:
            soft_labels = regions.features[CLASS_PROB]
        else:
            soft_labels = lmdb_records.derive_soft_labels(regions, column_of)
        return lmdb_records.uniter(regions, feature, soft_labels)

    def list_keys(names: list[str]) -> tuple[bytes, bytes]:
        return b"__keys__", json.dumps(names).encode()

    return _Layout(
        key=lambda image_id: f"{prefix}_{image_id:012}.npz",
        record=record,
        list_keys=list_keys,
        region_bytes=2 * (source.width(feature) + 7),  # float16 features, norm_bb and conf
        folder=UNITER_FOLDER,
        notes=notes,
    )


def _encode_records(layout: _Layout, image_ids: list[int]) -> Iterator[tuple[bytes, bytes]]:
    """Iterate over the key and value of each image's record, and then of the list of keys."""
    names = [layout.key(image_id) for image_id in image_ids]
    for image_id, name in zip(progress(image_ids, "export", "image"), names, strict=True):
        yield name.encode(), layout.record(image_id)
    yield layout.list_keys(names)


def _read_ann_ids(source: Source, image_ids: list[int]) -> dict[str, list[int]]:
    """Annotation ids of each image in the order of its regions, for UNITER's prepro.py."""
    by_image = {}
    for image_id in image_ids:
        ann_ids = source.read(image_id, (), categories=False).ann_ids
        assert ann_ids is not None
        by_image[str(image_id)] = ann_ids.tolist()
    return by_image


def _write_database(lmdb: ModuleType, folder: Path, records: Iterable[tuple[bytes, bytes]], out: Path) -> None:
    """Write a database in batches of records, increasing the map size as needed.

    Args:
        lmdb: the package.
        folder: the folder of the database.
        records: key and value of each record.
        out: the export folder, for error messages.

    Raises:
        OSError: the disk is full, or the limit on file sizes is exceeded.
        RuntimeFailure: lmdb fails for another reason.
    """
    pending = iter(records)
    size = INITIAL_MAP_SIZE
    try:
        with lmdb.open(str(folder), map_size=size, lock=False, sync=False) as database:
            while batch := list(islice(pending, IMAGES_PER_COMMIT)):
                while True:  # until the batch fits into the map
                    try:
                        with database.begin(write=True) as transaction:
                            for key, value in batch:
                                transaction.put(key, value)
                        break
                    except lmdb.MapFullError:
                        size *= 2
                        database.set_mapsize(size)
    except lmdb.Error as error:
        raise _convert_error(error, folder, out) from error


def _convert_error(error: Exception, folder: Path, out: Path) -> Exception:
    """The OSError behind an error of lmdb, so that all formats report it in the same way; else a RuntimeFailure."""
    if os.strerror(errno.EFBIG) in str(error):
        return OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    # lmdb may report a full disk as "input/output error".
    if is_disk_full(error) or shutil.disk_usage(folder).free < ALMOST_FULL:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return RuntimeFailure(f"{out}: lmdb cannot write the database ({error}); try another disk")


def _import_lmdb() -> ModuleType:
    try:
        import lmdb
    except ImportError:
        raise InputError(
            "`format='lmdb'`: package lmdb is missing; pip install 'refdet[lmdb]' or pip install lmdb"
        ) from None
    return lmdb
