"""gRefCOCO's metrics, for sentences that refer to no, one or several objects.

N-acc, T-acc, gIoU and cIoU as in Liu et al., "GRES: Generalized Referring Expression Segmentation"; precision at F1 = 1
as in He et al., "GREC: Generalized Referring Expression Comprehension".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from refdet.evaluation.metrics import box_iou, generalized_iou, mask_overlap, mean, precisions, ratio


@dataclass(frozen=True)
class Answer:
    """Ground truth and prediction of one sentence.

    Attributes:
        truth: (n, 4) boxes of the objects, half-open xyxy in pixels; n is 0 without a target.
        truth_mask: RLE of the union of the objects' masks; None if masks are not compared.
        predicted: (m, 4) boxes like ``truth``; m is 0 for "no such object". None without a prediction.
        predicted_mask: RLE of the union of the predicted masks, empty without a prediction; None if masks are not
            compared.
    """

    truth: np.ndarray
    truth_mask: dict | None
    predicted: np.ndarray | None
    predicted_mask: dict | None


def generalized_scores(answers: Sequence[Answer]) -> dict[str, float | int | None]:
    """All metrics over the sentences of a split; a sentence without a prediction counts as wrong.

    Returns:
        no_target: number of sentences without a target; missing: number of sentences without a prediction.
        N-acc: share of the sentences without a target that are predicted to have none; T-acc: share of the sentences
        with a target that are predicted to have one; None if there are no such sentences.
        precision@F1=1,IoU>=0.5: share of the sentences with all objects found and nothing else;
        precision@F1=1,GIoU>=0.5: the same by generalized IoU, as in the code of GREC's authors.
        gIoU: mean IoU of masks, where a sentence without a target counts as 1 if its predicted mask is empty, else 0;
        cIoU: sum of intersections over sum of unions; precision@0.5 ... 0.9 of the masks of sentences with a target.
        These are None if masks are not compared.
    """
    without_target = [a for a in answers if not len(a.truth)]
    with_target = [a for a in answers if len(a.truth)]
    scores: dict[str, float | int | None] = {
        "no_target": len(without_target),
        "missing": sum(a.predicted is None for a in answers),
        "N-acc": mean([_predicts_no_target(a) for a in without_target]) if without_target else None,
        "T-acc": mean([a.predicted is not None and len(a.predicted) > 0 for a in with_target]) if with_target else None,
        "precision@F1=1,IoU>=0.5": mean([_has_perfect_f1(a, box_iou) for a in answers]),
        "precision@F1=1,GIoU>=0.5": mean([_has_perfect_f1(a, generalized_iou) for a in answers]),
    }
    overlaps = [_overlap(a) for a in answers]
    if any(overlap is None for overlap in overlaps):
        return scores | dict.fromkeys(("gIoU", "cIoU", *precisions([])))
    available = [overlap for overlap in overlaps if overlap is not None]
    pairs = list(zip(answers, available, strict=True))
    target_ious = [ratio(*overlap) for a, overlap in pairs if len(a.truth)]
    # the union with an empty truth is the predicted mask
    no_target_ious = [float(a.predicted is not None and not union) for a, (_, union) in pairs if not len(a.truth)]
    overall = ratio(sum(intersection for intersection, _ in available), sum(union for _, union in available))
    return scores | {"gIoU": mean(target_ious + no_target_ious), "cIoU": overall} | precisions(target_ious)


def _predicts_no_target(answer: Answer) -> bool:
    return answer.predicted is not None and not len(answer.predicted)


def _overlap(answer: Answer) -> tuple[int, int] | None:
    """`mask_overlap` of the predicted mask and the truth; None if masks are not compared."""
    if answer.truth_mask is None or answer.predicted_mask is None:
        return None
    return mask_overlap(answer.predicted_mask, answer.truth_mask)


def _has_perfect_f1(answer: Answer, overlap: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> bool:
    """Whether F1 is 1: as many boxes as objects, and all greedily matched pairs have an ``overlap`` of at least 0.5."""
    if answer.predicted is None or len(answer.predicted) != len(answer.truth):
        return False
    overlaps = overlap(answer.predicted, answer.truth)
    for _ in range(len(answer.truth)):
        row, column = np.unravel_index(int(overlaps.argmax()), overlaps.shape)
        if overlaps[row, column] < 0.5:
            return False
        overlaps[row, :], overlaps[:, column] = -1.0, -1.0  # matched
    return True
