"""Read MDETR's ``finetune_refcoco_{train,val,testA,testB}.json``.

They are instances files with an image and an annotation per sentence. ``original_id`` of an image and of an annotation
is COCO's id, and ``caption`` of the image is the sentence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refdet.data.refer_formats.records import Row, Source, SourceInstances, SourceRef, SourceSentence
from refdet.errors import InputError

_HEADER = ("info", "licenses", "categories")


def is_mdetr(value: Any) -> bool:
    """Whether a JSON value has the fields of MDETR's files."""
    if not isinstance(value, dict) or not isinstance(value.get("images"), list):
        return False
    first = value["images"][0] if value["images"] else None
    return "annotations" in value and isinstance(first, dict) and "caption" in first


def read_mdetr(path: Path, value: dict[str, Any], split: str) -> Source:
    """Read an MDETR file.

    Args:
        path: the file, for error messages.
        value: its contents.
        split: name of the split.

    Returns:
        An entry for each sentence, in file order.

    Raises:
        InputError: a field is missing or has a wrong value, an id is a duplicate, or an image does not have exactly one
            annotation.
    """
    file = Row(str(path), value)
    unmatched: dict[int, Row] = {}  # id of an image whose annotation has not been read yet -> image
    for number, entry in enumerate(file.items("images")):
        row = Row(f"{path}: images[{number}]", entry)
        if unmatched.setdefault(row.integer("id"), row) is not row:
            raise InputError(f"{row.where}: duplicate id {row.integer('id')}")
    refs = []
    for number, entry in enumerate(file.items("annotations")):
        row = Row(f"{path}: annotations[{number}]", entry)
        image = unmatched.pop(row.integer("image_id"), None)
        if image is None:
            raise InputError(f"{row.where}: image {row.integer('image_id')} is missing or has two annotations")
        refs.append(
            SourceRef(
                where=row.where,
                split=split,
                sentences=[SourceSentence(image.text("caption"))],
                dataset=image.optional("dataset_name", image.text) or "",
                image_id=image.optional("original_id", image.integer),
                file_name=image.text("file_name"),
                ann_id=row.optional("original_id", row.integer),
                category_id=row.optional("category_id", row.integer),
                box=row.box("bbox"),
            )
        )
    if unmatched:
        raise InputError(f"{next(iter(unmatched.values())).where}: no annotation for its sentence; download it again")
    header = {key: value[key] for key in _HEADER if key in value}
    instances = SourceInstances(header=header)
    return Source("MDETR's JSON", refs, one_sentence_each=True, layouts=("xywh",), instances=instances)
