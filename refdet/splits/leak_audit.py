"""Find REFER's val and test images in a list of training images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refdet.files.short_text import agree, format_count
from refdet.splits.benchmark import held_out_benchmarks
from refdet.splits.held_out import held_out
from refdet.splits.image_list import ImageEntry, ImageListFile
from refdet.splits.list_reading import read_image_list
from refdet.structures.provenance import file_sha256, image_ids_sha256


@dataclass(frozen=True)
class SplitLeak:
    """Images of one held-out split that are in a list.

    Attributes:
        name: such as "refcoco/unc/val".
        images: number of images in the split.
        image_ids: ids, in the list, of the images that are in the split, ascending; also the ids of images of the split
            that only an annotation or a name outside of ``images`` refers to.
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
        form: format of the list: "instances", "JSON list", "JSON object", "JSON lines" or "lines of text".
        images: number of entries in the list.
        unidentified: number of entries that cannot be identified as an image of COCO or of another source.
        unknown: labels of the unidentified entries.
        not_known_by_id: number of images whose id is not the number in their file name.
        file_sha256: hash of the file.
        image_ids_sha256: hash of the ids in the file.
        held_out_images: number of held-out images, each counted once.
        splits: leaks of each split.
        leaked: the ``image_ids`` of all splits, each once, ascending.
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
    allow_unknown: bool = False,
) -> AuditResult:
    """Look for images of REFER's val and test splits in a list of images.

    Annotations count too: an annotation left in the file after its image was removed is a leak.

    Examples:
        >>> refdet.audit("demo/split.json", "demo/data/refer").leaked
        []
        >>> len(refdet.audit("demo/data/annotations/instances_train2014.json", "demo/data/refer").leaked) > 0
        True

    Args:
        instances: an instances JSON or another list, in any of the formats of `refdet.splits.image_list`.
        refer_root: folder with DATASET/refs(SPLIT_BY).p files.
        exclude: splits to look for, each "DATASET:SPLIT_BY" (all but train) or "DATASET:SPLIT_BY:SPLIT,...". Empty
            looks for all but train of every dataset found.
        benchmark: files with the images of other benchmarks to look for, see `refdet.splits.benchmark`.
        allow_unknown: accept a list in which no entry can be identified, for `audit_content` to compare.

    Returns:
        The leaks of each split, hashes of the list and warnings.

    Raises:
        InputError: the file is not a list of images.
        refer.ReferError: invalid REFER data.
    """
    splits, notes = held_out(refer_root, exclude)
    benchmark_splits, benchmark_notes = held_out_benchmarks(benchmark)
    splits, notes = splits + benchmark_splits, notes + benchmark_notes
    images = read_image_list(instances, allow_unknown=allow_unknown)
    notes += identification_warnings(images)
    annotation_counts = Counter(entry.image_id for entry in images.annotations)
    removed_ids = annotation_counts.keys() - images.ids  # ids of images that only annotations refer to
    if removed_ids:
        count = sum(annotation_counts[image_id] for image_id in removed_ids)
        notes.append(f"{images.path}: {format_count(count, 'annotation', 'refers')} to images that are not in it")
    ids_in_other_keys = frozenset().union(*images.ids_in_other_keys.values())
    if ids_in_other_keys:
        keys = ", ".join(map(repr, images.ids_in_other_keys))
        notes.append(f"{images.path}: COCO image names outside of 'images', under {keys:.80}, are checked too")
    leaks = []
    held_out_ids = frozenset().union(*(split.image_ids for split in splits))
    matching = [image for image in images.images if not held_out_ids.isdisjoint(image.coco_ids)]
    for split in splits:
        ids = {
            image.id for image in matching if image.id is not None and not split.image_ids.isdisjoint(image.coco_ids)
        }
        ids |= (removed_ids | ids_in_other_keys) & split.image_ids
        leaks.append(
            SplitLeak(split.name, len(split.image_ids), sorted(ids), sum(annotation_counts[id_] for id_ in ids))
        )
    unknown = [image.label for image in images.images if image.unknown]
    return AuditResult(
        form=images.format,
        images=len(images.images),
        unidentified=len(unknown),
        unknown=unknown,
        not_known_by_id=sum(not image.id_matches_file_name for image in images.images),
        file_sha256=file_sha256(images.path),
        image_ids_sha256=image_ids_sha256(images.ids),
        held_out_images=len(held_out_ids),
        splits=leaks,
        leaked=sorted({image_id for leak in leaks for image_id in leak.image_ids}),
        notes=notes,
    )


