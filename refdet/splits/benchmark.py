"""The COCO images of benchmarks beside REFER, from any file that lists them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refdet.data.image_evidence import COCO_IDS, IDS, NAMES, evidence_of
from refdet.data.parquet import is_parquet, read_rows
from refdet.errors import InputError
from refdet.splits.held_out import HeldOut
from refdet.splits.image_list import LINES, ImageEntry, weigh
from refdet.splits.list_reading import read_image_list


def held_out_benchmarks(paths: Sequence[str | Path]) -> tuple[list[HeldOut], list[str]]:
    """Find the images of benchmarks that a detector must not be trained on.

    Args:
        paths: a file per benchmark: Parquet (Ref-L4), or any list of `refdet.splits.image_list`, such as Visual
            Genome's ``image_data.json``.

    Returns:
        A split named "benchmark/FILE" of each, and human-readable notes about images that are not COCO's or unknown.

    Raises:
        InputError: a file cannot be read, or no image in it can be identified as one of COCO.
    """
    splits: list[HeldOut] = []
    notes: list[str] = []
    for path in map(Path, paths):
        split, lines = _benchmark(path)
        if split.name in (other.name for other in splits):
            raise InputError(f"`benchmark` {path}: another benchmark has the same file name; rename one of them")
        splits.append(split)
        notes += lines
    return splits, notes


def _benchmark(path: Path) -> tuple[HeldOut, list[str]]:
    if is_parquet(path):
        images, is_list = _parquet_images(path), False
    else:
        found = read_image_list(path)
        images, is_list = found.images, found.form == LINES
    unknown = [image for image in images if image.unknown]
    coco = [image for image in images if not image.unknown and image.numbers]
    if is_list and unknown and not any(image.evidence.named for image in coco):
        raise InputError(
            f"`benchmark` {path}: {len(unknown)} of its {len(images)} numbers cannot be COCO ids, so none is taken as "
            "one (Flickr30k has its own); compare the images themselves with refdet audit --find-duplicates"
        )
    numbers = frozenset().union(*(image.numbers for image in coco))
    if not numbers:
        raise InputError(
            f"`benchmark` {path}: none of its {len(images)} images can be identified as one of COCO; compare the "
            "images themselves with refdet audit --find-duplicates"
        )
    name = f"benchmark/{path.name}"
    notes = []
    others = [image for image in images if not image.unknown and not image.numbers]
    if others:
        notes.append(f"{path}: {len(others)} images are not COCO's according to the file; they are not looked for")
    if unknown:
        notes.append(
            f"{path}: {len(unknown)} images cannot be identified as COCO's (first: {unknown[0].label!s:.60}); they are "
            "not looked for"
        )
    return HeldOut(name, numbers, 0), notes


def _parquet_images(path: Path) -> list[ImageEntry]:
    """The images of a Parquet file, a row each or several; columns with the images themselves are not read."""

    def choose(schema: Any) -> list[str]:
        from pyarrow import types

        keys = {*NAMES, *IDS[:1], *COCO_IDS, "image_path", "img_path"}
        kinds = (types.is_string, types.is_large_string, types.is_integer)
        plain = [f.name for f in schema if f.name in keys and any(is_kind(f.type) for is_kind in kinds)]
        if not plain:
            raise InputError(f"`benchmark` {path}: no column with names or ids of images: {', '.join(sorted(keys))}")
        return plain

    rows = {tuple(row.items()): None for row in read_rows(path, choose)}
    entries = []
    for number, row in enumerate(rows):
        value = {key: one for key, one in row if one is not None}
        evidence = evidence_of(value)
        label = next((one for one in value.values() if isinstance(one, str)), number)
        entries.append(ImageEntry(evidence.id, str(label), label, evidence, False, 0, 0))
    return weigh(entries)
