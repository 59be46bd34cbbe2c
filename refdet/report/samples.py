"""The images that a report shows: REFER images with their refs and regions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from refdet.data.box_format import DEFAULT_FORMAT
from refdet.data.coco import ImageRecord
from refdet.evaluation.metrics import Protocol, box_iou, box_overlap
from refdet.evaluation.predictions import load_predictions
from refdet.store import Store
from refdet.structures.regions import Regions
from refer import REFER

_T = TypeVar("_T")

MIN_IOU = 0.5  # IoU from which a region covers a referent, and an answer is correct


@dataclass(frozen=True)
class Referent:
    """The object that the sentences of a ref refer to.

    Attributes:
        category_id: its COCO category id.
        category: the name of its category.
        sentences: its referring expressions.
        box: (4,) annotated box, half-open xyxy in pixels of the image.
        region: row of the region with the highest IoU, None without regions.
        iou: the IoU of ``region``, 0 without regions.
    """

    category_id: int
    category: str
    sentences: tuple[str, ...]
    box: np.ndarray
    region: int | None
    iou: float

    @property
    def is_covered(self) -> bool:
        """Whether a region has an IoU of `MIN_IOU` or more."""
        return self.iou >= MIN_IOU


@dataclass(frozen=True)
class Scene:
    """One image. Its regions are read on demand, as stores have tens of thousands of images.

    Attributes:
        split: the split, such as "refcoco/unc/val".
        image: the image.
        referents: the objects of the image that refs of the split refer to.
        names: category id -> name in the store.
        read: reads the regions.
        exif: EXIF handling of the extraction, "ignore" or "apply".
    """

    split: str
    image: ImageRecord
    referents: tuple[Referent, ...]
    names: Mapping[int, str]
    read: Callable[[], Regions]
    exif: str = "ignore"

    @classmethod
    def from_store(cls, split: str, store: Store, image: ImageRecord, referents: tuple[Referent, ...]) -> Scene:
        """An image of a store."""
        exif = "apply" if store.options.get("exif") == "apply" else "ignore"
        return cls(split, image, referents, store.names, lambda: store.read(image.id, features=()), exif)

    @property
    def regions(self) -> Regions:
        """The regions, read anew on each access."""
        return self.read()

    @property
    def lowest_iou(self) -> float:
        """The lowest IoU of the referents, 1 without referents."""
        return min((referent.iou for referent in self.referents), default=1.0)


@dataclass(frozen=True)
class Answer:
    """A model's answer to one sentence.

    Attributes:
        scene: the image, with one referent, that of the sentence, and with no other sentence.
        box: (4,) the answer, half-open xyxy in pixels of the image.
        iou: IoU of the box and the referent.
        is_correct: whether it is correct by the protocol of the evaluation.
    """

    scene: Scene
    box: np.ndarray
    iou: float
    is_correct: bool


def scenes_of_splits(store: Store, refer: REFER, dataset: str, splits: Sequence[str]) -> list[Scene]:
    """The usable images of a store that are in the splits, split by split and by ascending image id.

    Args:
        store: the store.
        refer: the REFER dataset.
        dataset: dataset and split_by, such as "refcoco/unc".
        splits: names of splits.
    """
    images = images_of(store)
    return [
        Scene.from_store(f"{dataset}/{split}", store, images[image_id], referents)
        for split in splits
        for image_id, referents in _referents_by_image(store, refer, split)
    ]


def read_answers(
    store: Store,
    refer: REFER,
    dataset: str,
    splits: Sequence[str],
    predictions: Path,
    protocol: Protocol = "standard",
    box_format: str = DEFAULT_FORMAT,
) -> list[Answer]:
    """Read a model's answers to the sentences of the splits, split by split and by ascending image id.

    Args:
        store: the store.
        refer: the REFER dataset.
        dataset: dataset and split_by, such as "refcoco/unc".
        splits: names of splits.
        predictions: JSON of the answers.
        protocol: how boxes are compared, as in `refdet.evaluation.refer_benchmark.evaluate_on_refer`.
        box_format: format of the boxes in ``predictions``.

    Returns:
        The answers; sentences without an answer, or on images that the store lacks, are left out.

    Raises:
        InputError: the file is damaged, or does not fit the store.
    """
    images = images_of(store)
    records = {
        sent_id: images[ref["image_id"]] for sent_id, ref in refer.sentToRef.items() if ref["image_id"] in images
    }
    predicted = load_predictions(predictions, store, records, box_format=box_format)
    results = []
    for split in splits:
        for image_id, ref_ids in _refs_by_image(refer, split).items():
            if image_id not in store:
                continue
            region_boxes = store.boxes(image_id)
            for ref_id in ref_ids:
                referent = _referent(refer, ref_id, region_boxes)
                for sentence in refer.Refs[ref_id]["sentences"]:
                    if sentence["sent_id"] not in predicted:
                        continue
                    box = predicted[sentence["sent_id"]].boxes[0]
                    iou = float(box_iou(box[None], referent.box[None], protocol)[0, 0])
                    is_correct = bool(box_overlap(box[None], referent.box[None], protocol)[0, 0] >= MIN_IOU)
                    referents = (replace(referent, sentences=(str(sentence["sent"]),)),)
                    scene = Scene.from_store(f"{dataset}/{split}", store, images[image_id], referents)
                    results.append(Answer(scene, box, iou, is_correct))
    return results


def images_of(store: Store) -> dict[int, ImageRecord]:
    """The images of a store by id."""
    columns = (store.image_ids.tolist(), store.file_names.tolist(), store.heights.tolist(), store.widths.tolist())
    return {row[0]: ImageRecord(*row) for row in zip(*columns, strict=True)}


def _refs_by_image(refer: REFER, split: str) -> dict[int, list[int]]:
    """Image id -> ids of the refs of a split, in ascending order of image ids."""
    ref_ids: dict[int, list[int]] = {}
    for ref in refer.data["refs"]:
        if ref["split"] == split:
            ref_ids.setdefault(ref["image_id"], []).append(ref["ref_id"])
    return dict(sorted(ref_ids.items()))


def _referents_by_image(store: Store, refer: REFER, split: str) -> Iterator[tuple[int, tuple[Referent, ...]]]:
    """(image id, referents) of the usable images of a split, in ascending order of image ids."""
    for image_id, ref_ids in _refs_by_image(refer, split).items():
        if image_id in store and image_id not in store.errors:
            boxes = store.boxes(image_id)
            yield image_id, tuple(_referent(refer, ref_id, boxes) for ref_id in ref_ids)


def _referent(refer: REFER, ref_id: int, boxes: np.ndarray) -> Referent:
    """The referent of a ref, compared with the boxes (K, 4) of the regions of its image, xyxy in pixels."""
    x, y, width, height = refer.getRefBox(ref_id)
    box = np.array([x, y, x + width, y + height], np.float64)
    ious = box_iou(box[None], boxes)[0]
    best = int(ious.argmax()) if len(ious) else None
    ref = refer.Refs[ref_id]
    return Referent(
        category_id=int(ref["category_id"]),
        category=str(refer.Cats.get(ref["category_id"], ref["category_id"])),
        sentences=tuple(str(sentence["sent"]) for sentence in ref["sentences"]),
        box=box,
        region=best,
        iou=float(ious[best]) if best is not None else 0.0,
    )


def sample_scenes(all_scenes: Sequence[Scene], count: int) -> list[Scene]:
    """At most ``count`` images, balanced over the splits and evenly spaced within each, without duplicates."""
    by_split: dict[str, list[Scene]] = {}
    for scene in all_scenes:
        by_split.setdefault(scene.split, []).append(scene)
    chosen: dict[int, Scene] = {}  # by image id, as RefCOCO and RefCOCO+ share images
    per_split = -(-count // max(len(by_split), 1))  # rounded up
    for turn in range(per_split):
        for split_scenes in by_split.values():
            start = (2 * turn + 1) * len(split_scenes) // (2 * per_split)
            from_start = [*split_scenes[start:], *split_scenes[:start]]
            new = next((scene for scene in from_start if scene.image.id not in chosen), None)
            if new is not None and len(chosen) < count:
                chosen[new.image.id] = new
    order = list(by_split)
    return sorted(chosen.values(), key=lambda scene: order.index(scene.split))


def hardest_scenes(all_scenes: Sequence[Scene], count: int) -> list[Scene]:
    """At most ``count`` images with an uncovered referent, lowest `lowest_iou` first, without duplicates."""
    chosen: dict[int, Scene] = {}
    for scene in sorted(all_scenes, key=lambda scene: scene.lowest_iou):
        if scene.lowest_iou < MIN_IOU and len(chosen) < count:
            chosen.setdefault(scene.image.id, scene)
    return list(chosen.values())


def covered_scenes(all_scenes: Sequence[Scene], count: int) -> list[Scene]:
    """At most ``count`` images whose referents are all covered, highest `lowest_iou` first, without duplicates."""
    chosen: dict[int, Scene] = {}
    for scene in sorted(all_scenes, key=lambda scene: -scene.lowest_iou):
        if scene.lowest_iou >= MIN_IOU and len(chosen) < count:
            chosen.setdefault(scene.image.id, scene)
    return list(chosen.values())


def sample_evenly(items: Sequence[_T], count: int) -> list[_T]:
    """At most ``count`` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
