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
from refdet import store
from refdet.errors import InputError
from refdet.extraction.extract import extract_features
from refdet.extraction.image_list import ImageList
from refdet.extraction.options import ExtractOptions
from refdet.store.schema import attributes_checksum
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


def extract(
    folder: Path, out: Path, names: dict[int, str], regions: str, features: tuple[str, ...], count: int = 1, **more: Any
) -> Path:
    """Extract features of a box of the last of these categories, as an annotation, COCO result or in a store.

    The box is in each of ``count`` images.
    """
    ids = range(1, count + 1)
    entries = [{"image_id": i, "category_id": list(names)[-1], "bbox": BOX, "score": 0.5} for i in ids]
    instances, boxes = out.with_suffix(".json"), out.with_suffix(".boxes.json")
    instances.write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.png", "height": 80, "width": 96} for i in ids],
        "annotations": [{**entry, "id": 4 + entry["image_id"], "area": 2000.0, "iscrowd": 0} for entry in entries],
        "categories": [{"id": category, "name": name} for category, name in names.items()],
    }))  # fmt: skip
    boxes.write_text(json.dumps(entries))
    given: dict[str, Any] = {"options": ExtractOptions(features=features, regions="annotations")}
    images = ImageList.of_instances(instances)
    if regions == "store":
        boxes = out.with_suffix(".boxes.h5")
        given["options"] = ExtractOptions(features=("fc7",), regions="annotations")
        extract_features(folder / "run", folder, boxes, images, device="cpu", **given)
    if regions != "annotations":
        given = {"options": ExtractOptions(features=features), "boxes": boxes}
    extract_features(folder / "run", folder, out, images, device="cpu", **given, **more)
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


def make_older(path: Path, names: dict[int, str]) -> None:
    """Give a store the classes that older versions gave to those of given regions."""
    with h5py.File(path, "r+") as file:
        file.attrs["classes"] = json.dumps([{"id": id_, "name": name} for id_, name in names.items()])
        file["checksums/crc32"].attrs["attributes"] = attributes_checksum(file.attrs)


@pytest.mark.parametrize("regions", ["annotations", "boxes"])
@pytest.mark.parametrize("names", [LISTS["another order"], LISTS["others"]])
def test_a_store_of_an_older_version_is_repaired_with_its_classes(
    folder: Path, tmp_path: Path, names: dict[int, str], regions: str
) -> None:
    data = (folder / "1.png").read_bytes()
    for number, contents in ((1, data), (2, b"broken")):
        (tmp_path / f"{number}.png").write_bytes(contents)
    (tmp_path / "run").symlink_to(folder / "run")
    begun, done = tmp_path / "begun.h5", tmp_path / "done.h5"
    given = (names, regions, ("fc7",), 2)
    extract(tmp_path, begun, *given, part="2/2")  # the only shard is of the other part
    plan = json.loads((tmp_path / "begun.h5.parts/plan.json").read_text())
    plan["header"]["classes"] = [{"id": id_, "name": name} for id_, name in names.items()]
    (tmp_path / "begun.h5.parts/plan.json").write_text(json.dumps(plan))
    make_older(extract(tmp_path, done, *given), names)
    (tmp_path / "2.png").write_bytes(data)
    for out in (begun, done):
        extract(tmp_path, out, *given, resume=True)
        with store.open(out) as found:
            assert found.names == names and list(found.names) == list(names)
            assert (found.regions, found.errors) == (2, {})
        assert verify(out).problems == []


def test_a_store_of_an_older_version_with_class_prob_is_refused(folder: Path, tmp_path: Path) -> None:
    names = LISTS["another order"]
    path = extract(folder, tmp_path / "a.h5", names, "annotations", ("class_prob",))
    make_older(path, names)
    with pytest.raises(InputError, match="other classes of the checkpoint or of the given regions; choose another"):
        extract(folder, path, names, "annotations", ("class_prob",), resume=True)
