"""COCO images of benchmarks other than REFER's, from any file that lists them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from refdet.data.image_evidence import COCO_ID_KEYS, NAME_KEYS, evidence_of
from refdet.data.parquet import is_parquet, read_rows, read_schema
from refdet.errors import InputError
from refdet.files.short_text import agree, format_count, format_share
from refdet.splits.held_out import SplitImages
from refdet.splits.image_list import LINES, ImageEntry, identify_images
from refdet.splits.list_reading import read_image_list

_FIX = "give COCO ids or file names such as 000000000009.jpg, or leave the benchmark out"


def held_out_benchmarks(paths: Sequence[str | Path]) -> tuple[list[SplitImages], list[str]]:
    """Find the images of benchmarks that a detector must not be trained on.

    Args:
        paths: a file per benchmark: Parquet (Ref-L4), or any list of `refdet.splits.image_list`, such as Visual
            Genome's ``image_data.json``.

    Returns:
        A split named "benchmark/FILE" for each, and human-readable notes about images that are unknown or not COCO's.

    Raises:
        InputError: a file cannot be read, or no image in it can be identified as one of COCO.
    """
    splits: list[SplitImages] = []
    notes: list[str] = []
    for path in map(Path, paths):
        split, benchmark_notes = _read_benchmark(path)
        if split.name in (other.name for other in splits):
            raise InputError(f"`benchmark` {path}: another benchmark has the same file name; rename one of them")
        splits.append(split)
        notes += benchmark_notes
    return splits, notes


def _read_benchmark(path: Path) -> tuple[SplitImages, list[str]]:
    """The COCO images of one benchmark, and notes about its other images; raises as `held_out_benchmarks`."""
    if not path.exists():
        raise InputError(f"`benchmark` {path}: no such file")
    if is_parquet(path):
        images, noun = _parquet_images(path), "entry"
    else:
        image_list = read_image_list(path)
        images, noun = image_list.images, "line" if image_list.format == LINES else "entry"
    # an entry may name a COCO image and also a file that is unknown, such as a renamed one beside its coco_url
    unknown = [image for image in images if image.unknown and not image.evidence.coco_numbers]
    coco = [image for image in images if image.evidence.coco_numbers or (not image.unknown and image.coco_ids)]
    if unknown and coco and not any(image.evidence.coco_numbers for image in coco):
        # some of Flickr30k's ids are in the range of COCO's
        raise InputError(
            f"`benchmark` {path}: {format_share(len(unknown), len(images), noun, 'has')} no COCO id (first: "
            f"{unknown[0].label!s:.60}), so the other numbers are not taken as COCO ids either; {_FIX}"
        )
    coco_ids = frozenset().union(*(image.evidence.coco_numbers if image.unknown else image.coco_ids for image in coco))
    if not coco_ids:
        raise InputError(
            f"`benchmark` {path}: its {format_count(len(images), 'image')} cannot be identified as COCO's; {_FIX}"
        )
    name = f"benchmark/{path.name}"
    notes = []
    non_coco = [image for image in images if not image.unknown and not image.coco_ids]
    if non_coco:
        are_not = format_count(len(non_coco), "image", "is")
        notes.append(
            f"{path}: {are_not} not COCO's according to the file and {agree(len(non_coco), 'is')} not looked for"
        )
    if unknown:
        notes.append(
            f"{path}: {format_count(len(unknown), 'image')} cannot be identified as COCO's (first: "
            f"{unknown[0].label!s:.60}) and {agree(len(unknown), 'is')} not looked for"
        )
    return SplitImages(name, coco_ids, shared=0), notes


def _parquet_images(path: Path) -> list[ImageEntry]:
    """Read the images of a Parquet file with one or more rows per image; columns of encoded images are not read."""
    schema = read_schema(path)
    from pyarrow import types  # `read_schema` has checked that it is installed

    keys = {*NAME_KEYS, "image_id", *COCO_ID_KEYS, "image_path", "img_path"}  # "id" may number the rows
    type_checks = (types.is_string, types.is_large_string, types.is_integer)
    columns = [f.name for f in schema if f.name in keys and any(is_type(f.type) for is_type in type_checks)]
    if not columns:
        raise InputError(
            f"`benchmark` {path}: no column with names or ids of images; add one of {', '.join(sorted(keys))}"
        )
    unique_rows = dict.fromkeys(tuple(row.items()) for row in read_rows(path, columns))
    entries = []
    for index, row in enumerate(unique_rows):
        value = {column: cell for column, cell in row if cell is not None}
        evidence = evidence_of(value)
        label = next((cell for cell in value.values() if isinstance(cell, str)), index)
        # a Parquet file has no text that `start` and `end` could refer to
        entry = ImageEntry(evidence.id, str(label), label, evidence, id_matches_file_name=False, start=0, end=0)
        entries.append(entry)
    return identify_images(entries)
