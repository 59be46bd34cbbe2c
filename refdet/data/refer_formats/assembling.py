"""Assemble REFER's refs and instances from what the readers of the formats return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from refdet.data.refer_formats.coco_annotations import CocoAnnotations
from refdet.data.refer_formats.records import SourceRef
from refdet.errors import InputError
from refdet.structures.coco_categories import coco_categories
from refer.statistics import COUNTS


def merge_sentences(refs: Sequence[SourceRef], dataset: str, split_by: str) -> list[SourceRef]:
    """Merge the sentences of an object into one ref.

    Some objects of RefCOCOg have two refs. If merging only sentences that follow each other gives the published number
    of refs, just these are merged, which keeps the two refs apart.

    Args:
        refs: an entry per sentence, with annotation ids.
        dataset: such as "refcoco".
        split_by: such as "unc".

    Returns:
        A ref for each object of each split, in the order of their first sentences.
    """
    published_counts = {counts.refs for counts in COUNTS.get((dataset, split_by), {}).values()}
    merged: list[SourceRef] = []
    for split in dict.fromkeys(ref.split for ref in refs):
        split_refs = [ref for ref in refs if ref.split == split]
        adjacent = _merge(split_refs, anywhere=False)
        # of any split, as the splits of the source may have other names
        merged += adjacent if len(adjacent) in published_counts else _merge(split_refs, anywhere=True)
    return merged


def _merge(refs: Sequence[SourceRef], anywhere: bool) -> list[SourceRef]:
    """Merge refs of the same annotation: only those that follow each other, or ``anywhere`` in the list."""
    merged: list[SourceRef] = []
    last: dict[int | None, SourceRef] = {}
    for ref in refs:
        previous = last.get(ref.ann_id)
        if previous is not None and (anywhere or previous is merged[-1]):
            previous.sentences += ref.sentences
        else:
            merged.append(replace(ref, sentences=list(ref.sentences)))
            last[ref.ann_id] = merged[-1]
    return merged


def build_refs(
    refs: Sequence[SourceRef], ref_file_names: bool, coco: CocoAnnotations
) -> tuple[list[dict[str, Any]], list[str]]:
    """Create the entries of a refs file.

    Args:
        refs: the refs of a dataset and split_by, with image, annotation and category ids.
        ref_file_names: whether the refs have REFER's own ``file_name`` (`Source.ref_file_names`).
        coco: their images.

    Returns:
        The entries, and a note for each missing field that was filled in.
    """
    has_ref_ids = all(ref.ref_id is not None for ref in refs)
    has_sent_ids = all(sentence.sent_id is not None for ref in refs for sentence in ref.sentences)
    notes = []
    if has_ref_ids:
        refs = sorted(refs, key=lambda ref: ref.ref_id or 0)
    missing = ["ref_id"] * (not has_ref_ids) + ["sent_id"] * (not has_sent_ids)
    if missing:
        notes.append(f"{' and '.join(missing)} are renumbered, as the source has none; they differ from REFER's")
    sentences = [sentence for ref in refs for sentence in ref.sentences]
    if any(sentence.tokens is None for sentence in sentences):
        notes.append("tokens are the words of sent")
    if any(sentence.raw is None for sentence in sentences):
        notes.append("raw is sent, as the source has only one of them")
    if not ref_file_names or any(ref.file_name is None for ref in refs):
        notes.append("file_name is the image's, without the number that REFER appends")
    entries = []
    next_sent_id = 0
    for number, ref in enumerate(refs):
        ref_sentences = []
        for sentence in ref.sentences:
            ref_sentences.append(
                {
                    "tokens": sentence.sent.split() if sentence.tokens is None else sentence.tokens,
                    "raw": sentence.sent if sentence.raw is None else sentence.raw,
                    "sent_id": sentence.sent_id if has_sent_ids else next_sent_id,
                    "sent": sentence.sent,
                }
            )
            next_sent_id += 1
        image = coco.image(ref.image_id) or {}
        ref_file_name = ref.file_name if ref_file_names else None
        entries.append(
            {
                "sent_ids": [sentence["sent_id"] for sentence in ref_sentences],
                "file_name": ref_file_name or str(image.get("file_name", ref.file_name or "")),
                "ann_id": ref.ann_id,
                "ref_id": ref.ref_id if has_ref_ids else number,
                "image_id": ref.image_id,
                "split": ref.split,
                "sentences": ref_sentences,
                "category_id": ref.category_id,
            }
        )
    return entries, notes


def build_instances(refs: Sequence[SourceRef], coco: CocoAnnotations) -> tuple[dict[str, Any], list[str]]:
    """Create the contents of ``instances.json``: the images of refs with all of their annotations.

    Args:
        refs: the refs of a dataset.
        coco: the images, their annotations, and the other fields of the file.

    Returns:
        The contents, and a list with a note if they have only the referred annotations, else [].

    Raises:
        InputError: an image or annotation is missing, or there are no categories.
    """
    instances = coco.instances
    image_ids: set[int | None] = set()
    for ref in refs:
        image_ids.add(ref.image_id)
        if coco.image(ref.image_id) is None or coco.annotation(ref.ann_id) is None:
            raise InputError(
                f"{ref.where}: the source has no image {ref.image_id} or no annotation {ref.ann_id}; give "
                "`instances=instances_train2014.json`"
            )
    header = {"info": {}, "licenses": []} | instances.header
    if "categories" not in header:
        names = coco_categories()
        used = {ref.category_id for ref in refs}
        if not used <= {category_id for category_id, _ in names}:
            raise InputError(
                f"{coco.name}: no categories in it, and its category ids are not COCO's; give "
                "`instances=instances_train2014.json`"
            )
        header["categories"] = [{"id": category_id, "name": name} for category_id, name in names]
    contents = {
        "info": header["info"],
        "images": [image for key, image in instances.images.items() if key in image_ids],
        "annotations": [
            annotation for annotation in instances.annotations.values() if annotation["image_id"] in image_ids
        ],
        **{key: value for key, value in header.items() if key != "info"},
    }
    notes = []
    if not instances.complete:
        notes.append(
            "instances.json has only the annotations that refs refer to, so detection AP is computed on these alone; "
            "give `instances=instances_train2014.json` to include all annotations of the images, as REFER does"
        )
    return contents, notes
