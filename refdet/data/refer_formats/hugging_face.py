"""Read Parquet files of Hugging Face, in the formats of jxu124/refcoco and lmms-lab/RefCOCO.

jxu124/refcoco has a row per ref with all fields of REFER, and the ref's annotation and image as JSON texts. Its
``bbox`` is ``x1 y1 x2 y2``; the annotation has REFER's own ``x y w h``.

lmms-lab/RefCOCO has a row per ref with the image itself, the sentences as ``answer``, the box as ``x y w h`` in
float32, REFER's own ``file_name``, and the annotation id as ``question_id``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from refdet.data.parquet import read_rows, read_schema
from refdet.data.refer_formats.full_refs import read_full_ref
from refdet.data.refer_formats.records import Row, Source, SourceInstances, SourceRef, SourceSentence
from refdet.data.refer_formats.split_names import dataset_in
from refdet.errors import InputError

# Required and optional columns of each format; columns with the images themselves are not read.
_JXU124 = (
    ("ref_id", "ann_id", "image_id", "split", "sentences", "category_id"),
    ("file_name", "sent_ids", "raw_anns", "raw_image_info", "anns_id"),
)
_LMMS = (("answer", "bbox", "file_name"), ("question_id",))


def read_parquet(path: Path, split: str) -> Source:
    """Read a Parquet file of either format.

    Args:
        path: the file.
        split: name of the split, for lmms-lab's format, which lacks it.

    Returns:
        Its refs.

    Raises:
        InputError: pyarrow is not installed, the file is damaged, or a column is missing or has a wrong value.
    """
    names = read_schema(path).names
    is_lmms = not {"ref_id", "ann_id"} & set(names) and bool({"answer", "question_id"} & set(names))
    source, required, optional = ("lmms-lab/RefCOCO", *_LMMS) if is_lmms else ("jxu124/refcoco", *_JXU124)
    missing = [name for name in required if name not in names]
    if missing:
        raise InputError(
            f"{path}: no column {', '.join(missing)}; a Parquet file in the format of {source} has "
            f"{', '.join(required)}"
        )
    columns = [name for name in (*required, *optional) if name in names]
    rows = [Row(f"{path}: row {number}", value) for number, value in enumerate(read_rows(path, columns))]
    return _read_lmms(rows, split) if is_lmms else _read_jxu124(rows)


def _read_jxu124(rows: Iterable[Row]) -> Source:
    refs: list[SourceRef] = []
    instances = SourceInstances()
    for row in rows:
        ref = read_full_ref(row, dataset_in(row.optional("anns_id", row.text) or ""), "")
        for key, entries, id_ in (
            ("raw_image_info", instances.images, ref.image_id),
            ("raw_anns", instances.annotations, ref.ann_id),
        ):
            text = row.optional(key, row.text)
            if text is not None and id_ is not None:
                entries[id_] = _parse_json(row, key, text, id_)
        refs.append(ref)
    return Source("Parquet in the format of jxu124/refcoco", refs, ref_file_names=True, instances=instances)


def _parse_json(row: Row, key: str, text: str, id_: int) -> dict[str, Any]:
    """Parse the JSON text in a column: the entry of the image or annotation with that id."""
    try:
        entry = Row(f"{row.where}: {key!r}", json.loads(text))
    except (ValueError, RecursionError):
        raise InputError(f"{row.where}: {key!r} is malformed JSON") from None
    if entry.integer("id") != id_:
        raise InputError(f"{row.where}: {key!r} has id {entry.integer('id')}, not the row's {id_}")
    return entry.value


def _read_lmms(rows: Iterable[Row], split: str) -> Source:
    refs = []
    for row in rows:
        question_id = row.value.get("question_id")
        refs.append(
            SourceRef(
                where=row.where,
                split=split,
                sentences=[SourceSentence(text) for text in row.texts("answer")],
                file_name=row.text("file_name"),
                # only likely, as the format does not say what the column holds
                likely_ann_id=row.integer("question_id") if str(question_id).strip().isdecimal() else None,
                box=row.box("bbox"),
            )
        )
    return Source("Parquet in the format of lmms-lab/RefCOCO", refs, layouts=("xywh",), ref_file_names=True)
