"""LMDBs that the image feature readers of ViLBERT and UNITER open."""

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
from refdet.store.export import consumers, lmdb_records, portable_pickle
from refdet.store.export.folder import new_folder, require_space
from refdet.store.export.lmdb_records import CLASS_PROB, PROTOCOL
from refdet.store.export.record import Exported, write_record
from refdet.store.export.source import Source

COMMIT_IMAGES = 32  # what memory holds at most
FIRST_MAP = 64 << 20  # bytes of address space; doubled as needed
ALMOST_FULL = 1 << 20  # bytes: with no more left, an input/output error is taken for a full disk
UNITER_FOLDER = "feat_numbb100"  # what UNITER opens for conf_th -1 and num_bb 100, as its configs of RefCOCO have it
UNITER_REGIONS = 100


@dataclass(frozen=True)
class _Layout:
    """How the database of one reader looks.

    Attributes:
        key: image id -> the key of its record.
        record: image id -> its record.
        keys: the key and the contents of the list of all keys.
        space: bytes of a region, at least.
        folder: where in the export the database lies.
        notes: what a user should know.
    """

    key: Callable[[int], str]
    record: Callable[[int], bytes]
    keys: Callable[[list[str]], tuple[bytes, bytes]]
    space: int
    folder: str = ""
    notes: list[str] = field(default_factory=list)


def export_lmdb(store: Path, out: Path, feature: str = "fc7", consumer: str | None = None) -> Exported:
    """Write an LMDB of one record an image, see `refdet.store.export.lmdb_records`, and of the list of its keys.

    Images without regions are left out: ViLBERT's reader divides by their number, UNITER points into them. The region
    that is the whole image, which ViLBERT puts first, its reader makes itself.

    Args:
        store: the file of regions.
        out: the folder; it is the database or, for UNITER, the folder of databases.
        feature: which feature is written.
        consumer: one of `consumers.LMDB`, None for the first.

    Raises:
        InputError: the package lmdb is missing, ``out`` is not empty, the store lacks the feature, or numbers of it
            are beyond what the records hold.
        RuntimeFailure: the disk is full, or lmdb cannot write for another reason.
    """
    consumers.check_consumer("lmdb", consumer or consumers.LMDB[0])
    lmdb = _package()
    with Source(store) as source, new_folder(out) as folder:
        empty = {i: why for i in source.store if (why := source.why_empty(i))}
        kept = [i for i in source.store if i not in empty]
        layout = _layout(source, feature, consumer or consumers.LMDB[0])
        require_space(out, source.store.regions * layout.space)
        database = folder / layout.folder
        database.mkdir(exist_ok=True)
        _write(lmdb, database, _records(layout, kept), out)
        notes = list(layout.notes)
        if consumer is None:
            notes.insert(0, "written as arrays, for vilbert-multi-task; older exports of refdet have base64, which "
                            "--for vilbert-beta writes")  # fmt: skip
        if empty:
            notes.append(f"{len(empty)} images have no regions and are left out; provenance.json lists them")
        files = ["/".join(filter(None, (layout.folder, "data.mdb")))]
        if layout.folder and source.store.has_ann_ids:
            write_json(folder / "iid_to_ann_ids.json", {"iid_to_ann_ids": _ann_ids(source, kept)})
            files.append("iid_to_ann_ids.json")
        done = Exported("lmdb", len(kept), source.store.regions, files, empty, notes)
        options = {"for": consumer or consumers.LMDB[0], "feature": feature}
        write_record(folder, done, options, {"features": source})
    return done


