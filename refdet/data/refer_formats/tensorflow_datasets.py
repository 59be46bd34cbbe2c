"""Read the two JSON formats around TensorFlow Datasets' ``ref_coco``.

``refcoco.json``, which its manual download script writes, has all refs of all datasets and all annotations of their
images. Examples of the dataset itself, saved as a JSON list, have an entry per image with its objects, whose boxes are
``ymin xmin ymax xmax`` relative to the image size in float32. Their expressions have only
``raw``, the text as typed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refdet.data.refer_formats.full_refs import read_full_ref
from refdet.data.refer_formats.records import Row, Source, SourceInstances, SourceRef, SourceSentence
from refdet.errors import InputError


def is_manual_download(value: Any) -> bool:
    """Whether a JSON value has the fields of ``refcoco.json``."""
    return isinstance(value, dict) and {"ref", "coco_anns"} <= value.keys()


def read_manual_download(path: Path, value: dict[str, Any]) -> Source:
    """Read ``refcoco.json``.

    Args:
        path: the file, for error messages.
        value: its contents.

    Returns:
        All its refs, and all annotations of their images.

    Raises:
        InputError: a field is missing or has a wrong value.
    """
    file = Row(str(path), value)
    refs = []
    for number, entry in enumerate(file.items("ref")):
        row = Row(f"{path}: ref[{number}]", entry)
        refs.append(read_full_ref(row, row.text("dataset"), row.text("dataset_partition")))
    instances = SourceInstances(complete=True)
    for key, entry in file.entry("coco_anns").value.items():
        row = Row(f"{path}: coco_anns[{key!r}]", entry)
        info = row.entry("info")
        instances.images[info.integer("id")] = info.value
        for annotation in row.items("anns"):
            annotation_row = Row(f"{row.where}: an annotation", annotation)
            instances.annotations[annotation_row.integer("id")] = annotation_row.value
    return Source("TensorFlow Datasets' refcoco.json", refs, ref_file_names=True, instances=instances)


def is_examples(value: Any) -> bool:
    """Whether a JSON value is a list of examples of ``ref_coco``."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and "objects" in first and bool({"image/id", "image_id"} & first.keys())


def read_examples(path: Path, value: list[Any], split: str) -> Source:
    """Read a JSON list of examples.

    Args:
        path: the file, for error messages.
        value: its contents.
        split: name of the split.

    Returns:
        A ref for each object of each image.

    Raises:
        InputError: a field is missing or has a wrong value.
    """
    refs = []
    for number, entry in enumerate(value):
        row = Row(f"{path}: [{number}]", entry)
        image_id = row.integer("image/id" if "image/id" in row.value else "image_id")
        for object_row in _entries(row, "objects"):
            expressions = _entries(object_row, "refexp")
            refs.append(
                SourceRef(
                    where=object_row.where,
                    split=split,
                    sentences=[
                        SourceSentence(
                            expression.text("raw"),
                            raw=expression.text("raw"),
                            sent_id=expression.optional("refexp_id", expression.integer),
                        )
                        for expression in expressions
                    ],
                    image_id=image_id,
                    ann_id=object_row.optional("id", object_row.integer),
                    category_id=object_row.optional("label", object_row.integer),
                    box=object_row.box("bbox"),
                )
            )
    return Source(
        "a list of TensorFlow Datasets' examples",
        refs,
        layouts=("normalized-yxyx",),
        notes=["sent is raw, as the source has only one of them"],
    )


def _entries(row: Row, key: str) -> list[Row]:
    """Read a list of objects, which TensorFlow Datasets also writes as an object of lists, one per field."""
    value = row.value.get(key)
    if isinstance(value, dict):
        columns = {name: row.entry(key).items(name) for name in value}
        lengths = {len(column) for column in columns.values()}
        if len(lengths) > 1:
            raise InputError(f"{row.where}: {key!r} has columns of different lengths")
        value = [dict(zip(columns, fields, strict=True)) for fields in zip(*columns.values(), strict=True)]
    if not isinstance(value, list):
        raise InputError(f"{row.where}: no list {key!r}")
    return [Row(f"{row.where}: {key}[{number}]", entry) for number, entry in enumerate(value)]
