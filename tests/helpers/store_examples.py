"""Random regions, and stores of regions, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from pycocotools import mask as coco_mask

from refdet import store
from refdet.data.coco import ImageRecord
from refdet.extraction import shards
from refdet.structures.regions import Regions

HEADER = store.Header([{"id": 3, "name": "dög"}], "name: test", {"source": "x.json"}, {"dtype": "float32"})
PLAN = shards.Plan({"dtype": "float32", "score_threshold": 0.05}, ("fc7", "pool5"), "float32", True, True, 4)


def make_regions(image_id: int, n: int, seed: int = 0) -> Regions:
    random = np.random.default_rng([seed, image_id])
    return Regions(
        image_id, f"ümlaut_{image_id}.jpg", 40 + image_id % 7, 50,
        boxes=random.random((n, 4), np.float32),
        scores=random.random(n, np.float32),
        category_ids=random.integers(1, 90, n),
        ann_ids=random.integers(1, 2**40, n),
        masks=tuple(random_mask(random, 40 + image_id % 7, 50) for _ in range(n)),
        features={"pool5": random.random((n, 4), np.float32), "fc7": random.random((n, 6), np.float32)},
    )  # fmt: skip


def random_mask(random: np.random.Generator, height: int, width: int) -> bytes:
    """Counts of a compressed RLE with a random number of runs."""
    cuts = np.sort(random.integers(0, height * width + 1, int(random.integers(0, 5))))
    runs = np.diff(cuts, prepend=0, append=height * width).tolist()
    counts: bytes = coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)["counts"]
    return counts


def write_regions(path: Path, images: list[Regions], header: store.Header, columns: store.Columns) -> Path:
    """Write a store of the regions of these images."""
    rows = [
        store.ImageRow(r.image_id, r.file_name, r.height, r.width, r.error, len(r), sum(map(len, r.masks or ())))
        for r in images
    ]
    with store.create(path, header, columns, rows) as writer:
        for regions in images:
            writer.put(regions)
    return path


def record(regions: Regions) -> ImageRecord:
    return ImageRecord(regions.image_id, regions.file_name, regions.height, regions.width)


def contents(path: Path) -> dict[str, Any]:
    """Everything in an HDF5 file by name, except for the attribute ``run``."""
    values: dict[str, Any] = {}

    def visit(name: str, node: h5py.Dataset | h5py.Group) -> None:
        values.update({f"{name}@{key}": value for key, value in node.attrs.items()})
        if isinstance(node, h5py.Dataset):
            values[name] = (node.dtype, node.shape, node[()].tolist())

    with h5py.File(path) as file:
        values.update({f"@{key}": value for key, value in file.attrs.items() if key != "run"})
        file.visititems(visit)
    return values
