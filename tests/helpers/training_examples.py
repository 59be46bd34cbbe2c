"""Training in seconds: a tiny recipe, and a synthetic dataset whose annotations can be changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from refdet.config import recipe
from refdet.config.recipe import Recipe
from refdet.training.summary import Summary
from refdet.training.train import train

TINY = ["model.width=8", "model.mask_channels=8", "model.rpn_channels=16", "model.fpn_channels=16",
        "model.fc_dim=32", "train.batch_size=2", "train.workers=0", "head.batch_size_per_image=8",
        "train.warmup_steps=2",
        "train.log_every=1", "train.steps=2", "input.min_sizes=[64]"]  # fmt: skip

Change = Callable[[dict[str, Any]], object]


def tiny(*changes: str) -> Recipe:
    return recipe.load("demo").with_changes([*TINY, *changes])


def squares(root: Path, change: Change = lambda tree: None, images: int = 4) -> Path:
    """Draw images of two squares each into ``root/images``, and write their instances JSON, modified by `change`."""
    folder = root / "images"
    folder.mkdir(parents=True, exist_ok=True)
    tree: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "a"}, {"id": 5, "name": "b"}],
    }
    for image in range(1, images + 1):
        Image.new("RGB", (96, 64), (40 * image % 256, 90, 10)).save(folder / f"{image}.png")
        tree["images"].append({"id": image, "file_name": f"{image}.png", "height": 64, "width": 96})
        for number, (x, y) in enumerate(((8, 8), (50, 20))):
            corners = [x, y, x + 30, y, x + 30, y + 30, x, y + 30]
            tree["annotations"].append(
                {"id": 10 * image + number, "image_id": image, "category_id": (3, 5)[number], "bbox": [x, y, 30, 30],
                 "segmentation": [corners], "area": 900, "iscrowd": 0}
            )  # fmt: skip
    change(tree)
    (root / "instances.json").write_text(json.dumps(tree))
    return root / "instances.json"


def mark_crowds(*indices: int) -> Change:
    """A change for `squares` that sets iscrowd of the annotations at these indices."""

    def change(tree: dict[str, Any]) -> None:
        for index in indices:
            tree["annotations"][index]["iscrowd"] = 1

    return change


def run(root: Path, *changes: str, out: str = "run", device: str = "cpu", **more: Any) -> Summary:
    """Train on the `squares` under ``root`` into ``root/out``."""
    return train(tiny(*changes), root / "instances.json", root / "images", root / out, device=device, **more)


def steps_of(out: Path) -> list[int]:
    """The steps in metrics.jsonl."""
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
