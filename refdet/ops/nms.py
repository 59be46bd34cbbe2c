"""Greedy non-maximum suppression, by a compiled kernel or plain PyTorch.

Shape shorthand in this module:

    N: boxes of all images
    K: kept boxes
    B: images
    M: maximum number of boxes to keep per image
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from refdet.device import to_device
from refdet.ops._library import DEVICES

BLOCK = 512  # boxes per block of nms_plain; each block synchronizes with the device several times


def nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_keep: int = -1,
    *,
    groups: Tensor | None = None,
    images: Tensor | None = None,
) -> Tensor:
    """Greedy NMS within each group of each image.

    Boxes are visited by descending score, ties by index; a NaN score counts as -inf. A box is kept unless its IoU with
    a kept box exceeds the threshold. IoU and threshold are float32, so an IoU of exactly 3/10 is not above 0.3. Empty
    boxes and boxes with a NaN coordinate neither suppress nor are suppressed. The result is the same with and without
    the compiled kernel.

    Args:
        boxes: (N, 4) half-open xyxy, any floating dtype.
        scores: (N,) on the same device.
        iou_threshold: in 0..1.
        max_keep: boxes to keep per image, over all its groups; negative for no limit.
        groups: (N,) int64, any values: only boxes of one group suppress each other. None for a single group.
        images: (N,) int64, any values: the image of each box. None for a single image.

    Returns:
        Indices (K,) int64 of the kept boxes, by image, then by descending score.

    Raises:
        TypeError: boxes or scores are not floating point, or groups or images are not int64.
        ValueError: shapes or devices do not match, or the threshold is not in 0..1.
    """
    boxes, scores = _check_inputs(boxes, scores, iou_threshold, groups, images)
    kernel = torch.ops.refdet.nms if boxes.device.type in DEVICES else nms_plain
    return kernel(boxes, scores, iou_threshold, max_keep, groups=groups, images=images)


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_keep: int,
    images: Tensor,
    num_images: int,
    *,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`nms` with an output of fixed size, so that the compiled kernel does not synchronize with a GPU.

    Args:
        boxes: (N, 4) half-open xyxy, any floating dtype.
        scores: (N,) on the same device.
        iou_threshold: in 0..1.
        max_keep: boxes to keep per image, M.
        images: (N,) int64, the image of each box; boxes whose image is not in 0..B - 1 are left out.
        num_images: number of images, B.
        groups: (N,) int64, any values: only boxes of one group suppress each other. None for a single group.

    Returns:
        Indices (B, M) int64 of the kept boxes of each image, by descending score, padded with -1; and the number (B,)
        of kept boxes of each image.

    Raises:
        TypeError: boxes or scores are not floating point, or groups or images are not int64.
        ValueError: shapes or devices do not match, the threshold is not in 0..1, or `max_keep` or `num_images` is
            negative.
    """
    boxes, scores = _check_inputs(boxes, scores, iou_threshold, groups, images)
    if max_keep < 0 or num_images < 0:
        raise ValueError(
            f"nms needs nonnegative numbers of boxes to keep and of images, got {max_keep} and {num_images}"
        )
    kernel = torch.ops.refdet.nms_padded if boxes.device.type in DEVICES else nms_padded_plain
    return kernel(boxes, scores, iou_threshold, max_keep, images, num_images, groups=groups)


def unpad(kept: Tensor, counts: Tensor) -> tuple[Tensor, list[int]]:
    """Remove the padding from the result of `nms_padded`; synchronizes with a GPU once.

    Args:
        kept: (B, M) int64 indices, padded at the end of each row.
        counts: (B,) number of indices in each row.

    Returns:
        Indices (K,) of all images, and the number of them in each image.
    """
    counts_list = counts.tolist()
    is_index = np.arange(kept.shape[1]) < np.array(counts_list, np.int64)[:, None]
    positions = torch.from_numpy(is_index.ravel().nonzero()[0])
    return kept.flatten()[to_device(positions, kept.device)], counts_list


