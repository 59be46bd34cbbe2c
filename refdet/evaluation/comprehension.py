"""Metrics of predictions for the sentences of refs: comprehension and segmentation, or for gRefCOCO its own metrics.

A ref is an object, or in gRefCOCO any number of objects, with the sentences that refer to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from refdet.data.coco import CocoIndex, ImageRecord
from refdet.evaluation import targets
from refdet.evaluation.grefcoco import Answer, generalized_scores
from refdet.evaluation.metrics import (
    Protocol,
    box_iou,
    box_overlap,
    fraction_at_least,
    mask_overlap,
    mean,
    precisions,
    segmentation_scores,
)
from refdet.evaluation.predictions import Prediction
from refdet.structures.regions import Regions
from refer import REFER

RANKS = (1, 5, 10)  # of P@1, P@5 and P@10


def comprehension(
    refer: REFER,
    index: CocoIndex,
    refs: Sequence[Any],
    predictions: Mapping[int, Prediction],
    regions: Mapping[int, Regions],
    protocol: Protocol,
) -> dict[str, Any]:
    """Compute accuracy of boxes and IoU of masks over the sentences of refs with one object each.

    Args:
        refer: the REFER dataset.
        index: its instances file.
        refs: the refs to evaluate.
        predictions: sentence id -> prediction; a sentence without one counts as wrong.
        regions: image id -> the regions of the store.
        protocol: how the overlap of boxes is computed, see `box_overlap`.

    Returns:
        Two entries. "comprehension" has

        - accuracy@0.5: share of the sentences whose first answer overlaps the object by at least 0.5;
        - missing: number of sentences without a prediction;
        - random_baseline@0.5: the accuracy to expect if a random region of the image is the answer;
        - precision@0.5 ... 0.9: the accuracy at these thresholds;
        - mean_iou: mean IoU of the first answers, never the generalized IoU of the protocol "mdetr";
        - P@1, P@5 and P@10, only if any of ``predictions`` is ranked: share of the sentences with an overlap of at
          least 0.5 among the first 1, 5 and 10 answers.

        "segmentation" has `segmentation_scores`, and missing: number of sentences without a mask, which count as wrong.
        It is None if no prediction has a mask.
    """
    ious: list[float] = []
    top1: list[float] = []  # overlap of the first answer, as the protocol defines it
    top_k: list[list[float]] = []  # best overlap of the first k answers, for each k in `RANKS`
    baseline: list[float] = []  # probability that a random region is correct
    mask_overlaps: list[tuple[int, int]] = []  # intersection and union in pixels
    all_predictions = [predictions.get(sentence["sent_id"]) for ref in refs for sentence in ref["sentences"]]
    with_masks = any(p is not None and p.masks is not None for p in all_predictions)
    for ref in refs:
        objects = targets.objects_of(refer, ref)
        image, box = index.images[ref["image_id"]], targets.boxes(refer, objects)  # (1, 4)
        true_mask = targets.mask(refer, objects, image) if with_masks else None
        chance = fraction_at_least(box_overlap(box, regions[image.id].boxes, protocol)[0], 0.5)
        for sentence in ref["sentences"]:
            predicted = predictions.get(sentence["sent_id"])
            ious.append(0.0 if predicted is None else float(box_iou(predicted.boxes, box, protocol)[0, 0]))
            top_k.append(_best_overlap_at_k(predicted, box, protocol))
            top1.append(top_k[-1][0])
            baseline.append(chance)
            if true_mask is not None:
                mask_overlaps.append(mask_overlap(_merged_mask(predicted, image), true_mask))
    box_scores = {
        "accuracy@0.5": fraction_at_least(top1, 0.5),
        "missing": sum(p is None for p in all_predictions),
        "random_baseline@0.5": mean(baseline),
        **precisions(top1),
        "mean_iou": mean(ious),
    }
    if any(p.ranked is not None for p in predictions.values()):
        for i, k in enumerate(RANKS):
            box_scores[f"P@{k}"] = fraction_at_least([overlaps[i] for overlaps in top_k], 0.5)
    segmentation = None
    if with_masks:
        without_mask = sum(p is None or p.masks is None for p in all_predictions)
        segmentation = {"missing": without_mask, **segmentation_scores(mask_overlaps)}
    return {"comprehension": box_scores, "segmentation": segmentation}


def _best_overlap_at_k(predicted: Prediction | None, box: np.ndarray, protocol: Protocol) -> list[float]:
    """Highest overlap of the first k answers with a box (1, 4), for each k in `RANKS`; 0 without an answer."""
    if predicted is None:
        return [0.0] * len(RANKS)
    answers = predicted.boxes if predicted.ranked is None else predicted.ranked
    overlaps = box_overlap(answers[: RANKS[-1]], box, protocol)[:, 0]
    return [float(overlaps[:k].max()) for k in RANKS]


def generalized_comprehension(
    refer: REFER, index: CocoIndex, refs: Sequence[Any], predictions: Mapping[int, Prediction]
) -> dict[str, Any]:
    """Compute gRefCOCO's metrics over the sentences of refs, which may have any number of objects.

    Args:
        refer: as in `comprehension`.
        index: as in `comprehension`.
        refs: as in `comprehension`.
        predictions: as in `comprehension`.

    Returns:
        One entry, "generalized": `generalized_scores`. Masks are compared if every prediction for these sentences has
        masks.
    """
    all_predictions = [predictions.get(sentence["sent_id"]) for ref in refs for sentence in ref["sentences"]]
    available = [p for p in all_predictions if p is not None]
    with_masks = bool(available) and all(p.masks is not None for p in available)
    answers = []
    for ref in refs:
        objects = targets.objects_of(refer, ref)
        image = index.images[ref["image_id"]]
        # as in gRefCOCO's evaluation code and REFER.getMask, crowds count for boxes, but not for masks
        non_crowd = [annotation for annotation in objects if not annotation.get("iscrowd")]
        true_mask = targets.mask(refer, non_crowd, image) if with_masks else None
        for sentence in ref["sentences"]:
            predicted = predictions.get(sentence["sent_id"])
            boxes = None if predicted is None else predicted.boxes
            mask = _merged_mask(predicted, image) if with_masks else None
            answers.append(Answer(targets.boxes(refer, objects), true_mask, boxes, mask))
    return {"generalized": generalized_scores(answers)}


def _merged_mask(predicted: Prediction | None, image: ImageRecord) -> dict:
    """RLE of the union of a prediction's masks; empty without a prediction or masks."""
    masks = () if predicted is None else predicted.masks or ()
    return coco_mask.merge([targets.empty_mask(image.height, image.width), *masks])