def all_coco_ids(images: Iterable[ImageEntry]) -> frozenset[int]:
    """Union of the images' COCO ids."""
    return frozenset().union(*(image.coco_ids for image in images))


def identification_warnings(images: ImageListFile) -> list[str]:
    """Human-readable warnings about how the images of a list are identified, one line each."""
    path, warnings = images.path, []
    ambiguous = [image for image in images.images if len(image.coco_ids) > 1]
    if ambiguous:
        first = ambiguous[0]
        ids = " and ".join(map(str, sorted(first.coco_ids)[:3]))
        warnings.append(
            f"{path}: {format_count(len(ambiguous), 'entry', 'refers')} to several COCO images ({first.label!s:.60}: "
            f"{ids}); an entry is held out if any of them is"
        )
    renumbered = [image for image in images.images if _id_contradicts_name(image)]
    if renumbered:
        warnings.append(
            f"{path}: {format_count(len(renumbered), 'image', 'has')} an id that differs from the number in the name "
            f"({renumbered[0].label!s:.60}: {min(renumbered[0].evidence.coco_numbers)}); names are used"
        )
    non_coco = [image for image in images.images if image.evidence.is_non_coco]
    if non_coco:
        not_coco = format_count(len(non_coco), "image", "is")
        warnings.append(f"{path}: {not_coco} not from COCO according to the file (coco_id null)")
    warnings += _unknown_warnings(images)
    with_bare_id = [image for image in images.images if image.evidence.bare_numbers and not image.evidence.coco_numbers]
    if with_bare_id:
        first = with_bare_id[0]
        what = "id" if all(type(image.label) is int and not image.name for image in with_bare_id) else "numeric name"
        taken = "is taken as a COCO image id" if len(with_bare_id) == 1 else "are taken as COCO image ids"
        names = format_count(len(with_bare_id), what)
        warnings.append(f"{path}: {names} (first: {first.name or first.label!r:.60}) {taken}")
    return warnings


def _unknown_warnings(images: ImageListFile) -> list[str]:
    """Warnings about entries with only an unconfirmed id, and about entries that cannot be identified."""
    with_id = [image for image in images.images if image.unknown and _has_only_id(image)]
    others = [image for image in images.images if image.unknown and not _has_only_id(image)]
    path, warnings = images.path, []
    if with_id:
        warnings.append(
            f"{path}: {format_count(len(with_id), 'image', 'has')} only an id (first: {with_id[0].label}), and no name "
            "such as 000000000009.jpg or coco_id in the file confirms that its ids are COCO's: not proven clean"
        )
    if others:
        visual_genome = sum(image.evidence.is_visual_genome for image in others)
        are = agree(visual_genome, "is")
        hint = f" ({visual_genome} {are} Visual Genome's, whose image_data.json has COCO ids)" if visual_genome else ""
        warnings.append(
            f"{path}: {format_count(len(others), 'entry', 'has')} no COCO image id{hint}, first: "
            f"{others[0].name or others[0].label!r:.60}; their ids and names prove nothing, use refdet audit "
            "--find-duplicates to compare their content"
        )
    return warnings


def _id_contradicts_name(image: ImageEntry) -> bool:
    evidence = image.evidence
    return (
        bool(evidence.coco_numbers)
        and evidence.id is not None
        and evidence.id not in image.coco_ids
        and not evidence.is_visual_genome
    )


def _has_only_id(image: ImageEntry) -> bool:
    return (
        bool(image.evidence.possible_ids)
        and not image.evidence.has_unnumbered_name
        and not image.evidence.is_visual_genome
    )
