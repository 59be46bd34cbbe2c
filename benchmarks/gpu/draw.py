"""Step: draw annotated JPEGs in forty sizes, and make random weights of a C4 and an FPN network for them."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from results import Step, run

from refdet.structures.coco_categories import coco_categories

FREQUENT = ((640, 480), (640, 427), (480, 640))  # sizes of half of COCO's images
SHARES = (0.25, 0.125, 0.125)  # of each frequent size


def sizes(count: int, small: bool) -> list[tuple[int, int]]:
    """Width and height of each image: forty sizes in random order, of which three are more frequent."""
    rare = [(640, height) for height in range(356, 621, 14)] + [(width, 640) for width in range(386, 625, 14)]
    assert len(rare) == 37 and not set(rare) & set(FREQUENT)
    random = np.random.default_rng(0)
    rest = (1 - sum(SHARES)) / len(rare)
    chosen = random.choice(len(FREQUENT) + len(rare), count, p=[*SHARES, *[rest] * len(rare)])
    every = [*FREQUENT, *rare]
    scale = 5 if small else 1
    return [(every[i][0] // scale, every[i][1] // scale) for i in chosen]


def draw(job: tuple[Path, int, tuple[int, int]]) -> list[dict[str, Any]]:
    """Write an image of smooth noise with 3 to 12 polygons; returns the annotations of the polygons."""
    folder, number, (width, height) = job
    random = np.random.default_rng(number)
    noise = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.DETAIL)
    pencil, found = ImageDraw.Draw(image), []
    angles = np.arange(20) * (2 * np.pi / 20)
    for index in range(int(random.integers(3, 13))):
        center, radius = random.uniform((0, 0), (width, height)), random.uniform(0.04, 0.3) * min(width, height)
        reach = radius * (1 + 0.2 * random.standard_normal(20))[:, None]
        points = center + np.stack((np.cos(angles), np.sin(angles)), 1) * reach
        points = np.clip(points, 0, (width, height)).round(2)
        low, high = points.min(0), points.max(0)
        if (high - low).min() < 4:
            continue
        pencil.polygon([tuple(p) for p in points.tolist()], fill=tuple(random.integers(0, 256, 3).tolist()))
        box = [*low.tolist(), *(high - low).tolist()]
        found.append(
            {
                "id": number * 100 + index,
                "image_id": number,
                "category_id": coco_categories()[random.integers(80)][0],
                "bbox": box,
                "segmentation": [points.ravel().tolist()],
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
        )
    image.save(folder / f"{number:06d}.jpg", quality=90)
    return found


def work(step: Step) -> None:
    count = 24 if step.small else 1024
    folder, ready = step.work / "images", step.work / "drawn.json"
    if ready.exists():
        step.put("reused", True)
        return
    folder.mkdir(exist_ok=True)
    of_each = sizes(count, step.small)
    jobs = [(folder, number, size) for number, size in enumerate(of_each, start=1)]
    if step.small:
        annotations = [found for job in jobs for found in draw(job)]
    else:
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            annotations = [found for of_image in pool.map(draw, jobs, chunksize=16) for found in of_image]
    records = [
        {"id": number, "file_name": f"{number:06d}.jpg", "width": width, "height": height}
        for number, (width, height) in enumerate(of_each, start=1)
    ]
    categories = [{"id": id_, "name": name} for id_, name in coco_categories()]
    tree = {"images": records, "annotations": annotations, "categories": categories}
    (step.work / "instances.json").write_text(json.dumps(tree))
    step.put("images", count)
    step.put("sizes", len(set(of_each)))
    step.put("objects", len(annotations))
    step.put("megabytes", sum(path.stat().st_size for path in folder.iterdir()) / 1e6)
    ready.write_text(json.dumps({"threshold": weights(step, folder)}))


def weights(step: Step, folder: Path) -> dict[str, float]:
    """Write run directories of both networks; returns the score threshold of each."""
    from drawn_weights import make_weights  # imports torch, which the processes that draw do without
    from work import NETWORKS, recipe_of, run_folder

    pixels = [np.array(Image.open(folder / f"{number:06d}.jpg").convert("RGB")) for number in (1, 2)]
    thresholds = {}
    for network in NETWORKS:
        shutil.rmtree(run_folder(step, network), ignore_errors=True)  # left by a run that was cut off
        thresholds[network] = make_weights(run_folder(step, network), recipe_of(step, network), pixels)
        step.put(f"threshold_{network}", thresholds[network])
    return thresholds


if __name__ == "__main__":
    run(work, "env")
