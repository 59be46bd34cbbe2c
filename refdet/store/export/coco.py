"""Export to COCO's JSON files: all regions as results, and the confident ones as annotations."""

from __future__ import annotations

import json
from itertools import compress
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from refdet.files.progress import progress
from refdet.files.short_text import format_count, format_share
from refdet.files.version import __version__
from refdet.store.export.folder import json_list, new_folder, require_space
from refdet.store.export.record import ExportResult, write_record
from refdet.store.export.source import Source
from refdet.structures.regions import Regions

SCORE_THRESHOLD = 0.5  # most regions with a lower score are duplicates or mistakes, unsuitable for training a detector
_REGION_BYTES = 500  # approximate size of a region with its mask, in both files together


def export_coco(store: Path, out: Path, score_threshold: float = SCORE_THRESHOLD) -> ExportResult:
    """Write ``results.json`` and ``instances.json``.

    The results are a list as pycocotools' ``loadRes`` reads it, with all regions in the order of the store. The
    instances are a dataset whose annotations are the regions with a score of at least ``score_threshold``
    (pseudo-annotations); the id of an annotation is the row of its region + 1, as pycocotools takes the id 0 for "no
    match".

    Args:
        store: the store.
        out: the folder.
        score_threshold: lowest score of an annotation.

    Returns:
        What was written, with notes.

    Raises:
        InputError: ``out`` is not empty, or the store is damaged or has regions of unknown categories.
        RuntimeFailure: the disk is full.
    """
    with Source(store) as source, new_folder(out) as folder:
        require_space(out, source.store.regions * _REGION_BYTES)
        num_kept = row = 0  # annotations so far, and row of the next image's first region
        with json_list(folder / "results.json") as add_result, json_list(folder / "annotations") as add_annotation:
            for image_id in progress(source.store, "export", "image", total=len(source.store)):
                regions = source.read(image_id, ())
                is_kept = regions.score_at_least(score_threshold).tolist()
                for annotation in compress(_annotations(regions, row), is_kept):
                    add_annotation(annotation)
                num_kept += sum(is_kept)
                for entry in regions.to_coco():
                    add_result(entry)
                row += len(regions)
        _write_instances(folder, source)
        empty = {i: why for i in source.store if (why := source.why_empty(i))}
        share = format_share(num_kept, row, "region")
        notes = [f"instances.json has {share}: those with a score of {score_threshold:g} or more"]
        if source.store.errors:
            unusable = format_count(len(source.store.errors), "image")
            notes.append(f"instances.json leaves out {unusable} that could not be used")
        if not source.store.has_masks:
            notes.append("the store has no masks, so no region has a segmentation")
        result = ExportResult("coco", len(source.store), row, ["instances.json", "results.json"], empty, notes)
        write_record(folder, result, {"score_threshold": score_threshold}, {"features": source})
    return result


def _annotations(regions: Regions, row: int) -> list[dict[str, Any]]:
    """The regions of an image as annotations of an instances JSON; ``row`` is the store's row of the first region."""
    entries = regions.to_coco()
    areas = coco_mask.area(regions.rles()).tolist() if entries and regions.masks is not None else None
    for i, entry in enumerate(entries):
        width, height = entry["bbox"][2:]
        area = width * height if areas is None else areas[i]
        entry.update({"id": row + i + 1, "area": area, "iscrowd": 0})
    return entries


def _write_instances(folder: Path, source: Source) -> None:
    """Write ``instances.json`` around the JSON list in the folder's file ``annotations``, and remove that file."""
    store = source.store
    columns = zip(
        store.image_ids.tolist(), store.file_names, store.heights.tolist(), store.widths.tolist(), strict=True
    )
    images = [
        {"id": image_id, "file_name": str(name), "height": height, "width": width}
        for image_id, name, height, width in columns
        if image_id not in store.errors
    ]
    head = {
        "info": {"description": f"regions of {store.path.name} as annotations, by refdet {__version__}"},
        "licenses": [],
        "images": images,
        "categories": [{"id": i, "name": name} for i, name in source.names.items()],
    }
    annotations = folder / "annotations"
    with (folder / "instances.json").open("w", encoding="utf-8") as file, annotations.open(encoding="utf-8") as lines:
        file.write(json.dumps(head, allow_nan=False)[:-1] + ',\n"annotations": ')
        for line in lines:
            file.write(line)
        file.write("}\n")
    annotations.unlink()
