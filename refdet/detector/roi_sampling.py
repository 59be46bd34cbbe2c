"""The RoIs that the second stage learns from: sampled from proposals and annotated boxes.

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
from refdet.structures.ground_truth import PaddedGroundTruth

FIRST_OBJECT_ID = 2**20  # of the first annotated box among the candidates, beyond the most proposals


@dataclass(frozen=True)
class PositiveRois:
    """The positive RoIs of a batch, on the CPU, image after image.

    Attributes:
        row: (Q,) int64 index among the K RoIs.
        image: (Q,) int64 index of the image.
        object: (Q,) int64 index of the object within its image.
        boxes: (Q, 4) xyxy in pixels of the network's input.
    """

    row: Tensor
    image: Tensor
    object: Tensor
    boxes: Tensor

    def __getitem__(self, rows: Tensor) -> PositiveRois:
        return PositiveRois(self.row[rows], self.image[rows], self.object[rows], self.boxes[rows])

    def with_mask(self, masks: Sequence[Sequence[dict | None] | None]) -> PositiveRois:
        """Those whose object has a mask, from the masks of each image's objects; all of an image where it has None."""
        pairs = zip(self.image.tolist(), self.object.tolist(), strict=True)
        has_mask = [(image_masks := masks[image]) is None or image_masks[index] is not None for image, index in pairs]
        return self if all(has_mask) else self[torch.tensor(has_mask)]

    def of_images(self, images: int) -> list[tuple[Tensor, Tensor]]:
        """Boxes and objects of each image."""
        counts = np.bincount(self.image.numpy(), minlength=images).tolist()
        return list(zip(self.boxes.split(counts), self.object.split(counts), strict=True))


@dataclass(frozen=True)
class SampledRois:
    """The sampled RoIs of a batch, on the device, image after image and positives first.

    Attributes:
        rois: (K, 5) image index and xyxy in pixels of the network's input.
        labels: (K,) int64, 0 for the background.
        boxes: (K, 4) of the object that each RoI overlaps most.
        positive: the positive ones, on the CPU.
    """

    rois: Tensor
    labels: Tensor
    boxes: Tensor
    positive: PositiveRois


def sample_rois(
    proposals: Sequence[Tensor], truth: PaddedGroundTruth, options: HeadOptions, seeds: Tensor
) -> SampledRois:
    """Sample RoIs of each image. Waits once for a GPU, for the samples of all images.

    An image's sample does not depend on the other images of the batch.

    Args:
        proposals: (P, 4) of each image, in pixels of the network's input.
        truth: annotated objects.
        options: of the recipe.
        seeds: (B,) int64, from `image_seeds`.
    """
    counts = to_device(torch.tensor([len(boxes) for boxes in proposals]), truth.boxes.device)
    proposed = pad_sequence(list(proposals), batch_first=True)
    max_proposals = proposed.shape[1]
    candidates = torch.cat((proposed, truth.boxes), dim=1)
    is_proposal = torch.arange(max_proposals, device=counts.device) < counts[:, None]
    match_labels, matched = assign_labels(
        candidates, truth, options.positive_iou, options.positive_iou, best_for_each=False
    )
    match_labels.masked_fill_(~torch.cat((is_proposal, truth.valid), dim=1), IGNORE)
    if not options.append_gt_boxes:  # only where no proposal is positive
        has_positive = (match_labels[:, :max_proposals] == POSITIVE).any(dim=1, keepdim=True)
        match_labels[:, max_proposals:].masked_fill_(has_positive, IGNORE)
    candidate_ids = torch.arange(candidates.shape[1], device=counts.device)
    # the same however many proposals the images of the batch have
    candidate_ids[max_proposals:] += FIRST_OBJECT_ID - max_proposals
    samples = subsample_labels(
        match_labels,
        options.batch_size_per_image,
        options.positive_fraction,
        seeds,
        options.sample_with_replacement,
        candidate_ids,
    )
    corners = _gather_boxes(candidates, samples.index)
    matched = matched.gather(1, samples.index)
    labels = truth.labels.gather(1, matched) * samples.positive
    image = torch.arange(len(proposals), device=corners.device)[:, None].expand_as(labels)
    table = (image, matched, samples.positive, samples.valid)
    packed = torch.cat((torch.stack(table, dim=2).to(corners.dtype), corners), dim=2).flatten(0, 1)
    wait = to_cpu_async(packed)
    rois = torch.cat((image[:, :, None].to(corners.dtype), corners), dim=2).flatten(0, 1)
    outputs = rois, labels.flatten(), _gather_boxes(truth.boxes, matched).flatten(0, 1)
    return _compact(wait(), *outputs)


def _gather_boxes(boxes: Tensor, index: Tensor) -> Tensor:
    """Boxes (B, N, 4) at indices (B, S) -> (B, S, 4)."""
    return boxes.gather(1, index[:, :, None].expand(-1, -1, 4))


def _compact(table: Tensor, rois: Tensor, labels: Tensor, boxes: Tensor) -> SampledRois:
    """Drop the rows that are not valid according to the table (B * S, 8) on the CPU."""
    valid = table[:, 3] > 0
    if not valid.all():
        rows = to_device(valid.nonzero()[:, 0], rois.device)
        table, rois, labels, boxes = table[valid], rois[rows], labels[rows], boxes[rows]
    row = (table[:, 2] > 0).nonzero()[:, 0]
    image, matched = table[row, :2].long().unbind(dim=1)
    return SampledRois(rois, labels, boxes, PositiveRois(row, image, matched, table[row, 4:]))
