"""Conversion between m x m masks of boxes and RLEs of the image, by compiled kernels or plain PyTorch.

Shape shorthand in this module:

    N, K: boxes
    M: bytes of all RLEs
    m: height and width of a mask before pasting, or of a mask target

Pixels are pixels of the image; an m x m mask has mask pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from refdet.files.short_text import format_count
from refdet.ops._library import DEVICES

FLOAT32_MAX = torch.finfo(torch.float32).max


def masks_to_rle(probabilities: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5) -> list[bytes]:
    """Paste masks of boxes into the image, without rounding the boxes, and encode each as RLE.

    Each pixel whose center is in the box is interpolated bilinearly from the probabilities at the centers of the mask
    pixels, clamped beyond the outer ones, and thresholded. A box with a NaN or infinite coordinate has an empty mask.
    The arithmetic is float32 in a fixed order, so that the result is the same with and without the compiled kernels.
    Tensors on a GPU are copied to the CPU first.

    Args:
        probabilities: (N, m, m) in 0..1, any floating dtype.
        boxes: (N, 4) half-open xyxy in pixels of the image, on the same device.
        height: height of the image in pixels.
        width: width of the image in pixels.
        threshold: lowest probability of a mask pixel, in 0..1.

    Returns:
        N COCO compressed RLE ``counts`` of ``size`` [height, width].

    Raises:
        TypeError: probabilities or boxes are not floating point.
        ValueError: shapes or devices do not match, the image has no pixels or 2**32 or more, or the threshold is not in
            0..1.
    """
    if not (probabilities.is_floating_point() and boxes.is_floating_point()):
        raise TypeError(
            f"masks need floating-point probabilities and boxes, got {probabilities.dtype} and {boxes.dtype}"
        )
    if probabilities.dim() != 3 or not 0 < probabilities.shape[1] == probabilities.shape[2]:
        raise ValueError(f"masks need probabilities (N, m, m), got {tuple(probabilities.shape)}")
    if boxes.dim() != 2 or boxes.shape[0] != probabilities.shape[0] or boxes.shape[1] != 4:
        raise ValueError(f"masks need boxes ({probabilities.shape[0]}, 4), one per mask, got {tuple(boxes.shape)}")
    if probabilities.device != boxes.device:
        raise ValueError(
            f"masks need probabilities and boxes on one device, got {probabilities.device} and {boxes.device}"
        )
    if height < 1 or width < 1 or height * width >= 2**32:
        raise ValueError(f"an image of {height} x {width} pixels has no RLE")
    if not 0 <= threshold <= 1:
        raise ValueError(f"masks need a threshold in 0..1, got {threshold}")
    values, boxes = (tensor.detach().cpu().float() for tensor in (probabilities, boxes))
    if "cpu" in DEVICES:
        counts, starts = torch.ops.refdet.masks_to_rle(values, boxes, height, width, threshold)
        text = counts.numpy().tobytes()
        return [text[start:end] for start, end in itertools.pairwise(starts.tolist())]
    return masks_to_rle_plain(values, boxes, height, width, threshold)


def masks_to_rle_plain(
    probabilities: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5
) -> list[bytes]:
    """`masks_to_rle` with NumPy and pycocotools, for float32 CPU tensors; arguments are not checked."""
    image_mask = np.zeros((height, width, 1), np.uint8, order="F")
    counts = []
    for mask, box in zip(probabilities.numpy(), boxes.numpy(), strict=True):
        top, rows = _interpolation(box[1], box[3], len(mask), height)
        left, columns = _interpolation(box[0], box[2], len(mask), width)
        with np.errstate(over="ignore", invalid="ignore"):  # from values outside 0..1
            window = columns.apply(mask.T).T  # (m, columns)
            window = rows.apply(window) >= np.float32(threshold)  # (rows, columns), the pixels in the box
        window_slice = (slice(top, top + window.shape[0]), slice(left, left + window.shape[1]), 0)
        image_mask[window_slice] = window
        counts.append(coco_mask.encode(image_mask)[0]["counts"])
        image_mask[window_slice] = 0
    return counts


@dataclass(frozen=True)
class _Interpolation:
    """Linear interpolation of the pixels along an axis, each between two neighboring mask pixels.

    Attributes:
        first: (pixels,) int64, the first of the two mask pixels.
        weight: (pixels,) float32, the weight of the first; the weight of the second is 1 - `weight`.
    """

    first: np.ndarray
    weight: np.ndarray

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Values (m, K) of the mask pixels -> (pixels, K)."""
        second = np.minimum(self.first + 1, len(values) - 1)
        weights = self.weight[:, None]
        return values[self.first] * weights + values[second] * (np.float32(1) - weights)


