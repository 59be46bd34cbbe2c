"""Export to a FiftyOne dataset; needs the package fiftyone."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from refdet.data.coco import ImageRecord
from refdet.data.image_decoder import orient_points
from refdet.data.image_source import ImageError, ImageSource
from refdet.errors import ArgumentError, InputError, RuntimeFailure
from refdet.files.progress import progress
from refdet.files.short_text import agree, format_count
from refdet.store.export.folder import new_folder
from refdet.store.export.record import ExportResult, write_record
from refdet.store.export.source import Source
from refdet.structures.regions import Regions
from refer.pixels import apply_orientation


@dataclass(frozen=True)
class _ExportedImage:
    """An image to export.

    Attributes:
        record: the image.
        name: name of its file in the folder.
        orientation: EXIF orientation to apply to its regions, 1 for none.
    """

    record: ImageRecord
    name: str
    orientation: int


def export_fiftyone(store: Path, out: Path, images: Path) -> ExportResult:
    """Write a ``FiftyOneDataset`` folder, whose samples refer to the original image files.

    Each sample has its image, ``image_id``, and ``regions``: detections with label, box, score, mask and ``region``,
    the row in the store. FiftyOne applies the EXIF orientation of the images it displays, so the regions of a store
    that ignores it are transformed in the same way. Images whose size differs from the store's are left out.

    Args:
        store: the store.
        out: the folder to write, new or empty.
        images: folder of the image files, not a zip.

    Returns:
        What was written, with notes.

    Raises:
        InputError: FiftyOne is not installed, ``out`` is not empty, images are missing, or ``images`` is not a folder.
        RuntimeFailure: FiftyOne cannot use its database.
    """
    fiftyone = _import_fiftyone()
    if not images.is_dir():
        raise ArgumentError("images", f"{images} is not a folder; FiftyOne needs a folder of image files")
    with Source(store) as source, new_folder(out) as folder:
        reader = source.store
        records = [
            ImageRecord(id=image_id, file_name=str(name), height=height, width=width)
            for image_id, name, height, width in zip(
                reader.image_ids.tolist(),
                reader.file_names,
                reader.heights.tolist(),
                reader.widths.tolist(),
                strict=True,
            )
            if image_id not in reader.errors
        ]
        # read the images as the extraction did, so that their sizes can be compared with the store's
        files = ImageSource.open(images, "apply" if reader.options.get("exif") == "apply" else "ignore")
        files.check(records, store)
        usable, rejected = _find_readable(records, files)
        dataset = _new_dataset(fiftyone)
        try:
            samples = (_make_sample(fiftyone, source, images, image) for image in usable)
            dataset.add_samples(progress(samples, "export", "image", total=len(usable)), num_samples=len(usable))
            dataset_type = fiftyone.types.FiftyOneDataset
            dataset.export(export_dir=str(folder), dataset_type=dataset_type, export_media=False)
        finally:
            dataset.delete()
        empty = {image_id: why for image_id in reader if (why := source.why_empty(image_id))}
        notes = []
        if reader.errors:
            notes.append(_left_out_note(len(reader.errors), "that could not be used"))
        if rejected:
            left_out = _left_out_note(len(rejected), "whose file cannot be read or has another size than in the store")
            notes.append(f"{left_out}, first: {rejected[0]}")
        if num_rotated := sum(image.orientation != 1 for image in usable):
            rotated = format_count(num_rotated, "image")
            notes.append(f"regions of {rotated} are turned by EXIF orientation, as FiftyOne turns the pixels")
        names = sorted(path.name for path in folder.iterdir())
        num_regions = sum(len(reader.rows(image.record.id)) for image in usable)
        result = ExportResult("fiftyone", len(usable), num_regions, names, empty, notes)
        write_record(folder, result, {"images": images.name}, {"features": source})
    return result


def _import_fiftyone() -> Any:
    try:
        import fiftyone
    except ImportError as error:
        raise InputError(
            "`format='fiftyone'` needs the package fiftyone: pip install fiftyone (or export with `format='coco'`, "
            "which FiftyOne imports)"
        ) from error
    return fiftyone


def _left_out_note(count: int, relative_clause: str) -> str:
    """A note such as "3 images that could not be used are left out"."""
    return f"{format_count(count, 'image')} {relative_clause} {agree(count, 'is')} left out"


def _new_dataset(fiftyone: Any) -> Any:
    """A temporary dataset in FiftyOne's own database."""
    try:
        return fiftyone.Dataset(f"refdet-{secrets.token_hex(8)}")
    except Exception as error:  # FiftyOne starts its database here, which can fail in any way
        raise RuntimeFailure(
            f"FiftyOne cannot use its database ({error}); repair it, or export with `format='coco'`, which it imports"
        ) from error


def _find_readable(records: Sequence[ImageRecord], files: ImageSource) -> tuple[list[_ExportedImage], list[str]]:
    """Split the images into those whose files can be read and have the store's size, and the errors of the others."""
    usable, rejected = [], []
    for record in progress(records, "check", "image", total=len(records)):
        name = files.find(record)
        assert name is not None  # as `files.check` found all of them
        try:
            files.read(record)
        except ImageError as error:
            rejected.append(str(error))
        else:
            usable.append(
                _ExportedImage(record, name, files.orientations.get(name, 1) if files.exif == "ignore" else 1)
            )
    return usable, rejected


def _make_sample(fiftyone: Any, source: Source, images: Path, image: _ExportedImage) -> Any:
    """Create the FiftyOne sample of an image whose file is in the folder ``images``."""
    record, orientation = image.record, image.orientation
    regions = source.read(record.id, ())
    rows = source.store.rows(record.id)
    boxes = relative_boxes(regions, orientation)
    detections = [
        fiftyone.Detection(
            label=source.names[int(regions.category_ids[i])],
            bounding_box=boxes[i],
            confidence=float(regions.scores[i]),
            mask=crop_mask(regions, i, orientation),
            region=row,
        )
        for i, row in enumerate(rows)
    ]
    path = str((images / image.name).absolute())
    return fiftyone.Sample(path, image_id=record.id, regions=fiftyone.Detections(detections=detections))


def relative_boxes(regions: Regions, orientation: int = 1) -> list[list[float]]:
    """``[x, y, width, height]`` of each box as fractions of the image, after applying an EXIF orientation."""
    boxes = regions.boxes.astype(np.float64) / ([regions.width, regions.height] * 2)
    corners = orient_points(boxes.reshape(-1, 2), orientation).reshape(-1, 2, 2)
    low = corners.min(axis=1)
    relative: list[list[float]] = np.concatenate([low, corners.max(axis=1) - low], axis=1).tolist()
    return relative


def crop_mask(regions: Regions, index: int, orientation: int = 1) -> np.ndarray | None:
    """Crop the mask of a region to the pixels that its box touches.

    Args:
        regions: regions of an image.
        index: index of the region.
        orientation: EXIF orientation to apply to the cropped mask, 1 for none.

    Returns:
        (h, w) bool; None if the regions have no masks, or the box has no pixels in the image.
    """
    if regions.masks is None:
        return None
    low, high = np.floor(regions.boxes[index, :2]).astype(int), np.ceil(regions.boxes[index, 2:]).astype(int)
    x1, y1 = np.maximum(low, 0)
    mask = np.asarray(coco_mask.decode(regions.rles()[index]))[y1 : max(high[1], y1), x1 : max(high[0], x1)]
    return apply_orientation(mask.astype(bool), orientation) if mask.size else None
