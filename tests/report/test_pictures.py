"""The pictures of a report: missed objects are counted over all scenes, unreadable images once."""

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


def test_missed_objects_of_all_splits_that_share_an_image_are_counted(tmp_path: Path) -> None:
    Image.new("RGB", (100, 80)).save(tmp_path / "1.png")
    every = [scene(1, "refcoco/unc/val", 0.1, 0.3), scene(1, "refcocog/umd/val", 0.2), scene(1, "refcoco+/unc/val")]
    section = pictures_section(every, Pictures(tmp_path, every), 3)
    assert "missed objects in total: 3)" in section


def test_referents_of_several_stores_are_said_to_be_counted_together() -> None:
    referents = scene(1, "a", 0.1, 0.9).referents * 2
    assert "The 2 stores are counted together" in ceiling_section(referents, 2)
    assert "counted together" not in ceiling_section(referents, 1)


def test_an_unreadable_image_is_counted_once(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"no image")
    Image.new("RGB", (100, 80)).save(tmp_path / "2.png")
    every = [scene(1, "a", 0.1), scene(2, "a", 0.9), scene(3, "a", 0.2)]  # 3 has no file
    pictures = Pictures(tmp_path, every)
    assert "2 images could not be read, first: 3.png" in pictures_section(every, pictures, 9)


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_an_image_is_oriented_as_in_the_extraction(tmp_path: Path, exif: str) -> None:
    """Also next to a store that was extracted with the other orientation."""
    pixels = Image.new("RGB", (100, 80))
    pixels.paste("white", (0, 40, 100, 80))  # the lower half
    orientation = Image.Exif()
    orientation[274] = 3  # upside down
    pixels.save(tmp_path / "1.png", exif=orientation)
    other = scene(1, "other", exif="apply" if exif == "ignore" else "ignore")
    every = [other, scene(1, "a", exif=exif)]
    (drawn,) = Pictures(tmp_path, every).draw(every[1:])
    image = np.asarray(Image.open(io.BytesIO(drawn.jpeg)).convert("L"))
    assert (image[5, -5] > 128) == (exif == "apply") and (image[-5, -5] > 128) == (exif == "ignore")
