"""Fill in the image, annotation and category ids that the format of a source lacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from refdet.data.refer_formats.coco_annotations import CocoAnnotations, image_id_of
from refdet.data.refer_formats.records import Source, SourceRef
from refdet.errors import InputError
from refdet.files.short_text import short_repr


def resolve_ids(path: Path, source: Source, coco: CocoAnnotations | None) -> None:
    """Set and check ``image_id``, ``ann_id`` and ``category_id`` of all refs.

    Args:
        path: the file of the source, for error messages.
        source: the source, whose refs are changed.
        coco: COCO's instances, None if not given.

    Raises:
        InputError: annotation ids are missing and ``coco`` is None; or refs have no image id, no annotation or several
            candidates for it, or ids that contradict their annotation. The message has the number of such refs.
    """
    for ref in source.refs:
        if ref.image_id is None and ref.file_name is not None:
            ref.image_id = image_id_of(ref.file_name)
    _raise_if_any(
        path, source.refs, [ref for ref in source.refs if ref.image_id is None], "no COCO id in the image's name"
    )
    without_ann_id = [ref for ref in source.refs if ref.ann_id is None]
    if without_ann_id and coco is None:
        raise InputError(
            f"{path}: {source.format} has no annotation ids; give `instances=instances_train2014.json`, in which they "
            "are looked up by image and box"
        )
    if coco is None:  # all ids are the source's own
        return
    where = f"in {coco.name}"
    missing = [ref for ref in source.refs if coco.image(ref.image_id) is None]
    _raise_if_any(path, source.refs, missing, f"no such image {where}")
    annotations = coco.find_by_box(without_ann_id, source.layouts)
    _raise_if_any(
        path,
        source.refs,
        [ref for ref, annotation in zip(without_ann_id, annotations, strict=True) if annotation is None],
        f"no annotation {where} with its image and box, or several",
    )
    for ref, annotation in zip(without_ann_id, annotations, strict=True):
        if annotation is not None:
            ref.ann_id = annotation["id"]
    for ref in source.refs:
        annotation = coco.annotation(ref.ann_id)
        if annotation is not None and ref.category_id is None:
            ref.category_id = annotation.get("category_id")
    _raise_if_any(
        path,
        source.refs,
        [ref for ref in source.refs if not _is_consistent(ref, coco)],
        f"no annotation {where} with its ann_id, image_id and category_id",
    )


def _is_consistent(ref: SourceRef, coco: CocoAnnotations) -> bool:
    """Whether the annotation of a ref exists and has the image and category of the ref."""
    annotation = coco.annotation(ref.ann_id)
    return annotation is not None and (ref.image_id, ref.category_id) == (
        annotation["image_id"],
        annotation.get("category_id"),
    )


def _raise_if_any(path: Path, refs: Sequence[SourceRef], invalid: Sequence[SourceRef], problem: str) -> None:
    """Raise an InputError if any of the refs are invalid, with their number and the first one."""
    if invalid:
        first = invalid[0]
        sentence = f" ({short_repr(first.sentences[0].sent)})" if first.sentences else ""
        raise InputError(
            f"{path}: {problem} (refs or sentences: {len(invalid)} of {len(refs)}, first {first.where}{sentence}); "
            "nothing was written"
        )
