"""A folder like that of `make demo`, written in seconds, on which the examples in docstrings and docs are run."""

from __future__ import annotations

from pathlib import Path

import refdet
from refdet.data import shapes

TINY = ["train.steps=2", "model.width=8", "model.mask_channels=8", "model.rpn_channels=16", "model.fpn_channels=16",
        "model.fc_dim=32", "train.batch_size=2", "head.batch_size_per_image=8", "input.min_sizes=[96]",
        "train.warmup_steps=1", "model.zero_init_residual=true"]  # fmt: skip


def write_demo(root: Path) -> Path:
    """Write ``root/demo`` with data/, split.json, run/ and features/refcoco.h5; its detector is barely trained."""
    demo = root / "demo"
    data = shapes.write(demo / "data", seed=0, images=60)
    split = demo / "split.json"
    refdet.build_split(data / "annotations" / "instances_train2014.json", data / "refer", split)
    refdet.train("demo", split, data / "train2014", demo / "run", changes=TINY, device="cpu")
    (demo / "features").mkdir()
    images = refdet.ImageList.of_refer(data / "refer", "refcoco", "unc", splits=["val,testA,testB"])
    options = refdet.ExtractOptions(max_regions=20)
    store = demo / "features" / "refcoco.h5"
    refdet.extract_features(demo / "run", data / "train2014", store, images, options=options, device="cpu")
    return root
