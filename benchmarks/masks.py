"""Times refdet's way between masks of boxes and RLE of images beside torchvision's and pycocotools'.

    python benchmarks/masks.py [--json] [--repeat 10]

Objects are outlines of 24 corners about random centres in an image of 480x640, a third of it large at most. On the
CPU; times are medians of rounds in which all take turns.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from pycocotools import mask as coco_mask
from timing import measure
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import roi_align

from refdet.data.segmentations import to_rle
from refdet.ops._library import DEVICES
from refdet.ops.masks import encode_masks_plain, mask_coverage, mask_coverage_plain, masks_to_rle

HEIGHT, WIDTH = 480, 640
Outline = list[list[float]]


def outlines(count: int, random: np.random.Generator) -> list[Outline]:
    """Polygons of one part each, wobbly ellipses of 16 to 200 pixels."""
    angles = np.arange(24) * (2 * np.pi / 24)
    found = []
    for _ in range(count):
        centre, radii = random.uniform((0, 0), (WIDTH, HEIGHT)), random.uniform(8, 100, 2)
        wobble = 1 + 0.2 * random.standard_normal(24)
        points = centre + np.stack((np.cos(angles), np.sin(angles)), 1) * radii * wobble[:, None]
        found.append([np.clip(points, 0, (WIDTH, HEIGHT)).round(2).ravel().tolist()])
    return found


def boxes_of(polygons: list[Outline], random: np.random.Generator) -> Tensor:
    """A box about each, a little off as those of a detector are, (N, 4)."""
    points = [np.reshape(polygon[0], (-1, 2)) for polygon in polygons]
    tight = np.array([np.concatenate((p.min(0), p.max(0))) for p in points])
    sides = np.tile(tight[:, 2:] - tight[:, :2], 2) + 1
    return torch.from_numpy(tight + sides * random.uniform(-0.1, 0.1, tight.shape) + [-1, -1, 1, 1]).float()


def to_rle_case(size: int, count: int, noise: bool, repeat: int) -> dict:
    random = np.random.default_rng(0)
    polygons = outlines(count, random)
    boxes = boxes_of(polygons, random)
    rles = [to_rle(polygon, HEIGHT, WIDTH) for polygon in polygons]
    cells = mask_coverage(rles, torch.arange(count), boxes, size)
    if noise:
        cells = torch.from_numpy(random.random(cells.shape)).float()

    def theirs() -> list[dict]:
        full = paste_masks_in_image(cells[:, None], boxes, (HEIGHT, WIDTH))[:, 0] >= 0.5
        return [coco_mask.encode(np.asfortranarray(mask)) for mask in full.numpy().astype(np.uint8)]

    ours = masks_to_rle(cells, boxes, HEIGHT, WIDTH)
    plain = encode_masks_plain(cells, boxes, HEIGHT, WIDTH)
    same = b"".join(ours) == plain.counts.numpy().tobytes()
    named = [{"size": [HEIGHT, WIDTH], "counts": counts} for counts in ours]
    alike = [coco_mask.iou([a], [b], [0])[0, 0] for a, b in zip(named, theirs(), strict=True)]
    times = measure(
        {
            "refdet": lambda: masks_to_rle(cells, boxes, HEIGHT, WIDTH),
            "plain": lambda: encode_masks_plain(cells, boxes, HEIGHT, WIDTH),
            "libraries": theirs,
        },
        repeat,
        "cpu",
    )
    name = f"{count} {'noisy ' if noise else ''}masks {size}x{size} to RLE"
    return _row(name, same, float(np.mean(alike)), times)


def targets_case(size: int, count: int, objects: int, polygons_given: bool, repeat: int) -> dict:
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
    row = _row(name, same, alike, measure(runs, repeat, "cpu"))
    if polygons_given:
        row["rasterising_ms"] = round(measure({"rles": rles}, repeat, "cpu")["rles"], 2)
    return row


def _row(name: str, same: bool, alike: float, times: dict[str, float]) -> dict:
    return (
        {"what": name, "same_as_plain": same, "like_libraries": round(alike, 4)}
        | {f"{key}_ms": round(value, 3) for key, value in times.items()}
        | {"ratio": round(times["libraries"] / times["refdet"], 1)}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--repeat", type=int, default=10)
    options = parser.parse_args()
    results = [to_rle_case(size, 100, noise, options.repeat) for size, noise in ((14, False), (28, False), (28, True))]
    for objects in (64, 8):
        results += [targets_case(28, 64, objects, given, options.repeat) for given in (True, False)]
    if options.json:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "kernels": sorted(DEVICES)}
        print(json.dumps({**machine, "cases": results}))
        return
    print(f"masks on the CPU, {torch.get_num_threads()} threads; milliseconds, and how far the answers are alike")
    width = max(len(row["what"]) for row in results)
    print("  ".join((f"{'':{width}}", *(f"{name:>14}" for name in list(results[0])[1:]))))
    for row in results:
        print("  ".join((f"{row['what']:{width}}", *(f"{value!s:>14}" for value in list(row.values())[1:]))))


if __name__ == "__main__":
    main()
