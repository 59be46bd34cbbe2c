"""NMS problems with several images and groups, and their solutions by brute force."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """The arguments of one call of `refdet.ops.nms.nms`."""

    boxes: Tensor
    scores: Tensor
    threshold: float
    max_keep: int
    groups: Tensor | None
    images: Tensor | None

    def solve(self, function: Callable[..., Tensor], device: str = "cpu") -> list[int]:
        groups, images = (None if ids is None else ids.to(device) for ids in (self.groups, self.images))
        boxes, scores = self.boxes.to(device), self.scores.to(device)
        return function(boxes, scores, self.threshold, self.max_keep, groups=groups, images=images).tolist()

    def brute_force(self) -> list[int]:
        """The kept rows, found by comparing each box with all that were kept, in float32."""
        boxes, scores = self.boxes.numpy(), self.scores.numpy()
        zeros = np.zeros(len(boxes), np.int64)
        groups = zeros if self.groups is None else self.groups.numpy()
        images = zeros if self.images is None else self.images.numpy()
        zero = np.float32(0)
        all_kept: list[int] = []
        for image in sorted(set(images.tolist())):
            rows = np.flatnonzero(images == image).tolist()
            kept: list[int] = []
            for i in sorted(rows, key=lambda i: (np.inf if np.isnan(scores[i]) else -scores[i], i)):
                if 0 <= self.max_keep <= len(kept):
                    break
                others = [j for j in kept if groups[j] == groups[i]]
                (x1, y1, x2, y2), (ox1, oy1, ox2, oy2) = boxes[i], boxes[others].T
                with np.errstate(all="ignore"):
                    width = np.maximum(np.minimum(x2, ox2) - np.maximum(x1, ox1), zero)
                    height = np.maximum(np.minimum(y2, oy2) - np.maximum(y1, oy1), zero)
                    area = (x2 - x1) * (y2 - y1)
                    other_area = (ox2 - ox1) * (oy2 - oy1)
                    iou = width * height / (area + other_area - width * height)
                if not (iou > np.float32(self.threshold)).any():
                    kept.append(i)
            all_kept += kept
        return all_kept

    def brute_force_by_image(self, count: int) -> list[list[int]]:
        """Kept rows of each of the images 0 to `count - 1`, which is what `nms_padded` returns."""
        images = torch.zeros(len(self.boxes), dtype=torch.int64) if self.images is None else self.images
        rows: list[list[int]] = [[] for _ in range(count)]
        for index in self.brute_force():
            if 0 <= images[index] < count:
                rows[images[index]].append(index)
        return rows


IDS = ([0], [0, 1, 2], [5, -3, 40, 7], [-(2**63), 2**63 - 1, 0, -1], [2**40, 2**40 + 1])
ODD = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40, -0.0]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Overlapping boxes in a small area; some have no area, a negative side, or values such as NaN."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.sampled_from([0, 1, 2, 31, 33, 64, 65, 129, 260]))
    corner = random.uniform(0, draw(st.sampled_from([4, 40])), (count, 2))
    boxes = np.hstack((corner, corner + random.uniform(draw(st.sampled_from([0, -3])), 30, (count, 2))))
    if draw(st.booleans()):
        boxes = boxes.round()
    boxes *= draw(st.sampled_from([1, 1, 1e-21, 1e18]))  # areas that are denormal, or infinite
    scores = random.random(count)
    if draw(st.booleans()):
        scores = scores.round(1)
    if draw(st.booleans()):
        odd = random.random(boxes.shape) < 0.03
        boxes[odd] = random.choice(ODD, odd.sum())
        odd = random.random(count) < 0.2
        scores[odd] = random.choice(ODD, odd.sum())
    groups, images = (
        torch.from_numpy(random.choice(np.array(ids, np.int64), count)) if ids else None
        for ids in (draw(st.sampled_from([None, *IDS])), draw(st.sampled_from([None, *IDS])))
    )
    threshold = draw(st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]))
    max_keep = draw(st.sampled_from([-1, 0, 1, 20, 1000]))
    tensors = torch.from_numpy(boxes).float(), torch.from_numpy(scores).float()
    return Problem(*tensors, threshold, max_keep, groups, images)


def scene(count: int, groups: int, images: int, max_keep: int = -1) -> Problem:
    random = torch.Generator().manual_seed(count)
    center = torch.randint(0, 200, (count, 2), generator=random).float()
    size = torch.rand(count, 2, generator=random) * 60 + 5
    boxes = torch.cat((center - size / 2, center + size / 2), dim=1)
    scores = torch.rand(count, generator=random)
    ids = (torch.randint(0, number, (count,), generator=random) for number in (groups, images))
    return Problem(boxes, scores, 0.4, max_keep, *ids)
