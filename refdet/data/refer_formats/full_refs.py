"""Read refs that have all, or nearly all, fields of REFER under REFER's names."""

from __future__ import annotations

from refdet.data.refer_formats.records import Row, SourceRef, SourceSentence
from refdet.errors import InputError


def read_full_ref(row: Row, dataset: str, split_by: str) -> SourceRef:
    """Read an entry with REFER's own fields.

    Args:
        row: the entry.
        dataset: such as "refcoco", "" if unknown.
        split_by: such as "unc", "" if unknown.

    Returns:
        The ref.

    Raises:
        InputError: a field is missing or has a wrong value, or ``sent_ids`` are not those of the sentences.
    """
    sentences = [
        SourceSentence(
            sentence.text("sent"),
            sentence.optional("raw", sentence.text),
            sentence.optional("tokens", sentence.texts),
            sentence.integer("sent_id"),
        )
        for sentence in (Row(f"{row.where}: a sentence", value) for value in row.items("sentences"))
    ]
    ids = row.optional("sent_ids", row.items)
    if ids is not None and ids != [sentence.sent_id for sentence in sentences]:
        raise InputError(f"{row.where}: 'sent_ids' are not the ids of its sentences")
    return SourceRef(
        where=row.where,
        split=row.text("split"),
        sentences=sentences,
        dataset=dataset,
        split_by=split_by,
        image_id=row.integer("image_id"),
        file_name=row.optional("file_name", row.text),
        ref_id=row.integer("ref_id"),
        ann_id=row.integer("ann_id"),
        category_id=row.integer("category_id"),
    )