def _check_inputs(
    boxes: Tensor, scores: Tensor, iou_threshold: float, groups: Tensor | None, images: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Check the arguments of `nms` or `nms_padded`; returns boxes and scores as float32, without gradients."""
    if not (boxes.is_floating_point() and scores.is_floating_point()):
        raise TypeError(f"nms needs floating-point boxes and scores, got {boxes.dtype} and {scores.dtype}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"nms needs boxes (N, 4), got {tuple(boxes.shape)}")
    if scores.dim() != 1 or scores.shape[0] != boxes.shape[0]:
        raise ValueError(f"nms needs scores ({boxes.shape[0]},), one per box, got {tuple(scores.shape)}")
    if boxes.device != scores.device:
        raise ValueError(f"nms needs boxes and scores on one device, got {boxes.device} and {scores.device}")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"nms needs a threshold in 0..1, got {iou_threshold}")
    _check_ids("groups", groups, boxes)
    _check_ids("images", images, boxes)
    return boxes.detach().float(), scores.detach().float()


def _check_ids(name: str, ids: Tensor | None, boxes: Tensor) -> None:
    """Raise TypeError or ValueError unless `ids`, the argument `name`, is None or an int64 id per box."""
    if ids is None:
        return
    if ids.dtype != torch.int64:
        raise TypeError(f"nms needs {name} of int64, got {ids.dtype}")
    if ids.dim() != 1 or ids.shape[0] != boxes.shape[0]:
        raise ValueError(f"nms needs {name} ({boxes.shape[0]},), one per box, got {tuple(ids.shape)}")
    if ids.device != boxes.device:
        raise ValueError(f"nms needs boxes and {name} on one device, got {boxes.device} and {ids.device}")


def nms_plain(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_keep: int = -1,
    *,
    groups: Tensor | None = None,
    images: Tensor | None = None,
) -> Tensor:
    """`nms` in plain PyTorch, for float32 boxes and scores; arguments are not checked.

    The boxes of an image are processed in blocks: each block is compared with the boxes kept so far, and the boxes that
    remain are visited one by one on the host, with the matrix of which of them suppress each other.
    """
    order = scores.masked_fill(scores.isnan(), -torch.inf).argsort(descending=True, stable=True)
    orders: tuple[Tensor, ...] = (order,)  # of each image
    if images is not None:
        order = order[images[order].argsort(stable=True)]
        orders = order.split(images[order].unique_consecutive(return_counts=True)[1].tolist())
    threshold = boxes.new_tensor(iou_threshold)

    def suppression_matrix(a: Tensor, b: Tensor) -> Tensor:
        """Whether the boxes at indices a (P,) and b (Q,) would suppress each other, (P, Q) bool."""
        overlapping = _iou(boxes[a], boxes[b]) > threshold
        return overlapping if groups is None else overlapping & (groups[a][:, None] == groups[b])

    kept_per_image = []
    for image_order in orders:
        limit = len(image_order) if max_keep < 0 else min(max_keep, len(image_order))
        kept = image_order[:0]
        for block in image_order.split(BLOCK):
            if len(kept) == limit:
                break
            block = block[~suppression_matrix(block, kept).any(dim=1)]
            suppresses = suppression_matrix(block, block).cpu().numpy()
            alive = np.ones(len(block), bool)
            for row in range(len(block)):
                if alive[row]:
                    alive[row + 1 :] &= ~suppresses[row, row + 1 :]
            kept = torch.cat((kept, block[torch.from_numpy(alive).to(block.device)]))[:limit]
        kept_per_image.append(kept)
    return torch.cat(kept_per_image) if kept_per_image else order  # without boxes, `order` is empty


def nms_padded_plain(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_keep: int,
    images: Tensor,
    num_images: int,
    *,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`nms_padded` in plain PyTorch, for float32 boxes and scores; arguments are not checked."""
    rows = ((images >= 0) & (images < num_images)).nonzero()[:, 0]
    row_groups = None if groups is None else groups[rows]
    kept_rows = rows[
        nms_plain(boxes[rows], scores[rows], iou_threshold, max_keep, groups=row_groups, images=images[rows])
    ]
    counts = (images[kept_rows] == torch.arange(num_images, device=images.device)[:, None]).sum(dim=1)
    kept = kept_rows.new_full((num_images, max_keep), -1)
    kept[torch.arange(max_keep, device=kept.device) < counts[:, None]] = kept_rows
    return kept, counts


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU (P, Q) of boxes (P, 4) and (Q, 4), with the operations of csrc/nms/nms_cpu.cpp; NaN if the union is 0."""
    area_a, area_b = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b))
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    width, height = (high - low).clamp(min=0).unbind(dim=2)
    overlap = width * height
    return overlap / (area_a[:, None] + area_b - overlap)


if DEVICES:  # the output shapes of the compiled operators, for torch.compile and torch.export

    @torch.library.register_fake("refdet::nms")
    def _nms_fake(
        boxes: Tensor,
        scores: Tensor,
        iou_threshold: float,
        max_keep: int,
        groups: Tensor | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        kept = torch.library.get_ctx().new_dynamic_size()
        return boxes.new_empty((kept,), dtype=torch.int64)

    @torch.library.register_fake("refdet::nms_padded")
    def _nms_padded_fake(
        boxes: Tensor,
        scores: Tensor,
        iou_threshold: float,
        max_keep: int,
        images: Tensor,
        count: int,
        groups: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return images.new_empty((count, max_keep)), images.new_empty((count,))
