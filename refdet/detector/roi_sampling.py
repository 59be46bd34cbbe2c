"""Sample the RoIs that the second stage is trained on, from proposals and annotated boxes.

Shape shorthand in this module:

    B: images in the batch
    P: proposals of an image
    G: objects of an image
    S: sampled RoIs of an image
    K, Q: sampled RoIs of the batch, and the positive ones among them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from refdet.config.recipe import HeadOptions
from refdet.detector.sampling import subsample_labels
from refdet.detector.target_assignment import IGNORE, POSITIVE, assign_labels
from refdet.device import to_cpu_async, to_device
from refdet.structures import boxes as box_ops
from refdet.structures.ground_truth import PaddedGroundTruth

FIRST_OBJECT_ID = 2**20  # candidate id of the first annotated box; above the ids of all proposals


@dataclass(frozen=True)
class PositiveRois:
    """The positive RoIs of a batch, on the CPU, ordered by image.

    Attributes:
        row: (Q,) int64 index among the K RoIs.
        image: (Q,) int64 index of the image.
        object: (Q,) int64 index, within the image, of the object that the RoI overlaps most.
        boxes: (Q, 4) xyxy in pixels of the network's input.
    """

    row: Tensor
    image: Tensor
    object: Tensor
    boxes: Tensor

    def __getitem__(self, rows: Tensor) -> PositiveRois:
        return PositiveRois(self.row[rows], self.image[rows], self.object[rows], self.boxes[rows])

    def select_with_mask(self, masks: Sequence[Sequence[dict | None] | None]) -> PositiveRois:
        """The RoIs whose object has a mask.

        Args:
            masks: masks of the objects of each image; None instead of a list keeps all RoIs of the image.
        """
        has_mask = []
        for image, index in zip(self.image.tolist(), self.object.tolist(), strict=True):
            image_masks = masks[image]
            has_mask.append(image_masks is None or image_masks[index] is not None)
        return self if all(has_mask) else self[torch.tensor(has_mask)]

    def split_by_image(self, num_images: int) -> list[tuple[Tensor, Tensor]]:
        """(boxes, object) of the RoIs of each image."""
        counts = np.bincount(self.image.numpy(), minlength=num_images).tolist()
        return list(zip(self.boxes.split(counts), self.object.split(counts), strict=True))


@dataclass(frozen=True)
class SampledRois:
    """The sampled RoIs of a batch, on the device, ordered by image, positives first within an image.

    Attributes:
        rois: (K, 5) image index and xyxy in pixels of the network's input.
        labels: (K,) int64, 0 for the background.
        matched_boxes: (K, 4) box of the object that each RoI overlaps most, xyxy in pixels of the network's input.
        positive: the positive RoIs, on the CPU.
    """

    rois: Tensor
    labels: Tensor
    matched_boxes: Tensor
    positive: PositiveRois


def sample_rois(
    proposals: Sequence[Tensor], truth: PaddedGroundTruth, options: HeadOptions, seeds: Tensor
) -> SampledRois:
    """Sample RoIs of each image. Synchronizes with a GPU once per batch.

    The samples of an image do not depend on the other images of the batch.

    Args:
        proposals: (P, 4) of each image, in pixels of the network's input.
        truth: annotated objects, with at most G per image.
        options: ``head`` of the recipe.
        seeds: (B,) int64, from `image_seeds`.
    """
    counts = to_device(torch.tensor([len(boxes) for boxes in proposals]), truth.boxes.device)
    proposed = pad_sequence(list(proposals), batch_first=True)
    max_proposals = proposed.shape[1]
    candidates = torch.cat((proposed, truth.boxes), dim=1)
    is_proposal = torch.arange(max_proposals, device=counts.device) < counts[:, None]
    match_labels, matched = assign_labels(
        candidates, truth, options.positive_iou, options.positive_iou, allow_low_quality_matches=False
    )
    match_labels.masked_fill_(~torch.cat((is_proposal, truth.valid), dim=1), IGNORE)
    if not options.append_gt_boxes:  # then annotated boxes are sampled only in images without a positive proposal
        has_positive = (match_labels[:, :max_proposals] == POSITIVE).any(dim=1, keepdim=True)
        match_labels[:, max_proposals:].masked_fill_(has_positive, IGNORE)
    candidate_ids = torch.arange(candidates.shape[1], device=counts.device)
    # the ids of objects, and so their random order, do not depend on the number of proposals
    candidate_ids[max_proposals:] += FIRST_OBJECT_ID - max_proposals
    samples = subsample_labels(
        match_labels,
        options.batch_size_per_image,
        options.positive_fraction,
        seeds,
        options.sample_with_replacement,
        candidate_ids,
    )
    boxes = box_ops.gather(candidates, samples.index)
    matched = matched.gather(1, samples.index)
    labels = truth.labels.gather(1, matched) * samples.positive
    image = torch.arange(len(proposals), device=boxes.device)[:, None].expand_as(labels)
    columns = (image, matched, samples.positive, samples.valid)
    table = torch.cat((torch.stack(columns, dim=2).to(boxes.dtype), boxes), dim=2).flatten(0, 1)
    wait = to_cpu_async(table)  # everything the host needs, in one copy
    rois = torch.cat((image[:, :, None].to(boxes.dtype), boxes), dim=2).flatten(0, 1)
    outputs = rois, labels.flatten(), box_ops.gather(truth.boxes, matched).flatten(0, 1)
    return _drop_invalid(wait(), *outputs)


def _drop_invalid(table: Tensor, rois: Tensor, labels: Tensor, matched_boxes: Tensor) -> SampledRois:
    """The samples without the rows of padding.

    Args:
        table: (B * S, 8) on the CPU: of each RoI its image, object, whether it is positive, whether it is a sample and
            not padding, and xyxy.
        rois: (B * S, 5) on the device, as in `SampledRois`.
        labels: (B * S,), likewise.
        matched_boxes: (B * S, 4), likewise.
    """
    valid = table[:, 3] > 0
    if not valid.all():
        rows = to_device(valid.nonzero()[:, 0], rois.device)
        table, rois, labels, matched_boxes = table[valid], rois[rows], labels[rows], matched_boxes[rows]
    row = (table[:, 2] > 0).nonzero()[:, 0]
    image, matched = table[row, :2].long().unbind(dim=1)
    return SampledRois(rois, labels, matched_boxes, PositiveRois(row, image, matched, table[row, 4:]))
