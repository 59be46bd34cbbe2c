"""Build leak-free splits: remove the images that REFER holds out from a list of training images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refdet.errors import InputError
from refdet.files.atomic import atomic_write
from refdet.splits.benchmark import held_out_benchmarks
from refdet.splits.held_out import HeldOut, chosen, held_out
from refdet.splits.image_list import INSTANCES, ImageList
from refdet.splits.instances_check import InstancesCheck
from refdet.splits.leak_audit import numbers_of, warnings_of
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

    An image is held out if one of the numbers in its entry is, see `refdet.data.image_evidence`. All that stays is
    written as it stands in the file, in its order, and a report beside it. ``info.refdet`` of an instances file holds
    the provenance; for other lists the report does.

    Examples:
        >>> instances = "demo/data/annotations/instances_train2014.json"
        >>> split = refdet.build_split(instances, "demo/data/refer", "split.json")
        >>> split.report["images_removed"] > 0
        True

    Args:
        instances: COCO instances JSON or another list of images to filter; see `refdet.splits.image_list`.
        refer_root: folder of the REFER data.
        out: the file to write; the report of ``x.json`` or ``x.txt`` is ``x.report.json``.
        exclude: the splits to hold out, each "DATASET:SPLIT_BY[:SPLIT,...]"; val and test of all datasets under
            ``refer_root`` if empty.
        keep_only: the reverse: keep the images of these splits and no others.
        benchmark: files with the images of other benchmarks to hold out too, see `refdet.splits.benchmark`.

    Returns:
        The paths of both files, the report, and notes about the list.

    Raises:
        InputError: invalid input, an output that already exists, or no images left.
        refer.ReferError: invalid REFER data.
    """
    out = Path(out)
    report_path = out.with_name(out.name.removesuffix(".json").removesuffix(".txt") + ".report.json")
    for path in (out, report_path):
        if path.exists():
            raise InputError(f"{path} exists; choose another `out` or remove it")
    if exclude and keep_only:
        raise InputError("`exclude` and `keep_only`: cannot be combined; drop `exclude`, `keep_only` removes all else")
    if benchmark and keep_only:
        raise InputError("`benchmark` and `keep_only`: cannot be combined; drop `benchmark`")
    splits, notes = chosen(refer_root, keep_only) if keep_only else held_out(refer_root, exclude)
    others, more = held_out_benchmarks(benchmark)
    splits, notes = splits + others, notes + more
    check = InstancesCheck(Path(instances))
    images = read_image_list(instances, check)
    if images.form == INSTANCES:
        check.finish(images)

    everything = frozenset().union(*(split.image_ids for split in splits))
    for key, numbers in images.elsewhere.items():
        if not keep_only and (out_of_reach := sorted(numbers & everything)):
            raise InputError(
                f"{images.path}: {key!r:.60} refers to held-out images ({out_of_reach[0]}), but only entries of "
                "'images' can be removed; delete it from the file first"
            )
    named = [not everything.isdisjoint(image.numbers) for image in images.images]
    keep = named if keep_only else [not there for there in named]
    if not any(keep):
        why = f"none of its {len(keep)} images is in a split to keep" if keep_only else f"all {len(keep)} are held out"
        raise InputError(f"{instances}: no images left: {why} ({refer_root}); check the list and the splits")
    if not any(named):
        notes.append(f"{instances}: none of its images is in a held-out split; check that it lists COCO train images")
    notes += warnings_of(images)

    kept = [image for image, stays in zip(images.images, keep, strict=True) if stays]
    ids = {image.id for image in kept if image.id is not None}
    annotations = sum(entry.image_id in ids for entry in images.annotations)
    there = numbers_of(images.images)
    counts = _counts(splits, there)
    excluded = counts
    if keep_only:
        every, _ = held_out(refer_root)
        excluded = _counts([split for split in every if split.image_ids.isdisjoint(numbers_of(kept))], there)
        shared = [split.name for split in every if split.name not in excluded and split.name not in counts]
        if shared:
            notes.append(f"the kept images include some of {', '.join(shared)}")
    provenance = Provenance(
        source=images.path.name,
        source_sha256=file_sha256(images.path),
        images=len(kept),
        annotations=annotations,
        image_ids_sha256=image_ids_sha256(ids),
        excluded={**_earlier(images), **excluded},
        note=f"only images of {', '.join(counts)}" if keep_only else "",
    )
    report: dict[str, Any] = {
        "images_before": len(keep),
        "images_after": len(kept),
        "images_removed": len(keep) - len(kept),
        "annotations_before": len(images.annotations),
        "annotations_after": annotations,
        "excluded": excluded,
        **({"kept": counts} if keep_only else {}),
        "refer_images": len(everything),
        "refer_images_found": len(everything & there),
        "refer_images_missing": len(everything - there),
        "removed_image_ids": sorted(images.ids - ids),
    }
    if images.form != INSTANCES:
        report["provenance"] = provenance.to_json()
    with atomic_write(report_path) as report_file, atomic_write(out) as out_file:
        report_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        with out_file.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            images.write(file, keep, {**images.info, "refdet": provenance.to_json()})
    return SplitResult(out, report_path, report, notes)


def _counts(splits: Sequence[HeldOut], there: frozenset[int]) -> dict[str, dict[str, int]]:
    return {s.name: {"images": len(s.image_ids), "found": len(s.image_ids & there)} for s in splits}


def _earlier(images: ImageList) -> dict[str, dict[str, int]]:
    """Splits excluded by an earlier build-split, if the images are unchanged and their ids match their names."""
    if "refdet" not in images.info:
        return {}
    try:
        written = Provenance.from_json(images.info["refdet"])
    except InputError as error:
        raise InputError(f"{images.path}: info.refdet: {error}") from None
    same = written.image_ids_sha256 == image_ids_sha256(images.ids)
    return written.excluded if same and all(image.id_matches_file_name for image in images.images) else {}
