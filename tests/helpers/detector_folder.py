"""A small detector, and noise images with annotated objects, for tests of commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from trained_models import NAMES, saved_model

from refdet.cli.main import main

SIZES = [(48, 64), (64, 48), (60, 90)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread, as workers of Ray do on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class DetectorFolder:
    """Run directory, images and instances file."""

    def __init__(self, root: Path, images: int) -> None:
        self.run, self.images, self.instances = saved_model(root / "run"), root / "images", root / "instances.json"
        self.images.mkdir()
        random = np.random.default_rng(0)
        entries, annotations = [], []
        for number in range(images):
            height, width = SIZES[number % len(SIZES)]
            pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.images / f"{number}.png")
            entries.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
            outline = [[5, 5, 35, 5, 35, 30, 5, 30]]
            annotations.append({"id": number, "image_id": number, "category_id": 3, "bbox": [5, 5, 30, 25],
                                "area": 750, "iscrowd": 0, "segmentation": outline})  # fmt: skip
        categories = [{"id": id_, "name": name} for id_, name in NAMES.items()]
        self.instances.write_text(
            json.dumps({"images": entries, "annotations": annotations, "categories": categories})
        )  # fmt: skip

    def command(self, name: str, *more: str) -> Result:
        """Run a command with the folder's files, on the CPU."""
        common = ["--checkpoint", self.run, "--images", self.images, "--instances", self.instances, "--device", "cpu"]
        return CliRunner().invoke(main, [name, *map(str, common), *more])

    def extract(self, out: Path, *more: str) -> Result:
        return self.command("extract-features", "--out", str(out), *more)

    def replace_images(self) -> None:
        """Replace every image by another one of the same name and size in pixels."""
        for path in self.images.iterdir():
            with Image.open(path) as before:
                Image.new("RGB", before.size, "#123456").save(path)
