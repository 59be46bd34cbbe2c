"""Leak-free splits: the images REFER holds out, taking them out of an instances file, and the proof of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import refer
from refdet.atomic import atomic_path
from refdet.data.coco import CocoIndex, read_json
from refdet.errors import InputError
from refdet.provenance import Provenance, file_sha256, image_ids_sha256

TRAIN = "train"
# The images of RefClef are not COCO's; its ids would hit COCO images they have nothing to do with.
NOT_COCO = ("refclef",)
_COCO_NAME = re.compile(r"(?:.*/)?(?:COCO_[A-Za-z]+\d{4}_)?(\d{12})\.\w+")


@dataclass(frozen=True)
class HeldOut:
    """The images of one split of REFER that a detector must not see.

    Attributes:
        name: "refcoco/unc/val".
        image_ids: COCO ids of all its images.
        shared: how many of them hold refs of the train split of the same dataset and split_by too.
    """

    name: str
    image_ids: frozenset[int]
    shared: int


@dataclass(frozen=True)
class SplitResult:
    """What `build_split` did: ``report`` as written, the paths, and remarks for people."""

    out: Path
    report_path: Path
    report: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class SplitLeak:
    """What of one held-out split is in an instances file.

    Attributes:
        name: "refcoco/unc/val"; images: how many images it has.
        image_ids: ids in the file of the images that are in it, ascending.
        annotations: how many annotations of the file are on those images.
    """

    name: str
    images: int
    image_ids: list[int]
    annotations: int


@dataclass(frozen=True)
class AuditResult:
    """What `audit` found: ``held_out_images`` counts each image once, ``leaked`` are ids in the file."""

    images: int
    image_ids_sha256: str
    held_out_images: int
    splits: list[SplitLeak]
    leaked: list[int]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "clean": not self.leaked,
            "images": self.images,
            "image_ids_sha256": self.image_ids_sha256,
            "held_out_images": self.held_out_images,
            "splits": {
                leak.name: {
                    "images": leak.images,
                    "leaked": len(leak.image_ids),
                    "annotations": leak.annotations,
                    "image_ids": leak.image_ids,
                }
                for leak in self.splits
            },
            "leaked_image_ids": self.leaked,
            "notes": self.notes,
        }


def held_out(refer_root: str | Path, exclude: Sequence[str] = ()) -> tuple[list[HeldOut], list[str]]:
    """The splits to hold out, and remarks for people.

    Arguments:
        refer_root: folder of DATASET/refs(SPLIT_BY).p.
        exclude: what to hold out, each "DATASET:SPLIT_BY" (all but train) or "DATASET:SPLIT_BY:SPLIT,...";
            empty means all but train of every dataset and split_by found.

    Raises:
        InputError: nothing is there, or a name in ``exclude`` is not (the choices are listed).
        refer.ReferError: a refs file is damaged.
    """
    pairs = [pair for pair in refer.available(refer_root) if pair[0] not in NOT_COCO]
    skipped = sorted({dataset for dataset, _ in refer.available(refer_root)} & set(NOT_COCO))
    notes = [f"{dataset}: left alone, its images are not COCO's" for dataset in skipped]
    if not pairs:
        raise InputError(f"{refer_root}: no DATASET/refs(SPLIT_BY).p of COCO images below it; is this the REFER data?")
    wanted = [_parse(text, pairs) for text in exclude] or [(dataset, by, ()) for dataset, by in pairs]
    found: dict[str, HeldOut] = {}
    for dataset, split_by, names in wanted:
        images = _images_by_split(refer_root, dataset, split_by)
        unknown = [name for name in names if name not in images]
        if unknown:
            raise InputError(
                f"--exclude {dataset}:{split_by}: no split {unknown[0]!r}; choose from {', '.join(sorted(images))}"
            )
        train = images.get(TRAIN, frozenset())
        for name in names or sorted(set(images) - {TRAIN}):
            shared = len(images[name] & train) if name != TRAIN else 0
            full = f"{dataset}/{split_by}/{name}"
            found[full] = HeldOut(full, images[name], shared)
    splits = [found[name] for name in sorted(found)]
    if not splits:
        raise InputError(f"{refer_root}: its refs are all of the train split; nothing is there to hold out")
    for split in splits:
        if split.shared:
            notes.append(
                f"{split.name}: {split.shared} of its {len(split.image_ids)} images hold train refs too "
                "(this division is by object); they are held out as well"
            )
    return splits, notes


def build_split(
    instances: str | Path, refer_root: str | Path, out: str | Path, exclude: Sequence[str] = ()
) -> SplitResult:
    """Write an instances file without held-out images and without their annotations, and a report beside it.

    An image is held out if its id is, or the COCO number in its file name, whatever the folder or year in
    that name. All else in the file is kept as it is, in its order; ``info.refdet`` holds the provenance.

    Arguments:
        instances: the instances JSON to filter.
        refer_root, exclude: see `held_out`.
        out: the JSON to write; the report of ``x.json`` is ``x.report.json``.

    Raises:
        InputError: bad input, an output that exists, or no image left.
        refer.ReferError: bad REFER data.
    """
    out = Path(out)
    report_path = out.with_name(out.name.removesuffix(".json") + ".report.json")
    for path in (out, report_path):
        if path.exists():
            raise InputError(f"{path} exists; choose another --out or remove it")
    splits, notes = held_out(refer_root, exclude)
    index = CocoIndex.load(instances)
    if not index.images:
        raise InputError(f"{instances}: no image in it to split")
    numbers = {image.id: coco_numbers(image.id, image.file_name) for image in index.images.values()}
    by_split = {split.name: _hits(numbers, split.image_ids) for split in splits}
    removed = frozenset().union(*by_split.values())
    kept = [image_id for image_id in index.images if image_id not in removed]
    if not kept:
        raise InputError(f"{instances}: no image left; all {len(index.images)} are held out by {refer_root}")
    if not removed:
        notes.append(f"{instances}: none of its images is in a held-out split; is it of COCO train?")
    notes += _renumbered(index.path, numbers)

    raw = index.raw
    annotations = [annotation for annotation in raw["annotations"] if annotation["image_id"] not in removed]
    excluded = {s.name: {"images": len(s.image_ids), "found": len(by_split[s.name])} for s in splits}
    earlier = Provenance.of_instances(index).excluded  # of a file that build-split wrote
    provenance = Provenance(
        source=index.path.name,
        source_sha256=file_sha256(index.path),
        images=len(kept),
        annotations=len(annotations),
        image_ids_sha256=image_ids_sha256(kept),
        excluded={**earlier, **excluded},
    )
    report = {
        "images_before": len(index.images),
        "images_after": len(kept),
        "images_removed": len(removed),
        "annotations_before": len(raw["annotations"]),
        "annotations_after": len(annotations),
        "excluded": excluded,
        "removed_image_ids": sorted(removed),
    }
    filtered = {
        **raw,
        "info": {**index.info, "refdet": provenance.to_json()},
        "images": [image for image in raw["images"] if image["id"] not in removed],
        "annotations": annotations,
    }
    # Without indentation, which would double the size of a file of millions of polygon points.
    with atomic_path(report_path) as report_file, atomic_path(out) as out_file:
        report_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        out_file.write_text(json.dumps(filtered) + "\n", encoding="utf-8")
    return SplitResult(out, report_path, report, notes)


def audit(instances: str | Path, refer_root: str | Path) -> AuditResult:
    """Look for images of REFER's val and test splits in an instances file.

    Annotations count too: one whose image was removed but which stayed in the file is a leak.

    Raises:
        InputError: the file is no instances JSON.
        refer.ReferError: bad REFER data.
    """
    path = Path(instances)
    splits, notes = held_out(refer_root)
    raw = read_json(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("images"), list):
        raise InputError(f"{path}: no list 'images' in it; is it a COCO instances JSON?")
    images = _entries(path, raw["images"], "images", "id")
    if not images:
        raise InputError(f"{path}: no image in it to audit")
    numbers = {image["id"]: coco_numbers(image["id"], str(image.get("file_name") or "")) for image in images}
    if len(numbers) < len(images):  # one could hide the other
        twice = next(id_ for id_, count in Counter(image["id"] for image in images).items() if count > 1)
        raise InputError(f"{path}: image id {twice} is there twice; give each image one entry")
    ids_sha256 = image_ids_sha256(numbers)
    per_image: dict[int, int] = {}
    for annotation in _entries(path, raw.get("annotations") or [], "annotations", "image_id"):
        per_image[annotation["image_id"]] = per_image.get(annotation["image_id"], 0) + 1
    stray = set(per_image) - set(numbers)
    if stray:
        count = sum(per_image[image_id] for image_id in stray)
        notes.append(f"{path}: {count} annotations are of images that are not in it")
    notes += _renumbered(path, numbers)
    everything = numbers | {image_id: frozenset([image_id]) for image_id in stray}
    leaks = []
    for split in splits:
        hits = sorted(_hits(everything, split.image_ids))
        annotations = sum(per_image.get(image_id, 0) for image_id in hits)
        leaks.append(SplitLeak(split.name, len(split.image_ids), hits, annotations))
    return AuditResult(
        images=len(images),
        image_ids_sha256=ids_sha256,
        held_out_images=len(frozenset().union(*(split.image_ids for split in splits))),
        splits=leaks,
        leaked=sorted({image_id for leak in leaks for image_id in leak.image_ids}),
        notes=notes,
    )


def coco_numbers(image_id: int, file_name: str) -> frozenset[int]:
    """The numbers under which COCO may know an image: its id, and that in a COCO file name."""
    match = _COCO_NAME.fullmatch(file_name)
    return frozenset([image_id, int(match[1])] if match else [image_id])


def _hits(numbers: dict[int, frozenset[int]], image_ids: frozenset[int]) -> frozenset[int]:
    return frozenset(image_id for image_id, own in numbers.items() if own & image_ids)


def _renumbered(path: Path, numbers: dict[int, frozenset[int]]) -> list[str]:
    other = [(image_id, max(own - {image_id})) for image_id, own in numbers.items() if len(own) > 1]
    if not other:
        return []
    image_id, number = other[0]
    return [
        f"{path}: {len(other)} images have an id that is not the number in their file name "
        f"(image {image_id}: {number}); an image is held out if either number is"
    ]


def _parse(text: str, pairs: Iterable[tuple[str, str]]) -> tuple[str, str, tuple[str, ...]]:
    parts = text.split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise InputError(f"--exclude {text}: it must be DATASET:SPLIT_BY or DATASET:SPLIT_BY:SPLIT,...")
    if (parts[0], parts[1]) not in pairs:
        choices = ", ".join(f"{dataset}:{split_by}" for dataset, split_by in pairs)
        raise InputError(f"--exclude {text}: no such dataset and split_by; choose from {choices}")
    names = tuple(parts[2].split(",")) if len(parts) == 3 else ()
    return parts[0], parts[1], names


def _images_by_split(root: str | Path, dataset: str, split_by: str) -> dict[str, frozenset[int]]:
    images: dict[str, set[int]] = {}
    for ref in refer.read_refs(root, dataset, split_by):
        images.setdefault(ref["split"], set()).add(ref["image_id"])
    return {split: frozenset(ids) for split, ids in images.items()}


def _entries(path: Path, entries: Any, what: str, key: str) -> list[dict]:
    if not isinstance(entries, list):
        raise InputError(f"{path}: {what!r} is not a list")
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or type(entry.get(key)) is not int:
            raise InputError(f"{path}: {what}[{position}] has no integer {key!r}")
    return entries
