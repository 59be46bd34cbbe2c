"""Benchmarks the store: writing, opening, random reads and verification, and their memory.

    python benchmarks/store.py [--json] [--images 100000] [--folder DIR]

Writes images with 100 regions and float32 pool5 + fc7 of ResNet-101, and reads them; also reads a store of many images
with 5 regions and fc7. Each step runs in a process of its own, so that its peak memory can be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from peak import peak_memory
from pycocotools import mask as coco_mask

from refdet import store
from refdet.store.verify import verify
from refdet.structures.regions import Regions

HEIGHT, WIDTH = 480, 640
Y, X = np.mgrid[:HEIGHT, :WIDTH]
MASK: bytes = coco_mask.encode(np.asfortranarray((X - 300) ** 2 + (Y - 200) ** 2 < 60**2, np.uint8))["counts"]
FEATURES = {"pool5": (1024,), "fc7": (2048,)}


def draw(images: int, regions: int, features: dict[str, tuple[int, ...]], distinct: int) -> Iterator[Regions]:
    """Yield images with regions; only ``distinct`` of them differ, so that drawing is fast."""
    random = np.random.default_rng(0)
    low = random.uniform(0, (WIDTH, HEIGHT), (distinct, regions, 2)).astype(np.float32)
    boxes = np.concatenate((low, (low + (WIDTH, HEIGHT)) / 2), axis=2).astype(np.float32)
    scores = random.random((distinct, regions), np.float32)
    values = {
        name: np.maximum(random.standard_normal((distinct, regions, *shape)).astype(np.float32), 0)
        for name, shape in features.items()
    }
    for i in range(images):
        k = i % distinct
        yield Regions(
            i,
            f"COCO_train2014_{i:012d}.jpg",
            HEIGHT,
            WIDTH,
            boxes[k],
            scores[k],
            np.ones(regions, np.int64),
            masks=(MASK,) * regions,
            features={name: array[k] for name, array in values.items()},
        )


def write(path: Path, images: int, regions: int, features: dict[str, tuple[int, ...]], compression: str) -> dict:
    """Write a store; returns times per image, of `put` alone and of everything, and memory."""
    rows = [
        store.ImageRow(i, f"COCO_train2014_{i:012d}.jpg", HEIGHT, WIDTH, "", regions, regions * len(MASK))
        for i in range(images)
    ]
    header = store.Header([{"id": 1, "name": "person"}], "{}", {}, {})
    columns = store.Columns(features, masks=True, compression=compression)
    before, start, put = _peak_mb(), time.perf_counter(), 0.0
    with store.create(path, header, columns, rows) as writer:
        for drawn in draw(images, regions, features, min(images, 50)):
            put_start = time.perf_counter()
            writer.put(drawn)
            put += time.perf_counter() - put_start
    whole = time.perf_counter() - start
    return {
        "put_ms_an_image": put / images * 1000,
        "whole_ms_an_image": whole / images * 1000,
        "file_mb": path.stat().st_size / 1e6,
        "peak_mb": _peak_mb(),
        "peak_before_mb": before,
    }


def read(path: Path, count: int) -> dict:
    """Open a store and read `count` images in random order, from the page cache."""
    before, opening = _peak_mb(), []
    for _ in range(3):
        start = time.perf_counter()
        with store.open(path) as reader:
            opening.append(time.perf_counter() - start)
    times_by_kind: dict[str, list[float]] = {"all": [], "boxes": []}
    with store.open(path) as reader:
        ids = np.random.default_rng(1).choice(reader.image_ids, count).tolist()
        for image_id in ids:  # into the page cache
            reader[image_id]
        for image_id in ids:
            start = time.perf_counter()
            reader[image_id]
            times_by_kind["all"].append(time.perf_counter() - start)
            start = time.perf_counter()
            reader.read(image_id, features=())
            times_by_kind["boxes"].append(time.perf_counter() - start)
    return {
        "open_ms": statistics.median(opening) * 1000,
        **{f"{name}_ms": statistics.median(values) * 1000 for name, values in times_by_kind.items()},
        "all_99th_ms": float(np.quantile(times_by_kind["all"], 0.99)) * 1000,
        "peak_mb": _peak_mb(),
        "peak_before_mb": before,
    }


def check(path: Path) -> dict:
    """Verify a store; returns the time per image and memory."""
    before, start = _peak_mb(), time.perf_counter()
    result = verify(path)
    if result.problems:
        raise SystemExit(f"{path}: {result.problems[0]}")
    seconds = time.perf_counter() - start
    return {"ms_an_image": seconds / result.images * 1000, "peak_mb": _peak_mb(), "peak_before_mb": before}


def plain(path: Path) -> dict:
    """Time per image to write the same bytes to a plain file, without HDF5 and checksums."""
    drawn = list(draw(50, 100, FEATURES, 50))
    start = time.perf_counter()
    with path.open("wb") as file:
        for i in range(1000):
            for values in drawn[i % 50].features.values():
                file.write(values.data)
        file.flush()
        os.fsync(file.fileno())
    return {"whole_ms_an_image": time.perf_counter() - start}


def _peak_mb() -> float:
    return peak_memory() / 1e6


def _alone(*call: object) -> dict:
    """Call a function, given with its arguments, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(*call).result()  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--images", type=int, default=100_000, help="images of the large store")
    parser.add_argument("--folder", type=Path, help="folder for temporary files of 5 GB")
    options = parser.parse_args()
    few = {"fc7": (2048,)}
    results: dict[str, dict] = {}

    def step(name: str, *call: object) -> None:
        results[name] = _alone(*call)
        if not options.json:
            print(f"{name:26}" + "".join(f"  {key} {value:.3f}" for key, value in results[name].items()), flush=True)

    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        path = Path(temporary) / "drawn.h5"
        step("write the bytes alone", plain, path)
        for compression, images in (("none", 1000), ("lzf", 200), ("gzip", 200)):
            step(f"write {images} x 100, {compression}", write, path, images, 100, FEATURES, compression)
            step(f"read it, {compression}", read, path, images // 2)
            step(f"verify it, {compression}", check, path)
        for images in (options.images // 10, options.images):
            step(f"write {images} x 5", write, path, images, 5, few, "none")
            step(f"read of {images}", read, path, 2000)
            step(f"verify {images}", check, path)
    if options.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
