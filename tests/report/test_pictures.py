"""The pictures of a report: counts of missed objects and unreadable images, and EXIF orientation."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from store_examples import record

from refdet.report.pictures import Pictures, pictures_section
from refdet.report.samples import Referent, Scene
from refdet.report.sections import ceiling_section
from refdet.structures.regions import Regions


def scene(image_id: int, split: str, *ious: float, exif: str = "ignore") -> Scene:
    boxes = np.float32([[10, 10, 40, 40], [50, 20, 90, 70]])
    regions = Regions(image_id, f"{image_id}.png", 80, 100, boxes, np.float32([0.9, 0.2]), np.array([1, 1]))
    referred = tuple(Referent(1, "cat", ("it",), boxes[row], row, iou) for row, iou in enumerate(ious))
    return Scene(split, record(regions), referred, {1: "cat"}, lambda: regions, exif)


def test_missed_objects_are_counted_in_all_splits_that_share_an_image(tmp_path: Path) -> None:
    Image.new("RGB", (100, 80)).save(tmp_path / "1.png")
    scenes = [scene(1, "refcoco/unc/val", 0.1, 0.3), scene(1, "refcocog/umd/val", 0.2), scene(1, "refcoco+/unc/val")]
    section = pictures_section(scenes, Pictures(tmp_path, scenes), 3)
    assert "missed objects in total: 3)" in section


def test_the_recall_ceiling_says_that_several_stores_are_counted_together() -> None:
    referents = scene(1, "a", 0.1, 0.9).referents * 2
    assert "The 2 stores are counted together" in ceiling_section(referents, 2)
    assert "counted together" not in ceiling_section(referents, 1)


def test_unreadable_and_missing_images_are_counted_once(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"no image")
    Image.new("RGB", (100, 80)).save(tmp_path / "2.png")
    scenes = [scene(1, "a", 0.1), scene(2, "a", 0.9), scene(3, "a", 0.2)]  # 3 has no file
    pictures = Pictures(tmp_path, scenes)
    assert "2 images could not be read, first: 3.png" in pictures_section(scenes, pictures, 9)


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_an_image_is_oriented_as_during_extraction(tmp_path: Path, exif: str) -> None:
    """Another store, which was extracted with the other orientation, does not change that."""
    pixels = Image.new("RGB", (100, 80))
    pixels.paste("white", (0, 40, 100, 80))  # the lower half is white
    orientation = Image.Exif()
    orientation[274] = 3  # rotated by 180 degrees
    pixels.save(tmp_path / "1.png", exif=orientation)
    other = scene(1, "other", exif="apply" if exif == "ignore" else "ignore")
    scenes = [other, scene(1, "a", exif=exif)]
    (drawn,) = Pictures(tmp_path, scenes).draw(scenes[1:])
    image = np.asarray(Image.open(io.BytesIO(drawn.jpeg)).convert("L"))
    assert (image[5, -5] > 128) == (exif == "apply") and (image[-5, -5] > 128) == (exif == "ignore")