def _interpolation(low: np.float32, high: np.float32, size: int, limit: int) -> tuple[int, _Interpolation]:
    """Interpolation of the pixels of an axis whose centers are in a box.

    Args:
        low: start of the box, in pixels.
        high: end of the box, in pixels.
        size: mask pixels along the axis, m.
        limit: pixels of the image along the axis.

    Returns:
        The index of the first of these pixels, and the interpolation of all of them.
    """
    if not (np.isfinite(low) and np.isfinite(high)):
        return 0, _Interpolation(np.zeros(0, np.int64), np.zeros(0, np.float32))
    first, last = (int(np.clip(np.ceil(np.float64(edge) - 0.5), 0, limit)) for edge in (low, high))
    if last <= first:
        return first, _Interpolation(np.zeros(0, np.int64), np.zeros(0, np.float32))
    half = np.float32(0.5)
    scale = np.float32(size / (np.float64(high) - np.float64(low)))
    centers = np.arange(first, last).astype(np.float32) + half
    position = np.clip((centers - low) * scale - half, np.float32(0), np.float32(size - 1))
    mask_pixel = position.astype(np.int64)
    return first, _Interpolation(mask_pixel, np.float32(1) - (position - mask_pixel.astype(np.float32)))


def mask_coverage(rles: Sequence[dict], objects: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Compute the exact fraction of each cell of an m x m grid over a box that an object's mask covers.

    The covered area of a cell is a difference of four values of the mask's integral image, which is interpolated
    linearly between pixel corners. The result is the same with and without the compiled kernel. Runs on the CPU, as
    annotations are RLE.

    Args:
        rles: pycocotools RLEs of the objects of one image, with ``counts`` as bytes.
        objects: (K,) int64 index of the object of each box.
        boxes: (K, 4) half-open xyxy in pixels of the image; nothing is covered outside the image, nor in a box that is
            empty or has a NaN or infinite coordinate.
        size: cells on a side of the grid, m.

    Returns:
        (K, m, m) float32 in 0..1, on the CPU.

    Raises:
        ValueError: shapes do not match, an object index is out of range, masks differ in size, or an RLE does not match
            its size.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 4 or objects.shape != boxes.shape[:1]:
        raise ValueError(f"(K, 4) boxes need (K,) objects, got {tuple(boxes.shape)} and {tuple(objects.shape)}")
    if size < 1:
        raise ValueError(f"masks need at least one cell, got a size of {size}")
    objects, boxes = objects.detach().to("cpu", torch.int64), boxes.detach().to("cpu", torch.float64)
    if len(objects) == 0:
        return torch.zeros(0, size, size)
    if int(objects.min()) < 0 or int(objects.max()) >= len(rles):
        raise ValueError(
            f"objects: indices {int(objects.min())} to {int(objects.max())} are out of range for "
            f"{format_count(len(rles), 'mask')}"
        )
    sizes = {tuple(rle["size"]) for rle in rles}
    if len(sizes) > 1:
        raise ValueError(f"rles: masks of one image differ in size: {sorted(sizes)}")
    if "cpu" not in DEVICES:
        return mask_coverage_plain(rles, objects, boxes, size)
    height, width = sizes.pop()
    counts, starts = _concatenate([rle["counts"] for rle in rles])
    return torch.ops.refdet.mask_coverage(counts, starts, height, width, boxes, objects, size)


def mask_coverage_plain(rles: Sequence[dict], objects: Tensor, boxes: Tensor, size: int) -> Tensor:
    """`mask_coverage` in plain PyTorch, for int64 objects and float64 boxes on the CPU; arguments are not checked."""
    # as the kernel does, treat coordinates beyond float32 as infinite
    valid = (boxes.abs() <= FLOAT32_MAX).all(dim=1) & (boxes[:, :2] < boxes[:, 2:]).all(dim=1)
    boxes = torch.where(valid[:, None], boxes, 0.0)
    coverage = torch.zeros(len(boxes), size, size)
    for index in objects.unique().tolist():
        rows = (objects == index).nonzero()[:, 0]
        coverage[rows] = _coverage(coco_mask.decode(rles[index]), boxes[rows], size)
    return coverage


def _coverage(mask: np.ndarray, boxes: Tensor, size: int) -> Tensor:
    """Coverage (K, m, m) of boxes (K, 4) by a mask (H, W)."""
    height, width = mask.shape
    integral = np.zeros((height + 1, width + 1), np.float64)
    integral[1:, 1:] = mask.astype(np.float64).cumsum(0).cumsum(1)
    table = torch.from_numpy(integral)
    steps = torch.arange(size + 1, dtype=torch.float64) / size
    xs = boxes[:, 0:1] + (boxes[:, 2:3] - boxes[:, 0:1]) * steps
    ys = boxes[:, 1:2] + (boxes[:, 3:4] - boxes[:, 1:2]) * steps
    x0, fx = _floor_and_fraction(xs, width)
    y0, fy = _floor_and_fraction(ys, height)
    rows = table[y0] * (1 - fy)[:, :, None] + table[y0 + 1] * fy[:, :, None]  # (K, m + 1, W + 1)
    left = rows.gather(2, x0[:, None, :].expand(-1, size + 1, -1))
    right = rows.gather(2, (x0 + 1)[:, None, :].expand(-1, size + 1, -1))
    corners = left * (1 - fx)[:, None, :] + right * fx[:, None, :]
    covered = corners.diff(dim=1).diff(dim=2)
    cell_area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / size**2).clamp(min=1e-12)
    return (covered / cell_area[:, None, None]).clamp(0, 1).float()


