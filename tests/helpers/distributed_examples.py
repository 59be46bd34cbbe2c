"""Distributed training on a small dataset whose batches are padded differently if they are divided wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from process_groups import Ended, Launcher
from training_examples import TINY

from refdet.detector.checkpoint import read_tensors

SIZES = ((96, 64), (90, 60), (64, 80), (96, 70), (70, 70), (80, 60), (64, 96), (60, 90), (50, 96), (64, 90), (60, 80),
         (70, 96))  # fmt: skip
# make the numbers of anchors, proposals and RoIs differ from image to image
CHANGES = (*TINY, "train.batch_size=4", "train.steps=6", "input.min_sizes=[48,64]", "train.lr=0.005",
           "proposals.batch_size_per_image=1500", "proposals.nms_threshold=0.3",
           "head.batch_size_per_image=64")  # fmt: skip


def noise_images(root: Path) -> None:
    """Write landscape and portrait noise images with one to four objects each, and their instances JSON."""
    random = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    tree: dict[str, Any] = {"images": [], "annotations": []}
    tree["categories"] = [{"id": 3, "name": "a"}, {"id": 5, "name": "b"}]
    for image, (width, height) in enumerate(SIZES, start=1):
        pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{image}.png")
        tree["images"].append({"id": image, "file_name": f"{image}.png", "height": height, "width": width})
        for number in range(1 + image % 4):
            w, h = random.integers(12, 30, 2).tolist()
            x, y = random.integers(0, width - w), random.integers(0, height - h)
            x, y = int(x), int(y)
            tree["annotations"].append(
                {"id": 10 * image + number, "image_id": image, "category_id": (3, 5)[number % 2], "bbox": [x, y, w, h],
                 "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]], "area": w * h, "iscrowd": 0}
            )  # fmt: skip
    (root / "instances.json").write_text(json.dumps(tree))


def train(launcher: Launcher, root: Path, out: str, processes: int, *changes: str, **more: Any) -> Ended:
    """Train with `CHANGES` and more; see `Launcher.train`."""
    arguments = [part for change in (*CHANGES, *changes) for part in ("--set", change)]
    return launcher.train(root, out, processes, [*arguments, *more.pop("options", ())], **more)


def trained(launcher: Launcher, root: Path, out: str, processes: int, *changes: str, **more: Any) -> Ended:
    """Like `train`, asserting that it succeeds."""
    ended = train(launcher, root, out, processes, *changes, **more)
    assert ended.codes == [0] * len(ended.codes), "\n".join(ended.outputs)
    return ended


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_network(one: Path, other: Path, weights: float, loss: float) -> None:
    """Assert that weights and momentum differ by at most `weights`, and losses relatively by at most `loss`."""
    np.testing.assert_allclose(losses(one), losses(other), rtol=loss)
    states = [next((run / "state").glob("step-*")) for run in (one, other)]
    (actual, _), (expected, _) = map(read_tensors, states)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=weights, msg=lambda text, name=name: f"{name}: {text}"
        )
