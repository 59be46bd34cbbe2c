"""`CocoIndex`: an instances JSON in COCO's format, checked once and indexed by image."""

from __future__ import annotations

import gc
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refdet.data.segmentations import rle_pixels
from refdet.errors import InputError

log = logging.getLogger(__name__)

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image: its COCO id, file name ("" where the JSON gives none) and size in pixels."""

    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Annotation:
    """One annotated object.

    Attributes:
        box: half-open ``x1 y1 x2 y2`` in pixels as in the file: it may reach over the border of the image.
        segmentation: polygons ``[[x, y, x, y, ...], ...]`` in pixels, an RLE ``{"size": [h, w],
            "counts": ...}``, or None.
        area: as in the file; width times height of the box where the file gives none. Square pixels.
    """

    id: int
    image_id: int
    category_id: int
    box: Box
    segmentation: list | dict | None
    area: float
    iscrowd: bool


@dataclass(frozen=True, slots=True)
class CocoIndex:
    """The images, annotations and categories of one instances file.

    Attributes:
        path: the file.
        info: its ``info`` object, {} if it has none.
        images: image id -> record, in the order of the file.
        annotations: image id -> annotations in the order of the file; every image has an entry.
        categories: category id -> name, in the order of the file.
        supercategories: category id -> supercategory, "" where the file gives none.
        raw: the JSON as parsed.
        dropped: what was left out of ``annotations``, one line for people each.
    """

    path: Path
    info: dict
    images: dict[int, ImageRecord]
    annotations: dict[int, list[Annotation]]
    categories: dict[int, str]
    supercategories: dict[int, str]
    raw: dict
    dropped: list[str]

    @classmethod
    def load(cls, path: str | Path, need_segmentation: bool = False) -> CocoIndex:
        """Read and check an instances JSON.

        Annotations whose box has no area, is not finite or lies wholly outside the image are left out and
        listed in ``dropped``, as are polygons of fewer than three points; a line of the log says how many.

        Arguments:
            path: the file.
            need_segmentation: refuse a file in which no annotation has a segmentation.

        Raises:
            InputError: one line that names the file and the culprit in it.
        """
        path = Path(path)
        with _no_garbage_collection():
            raw = read_json(path)
            if not isinstance(raw, dict):
                raise InputError(f"{path}: an instances JSON is an object, this is a {_kind(raw)}")
            for key in ("images", "annotations", "categories"):
                if not isinstance(raw.get(key), list):
                    raise InputError(f"{path}: no list {key!r} in it; is it a COCO instances JSON?")
                for position, entry in enumerate(raw[key]):
                    if not isinstance(entry, dict):
                        raise InputError(f"{path}: {key}[{position}] is a {_kind(entry)}, not an object")
            info = raw["info"] if isinstance(raw.get("info"), dict) else {}
            categories, supercategories = _categories(path, raw["categories"])
            images = _images(path, raw["images"])
            annotations, dropped = _annotations(path, raw["annotations"], images, categories)
        index = cls(path, info, images, annotations, categories, supercategories, raw, dropped)
        if dropped:
            log.warning(
                "note: %s: %d annotations cannot be used as they are (the first: %s); refdet inspect lists them",
                path, len(dropped), dropped[0],
            )  # fmt: skip
        if need_segmentation and raw["annotations"]:
            found = any(a.segmentation is not None for of_image in annotations.values() for a in of_image)
            if not found:
                raise InputError(
                    f"{path}: no annotation has a segmentation; train boxes only with --set model.masks=false"
                )
        return index


def read_json(path: Path) -> Any:
    """Parse a JSON file. InputError names the file and, where it is malformed, the line."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: malformed JSON in line {error.lineno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a JSON text file ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise InputError(f"{path}: malformed JSON: nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise InputError(f"{path}: malformed JSON: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    # A parsed COCO file is millions of lists without one cycle; scanning them as they come doubles the time.
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _id(path: Path, entry: dict, key: str, what: str) -> int:
    value = entry.get(key)
    if type(value) is not int:  # bool is an int to isinstance
        shown = f"is {value!r:.40}" if key in entry else "is missing"
        raise InputError(f"{path}: {what}: {key!r} {shown}, it must be an integer")
    return value


def _categories(path: Path, entries: list[dict]) -> tuple[dict[int, str], dict[int, str]]:
    names: dict[int, str] = {}
    supercategories: dict[int, str] = {}
    for position, entry in enumerate(entries):
        category_id = _id(path, entry, "id", f"categories[{position}]")
        if category_id in names:
            raise InputError(f"{path}: category id {category_id} is there twice")
        name = entry.get("name")
        if not isinstance(name, str):
            raise InputError(f"{path}: category {category_id} has no name")
        names[category_id] = name
        supercategories[category_id] = str(entry.get("supercategory", ""))
    return names, supercategories


def _images(path: Path, entries: list[dict]) -> dict[int, ImageRecord]:
    images: dict[int, ImageRecord] = {}
    for position, entry in enumerate(entries):
        image_id = _id(path, entry, "id", f"images[{position}]")
        what = f"image {image_id}"
        if image_id in images:
            raise InputError(f"{path}: image id {image_id} is there twice")
        file_name = entry.get("file_name") or ""
        if not isinstance(file_name, str):
            raise InputError(f"{path}: {what}: 'file_name' is a {_kind(file_name)}, it must be a string")
        height, width = (_id(path, entry, key, what) for key in ("height", "width"))
        if height < 1 or width < 1:
            raise InputError(f"{path}: {what}: its size is {width}x{height}, it must be at least 1x1")
        images[image_id] = ImageRecord(image_id, file_name, height, width)
    return images


def _annotations(
    path: Path, entries: list[dict], images: dict[int, ImageRecord], categories: dict[int, str]
) -> tuple[dict[int, list[Annotation]], list[str]]:
    by_image: dict[int, list[Annotation]] = {image_id: [] for image_id in images}
    dropped: list[str] = []
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        annotation_id = _id(path, entry, "id", f"annotations[{position}]")
        what = f"annotation {annotation_id}"
        if annotation_id in seen:
            raise InputError(f"{path}: annotation id {annotation_id} is there twice")
        seen.add(annotation_id)
        image = images.get(_id(path, entry, "image_id", what))
        if image is None:
            raise InputError(f"{path}: {what} belongs to image {entry['image_id']}, which is not in the file")
        category_id = _id(path, entry, "category_id", what)
        if category_id not in categories:
            raise InputError(f"{path}: {what} has category {category_id}, which is not in the file")
        x, y, width, height = _bbox(path, entry.get("bbox"), what)
        segmentation, short = _segmentation(path, entry.get("segmentation"), image, what)
        if short:
            dropped.append(f"{what}: {short} of its polygons with fewer than three points")
        iscrowd = entry.get("iscrowd", 0)
        if iscrowd not in (0, 1):
            raise InputError(f"{path}: {what}: 'iscrowd' is {iscrowd!r:.40}, it must be 0 or 1")
        reason = _no_box(x, y, width, height, image)
        if reason:
            dropped.append(f"{what}: {reason}")
            continue
        area = entry.get("area", width * height)
        if not _is_finite(area):
            raise InputError(f"{path}: {what}: 'area' is {area!r:.40}, it must be a finite number")
        box = (float(x), float(y), float(x + width), float(y + height))
        by_image[image.id].append(
            Annotation(annotation_id, image.id, category_id, box, segmentation, float(area), bool(iscrowd))
        )
    return by_image, dropped


def _bbox(path: Path, bbox: object, what: str) -> list[float]:
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(type(v) in (int, float) for v in bbox):
        shown = "is missing" if bbox is None else f"is {bbox!r:.60}"
        raise InputError(f"{path}: {what}: 'bbox' {shown}, it must be four numbers [x, y, width, height]")
    return bbox


def _is_finite(value: object) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer beyond the range of floats
        return False


def _no_box(x: float, y: float, width: float, height: float, image: ImageRecord) -> str:
    """Why this box is none, or ""."""
    if not all(map(_is_finite, (x, y, width, height, x + width, y + height))):
        return "box is not finite"
    if width <= 0 or height <= 0:
        return "box has no area"
    if x >= image.width or y >= image.height or x + width <= 0 or y + height <= 0:
        return f"box lies outside image {image.id} ({image.width}x{image.height})"
    return ""


def _segmentation(path: Path, value: object, image: ImageRecord, what: str) -> tuple[list | dict | None, int]:
    """The segmentation without polygons that enclose nothing, and how many of those there were."""
    if value is None or value == []:
        return None, 0
    if isinstance(value, dict):
        size, counts = value.get("size"), value.get("counts")
        if size != [image.height, image.width]:
            raise InputError(
                f"{path}: {what}: its RLE has size {size!r:.40}, its image is [{image.height}, {image.width}]"
            )
        if isinstance(counts, list):
            if not all(type(count) is int and count >= 0 for count in counts):
                raise InputError(f"{path}: {what}: the counts of its RLE must be integers from 0 on")
            if sum(counts) != image.height * image.width:
                raise InputError(f"{path}: {what}: its RLE covers {sum(counts)} pixels, its image has "
                                 f"{image.height * image.width}")  # fmt: skip
        elif not isinstance(counts, str):
            raise InputError(f"{path}: {what}: its RLE has no 'counts' (a list or a string)")
        elif rle_pixels(counts) != image.height * image.width:
            raise InputError(f"{path}: {what}: its RLE is damaged: it does not cover the {image.height * image.width} "
                             "pixels of its image")  # fmt: skip
        return value, 0
    if not isinstance(value, list):
        raise InputError(f"{path}: {what}: 'segmentation' is a {_kind(value)}, it must be polygons or an RLE")
    for polygon in value:
        try:
            # Adding up is the quick way to see that all of a long list are finite numbers.
            good = isinstance(polygon, list) and len(polygon) % 2 == 0 and math.isfinite(sum(polygon))
        except (TypeError, OverflowError):
            good = False
        if not good:
            raise InputError(f"{path}: {what}: a polygon must be a list of numbers [x, y, x, y, ...]")
    kept = [polygon for polygon in value if len(polygon) >= 6]
    if len(kept) == len(value):
        return value, 0
    return kept or None, len(value) - len(kept)
