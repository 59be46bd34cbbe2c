"""The pictures of a report: missed objects are counted over all scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from store_examples import record

from refdet.report.pictures import Pictures, pictures_section
from refdet.report.samples import Referred, Scene
from refdet.structures.regions import Regions


def scene(image_id: int, split: str, *ious: float) -> Scene:
    boxes = np.float32([[10, 10, 40, 40], [50, 20, 90, 70]])
    regions = Regions(image_id, f"{image_id}.png", 80, 100, boxes, np.float32([0.9, 0.2]), np.array([1, 1]))
    referred = tuple(Referred(1, "cat", ("it",), boxes[row], row, iou) for row, iou in enumerate(ious))
    return Scene(split, record(regions), referred, {1: "cat"}, lambda: regions)


def test_missed_objects_of_all_splits_that_share_an_image_are_counted(tmp_path: Path) -> None:
    Image.new("RGB", (100, 80)).save(tmp_path / "1.png")
    every = [scene(1, "refcoco/unc/val", 0.1, 0.3), scene(1, "refcocog/umd/val", 0.2), scene(1, "refcoco+/unc/val")]
    section = pictures_section(every, Pictures(tmp_path, "ignore", every), 3)
    assert "missed objects in total: 3)" in section
