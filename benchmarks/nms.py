"""Benchmarks refdet's nms against its plain PyTorch fallback and torchvision's.

Boxes are clustered like RPN proposals: several shifted copies around each object. Times are medians of rounds in which
all three take turns, so that other load on the machine slows all of them. torchvision processes one image at a time. On
a GPU, the bytes are those that must be read and written once: boxes, scores, ids and the result. NMS is bound by
arithmetic and stays far below the memory bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torchvision
from timing import Row, Settings
from torch import Tensor

from refdet.ops.nms import nms, nms_plain


@dataclass(frozen=True)
class Case:
    """`boxes` boxes per image in `classes` classes; at most max_keep are kept per image (negative: no limit)."""

    boxes: int
    max_keep: int
    iou_threshold: float
    classes: int = 1
    images: int = 1


CASES = (
    Case(6000, 300, 0.7),  # RPN when testing
    Case(12000, 2000, 0.7),  # RPN when training
    Case(300, 100, 0.3),  # a class of the head
    Case(2000, -1, 0.3, classes=80),
    Case(2000, 100, 0.3, classes=80),
    Case(6000, 300, 0.7, images=8),
    Case(2000, 100, 0.3, classes=80, images=8),
)


@dataclass(frozen=True)
class Boxes:
    """Boxes (N, 4) with their scores, classes and image indices (N,), sorted by image."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    images: Tensor

    def to(self, device: str) -> Boxes:
        return Boxes(*(tensor.to(device) for tensor in (self.boxes, self.scores, self.classes, self.images)))


def proposals(case: Case, seed: int = 0) -> Boxes:
    """Random clustered boxes in images of 1000x600 pixels."""
    random = torch.Generator().manual_seed(seed)
    count = case.boxes * case.images
    centers = torch.rand(count // 6 + 1, 2, generator=random) * torch.tensor([1000.0, 600.0])
    sizes = torch.rand(count // 6 + 1, 2, generator=random) * 200 + 16
    chosen = torch.randint(len(centers), (count,), generator=random)
    center = centers[chosen] + torch.randn(count, 2, generator=random) * 6
    size = sizes[chosen] * torch.exp(torch.randn(count, 2, generator=random) * 0.1)
    boxes, scores = torch.cat((center - size / 2, center + size / 2), dim=1), torch.rand(count, generator=random)
    classes = torch.randint(case.classes, (count,), generator=random)
    return Boxes(boxes, scores, classes, torch.arange(case.images).repeat_interleave(case.boxes))


def torchvision_nms(inputs: Boxes, case: Case) -> Tensor:
    """The result of torchvision's nms or batched_nms for each image."""
    kept = []
    for first in range(0, len(inputs.boxes), case.boxes):
        rows = slice(first, first + case.boxes)
        boxes, scores = inputs.boxes[rows], inputs.scores[rows]
        if case.classes > 1:
            found = torchvision.ops.batched_nms(boxes, scores, inputs.classes[rows], case.iou_threshold)
        else:
            found = torchvision.ops.nms(boxes, scores, case.iou_threshold)
        kept.append((found if case.max_keep < 0 else found[: case.max_keep]) + first)
    return torch.cat(kept)


def row(case: Case, settings: Settings) -> Row:
    """A row of the table."""
    inputs = proposals(case).to(settings.device)
    ids = {
        "groups": inputs.classes if case.classes > 1 else None,
        "images": inputs.images if case.images > 1 else None,
    }
    runs = {
        name: partial(function, inputs.boxes, inputs.scores, case.iou_threshold, case.max_keep, **ids)
        for name, function in (("refdet", nms), ("plain", nms_plain))
    } | {"torchvision": partial(torchvision_nms, inputs, case)}
    results = [run() for run in runs.values()]
    times = settings.measure(runs)
    tensors = [inputs.boxes, inputs.scores, results[0], *(tensor for tensor in ids.values() if tensor is not None)]
    return (
        {**vars(case), "same": all(results[0].equal(result) for result in results)}
        | {f"{name}_ms": round(value, 4) for name, value in times.items()}
        | {"ratio": round(times["torchvision"] / times["refdet"], 1)}
        | settings.roof(sum(tensor.nbytes for tensor in tensors), times["refdet"])
    )


def rows(settings: Settings) -> list[Row]:
    """Rows of the table."""
    return [row(case, settings) for case in CASES]