def _floor_and_fraction(positions: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Integer and fractional part of positions clamped to [0, limit]; the integer part is less than `limit`."""
    inside = positions.clamp(0, limit)
    floor = inside.floor().clamp(max=limit - 1)
    return floor.long(), inside - floor


def _concatenate(texts: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """Concatenated bytes (M,) uint8, and int64 offsets: the start of each text, and M at the end."""
    starts = np.concatenate(([0], np.cumsum([len(text) for text in texts], dtype=np.int64)))
    data = bytearray(b"".join(texts))  # torch warns of tensors that share memory with bytes, which are read-only
    return torch.from_numpy(np.frombuffer(data, np.uint8)), torch.from_numpy(starts)


if DEVICES:

    @torch.library.register_fake("refdet::masks_to_rle")
    def _masks_to_rle_fake(
        probabilities: Tensor, boxes: Tensor, height: int, width: int, threshold: float
    ) -> tuple[Tensor, Tensor]:
        length = torch.library.get_ctx().new_dynamic_size()
        counts = boxes.new_empty((length,), dtype=torch.uint8)
        return counts, boxes.new_empty((boxes.shape[0] + 1,), dtype=torch.int64)

    @torch.library.register_fake("refdet::mask_coverage")
    def _mask_coverage_fake(
        counts: Tensor, starts: Tensor, height: int, width: int, boxes: Tensor, objects: Tensor, size: int
    ) -> Tensor:
        return boxes.new_empty((boxes.shape[0], size, size), dtype=torch.float32)
