"""evaluate: the regions that extract-features writes, measured; and what it says when there is nothing to measure."""

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


class Folder:
    """A detector of random weights, and images of noise with annotations, of several sizes."""

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
def test_what_is_measured_is_what_is_extracted(tmp_path: Path, variant: str) -> None:
    """Bit for bit: one network, one arithmetic, the same batches."""
    folder = Folder(tmp_path / "d", variant)
    index = CocoIndex.load(folder.file)
    extract_features(folder.run, folder.images, tmp_path / "a.h5", ImageList.of_instances(folder.file),
                     device="cpu")  # fmt: skip
    detector = loading.load(folder.run, "cpu", for_inference=True)
    source = ImageSource.open(folder.images)
    measured = list(detection.detect_regions(detector, source, list(index.images.values())))
    with store.open(tmp_path / "a.h5") as written:
        assert {r.image_id for r in measured} == set(written) and written.regions > 50
        for regions in measured:
            stored = written[regions.image_id]
            for name in ("boxes", "scores", "category_ids"):
                np.testing.assert_array_equal(getattr(regions, name), getattr(stored, name))
            assert regions.masks == stored.masks
        results = coco_results([written[i] for i in index.images])
    found = json.loads(folder.evaluate("--json").stdout)
    for kind in ("bbox", "segm"):
        wanted = coco_ap(index, list(index.images), results, kind)
        assert found[kind] == {name: None if rate < 0 else pytest.approx(rate) for name, rate in wanted.items()}


def test_threads_and_batches_are_by_default_those_of_an_extraction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked, load_ahead = Folder(tmp_path / "d"), [], detection.load_ahead

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


def test_the_options_reach_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = Folder(tmp_path / "d"), {}
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


def test_a_bad_image_ends_the_work_in_one_line(tmp_path: Path) -> None:
    """What extraction leaves without regions would be missed objects here."""
    folder = Folder(tmp_path / "d")
    (folder.images / "6.png").write_bytes(b"no image")
    done = folder.evaluate()
    assert done.exit_code == 2 and "6.png" in done.stderr.splitlines()[-1] and "Traceback" not in done.output


def test_all_crowds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Folder(tmp_path / "d")
    for annotation in folder.data["annotations"]:
        annotation["iscrowd"] = 1
    folder.write()
    done = folder.evaluate()
    assert done.exit_code == 0 and "AP is not defined: iscrowd is 1 on all 8 annotations (CVAT" in caplog.text
    assert [line.split() for line in done.stdout.splitlines()[1:]] == [["bbox", *"------"], ["segm", *"------"]]
    found = json.loads(folder.evaluate("--json").stdout)
    assert found == dict.fromkeys(("bbox", "segm"), dict.fromkeys(METRICS))


def test_some_crowds_say_nothing_and_sizes_without_objects_are_dashes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder(tmp_path / "d")
    folder.data["annotations"][0]["iscrowd"] = 1
    folder.write()
    done = folder.evaluate()
    assert "not defined" not in caplog.text and "no segmentation" not in caplog.text
    of_boxes = done.stdout.splitlines()[1].split()
    assert "-1.000" not in done.stdout and of_boxes[-1] == "-" and of_boxes[1] != "-"  # none is large


def test_boxes_that_stand_in_for_masks_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Folder(tmp_path / "d")
    del folder.data["annotations"][0]["segmentation"], folder.data["annotations"][5]["segmentation"]
    folder.write()
    assert folder.evaluate().exit_code == 0 and "2 of 8 annotations have no segmentation" in caplog.text


@pytest.mark.parametrize("info", ["missing", None])
def test_files_without_info(tmp_path: Path, info: Any) -> None:
    folder = Folder(tmp_path / "d")
    if info != "missing":
        folder.data["info"] = info
    folder.write()
    assert folder.evaluate("--json").exit_code == 0


def test_cheap_mistakes_are_found_before_the_weights_are_read(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "d")
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
def test_other_classes_are_named(tmp_path: Path, classes: tuple[tuple[int, str], ...], message: str) -> None:
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
