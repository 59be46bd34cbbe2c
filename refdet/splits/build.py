"""Build leak-free splits: remove the images of REFER's val and test splits from a list of training images."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refdet.errors import InputError
from refdet.files.atomic import atomic_create
from refdet.files.short_text import format_count, shorten
from refdet.splits.benchmark import held_out_benchmarks
from refdet.splits.held_out import SplitImages, held_out, splits_to_keep
from refdet.splits.image_list import INSTANCES, ImageEntry, ImageListFile
from refdet.splits.instances_check import InstancesCheck
from refdet.splits.leak_audit import all_coco_ids, identification_warnings
from refdet.splits.list_reading import read_image_list
from refdet.structures.provenance import Provenance, file_sha256, image_ids_sha256


@dataclass(frozen=True)
class SplitResult:
    """Result of `build_split`.

    Attributes:
        out: the list that was written.
        report_path: the report that was written.
        report: contents of the report.
        notes: human-readable warnings.
    """

    out: Path
    report_path: Path
    report: dict[str, Any]
    notes: list[str]


def build_split(
    instances: str | Path,
    refer_root: str | Path,
    out: str | Path,
    *,
    exclude: Sequence[str] = (),
    keep_only: Sequence[str] = (),
    benchmark: Sequence[str | Path] = (),
) -> SplitResult:
    """Write a list of training images without REFER's val and test images and their annotations.

    An image is removed if any COCO id that its entry contains is that of a held-out image
    (`refdet.data.image_evidence`). Annotations of held-out images are removed even if another program has already
    removed the images. The remaining entries are written unchanged and in order, with a report next to the file. The
    `Provenance` is in ``info.refdet`` of an instances file, and in the report for other lists.

    Examples:
        >>> instances = "demo/data/annotations/instances_train2014.json"
        >>> split = refdet.build_split(instances, "demo/data/refer", "split.json")
        >>> split.report["images_removed"] > 0
        True

    Args:
        instances: COCO instances JSON or another list of images to filter; see `refdet.splits.image_list`.
        refer_root: folder of the REFER data.
        out: the file to write; the report of ``x.json`` or ``x.txt`` is ``x.report.json``.
        exclude: the splits to hold out, each "DATASET:SPLIT_BY[:SPLIT,...]"; without a SPLIT, all but train. If
            empty, all but train of every dataset under ``refer_root``.
        keep_only: the reverse: keep the images of these splits and no others; without a SPLIT, train included.
        benchmark: files with the images of other benchmarks to hold out too, see `refdet.splits.benchmark`.

    Returns:
        The paths of both files, the report, and notes about the list.

    Raises:
        InputError: invalid input, an output that already exists, or no images left.
        refer.ReferError: invalid REFER data.
    """
    out = Path(out)
    _check_arguments(out, exclude, keep_only, benchmark)
    splits, notes = splits_to_keep(refer_root, keep_only) if keep_only else held_out(refer_root, exclude)
    benchmark_splits, benchmark_notes = held_out_benchmarks(benchmark)
    splits, notes = splits + benchmark_splits, notes + benchmark_notes
    check = InstancesCheck(Path(instances))  # called with each entry as it is read
    images = read_image_list(instances, check)
    split_ids = frozenset().union(*(split.image_ids for split in splits))
    if images.format == INSTANCES:
        # annotations have the ids of the list, which are COCO's if they agree with all names
        ids_are_coco = all(image.id_matches_file_name for image in images.images)
        check.finish(images, removed=split_ids if ids_are_coco and not keep_only else frozenset())
    if not keep_only:
        _check_removable(images, split_ids)
    in_splits = [not split_ids.isdisjoint(image.coco_ids) for image in images.images]
    keep = in_splits if keep_only else [not in_split for in_split in in_splits]
    if not any(keep):
        count = format_count(len(keep), "image", "is")
        why = f"its {count} not in a split to keep" if keep_only else f"its {count} held out"
        raise InputError(f"{instances}: no images left: {why} ({refer_root}); check the list and the splits")
    if not any(in_splits):
        notes.append(f"{instances}: none of its images is in a held-out split; check that it lists COCO train images")
    notes += identification_warnings(images)
    listed_ids = images.ids
    if left := sum(entry.image_id not in listed_ids for entry in images.annotations):
        notes.append(f"{instances}: removed {format_count(left, 'annotation')} of held-out images that are not in it")
    if lost := _lost_info(images):
        notes.append(
            f"{instances}: 'info' is not an object and is replaced by one with the provenance: {shorten(lost)}"
        )

    kept = [image for image, is_kept in zip(images.images, keep, strict=True) if is_kept]
    present_ids = all_coco_ids(images.images)
    counts = _counts(splits, present_ids)
    excluded = counts
    if keep_only:
        without_kept, with_kept = _divide_splits(refer_root, images, kept)
        excluded = _counts(without_kept, present_ids)
        if shared := [name for name in with_kept if name not in counts]:
            notes.append(f"the kept images include some of {', '.join(shared)}")
    kept_splits = counts if keep_only else None
    provenance = _make_provenance(images, kept, excluded, kept_splits)
    report = _make_report(images, kept, provenance, excluded=excluded, kept_splits=kept_splits, split_ids=split_ids)
    _write(out, images, keep, provenance, report)
    return SplitResult(out, report_path(out), report, notes)


def report_path(out: Path) -> Path:
    """Path of the report of a list that `build_split` writes."""
    return out.with_name(out.name.removesuffix(".json").removesuffix(".txt") + ".report.json")


def _check_arguments(
    out: Path, exclude: Sequence[str], keep_only: Sequence[str], benchmark: Sequence[str | Path]
) -> None:
    """Raise an InputError if an output exists or arguments exclude each other."""
    _check_absent(out)
    if exclude and keep_only:
        raise InputError("`exclude` and `keep_only`: cannot be combined; drop `exclude`, `keep_only` removes all else")
    if benchmark and keep_only:
        raise InputError("`benchmark` and `keep_only`: cannot be combined; drop `benchmark`")


def _check_absent(out: Path) -> None:
    """Raise an InputError if a file to write exists."""
    for path in (out, report_path(out)):
        if os.path.lexists(path):
            raise InputError(f"{path} exists; choose another `out` or remove it")


def _lost_info(images: ImageListFile) -> str:
    """Text of ``info`` in an instances file if it is neither an object nor null, else ""."""
    texts = [images.text[member.start : member.end] for member in images.members if member.key == "info"]
    return next((text for text in texts if not (text.startswith("{") or text == "null")), "")


def _check_removable(images: ImageListFile, held_out_ids: frozenset[int]) -> None:
    """Raise an InputError if a key other than ``images`` refers to held-out images: nothing is removed from it."""
    for key, coco_ids in images.ids_in_other_keys.items():
        if found := coco_ids & held_out_ids:
            raise InputError(
                f"{images.path}: {key!r:.60} refers to held-out images ({min(found)}), but only entries of "
                "'images' can be removed; delete it from the file first"
            )


def _divide_splits(
    refer_root: str | Path, images: ImageListFile, kept: Sequence[ImageEntry]
) -> tuple[list[SplitImages], list[str]]:
    """Val and test splits with none of the kept images, and names of the val and test splits with some of them."""
    kept_ids = all_coco_ids(kept).union(*images.ids_in_other_keys.values())  # other keys are written unchanged
    splits, _ = held_out(refer_root)
    without_kept = [split for split in splits if split.image_ids.isdisjoint(kept_ids)]
    return without_kept, [split.name for split in splits if split not in without_kept]


def _counts(splits: Sequence[SplitImages], present_ids: frozenset[int]) -> dict[str, dict[str, int]]:
    """Number of images of each split, and how many of them are in the list to filter."""
    return {s.name: {"images": len(s.image_ids), "found": len(s.image_ids & present_ids)} for s in splits}


def _make_provenance(
    images: ImageListFile,
    kept: Sequence[ImageEntry],
    excluded: dict[str, dict[str, int]],
    kept_splits: dict[str, dict[str, int]] | None,
) -> Provenance:
    """Make the provenance of the kept images of a list; arguments as in `_make_report`."""
    ids = _list_ids(kept)
    return Provenance(
        source=images.path.name,
        source_sha256=file_sha256(images.path),
        images=len(kept),
        annotations=sum(entry.image_id in ids for entry in images.annotations),
        image_ids_sha256=image_ids_sha256(ids),
        excluded={**_previous_exclusions(images), **excluded},
        note="" if kept_splits is None else f"only images of {', '.join(kept_splits)}",
    )


def _previous_exclusions(images: ImageListFile) -> dict[str, dict[str, int]]:
    """Splits that an earlier build-split excluded; {} if the images changed since or an id is not that in its name."""
    if "refdet" not in images.info:
        return {}
    try:
        provenance = Provenance.from_json(images.info["refdet"])
    except InputError as error:
        raise InputError(f"{images.path}: info.refdet: {error}") from None
    unchanged = provenance.image_ids_sha256 == image_ids_sha256(images.ids)
    return provenance.excluded if unchanged and all(image.id_matches_file_name for image in images.images) else {}


def _make_report(
    images: ImageListFile,
    kept: Sequence[ImageEntry],
    provenance: Provenance,
    *,
    excluded: dict[str, dict[str, int]],
    kept_splits: dict[str, dict[str, int]] | None,
    split_ids: frozenset[int],
) -> dict[str, Any]:
    """Make the contents of the report.

    Args:
        images: the list that was filtered.
        kept: those of its images that were kept.
        provenance: provenance of the kept images.
        excluded: `_counts` of the splits of which no image was kept.
        kept_splits: `_counts` of the splits to which the kept images belong, None without ``keep_only``.
        split_ids: COCO ids of the images to remove, or with ``keep_only`` of those to keep.
    """
    present_ids = all_coco_ids(images.images)
    report: dict[str, Any] = {
        "images_before": len(images.images),
        "images_after": len(kept),
        "images_removed": len(images.images) - len(kept),
        "annotations_before": len(images.annotations),
        "annotations_after": provenance.annotations,
        "excluded": excluded,
        **({} if kept_splits is None else {"kept": kept_splits}),
        "refer_images": len(split_ids),
        "refer_images_found": len(split_ids & present_ids),
        "refer_images_missing": len(split_ids - present_ids),
        "removed_image_ids": sorted(images.ids - _list_ids(kept)),
    }
    if images.format != INSTANCES:
        report["provenance"] = provenance.to_json()
    return report


def _list_ids(images: Sequence[ImageEntry]) -> set[int]:
    """Ids in the list, of the images that have one."""
    return {image.id for image in images if image.id is not None}


def _write(
    out: Path, images: ImageListFile, keep: Sequence[bool], provenance: Provenance, report: Mapping[str, Any]
) -> None:
    """Write the images to keep, and the report."""
    with atomic_create(report_path(out)) as report_file, atomic_create(out) as out_file:
        report_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        # surrogatepass and newline: entries are written exactly as they were read
        with out_file.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            images.write(file, keep, {**images.info, "refdet": provenance.to_json()})
        _check_absent(out)  # another process may have written the files since
