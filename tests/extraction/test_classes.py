"""The classes of stores of given regions: those of the detector first, so that they name the columns of class_prob."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image
from trained_models import NAMES, saved_model

import refdet
from refdet.errors import InputError
from refdet.extraction.extract import extract_features
from refdet.extraction.image_list import ImageList
from refdet.extraction.options import ExtractOptions
from refdet.store.verify import verify

pytestmark = pytest.mark.slow
BOX = [10.0, 10.0, 50.0, 40.0]  # xywh in an image of 96x80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector of `NAMES` and an image of noise."""
    folder = tmp_path_factory.mktemp("classes")
    saved_model(folder / "run")
    pixels = np.random.default_rng(0).integers(0, 255, (80, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "1.png")
    return folder


def extract(folder: Path, out: Path, names: dict[int, str], regions: str, features: tuple[str, ...]) -> Path:
    """Extract features of a box of the last of these categories, as an annotation, COCO result or in a store."""
    entry = {"image_id": 1, "category_id": list(names)[-1], "bbox": BOX, "score": 0.5}
    instances, boxes = out.with_suffix(".json"), out.with_suffix(".boxes.json")
    instances.write_text(json.dumps({
        "images": [{"id": 1, "file_name": "1.png", "height": 80, "width": 96}],
        "annotations": [{**entry, "id": 5, "area": 2000.0, "iscrowd": 0}],
        "categories": [{"id": category, "name": name} for category, name in names.items()],
    }))  # fmt: skip
    boxes.write_text(json.dumps([entry]))
    given: dict[str, Any] = {"options": ExtractOptions(features=features, regions="annotations")}
    images = ImageList.of_instances(instances)
    if regions == "store":
        boxes = out.with_suffix(".boxes.h5")
        given["options"] = ExtractOptions(features=("fc7",), regions="annotations")
        extract_features(folder / "run", folder, boxes, images, device="cpu", **given)
    if regions != "annotations":
        given = {"options": ExtractOptions(features=features), "boxes": boxes}
    extract_features(folder / "run", folder, out, images, device="cpu", **given)
    return out


LISTS = {
    "the same": NAMES,
    "another order": dict(reversed(NAMES.items())),
    "fewer": {44: "bottle", 7: "train"},
    "others": {99: "kite", 44: "bottle", 2: "bicycle"},
}


@pytest.mark.parametrize("regions", ["annotations", "boxes"])
@pytest.mark.parametrize("names", LISTS.values(), ids=LISTS)
def test_classes_name_the_columns_of_class_prob(
    folder: Path, tmp_path: Path, names: dict[int, str], regions: str
) -> None:
    path = extract(folder, tmp_path / "a.h5", names, regions, ("class_prob",))
    corners = [BOX[0], BOX[1], BOX[0] + BOX[2], BOX[1] + BOX[3]]
    detector = refdet.load_detector(folder / "run", device="cpu")
    expected = detector.describe(folder / "1.png", [corners], features=["class_prob"])
    with h5py.File(path) as file:
        classes = {entry["id"]: entry["name"] for entry in json.loads(file.attrs["classes"])}
        np.testing.assert_array_equal(file["features/class_prob"][:], expected.features["class_prob"])
        assert file["regions/category_id"][:].tolist() == [list(names)[-1]]
    assert list(classes.items())[: len(NAMES)] == list(NAMES.items())
    assert list(classes.items())[len(NAMES) :] == [item for item in names.items() if item[0] not in NAMES]
    assert verify(path).problems == []


@pytest.mark.parametrize(
    ("regions", "named_in"), [("annotations", "a.json"), ("boxes", "a.json"), ("store", "a.boxes.h5")]
)
def test_ids_that_mean_other_categories_have_no_class_prob(
    folder: Path, tmp_path: Path, regions: str, named_in: str
) -> None:
    names = {3: "truck", 1: "person"}
    file = re.escape(str(tmp_path / named_in))
    with pytest.raises(
        InputError, match=rf"category 3 is 'car' in the detector, but 'truck' in {file}, so .*omit class_prob"
    ):
        extract(folder, tmp_path / "a.h5", names, regions, ("fc7", "class_prob"))
    assert not (tmp_path / "a.h5").exists()
    with h5py.File(extract(folder, tmp_path / "b.h5", names, regions, ("fc7",))) as file:
        assert {entry["id"]: entry["name"] for entry in json.loads(file.attrs["classes"])} == names
