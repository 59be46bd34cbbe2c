"""Add the referents and the annotated objects of the images of a store to the catalog."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from refdet.data.coco import CocoIndex
from refdet.evaluation.targets import boxes, objects_of
from refdet.report.browse.catalog import Catalog, Referent
from refer import REFER


def add_refs(catalog: Catalog, positions: Mapping[int, int], refer: REFER) -> int:
    """Add the refs whose images are in a store.

    Args:
        catalog: the catalog to add to.
        positions: image id -> position in the store.
        refer: the refs.

    Returns:
        The number of refs that were left out, as their images are not in the store.

    Raises:
        refer.ReferError: an annotation has no box, or a box that is not finite.
    """
    refs = refer.data["refs"]
    catalog.add_referents(_referents(refs, positions, refer))
    return sum(ref["image_id"] not in positions for ref in refs)


def _referents(refs: list[Any], positions: Mapping[int, int], refer: REFER) -> Iterator[Referent]:
    """The referents of the refs whose images have a position."""
    for ref in refs:
        if ref["image_id"] not in positions:
            continue
        objects = objects_of(refer, ref)
        object_boxes = boxes(refer, objects)
        first_sides = object_boxes[:1, 2:] - object_boxes[:1, :2]  # (1, 2), or (0, 2) without objects
        area = objects[0].get("area") if objects else None
        yield Referent(
            label=f"ref {ref['ref_id']}",
            position=positions[ref["image_id"]],
            split=ref["split"],
            category=objects[0]["category_id"] if objects else None,
            # the area of the box if the file has none; the sum over no boxes is 0
            area=float(area) if isinstance(area, int | float) else float(first_sides.prod(axis=1).sum()),
            boxes=object_boxes.tolist(),
            sentences=[(sentence["sent_id"], sentence["sent"]) for sentence in ref["sentences"]],
            segmentations=[annotation["segmentation"] for annotation in objects if annotation.get("segmentation")],
        )


def add_annotations(catalog: Catalog, positions: Mapping[int, int], index: CocoIndex, *, as_referents: bool) -> int:
    """Add the annotated objects of the images of a store.

    Args:
        catalog: the catalog to add to.
        positions: image id -> position in the store.
        index: the instances file.
        as_referents: whether to add the objects, except crowds, as referents without sentences too.

    Returns:
        The number of images of the store that are not in the instances file.
    """
    located = [
        (positions[i], annotation) for i in index.images if i in positions for annotation in index.annotations[i]
    ]
    catalog.add_annotations(
        (position, annotation.category_id, list(annotation.box)) for position, annotation in located
    )
    if as_referents:
        catalog.add_referents(
            Referent(
                label=f"object {annotation.id}",
                position=position,
                split="",
                category=annotation.category_id,
                area=annotation.area,
                boxes=[list(annotation.box)],
                sentences=(),
                segmentations=[annotation.segmentation] if annotation.segmentation else (),
            )
            for position, annotation in located
            if not annotation.iscrowd
        )
    return sum(i not in index.images for i in positions)