def _layout(source: Source, feature: str, consumer: str) -> _Layout:
    width = source.width(feature)
    notes = consumers.width_note(feature, width, consumer)
    probabilities = CLASS_PROB in source.store.feature_names
    read = (feature, CLASS_PROB) if probabilities else (feature,)
    numbers = width + 4 + (source.width(CLASS_PROB) if probabilities else 0)
    if consumer == "uniter":
        return _uniter(source, feature, read, notes)
    arrays = consumer == "vilbert-multi-task"
    pack = lmdb_records.vilbert_multi_task if arrays else lmdb_records.vilbert_beta

    def keys(names: list[str]) -> tuple[bytes, bytes]:
        return b"keys", portable_pickle.dumps([name.encode() for name in names], PROTOCOL)

    return _Layout(str, lambda image_id: pack(source.read(image_id, read, categories=False), feature), keys,
                   4 * numbers if arrays else 16 * numbers // 3, notes=notes)  # fmt: skip


def _uniter(source: Source, feature: str, read: tuple[str, ...], notes: list[str]) -> _Layout:
    prefix = "visual_grounding_coco_gt" if source.store.has_ann_ids else "visual_grounding_det_coco"
    places = {category: i for i, category in enumerate(source.names, start=1)}
    probabilities = CLASS_PROB in read
    if not probabilities:
        notes.append(f"soft_labels are made of scores and categories, for {source.path.name} has no {CLASS_PROB}; "
                     "UNITER reads them in pretraining alone")  # fmt: skip
    many = sum(len(source.store.rows(image_id)) > UNITER_REGIONS for image_id in source.store)
    if many:
        notes.append(f"{many} images have more than {UNITER_REGIONS} regions, of which UNITER reads the first")

    def record(image_id: int) -> bytes:
        regions = source.read(image_id, read, categories=not probabilities)
        labels = regions.features[CLASS_PROB] if probabilities else lmdb_records.soft_labels_of(regions, places)
        return lmdb_records.uniter(regions, feature, labels)

    def keys(names: list[str]) -> tuple[bytes, bytes]:
        return b"__keys__", json.dumps(names).encode()

    return _Layout(lambda image_id: f"{prefix}_{image_id:012}.npz", record, keys, 2 * (source.width(feature) + 7),
                   UNITER_FOLDER, notes)  # fmt: skip


def _records(layout: _Layout, image_ids: list[int]) -> Iterator[tuple[bytes, bytes]]:
    names = [layout.key(image_id) for image_id in image_ids]
    for image_id, name in zip(progress(image_ids, "export", "image"), names, strict=True):
        yield name.encode(), layout.record(image_id)
    yield layout.keys(names)


def _ann_ids(source: Source, image_ids: list[int]) -> dict[str, list[int]]:
    """The annotations of each image in the order of its regions, as UNITER's prepro.py wants them."""
    found = {}
    for image_id in image_ids:
        ann_ids = source.read(image_id, (), categories=False).ann_ids
        assert ann_ids is not None
        found[str(image_id)] = ann_ids.tolist()
    return found


def _write(lmdb: ModuleType, folder: Path, records: Iterable[tuple[bytes, bytes]], out: Path) -> None:
    """Write a database, a few records at a time, in as much address space as it turns out to need.

    Raises:
        OSError: the disk is full, or a file larger than the process may write.
        RuntimeFailure: lmdb fails otherwise; it names ``out``.
    """
    waiting = iter(records)
    size = FIRST_MAP
    try:
        with lmdb.open(str(folder), map_size=size, lock=False, sync=False) as database:
            while batch := list(islice(waiting, COMMIT_IMAGES)):
                while True:
                    try:
                        with database.begin(write=True) as transaction:
                            for key, value in batch:
                                transaction.put(key, value)
                        break
                    except lmdb.MapFullError:
                        size *= 2
                        database.set_mapsize(size)
    except lmdb.Error as error:
        raise _in_words(error, folder, out) from error


def _in_words(error: Exception, folder: Path, out: Path) -> Exception:
    """The system's error where lmdb's text tells it, so that all formats report it alike."""
    if os.strerror(errno.EFBIG) in str(error):
        return OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    # Of a full disk lmdb may only say "input/output error".
    if is_disk_full(error) or shutil.disk_usage(folder).free < ALMOST_FULL:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return RuntimeFailure(f"{out}: lmdb cannot write the database: {error}; try another disk")


def _package() -> ModuleType:
    try:
        import lmdb
    except ImportError:
        raise InputError(
            "--format lmdb needs the package lmdb: pip install 'refdet[lmdb]', or pip install lmdb"
        ) from None
    return lmdb
