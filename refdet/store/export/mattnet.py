"""Export to the training and evaluation files of lichengunc/MAttNet."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from refdet.errors import InputError
from refdet.files.progress import progress
from refdet.files.short_text import agree, format_count, format_share
from refdet.store.export.folder import json_list, new_folder, require_space
from refdet.store.export.mattnet_prepro import METADATA_BYTES, Prepro
from refdet.store.export.record import ExportResult, write_record
from refdet.store.export.source import Source
from refdet.store.hdf5_file import OLDEST_READERS, new_file
from refdet.structures.regions import Regions

FEATURES = ("pool5", "fc7")  # of det_feats.h5 and ann_feats.h5; fc7 is required
WIDTHS = {"pool5": 1024, "fc7": 2048}  # lengths of the features that MAttNet's loaders and layers expect
HEAD_FOLDER = "head"  # subfolder of the export, with a file for the head map of each image


@dataclass(frozen=True)
class _Export:
    """Inputs of an export, and the notes that it collects.

    Attributes:
        folder: the folder to write to.
        detections: store of detections.
        annotations: store of annotations, None for none.
        prepro: the dataset as MAttNet's ``tools/prepro.py`` prepares it, None if not given.
        notes: human-readable notes so far.
    """

    folder: Path
    detections: Source
    annotations: Source | None
    prepro: Prepro | None
    notes: list[str]


def export_mattnet(
    store: Path, out: Path, annotations: Path | None, prepro: Prepro | None, options: Mapping[str, Any]
) -> ExportResult:
    """Write the files that the stores and the dataset allow, with notes about the others.

    - ``dets.json``, ``masks.json`` (with masks), ``det_feats.h5``: the detections;
    - ``head/ID.h5``: the head map of each image, from stores that have head maps;
    - ``data.json``, ``data.h5``: ``prepro``, unless it was read from an existing ``data.json``;
    - ``ann_feats.h5``: the features of the annotations, each in the row that is its ``h5_id`` in ``data.json``.

    Args:
        store: store of detections.
        out: the folder to create; it may exist if it is empty.
        annotations: store of annotations, None for none.
        prepro: the dataset, whose images are exported; None for all images.
        options: options to record in the provenance.

    Returns:
        What was written, with notes.

    Raises:
        InputError: ``out`` is not empty; a store is of the wrong kind, lacks fc7 or lacks images; annotations without
            ``prepro``; or the categories of detector and dataset differ.
        RuntimeFailure: the disk is full.
    """
    with ExitStack() as stack:
        detections = stack.enter_context(Source(store))
        if detections.store.has_ann_ids:
            raise InputError(
                f"`store` {store}: has annotations; give a store of detections, this one is for `annotations`"
            )
        annotation_source = stack.enter_context(Source(annotations)) if annotations else None
        if annotation_source is not None and not annotation_source.store.has_ann_ids:
            raise InputError(f"`annotations` {annotations}: has detections; extract with `regions='annotations'`")
        if annotation_source is not None and prepro is None:
            raise InputError(
                "`annotations`: the rows of ann_feats.h5 need a data.json; give `refer_root` with "
                "`dataset` and `split_by`, or `data_json`"
            )
        folder = stack.enter_context(new_folder(out))
        work = _Export(folder, detections, annotation_source, prepro, [])
        image_ids = _select_images(work)
        require_space(out, _min_space(work, image_ids))
        num_detections = _write_detections(work, image_ids)
        empty = {i: why for i in image_ids if (why := detections.why_empty(i))}
        if empty:
            work.notes.append(
                f"{format_count(len(empty), 'image', 'has')} no detections, at which MAttNet's evaluation fails; "
                "extract with `lower_threshold_if_empty=True`"
            )
        _write_annotations(work)
        _write_head_maps(work, image_ids)
        if prepro is None:
            work.notes.append("no data.json and data.h5; give `refer_root` with `dataset` and `split_by`")
        elif prepro.labels is not None:
            prepro.write(folder)
            if not prepro.data["att_to_ix"]:
                work.notes.append(
                    "data.json has no attribute words, which MAttNet needs for training; give `attributes`"
                )
        sources = {"features": detections} | (
            {"annotations": annotation_source} if annotation_source is not None else {}
        )
        files = sorted(path.name if path.is_file() else f"{path.name}/*.h5" for path in folder.iterdir())
        result = ExportResult("mattnet", len(image_ids), num_detections, files, empty, work.notes)
        write_record(folder, result, options, sources)
    return result


def _detection_record(regions: Regions, index: int, name: str, det_id: int, row: int) -> dict[str, Any]:
    """Create the record of a detection.

    MAttNet computes a width as ``x2 - x1 + 1``, as its boxes include the pixel x2. Boxes of a store are half-open, so
    that their width is ``x2 - x1``.

    Args:
        regions: regions of an image.
        index: index of the region in ``regions``.
        name: name of the region's category.
        det_id: number of the detection in the export, from 0, which is also its row in det_feats.h5.
        row: row of the region in the store.

    Returns:
        The record, with ``box`` as x, y, width, height in pixels. ``region``, the row in the store, is an addition to
        MAttNet's format: `refdet evaluate-on-refer` accepts it as an answer.
    """
    x1, y1, x2, y2 = regions.boxes[index].tolist()
    return {
        "det_id": det_id,
        "h5_id": det_id,
        "box": [x1, y1, x2 - x1, y2 - y1],
        "image_id": regions.image_id,
        "category_id": int(regions.category_ids[index]),
        "category_name": name,
        "score": float(regions.scores[index]),
        "region": row,
    }


def _select_images(work: _Export) -> list[int]:
    """Select the images that are in both the store and the dataset, and add notes about those that one of them lacks.

    Returns:
        Ids of the images in the order of the store; all of its images without a dataset.

    Raises:
        InputError: the store has none of the dataset's images, or another id for one of its categories.
    """
    source = work.detections
    if work.prepro is None:
        return list(source.store)
    names = work.prepro.data.get("cat_to_ix", {})
    for category_id, name in source.names.items():
        if names.get(name, category_id) != category_id:
            raise InputError(
                f"{source.path}: category {name} has id {category_id}, but {names[name]} in the dataset; "
                "extract with a detector that has the dataset's categories"
            )
    dataset_ids = {image["image_id"] for image in work.prepro.data["images"]}
    image_ids = [image_id for image_id in source.store if image_id in dataset_ids]
    if not image_ids:
        images = format_count(len(dataset_ids), "image")
        raise InputError(f"{source.path}: lacks all {images} of the dataset; extract them")
    if len(image_ids) < len(dataset_ids):
        absent = len(dataset_ids) - len(image_ids)
        work.notes.append(
            f"{format_share(absent, len(dataset_ids), 'image')} of the dataset {agree(absent, 'is')} not in "
            f"{source.path.name} and {agree(absent, 'has')} no detections"
        )
    if len(image_ids) < len(source.store):
        extra = len(source.store) - len(image_ids)
        work.notes.append(f"omitted: {format_count(extra, 'image')} of {source.path.name} not in the dataset")
    return image_ids


def _min_space(work: _Export, image_ids: list[int]) -> int:
    """Size in bytes of the float32 features and head maps, which is less than that of the export."""
    rows = sum(len(work.detections.store.rows(image_id)) for image_id in image_ids)
    sources = [(work.detections, rows)]
    if work.annotations is not None and work.prepro is not None:
        sources.append((work.annotations, len(work.prepro.data["anns"])))
    num_values = sum(
        n * source.width(name) for source, n in sources for name in FEATURES if name in source.store.feature_names
    )
    return 4 * (num_values + sum(work.detections.head_map_size(image_id) for image_id in image_ids))


def _create_datasets(file: h5py.File, source: Source, names: list[str], rows: int) -> dict[str, h5py.Dataset]:
    """Create float32 datasets for features; keep references to them until the block of `new_file` ends."""
    return {
        name: file.create_dataset(name, (rows, source.width(name)), np.float32, track_times=False) for name in names
    }


def _max_file_size(source: Source, names: list[str], rows: int) -> int:
    """Maximum size in bytes of a file with ``rows`` of these features."""
    return 4 * rows * sum(source.width(name) for name in names) + METADATA_BYTES


def _select_features(work: _Export, source: Source) -> list[str]:
    """Select the features of a store to export, and add notes about a missing pool5 and unexpected widths.

    Returns:
        Names of the features.

    Raises:
        InputError: the store lacks fc7, or a feature is not a vector.
    """
    names = [name for name in FEATURES if name in source.store.feature_names]
    for name in FEATURES:
        if name not in names and name != "fc7":
            work.notes.append(f"{source.path.name} has no {name}")
            continue
        width = source.width(name)  # raises if fc7 is missing
        if width != WIDTHS[name]:
            work.notes.append(
                f"{name} of {source.path.name} has {width} values per region, but "
                f"MAttNet's layers expect {WIDTHS[name]}"
            )
    return names


def _write_detections(work: _Export, image_ids: list[int]) -> int:
    """Write dets.json, masks.json and det_feats.h5 and return the number of detections.

    Detections are numbered as by MAttNet's run_detect.py: by image, then by class, then by descending score.
    """
    source, store = work.detections, work.detections.store
    names = _select_features(work, source)
    total = sum(len(store.rows(image_id)) for image_id in image_ids)
    rank = {category_id: i for i, category_id in enumerate(source.names)}
    if not store.has_masks:
        work.notes.append(f"no masks.json: {source.path.name} has no masks")
    with ExitStack() as stack:
        add = stack.enter_context(json_list(work.folder / "dets.json"))
        add_mask = stack.enter_context(json_list(work.folder / "masks.json")) if store.has_masks else None
        space = _max_file_size(source, names, total)
        file = stack.enter_context(new_file(work.folder / "det_feats.h5", space, OLDEST_READERS))
        datasets = _create_datasets(file, source, names, total)
        first = 0  # det_id of the first detection of the image
        for image_id in progress(image_ids, "detections", "image"):
            regions, rows = source.read(image_id, names), store.rows(image_id)
            # lexsort sorts by its last key first: by class, then by descending score
            order = np.lexsort((-regions.scores, np.array([rank[c] for c in regions.category_ids.tolist()], np.int64)))
            rles = regions.rles()
            for det_id, index in enumerate(order.tolist(), start=first):
                category = source.names[int(regions.category_ids[index])]
                record = _detection_record(regions, index, category, det_id, rows[index])
                add(record)
                if add_mask is not None:
                    add_mask(record | {"rle": rles[index] | {"counts": rles[index]["counts"].decode("ascii")}})
            end = first + len(rows)
            if len(rows):
                for name in names:
                    datasets[name][first:end] = regions.features[name][order]
            first = end
    return total


def _write_annotations(work: _Export) -> None:
    """Write ann_feats.h5: the features of an annotation are in the row that is its ``h5_id`` in data.json."""
    source = work.annotations
    if source is None or work.prepro is None:
        work.notes.append("no ann_feats.h5; give `annotations`")
        return
    images, anns = work.prepro.data["images"], work.prepro.data["anns"]
    missing = [image["image_id"] for image in images if image["image_id"] not in source.store]
    if missing:
        raise InputError(
            f"`annotations` {source.path}: {format_share(len(missing), len(images), 'image')} of the dataset "
            f"{agree(len(missing), 'is')} missing, first: {missing[0]}; extract all splits"
        )
    row_of = {ann["ann_id"]: ann["h5_id"] for ann in anns}
    names = _select_features(work, source)
    written = 0
    with new_file(work.folder / "ann_feats.h5", _max_file_size(source, names, len(anns)), OLDEST_READERS) as file:
        datasets = _create_datasets(file, source, names, len(anns))
        for image in progress(images, "annotations", "image"):
            regions = source.read(image["image_id"], names, categories=False)
            assert regions.ann_ids is not None
            rows = np.array([row_of.get(ann_id, -1) for ann_id in regions.ann_ids.tolist()], np.int64)
            # h5py needs ascending rows; annotations that the dataset lacks (-1) come first and are skipped
            order = np.argsort(rows, kind="stable")[np.count_nonzero(rows < 0) :]
            if len(np.unique(rows[order])) < len(order):
                raise InputError(
                    f"`annotations` {source.path}: duplicate annotation of image {image['image_id']}; extract it again"
                )
            if len(order):
                for name in names:
                    datasets[name][rows[order]] = regions.features[name][order]
            written += len(order)
    if anns and not written:
        lacking = format_count(len(anns), "annotation")
        raise InputError(f"`annotations` {source.path}: lacks all {lacking} of the dataset; extract them")
    if written < len(anns):
        absent = len(anns) - written
        work.notes.append(
            f"{format_share(absent, len(anns), 'annotation')} of the dataset {agree(absent, 'is')} not in "
            f"{source.path.name} (crowds or unusable images); their rows of ann_feats.h5 are zeros"
        )


def _write_head_maps(work: _Export, image_ids: list[int]) -> None:
    """Write ``head`` (1, C, H, W) and ``im_info`` (1, 3) of each image, from the first store that has them."""
    sources = [source for source in (work.detections, work.annotations) if source is not None and source.has_head_maps]
    if not sources:
        work.notes.append(
            f"no {HEAD_FOLDER}/*.h5, which MAttNet needs for training and evaluation; "
            "extract with `features` pool5,fc7,head"
        )
        return
    dataset_ids = [image["image_id"] for image in work.prepro.data["images"]] if work.prepro else image_ids
    (work.folder / HEAD_FOLDER).mkdir()
    missing = 0
    for image_id in progress(dataset_ids, "head maps", "image"):
        head_map = next(filter(None, (source.read_head_map(image_id) for source in sources)), None)
        if head_map is None:
            missing += 1
            continue
        arrays = {"head": head_map.values[None], "im_info": head_map.im_info[None]}
        space = sum(values.nbytes for values in arrays.values()) + METADATA_BYTES
        with new_file(work.folder / HEAD_FOLDER / f"{image_id}.h5", space, OLDEST_READERS) as file:
            datasets = [  # all open until the block ends, see `new_file`
                file.create_dataset(name, values.shape, values.dtype, track_times=False)
                for name, values in arrays.items()
            ]
            for dataset, values in zip(datasets, arrays.values(), strict=True):
                dataset[...] = values
    if missing:
        work.notes.append(f"{format_share(missing, len(dataset_ids), 'image', 'has')} no head map")
