"""Random valid regions for any columns of a store."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as coco_mask

from refdet import store
from refdet.structures.regions import Regions

HEADER = store.Header([{"id": 3, "name": "dög"}, {"id": 7, "name": "cat"}], "name: test", {}, {"dtype": "float32"})


def draw(image_id: int, n: int, columns: store.Columns, name: str = "a.jpg", error: str = "", seed: int = 0) -> Regions:
    """Valid regions of an image of 9 x 7 (height x width) pixels, with the columns of a store."""
    random = np.random.default_rng([seed, image_id])
    low = random.random((n, 2)) * (3, 4)
    has_maps = bool(columns.maps) and not error
    return Regions(
        image_id, name, 9, 7,
        boxes=np.concatenate((low, low + random.random((n, 2)) * 4), 1).astype(np.float32),
        scores=random.random(n, np.float32),
        category_ids=random.choice([3, 7], n).astype(np.int64),
        ann_ids=random.integers(1, 2**40, n) if columns.ann_ids else None,
        masks=tuple(coco_mask.encode(np.asfortranarray(random.random((9, 7)) < 0.5, np.uint8))["counts"]
                    for _ in range(n)) if columns.masks else None,
        features={key: random.standard_normal((n, *shape)).astype(columns.dtype)
                  for key, shape in columns.features.items()},
        error=error,
        maps={key: random.standard_normal((2, 3, 1 + image_id % 3)).astype(columns.dtype) for key in columns.maps}
        if has_maps else {},
        im_info=np.array([48, 16 * (1 + image_id % 3), 1.5], np.float32) if has_maps else None,
    )  # fmt: skip
