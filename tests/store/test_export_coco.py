"""Exports to COCO's files, read by pycocotools and refdet, and to FiftyOne."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result
from export_examples import ANNOTATIONS, BROKEN, CLASSES, DETECTIONS, HEIGHT, WIDTH, write_store
from PIL import ExifTags, Image
from pycocotools.coco import COCO

from refdet.cli.main import main
from refdet.data.coco import CocoIndex
from refdet.data.image_decoder import apply_orientation, orient_points
from refdet.errors import InputError, RuntimeFailure
from refdet.store.export.coco import export_coco
from refdet.store.export.fiftyone import crop_mask, export_fiftyone, relative_boxes
from refdet.structures.regions import NO_CATEGORY, Regions


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, args)])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("coco")
    store = write_store(work / "d.h5", DETECTIONS)
    result = run("--store", store, "--format", "coco", "--out", work / "out", "--score-threshold", 0.85)
    assert result.exit_code == 0, result.stderr
    assert "note: instances.json has 3 of 5 regions: those with a score of 0.85 or more" in result.stderr
    assert "leaves out 1 image that could not be used" in result.stderr
    return work / "out"


def test_pycocotools_reads_instances_and_results(out: Path) -> None:
    truth = COCO(str(out / "instances.json"))
    results = truth.loadRes(str(out / "results.json"))
    expected = [row for regions in DETECTIONS for row in regions.to_coco()]
    assert len(results.anns) == len(expected) == 5
    for annotation, result in zip(results.anns.values(), expected, strict=True):
        assert {name: annotation[name] for name in result} == result
    assert sorted(truth.imgs) == [3, 4]  # 5 could not be read
    assert truth.loadCats([1, 2]) == sorted(CLASSES, key=lambda category: category["id"])  # type: ignore[arg-type, return-value]
    assert len(truth.anns) == 3  # scores of 0.85 or more
    for annotation in truth.anns.values():
        row = annotation["id"] - 1
        assert {name: annotation[name] for name in expected[row]} == expected[row]
        assert annotation["area"] == truth.annToMask(annotation).sum() > 0


def test_refdet_reads_the_annotations(out: Path) -> None:
    index = CocoIndex.load(out / "instances.json")
    boxes = np.concatenate([regions.boxes[regions.scores >= 0.85] for regions in DETECTIONS])
    found = list(itertools.chain.from_iterable(index.annotations.values()))
    np.testing.assert_allclose([a.box for a in found], boxes, atol=1e-5)
    assert not any(annotation.iscrowd for annotation in found)


def test_a_score_of_0_7_in_float32_reaches_the_threshold_0_7(tmp_path: Path) -> None:
    """Although 0.7 as float32 is less than 0.7 as a Python float."""
    regions = DETECTIONS[1]
    assert regions.scores[0] == np.float32(0.7) and float(regions.scores[0]) < 0.7
    assert regions.score_at_least(0.7).all() and not regions.score_at_least(0.7001).any()
    export_coco(write_store(tmp_path / "a.h5", [regions]), tmp_path / "out", score_threshold=0.7)
    assert len(json.loads((tmp_path / "out" / "instances.json").read_text())["annotations"]) == 1


def test_provenance_json_lists_files_and_options(out: Path) -> None:
    record = json.loads((out / "provenance.json").read_text())
    assert record["export"]["files"] == ["instances.json", "results.json"]
    assert record["export"]["empty"] == {"5": "cannot be read"} and record["options"] == {"score_threshold": 0.85}
    assert sorted(path.name for path in out.iterdir()) == ["instances.json", "provenance.json", "results.json"]


def test_a_store_without_masks_or_regions_is_exported(tmp_path: Path) -> None:
    without_masks = [
        Regions(r.image_id, r.file_name, r.height, r.width, r.boxes, r.scores, r.category_ids) for r in ANNOTATIONS
    ]
    done = export_coco(write_store(tmp_path / "a.h5", without_masks), tmp_path / "out")
    assert any("no masks" in line for line in done.notes)
    annotations = json.loads((tmp_path / "out" / "instances.json").read_text())["annotations"]
    assert len(annotations) == 4 and "segmentation" not in annotations[0]
    assert annotations[0]["area"] == pytest.approx(annotations[0]["bbox"][2] * annotations[0]["bbox"][3])
    done = export_coco(write_store(tmp_path / "b.h5", [BROKEN]), tmp_path / "none")
    assert (done.images, done.regions) == (1, 0)
    assert json.loads((tmp_path / "none" / "results.json").read_text()) == []
    assert json.loads((tmp_path / "none" / "instances.json").read_text())["annotations"] == []


def test_boxes_without_a_category_are_refused(tmp_path: Path) -> None:
    regions = replace(DETECTIONS[1], category_ids=np.array([NO_CATEGORY]), masks=None, features={})
    with pytest.raises(InputError, match="category -1 is not among"):
        export_coco(write_store(tmp_path / "d.h5", [regions]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--format", "coco", "--images", "."), "--images is not for --format coco"),
        (("--format", "npz", "--score-threshold", "0.1"), "--score-threshold is not for --format npz"),
        (("--format", "fiftyone"), "--format fiftyone needs --images"),
        (("--format", "fiftyone", "--images", "no"), "--images no: no such file or folder"),
    ],
)
def test_invalid_options_are_reported_in_one_line(tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    result = run("--store", write_store(tmp_path / "d.h5", DETECTIONS), "--out", tmp_path / "out", *args)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_fiftyone_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    store = write_store(tmp_path / "d.h5", DETECTIONS)
    result = run("--store", store, "--format", "fiftyone", "--images", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "--format fiftyone needs the package fiftyone: pip install fiftyone" in result.stderr


def test_boxes_and_masks_are_converted_for_fiftyone() -> None:
    regions = DETECTIONS[0]
    boxes = relative_boxes(regions)
    assert len(boxes) == len(regions)
    for row, (x, y, width, height) in enumerate(boxes):
        x1, y1, x2, y2 = regions.boxes[row]
        assert (x * WIDTH, y * HEIGHT) == pytest.approx((x1, y1), abs=1e-5)
        assert (width * WIDTH, height * HEIGHT) == pytest.approx((x2 - x1, y2 - y1), abs=1e-5)
        mask = crop_mask(regions, row)
        assert mask is not None and mask.any() and mask.dtype == bool
        assert mask.shape == (np.ceil(y2) - np.floor(y1), np.ceil(x2) - np.floor(x1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_points_and_pixels_are_oriented_alike(orientation: int) -> None:
    pixels = np.zeros((4, 5), np.uint8)
    pixels[1, 3] = 1
    turned = apply_orientation(pixels, orientation)
    (y, x), (height, width) = np.argwhere(turned)[0], turned.shape
    (point,) = orient_points(np.array([[3.5 / 5, 1.5 / 4]]), orientation)
    assert point * (width, height) == pytest.approx((x + 0.5, y + 0.5))


class FakeFiftyOne:
    """The parts of FiftyOne that an export uses, without its database.

    Attributes:
        samples: samples of the last dataset.
        calls: "created" and "deleted" for each dataset.
    """

    Detection = Detections = SimpleNamespace
    types = SimpleNamespace(FiftyOneDataset="FiftyOneDataset")

    def __init__(self) -> None:
        self.samples: list[SimpleNamespace] = []
        self.calls: list[str] = []

    def Sample(self, path: str, **fields: object) -> SimpleNamespace:
        return SimpleNamespace(path=path, **fields)

    def Dataset(self, name: str) -> FakeFiftyOne:
        self.calls.append("created")
        self.samples.clear()
        return self

    def add_samples(self, samples: Iterable[SimpleNamespace], num_samples: int) -> None:
        self.samples.extend(samples)
        assert num_samples == len(self.samples)

    def export(self, export_dir: str, dataset_type: str, export_media: bool) -> None:
        assert (dataset_type, export_media) == ("FiftyOneDataset", False)
        (Path(export_dir) / "samples.json").write_text("{}")

    def delete(self) -> None:
        self.calls.append("deleted")


@pytest.fixture
def fiftyone(monkeypatch: pytest.MonkeyPatch) -> FakeFiftyOne:
    library = FakeFiftyOne()
    monkeypatch.setitem(sys.modules, "fiftyone", library)
    return library


def test_fiftyone_gets_a_sample_for_each_image(tmp_path: Path, fiftyone: FakeFiftyOne) -> None:
    for regions in DETECTIONS[:2]:
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / regions.file_name)
    done = export_fiftyone(write_store(tmp_path / "d.h5", DETECTIONS), tmp_path / "out", tmp_path)
    assert (done.images, done.files, fiftyone.calls) == (2, ["samples.json"], ["created", "deleted"])
    assert done.notes == ["1 image that could not be used is left out"]
    samples = fiftyone.samples
    assert [sample.path for sample in samples] == [str(tmp_path / r.file_name) for r in DETECTIONS[:2]]
    detections = samples[0].regions.detections
    assert [d.label for d in detections] == ["dog", "cat", "dog", "cat"]
    assert [d.region for d in detections] == [0, 1, 2, 3]
    assert samples[1].regions.detections[0].region == 4 and samples[1].image_id == 3


def test_fiftyone_regions_follow_the_exif_orientation(tmp_path: Path, fiftyone: FakeFiftyOne) -> None:
    turned = DETECTIONS[0]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # FiftyOne rotates the pixels by 90 degrees clockwise
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / turned.file_name, exif=exif)
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(tmp_path / DETECTIONS[1].file_name)
    done = export_fiftyone(write_store(tmp_path / "d.h5", DETECTIONS), tmp_path / "out", tmp_path)
    assert (done.images, done.regions, len(fiftyone.samples)) == (1, len(turned), 1)
    assert (
        "1 image whose file cannot be read or has another size than in the store is left out, first: " in done.notes[1]
    )
    assert done.notes[2] == "regions of 1 image are turned by EXIF orientation, as FiftyOne turns the pixels"
    for row, detection in enumerate(fiftyone.samples[0].regions.detections):
        x, y, width, height = detection.bounding_box
        x1, y1, x2, y2 = turned.boxes[row] / (
            WIDTH,
            HEIGHT,
            WIDTH,
            HEIGHT,
        )  # in the rotated image, x is 1 - y and y is x
        assert (x, y, x + width, y + height) == pytest.approx((1 - y2, x1, 1 - y1, x2), abs=1e-6)
        np.testing.assert_array_equal(detection.mask, np.rot90(crop_mask(turned, row), -1))


def test_fiftyone_needs_a_folder_of_images_and_its_database(tmp_path: Path, fiftyone: FakeFiftyOne) -> None:
    store = write_store(tmp_path / "d.h5", DETECTIONS)
    for regions in DETECTIONS[:2]:
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / regions.file_name)
    with pytest.raises(InputError, match=r"d\.h5 is not a folder; FiftyOne needs a folder of image files"):
        export_fiftyone(store, tmp_path / "out", store)

    def fail(name: str) -> None:
        raise OSError("no mongod")

    fiftyone.Dataset = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeFailure, match="cannot use its database .no mongod"):
        export_fiftyone(store, tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()
