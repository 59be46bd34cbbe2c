"""The pictures of a report: missed objects are counted over all scenes, unreadable images once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from store_examples import record

from refdet.report.pictures import Pictures, pictures_section
from refdet.report.samples import Referent, Scene
from refdet.structures.regions import Regions


def scene(image_id: int, split: str, *ious: float) -> Scene:
    boxes = np.float32([[10, 10, 40, 40], [50, 20, 90, 70]])
    regions = Regions(image_id, f"{image_id}.png", 80, 100, boxes, np.float32([0.9, 0.2]), np.array([1, 1]))
    referred = tuple(Referent(1, "cat", ("it",), boxes[row], row, iou) for row, iou in enumerate(ious))
    return Scene(split, record(regions), referred, {1: "cat"}, lambda: regions)


def test_missed_objects_of_all_splits_that_share_an_image_are_counted(tmp_path: Path) -> None:
    Image.new("RGB", (100, 80)).save(tmp_path / "1.png")
    every = [scene(1, "refcoco/unc/val", 0.1, 0.3), scene(1, "refcocog/umd/val", 0.2), scene(1, "refcoco+/unc/val")]
    section = pictures_section(every, Pictures(tmp_path, "ignore", every), 3)
    assert "missed objects in total: 3)" in section


def test_an_unreadable_image_is_counted_once(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"no image")
    Image.new("RGB", (100, 80)).save(tmp_path / "2.png")
    every = [scene(1, "a", 0.1), scene(2, "a", 0.9), scene(3, "a", 0.2)]  # 3 has no file
    pictures = Pictures(tmp_path, "ignore", every)
    assert "2 images could not be read, first: 3.png" in pictures_section(every, pictures, 9)
