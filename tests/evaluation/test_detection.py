"""refdet evaluate: AP of the same regions that extract-features writes, options, crowds, and error messages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from trained_models import VARIANTS, trained_model

from refdet import store
from refdet.cli.main import main
from refdet.data.coco import CocoIndex
from refdet.data.image_source import ImageSource
from refdet.detector import checkpoint, loading
from refdet.errors import InputError
from refdet.evaluation import detection
from refdet.evaluation.average_precision import METRICS, coco_ap, coco_results
from refdet.evaluation.evaluation_data import EvaluationData
from refdet.extraction import defaults
from refdet.extraction.extract import extract_features
from refdet.extraction.image_list import ImageList
from refdet.structures.provenance import Provenance

pytestmark = pytest.mark.slow

CLASSES = ((3, "car"), (7, "train"), (44, "bottle"), (90, "toothbrush"))
SIZES = [(96, 128), (128, 96), (96, 128), (96, 128), (60, 90), (128, 96), (96, 128), (96, 128)]


class DetectorAndDataset:
    """A detector with random weights, and images of noise in several sizes with one annotation each."""

    def __init__(self, root: Path, variant: str = "fpn") -> None:
        self.root, self.run, self.file, self.images = root, root / "run", root / "i.json", root / "images"
        model = trained_model(*VARIANTS[variant][0])
        self.run.mkdir(parents=True)
        checkpoint.save(
            self.run, model, checkpoint.CheckpointMetadata(model.recipe, CLASSES, Provenance.imported("x", "0" * 64), 0)
        )
        self.images.mkdir()
        random = np.random.default_rng(0)
        images, annotations = [], []
        for i, (height, width) in enumerate(SIZES):
            pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.images / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
            box = [10.0, 10.0, 40.0, 30.0]
            outline = [[10, 10, 50, 10, 50, 40, 10, 40]]
            annotations.append({"id": i, "image_id": i, "category_id": 3, "bbox": box, "area": 1200, "iscrowd": 0,
                                "segmentation": outline})  # fmt: skip
        categories = [{"id": i, "name": name} for i, name in CLASSES]
        self.data: dict[str, Any] = {"images": images, "annotations": annotations, "categories": categories}
        self.write()

    def write(self) -> None:
        self.file.write_text(json.dumps(self.data))

    def evaluate(self, *more: str, device: str = "cpu") -> Result:
        return CliRunner().invoke(main, ["evaluate", "--checkpoint", str(self.run), "--instances", str(self.file),
                                         "--images", str(self.images), "--device", device, *more])  # fmt: skip


@pytest.mark.parametrize("variant", ["fpn", "c4", "crop"])
def test_evaluate_measures_the_regions_that_extraction_writes(tmp_path: Path, variant: str) -> None:
    """Bit for bit, as both run the same network on the same batches."""
    folder = DetectorAndDataset(tmp_path / "d", variant)
    index = CocoIndex.load(folder.file)
    extract_features(folder.run, folder.images, tmp_path / "a.h5", ImageList.of_instances(folder.file),
                     device="cpu")  # fmt: skip
    detector = loading.load(folder.run, "cpu", for_inference=True)
    source = ImageSource.open(folder.images)
    measured = list(detection.detect_regions(detector, source, list(index.images.values())))
    with store.open(tmp_path / "a.h5") as extracted:
        assert {r.image_id for r in measured} == set(extracted) and extracted.regions > 50
        for regions in measured:
            stored = extracted[regions.image_id]
            for name in ("boxes", "scores", "category_ids"):
                np.testing.assert_array_equal(getattr(regions, name), getattr(stored, name))
            assert regions.masks == stored.masks
        results = coco_results([extracted[i] for i in index.images])
    found = json.loads(folder.evaluate("--json").stdout)
    for kind in ("bbox", "segm"):
        expected = coco_ap(index, list(index.images), results, kind)
        assert found[kind] == {name: None if rate < 0 else pytest.approx(rate) for name, rate in expected.items()}


def test_default_workers_and_batch_size_are_those_of_extraction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked, load_ahead = DetectorAndDataset(tmp_path / "d"), [], detection.load_ahead

    def loads(load: Any, batches: Any, workers: int) -> Any:
        asked.append((len(batches[0]), workers))
        return load_ahead(load, batches, workers)

    monkeypatch.setattr(detection, "load_ahead", loads)
    assert folder.evaluate().exit_code == 0
    monkeypatch.setitem(defaults.WORKERS, "cpu", 5)
    monkeypatch.setattr(defaults, "default_batch_size", lambda device: None)
    monkeypatch.setattr("refdet.extraction.batch_size.auto_batch_size", lambda *_: 3)
    assert folder.evaluate().exit_code == 0
    assert asked == [(4, 2), (3, 5)]


def test_options_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = DetectorAndDataset(tmp_path / "d"), {}
    load, regions = loading.load, detection.detect_regions

    def loads(path: Path, device: Any, **how: Any) -> Any:
        asked.update(how)
        return load(path, device, for_inference=True)

    def detects(detector: Any, source: Any, records: Any, batch_size: int, workers: int) -> Any:
        asked.update(batch_size=batch_size, workers=workers)
        return regions(detector, source, records, batch_size, workers)

    monkeypatch.setattr(loading, "load", loads)
    monkeypatch.setattr(detection, "detect_regions", detects)
    monkeypatch.setattr("refdet.device.supported_precision", lambda precision, device: precision)
    done = folder.evaluate("--precision", "bfloat16", "--batch-size", "3", "--workers", "1")
    assert done.exit_code == 0, done.output
    assert asked == {
        "for_inference": True,
        "precision": "bfloat16",
        "batch_size": 3,
        "workers": 1,
    }


def test_an_unreadable_image_is_a_one_line_error(tmp_path: Path) -> None:
    """Extraction skips such an image, but in evaluation its objects would count as missed."""
    folder = DetectorAndDataset(tmp_path / "d")
    (folder.images / "6.png").write_bytes(b"no image")
    done = folder.evaluate()
    assert done.exit_code == 2 and "6.png" in done.stderr.splitlines()[-1] and "Traceback" not in done.output


def test_ap_is_undefined_if_all_annotations_are_crowds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = DetectorAndDataset(tmp_path / "d")
    for annotation in folder.data["annotations"]:
        annotation["iscrowd"] = 1
    folder.write()
    done = folder.evaluate()
    assert done.exit_code == 0 and "AP is not defined: iscrowd is 1 on all 8 annotations (CVAT" in caplog.text
    assert [line.split() for line in done.stdout.splitlines()[1:]] == [["bbox", *"------"], ["segm", *"------"]]
    found = json.loads(folder.evaluate("--json").stdout)
    assert found == dict.fromkeys(("bbox", "segm"), dict.fromkeys(METRICS))


def test_some_crowds_give_no_note_and_sizes_without_objects_are_dashes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = DetectorAndDataset(tmp_path / "d")
    folder.data["annotations"][0]["iscrowd"] = 1
    folder.write()
    done = folder.evaluate()
    assert "not defined" not in caplog.text and "no segmentation" not in caplog.text
    box_row = done.stdout.splitlines()[1].split()
    # The last column is the AP of large objects, of which there are none.
    assert "-1.000" not in done.stdout and box_row[-1] == "-" and box_row[1] != "-"


def test_annotations_without_a_segmentation_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = DetectorAndDataset(tmp_path / "d")
    del folder.data["annotations"][0]["segmentation"], folder.data["annotations"][5]["segmentation"]
    folder.write()
    assert folder.evaluate().exit_code == 0 and "2 of 8 annotations have no segmentation" in caplog.text


@pytest.mark.parametrize("info", ["missing", None])
def test_info_is_optional(tmp_path: Path, info: Any) -> None:
    folder = DetectorAndDataset(tmp_path / "d")
    if info != "missing":
        folder.data["info"] = info
    folder.write()
    assert folder.evaluate("--json").exit_code == 0


def test_paths_are_checked_before_the_weights_are_read(tmp_path: Path) -> None:
    folder = DetectorAndDataset(tmp_path / "d")
    (folder.run / "model.safetensors").write_bytes(b"cut")
    shutil.move(folder.images, tmp_path / "gone")
    done = folder.evaluate()
    assert done.exit_code == 2 and "no such file or folder" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (((1, "cat"), (2, "cow")), r"run has other classes than .*instances\.json \(2 and 2; 2 cow, 2 dog\); evaluate"),
        (((3, "cat"), (4, "cow")), r"\(2 and 2; 1 cat, 2 dog, 3 cat, \.\.\.\); evaluate on the dataset"),
    ],
)
def test_errors_name_the_differing_classes(tmp_path: Path, classes: tuple[tuple[int, str], ...], message: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    tree = {
        "images": [{"id": 1, "file_name": "1.png", "height": 4, "width": 4}],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(tree))
    data = EvaluationData.open(tmp_path / "instances.json", tmp_path)
    data.check_categories(((1, "cat"), (2, "dog")), "run")
    with pytest.raises(InputError, match=message):
        data.check_categories(classes, "run")
