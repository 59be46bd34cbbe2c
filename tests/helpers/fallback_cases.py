"""A call of each op that has a kernel. As a script, saves the results without the compiled extension to a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from pooling_examples import some_map, some_rois

from refdet.ops.masks import mask_coverage, masks_to_rle
from refdet.ops.matching import match_boxes
from refdet.ops.nms import nms
from refdet.ops.pooling import roi_align, roi_crop_mean


def matches() -> list[list[float]]:
    boxes = _boxes(1000, 137)
    return [value.tolist() for value in match_boxes(boxes, boxes[::50] + 1)]


def kept() -> list[int]:
    boxes = _boxes(100, 37)
    return nms(boxes, boxes[:, 0] / 37, 0.5).tolist()


def kept_of_groups() -> list[int]:
    boxes, places = _boxes(200, 37), torch.arange(200)
    return nms(boxes, boxes[:, 0] / 37, 0.3, 20, groups=places % 3, images=places % 5).tolist()


def masks() -> list[Any]:
    boxes = torch.tensor([[3.3, 4.4, 50, 60], [-9, 0, 20, 99], [0, 0, 80, 70]])
    cells = torch.rand(3, 14, 14, generator=torch.Generator().manual_seed(0))
    counts = masks_to_rle(cells, boxes, 70, 80)
    rles = [{"size": [70, 80], "counts": text} for text in counts]
    return [counts, mask_coverage(rles, torch.arange(3), boxes, 28).tolist()]


def pooled() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(12)
    x, rois = some_map(generator, 2, 24, 12, 15), some_rois(generator, 9, 2, odd=True)
    return [roi_align(x, rois, 7, 8), roi_align(x, rois, 7, 8, 0), roi_crop_mean(x, rois, 7, 8)]


def _boxes(count: int, modulus: int) -> torch.Tensor:
    boxes = torch.arange(4.0 * count).reshape(count, 4) % modulus
    boxes[:, 2:] += boxes[:, :2]
    return boxes


CASES: dict[str, Callable[[], Any]] = {case.__name__: case for case in (matches, kept, kept_of_groups, masks, pooled)}

if __name__ == "__main__":
    from refdet.ops._library import DEVICES

    assert not DEVICES
    torch.save({name: case() for name, case in CASES.items()}, sys.argv[1])
