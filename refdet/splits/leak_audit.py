"""Find REFER's val and test images in a list of training images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refdet.splits.benchmark import held_out_benchmarks
from refdet.splits.held_out import held_out
from refdet.splits.image_list import ImageEntry, ImageList
from refdet.splits.list_reading import read_image_list
from refdet.structures.provenance import file_sha256, image_ids_sha256


@dataclass(frozen=True)
class SplitLeak:
    """Images of one held-out split that are in a list.

    Attributes:
        name: such as "refcoco/unc/val".
        images: number of images in the split.
        image_ids: ids, in the list, of the images that are in the split, ascending.
        annotations: number of annotations of those images in the list.
    """

    name: str
    images: int
    image_ids: list[int]
    annotations: int


@dataclass(frozen=True)
class AuditResult:
    """Result of `audit`.

    Attributes:
        form: form of the list: "instances", "JSON list", "JSON object", "JSON lines" or "lines of text".
        images: number of entries in the list.
        unidentified: number of entries that cannot be identified as an image of COCO or of another source.
        unknown: labels of the unidentified entries.
        not_known_by_id: number of images whose id is not the number in their file name.
        file_sha256: hash of the file.
        image_ids_sha256: hash of the ids in the file.
        held_out_images: number of held-out images, each counted once.
        splits: leaks of each split.
        leaked: ids, in the list, of the held-out images in it, ascending.
        notes: human-readable warnings.
    """

    form: str
    images: int
    unidentified: int
    unknown: list[int | str]
    not_known_by_id: int
    file_sha256: str
    image_ids_sha256: str
    held_out_images: int
    splits: list[SplitLeak]
    leaked: list[int]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "clean": not self.leaked,
            "form": self.form,
            "images": self.images,
            "unidentified": self.unidentified,
            "not_known_by_id": self.not_known_by_id,
            "file_sha256": self.file_sha256,
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


def audit(
    instances: str | Path,
    refer_root: str | Path,
    *,
    exclude: Sequence[str] = (),
    benchmark: Sequence[str | Path] = (),
) -> AuditResult:
    """Look for images of REFER's val and test splits in a list of images.

    Annotations count too: an annotation left in the file after its image was removed is a leak.

    Examples:
        >>> refdet.audit("demo/split.json", "demo/data/refer").leaked
        []
        >>> len(refdet.audit("demo/data/annotations/instances_train2014.json", "demo/data/refer").leaked) > 0
        True

    Args:
        instances: an instances JSON or another list, in any of the forms of `refdet.splits.image_list`.
        refer_root: folder with DATASET/refs(SPLIT_BY).p files.
        exclude: splits to look for, each "DATASET:SPLIT_BY" (all but train) or "DATASET:SPLIT_BY:SPLIT,...". Empty
            looks for all but train of every dataset found.
        benchmark: files with the images of other benchmarks to look for, see `refdet.splits.benchmark`.

    Returns:
        The leaks of each split, hashes of the list and warnings.

    Raises:
        InputError: the file is not a list of images.
        refer.ReferError: invalid REFER data.
    """
    splits, notes = held_out(refer_root, exclude)
    others, more = held_out_benchmarks(benchmark)
    splits, notes = splits + others, notes + more
    images = read_image_list(instances)
    notes += warnings_of(images)
    per_image = Counter(entry.image_id for entry in images.annotations)
    stray = per_image.keys() - images.ids
    if stray:
        count = sum(per_image[image_id] for image_id in stray)
        notes.append(f"{images.path}: {count} annotations refer to images that are not in it")
    elsewhere = frozenset().union(*images.elsewhere.values())
    if elsewhere:
        keys = ", ".join(map(repr, images.elsewhere))
        notes.append(f"{images.path}: COCO image names outside of 'images', under {keys:.80}, are checked too")
    leaks = []
    everything = frozenset().union(*(split.image_ids for split in splits))
    suspects = [image for image in images.images if not everything.isdisjoint(image.numbers)]
    for split in splits:
        ids = {image.id for image in suspects if image.id is not None and not split.image_ids.isdisjoint(image.numbers)}
        ids |= (stray | elsewhere) & split.image_ids
        leaks.append(SplitLeak(split.name, len(split.image_ids), sorted(ids), sum(per_image[id_] for id_ in ids)))
    unknown = [image.label for image in images.images if image.unknown]
    return AuditResult(
        form=images.form,
        images=len(images.images),
        unidentified=len(unknown),
        unknown=unknown,
        not_known_by_id=sum(not image.id_matches_file_name for image in images.images),
        file_sha256=file_sha256(images.path),
        image_ids_sha256=image_ids_sha256(images.ids),
        held_out_images=len(everything),
        splits=leaks,
        leaked=sorted({image_id for leak in leaks for image_id in leak.image_ids}),
        notes=notes,
    )


def numbers_of(images: Iterable[ImageEntry]) -> frozenset[int]:
    """Union of the images' COCO numbers."""
    return frozenset().union(*(image.numbers for image in images))


def warnings_of(images: ImageList) -> list[str]:
    """Human-readable warnings about how the images of a list are identified, one line each."""
    path, lines = images.path, []
    several = [image for image in images.images if len(image.numbers) > 1]
    if several:
        first = several[0]
        numbers = " and ".join(map(str, sorted(first.numbers)[:3]))
        lines.append(
            f"{path}: {len(several)} entries refer to several COCO images ({first.label!s:.60}: {numbers}); "
            "an entry is held out if any of them is"
        )
    running = [image for image in images.images if _has_running_id(image)]
    if running:
        lines.append(
            f"{path}: the ids of {len(running)} images differ from the numbers in their names "
            f"({running[0].label!s:.60}: {min(running[0].evidence.named)}); the names are used"
        )
    none = [image for image in images.images if image.evidence.is_non_coco]
    if none:
        lines.append(f"{path}: {len(none)} images are not from COCO according to the file (coco_id null)")
    lines += _unknown(images)
    bare = [image for image in images.images if image.evidence.bare and not image.evidence.named]
    if bare:
        first = bare[0]
        what = "ids" if all(type(image.label) is int and not image.name for image in bare) else "numeric names"
        lines.append(
            f"{path}: {len(bare)} {what} (first: {first.name or first.label!r:.60}) are taken as COCO image ids"
        )
    return lines


def _unknown(images: ImageList) -> list[str]:
    """Warnings about entries with only an unconfirmed id, and about entries that cannot be identified."""
    by_id = [image for image in images.images if image.unknown and _has_id_alone(image)]
    others = [image for image in images.images if image.unknown and not _has_id_alone(image)]
    path, lines = images.path, []
    if by_id:
        lines.append(
            f"{path}: {len(by_id)} images have only an id (first: {by_id[0].label}), and no name such as "
            "000000000009.jpg or coco_id in the file confirms that its ids are COCO's: they are not proven clean"
        )
    if others:
        genome = sum(image.evidence.genome for image in others)
        hint = f" ({genome} are Visual Genome's, whose image_data.json has COCO ids)" if genome else ""
        lines.append(
            f"{path}: {len(others)} entries have no COCO image id{hint}, first: "
            f"{others[0].name or others[0].label!r:.60}; their ids and names prove nothing, use refdet audit "
            "--find-duplicates to compare their content"
        )
    return lines


def _has_running_id(image: ImageEntry) -> bool:
    evidence = image.evidence
    return bool(evidence.named) and evidence.id is not None and evidence.id not in image.numbers and not evidence.genome


def _has_id_alone(image: ImageEntry) -> bool:
    return bool(image.evidence.ids) and not image.evidence.unread_names and not image.evidence.genome
