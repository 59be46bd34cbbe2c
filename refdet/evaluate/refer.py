"""A store of regions, and predictions made with it, measured on the splits of a REFER dataset. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refdet import store as stores
from refdet.data.coco import CocoIndex, ImageRecord
from refdet.data.refs import choose_splits
from refdet.data.segmentations import to_rle
from refdet.errors import InputError
from refdet.evaluate.average_precision import coco_ap, coco_results
from refdet.evaluate.metrics import box_iou, mask_overlap, rate, referent_recall, segmentation_scores
from refdet.evaluate.predictions import Prediction, load_predictions
from refdet.store import Store
from refer import REFER
from refer.records import Ref


def evaluate_on_refer(
    features: Path,
    refer_root: Path,
    dataset: str,
    split_by: str,
    splits: Sequence[str] = (),
    predictions: Path | None = None,
) -> dict[str, Any]:
    """Detection AP, referent recall and, with predictions, comprehension and segmentation of each split.

    Arguments:
        features: the store.
        refer_root: folder of the REFER data.
        splits: names, each possibly several with commas between; all but train where there are none.
        predictions: see `refdet.evaluate.predictions`.

    Returns:
        What goes into ``metrics.json``; all rates in 0..1, None where there is nothing to rate: AP of small
        objects where there are none, mask AP of a store without masks. A sentence without a prediction counts as wrong;
        ``comprehension.missing`` says how many there are.

    Raises:
        InputError: a file or a split is not there or damaged; the store lacks images of a split.
        refer.ReferError: the refs cannot be read.
    """
    with stores.open(features) as store:
        refer = REFER(refer_root, dataset, split_by)
        where = f"{refer_root / dataset}, split-by {split_by}"
        chosen = choose_splits(refer.data["refs"], splits, where, skip=("train",))
        if not chosen:
            raise InputError(f"{where}: all refs are of split train; say --split train to evaluate on it")
        index = CocoIndex.load(refer_root / dataset / "instances.json")
        made = None
        if predictions is not None:
            if len(refer.sentToRef) < sum(len(ref["sentences"]) for ref in refer.data["refs"]):
                raise InputError(f"{where}: a sent_id is there twice, so a prediction for it is ambiguous; renumber")
            images = {sent_id: index.images[ref["image_id"]] for sent_id, ref in refer.sentToRef.items()}
            made = load_predictions(predictions, store, images)
        for split in chosen:
            _check_images(store, refer, split, f"--refer-root {refer_root} --dataset {dataset} --split-by {split_by}")
        return {
            "dataset": dataset,
            "split_by": split_by,
            "provenance": store.provenance,
            "splits": {split: _split_metrics(store, refer, index, split, made) for split in chosen},
        }


def _refs(refer: REFER, split: str) -> list[Ref]:
    # By the name itself: asked for "test", the REFER API gives testA and testB too.
    return [ref for ref in refer.data["refs"] if ref["split"] == split]


def _check_images(store: Store, refer: REFER, split: str, arguments: str) -> None:
    ids = sorted({ref["image_id"] for ref in _refs(refer, split)})
    lost = [i for i in ids if i not in store]
    if lost:
        first = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
        raise InputError(f"{store.path}: lacks {len(lost)} of the {len(ids)} images of split {split} ({first}); "
                         f"extract them with: refdet extract-features {arguments} --split {split}")  # fmt: skip


def _split_metrics(
    store: Store, refer: REFER, index: CocoIndex, split: str, predictions: dict[int, Prediction] | None
) -> dict[str, Any]:
    refs = _refs(refer, split)
    ids = sorted({ref["image_id"] for ref in refs})
    best, best_of_category = [], []
    of_image: dict[int, list[Ref]] = {}
    for ref in refs:
        of_image.setdefault(ref["image_id"], []).append(ref)
    results: list[dict[str, Any]] = []
    for image_id in ids:
        regions = store.read(image_id, features=())
        results += coco_results([regions])
        ious = box_iou(np.stack([_box(refer, ref) for ref in of_image[image_id]]), regions.boxes)
        for ref, row in zip(of_image[image_id], ious, strict=True):
            best.append(row.max(initial=0.0))
            best_of_category.append(row[regions.category_ids == ref["category_id"]].max(initial=0.0))
    outlined = all(a.get("segmentation") for image_id in ids for a in refer.imgToAnns.get(image_id, []))
    metrics: dict[str, Any] = {
        "images": len(ids),
        "refs": len(refs),
        "sentences": sum(len(ref["sentences"]) for ref in refs),
        "detection": {
            "bbox": _ap(index, ids, results, "bbox"),
            "segm": _ap(index, ids, results, "segm") if store.has_masks and outlined else None,
        },
        "referent_recall": referent_recall(best, best_of_category),
    }
    if predictions is not None:
        metrics |= _comprehension(refer, index, refs, predictions)
    return metrics


def _ap(index: CocoIndex, ids: list[int], results: list[dict[str, Any]], kind: str) -> dict[str, float | None]:
    # pycocotools says -1 where there is no object of that size: no rate, so None.
    return {name: value if value >= 0 else None for name, value in coco_ap(index, ids, results, kind).items()}


def _comprehension(
    refer: REFER, index: CocoIndex, refs: list[Ref], predictions: dict[int, Prediction]
) -> dict[str, Any]:
    """Accuracy of the boxes and overlap of the masks, over sentences; segmentation is None if none has a mask."""
    ious: list[float] = []
    overlaps: list[tuple[int, int]] = []
    given = [predictions.get(s["sent_id"]) for ref in refs for s in ref["sentences"]]
    with_masks = any(p is not None and p.mask is not None for p in given)
    for ref in refs:
        truth = _mask(refer, ref, index.images[ref["image_id"]]) if with_masks else None
        for sentence in ref["sentences"]:
            predicted = predictions.get(sentence["sent_id"])
            ious.append(0.0 if predicted is None else float(box_iou(predicted.box, _box(refer, ref))[0, 0]))
            if truth is not None:
                mask = predicted.mask if predicted is not None else None
                overlaps.append(mask_overlap(mask or _empty(truth), truth))
    return {
        "comprehension": {"accuracy@0.5": rate(ious, 0.5), "missing": sum(p is None for p in given)},
        "segmentation": segmentation_scores(overlaps) if with_masks else None,
    }


def _box(refer: REFER, ref: Ref) -> np.ndarray:
    """(4,) float64: the box of a ref, half-open xyxy in pixels as the annotation has it."""
    x, y, width, height = refer.getRefBox(ref["ref_id"])
    return np.array([x, y, x + width, y + height], np.float64)


def _mask(refer: REFER, ref: Ref, image: ImageRecord) -> dict:
    segmentation = refer.refToAnn[ref["ref_id"]].get("segmentation")
    if not segmentation:
        raise InputError(f"{refer.DATA_DIR}: ref {ref['ref_id']} has no segmentation to compare masks with; "
                         "give predictions as boxes")  # fmt: skip
    return to_rle(segmentation, image.height, image.width)


def _empty(like: dict) -> dict:
    height, width = like["size"]
    return to_rle({"size": [height, width], "counts": [height * width]}, height, width)
