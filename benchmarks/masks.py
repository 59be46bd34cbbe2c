"""Benchmarks refdet's conversions between box masks and image RLE against torchvision and pycocotools.

Objects are polygons of 24 corners around random centers in a 480x640 image, at most a third of its size. Times are
medians of rounds in which all implementations take turns.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from pycocotools import mask as coco_mask
from timing import Row, Settings
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import roi_align

from refdet.data.segmentations import to_rle
from refdet.ops.masks import mask_coverage, mask_coverage_plain, masks_to_rle, masks_to_rle_plain

HEIGHT, WIDTH = 480, 640
Outline = list[list[float]]


def outlines(count: int, random: np.random.Generator) -> list[Outline]:
    """Irregular ellipses with radii of 8 to 100 pixels, as one polygon each."""
    angles = np.arange(24) * (2 * np.pi / 24)
    found = []
    for _ in range(count):
        center, radii = random.uniform((0, 0), (WIDTH, HEIGHT)), random.uniform(8, 100, 2)
        wobble = 1 + 0.2 * random.standard_normal(24)
        points = center + np.stack((np.cos(angles), np.sin(angles)), 1) * radii * wobble[:, None]
        found.append([np.clip(points, 0, (WIDTH, HEIGHT)).round(2).ravel().tolist()])
    return found


def boxes_of(polygons: list[Outline], random: np.random.Generator) -> Tensor:
    """A slightly inaccurate box around each polygon, as from a detector, (N, 4)."""
    points = [np.reshape(polygon[0], (-1, 2)) for polygon in polygons]
    tight = np.array([np.concatenate((p.min(0), p.max(0))) for p in points])
    sides = np.tile(tight[:, 2:] - tight[:, :2], 2) + 1
    return torch.from_numpy(tight + sides * random.uniform(-0.1, 0.1, tight.shape) + [-1, -1, 1, 1]).float()


def to_rle_case(size: int, count: int, noise: bool, settings: Settings) -> Row:
    """Row of pasting box masks (count, size, size) into the image as RLE: of real outlines, or of noise."""
    random = np.random.default_rng(0)
    polygons = outlines(count, random)
    boxes = boxes_of(polygons, random)
    rles = [to_rle(polygon, HEIGHT, WIDTH) for polygon in polygons]
    cells = mask_coverage(rles, torch.arange(count), boxes, size)
    if noise:
        cells = torch.from_numpy(random.random(cells.shape)).float()
    on_host = cells, boxes
    cells, boxes = cells.to(settings.device), boxes.to(settings.device)

    def theirs() -> list[dict]:
        full = paste_masks_in_image(cells[:, None], boxes, (HEIGHT, WIDTH))[:, 0] >= 0.5
        return [coco_mask.encode(np.asfortranarray(mask)) for mask in full.cpu().numpy().astype(np.uint8)]

    ours = masks_to_rle(cells, boxes, HEIGHT, WIDTH)
    same = ours == masks_to_rle_plain(*on_host, HEIGHT, WIDTH)
    rles_of_ours = [{"size": [HEIGHT, WIDTH], "counts": counts} for counts in ours]
    ious = [coco_mask.iou([a], [b], [0])[0, 0] for a, b in zip(rles_of_ours, theirs(), strict=True)]
    times = settings.measure(
        {
            "refdet": lambda: masks_to_rle(cells, boxes, HEIGHT, WIDTH),
            "plain": lambda: masks_to_rle_plain(*on_host, HEIGHT, WIDTH),
            "libraries": theirs,
        }
    )
    name = f"{count} {'noisy ' if noise else ''}masks {size}x{size} to RLE"
    return _row(name, same, float(np.mean(ious)), times)


def targets_case(size: int, count: int, objects: int, polygons_given: bool, settings: Settings) -> Row:
    """Row of mask targets (count, size, size) of boxes around objects that are given as polygons or as RLE."""
    random = np.random.default_rng(1)
    polygons = outlines(objects, random)
    matched = torch.arange(count) % objects
    boxes = boxes_of([polygons[i] for i in matched.tolist()], random)
    known = [to_rle(polygon, HEIGHT, WIDTH) for polygon in polygons]

    def rles() -> list[dict]:
        return [to_rle(polygon, HEIGHT, WIDTH) for polygon in polygons] if polygons_given else known

    def theirs() -> Tensor:
        masks = torch.from_numpy(np.stack([coco_mask.decode(rle) for rle in rles()]))
        rois = torch.cat((matched[:, None].float(), boxes), dim=1)
        return roi_align(masks[:, None].float(), rois, size, 1.0, aligned=True)[:, 0] >= 0.5

    runs = {
        "refdet": lambda: mask_coverage(rles(), matched, boxes, size) >= 0.5,
        "plain": lambda: mask_coverage_plain(rles(), matched, boxes.double(), size) >= 0.5,
        "libraries": theirs,
    }
    same = torch.equal(runs["refdet"](), runs["plain"]())
    alike = (runs["refdet"]() == theirs()).float().mean().item()
    name = f"{count} targets {size}x{size}, {objects} objects, from {'polygons' if polygons_given else 'RLE'}"
    row = _row(name, same, alike, settings.measure(runs))
    row["drawing_ms"] = round(settings.measure({"rles": rles})["rles"], 2) if polygons_given else 0.0
    return row


def _row(name: str, same: bool, alike: float, times: dict[str, float]) -> Row:
    """A row of the table; `alike` is the agreement with the libraries' result, 1 for equality."""
    return (
        {"what": name, "same_as_plain": same, "like_libraries": round(alike, 4)}
        | {f"{key}_ms": round(value, 3) for key, value in times.items()}
        | {"ratio": round(times["libraries"] / times["refdet"], 1)}
    )


def rows(settings: Settings) -> list[Row]:
    """Rows of the table. ``drawing_ms`` is pycocotools' time to rasterize polygons, included on both sides.

    Mask targets are computed on the CPU.
    """
    found = [to_rle_case(size, 100, noise, settings) for size, noise in ((14, False), (28, False), (28, True))]
    found = [row | {"drawing_ms": 0.0} for row in found]
    for objects in (64, 8):
        found += [targets_case(28, 64, objects, given, replace(settings, device="cpu")) for given in (True, False)]
    return found
