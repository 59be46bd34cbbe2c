"""Whole extractions on each device: pinned memory, the background thread, batches that fit into memory, resuming."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import is_gpu, on_devices, on_every_gpu
from interrupted_extraction import environment
from memory_limits import memory_of, too_little_memory
from PIL import Image
from store_examples import contents
from trained_models import NAMES, saved_model

import refdet
from refdet import store
from refdet.data import transforms
from refdet.data.coco import CocoIndex
from refdet.data.image_source import ImageSource
from refdet.detector import loading
from refdet.detector.predictor import detect_batch
from refdet.device import resolve_device
from refdet.errors import Interrupted, RuntimeFailure
from refdet.evaluation.detection import detect_regions, evaluate
from refdet.extraction import computing
from refdet.extraction.image_list import ImageList
from refdet.extraction.options import ExtractOptions

pytestmark = pytest.mark.slow

COUNT = 40  # two shards: ten batches, and two
SIZES = [(48, 64), (64, 48), (40, 40), (50, 90)]  # height and width
SMALL = ["model.depth=18", "model.width=8", "input.min_sizes=[64]", "input.max_size=128",
         "proposals.post_nms_top_n_test=40"]  # fmt: skip
OPTIONS = ExtractOptions(score_threshold=0.1, max_regions=10, features=("pool5", "fc7", "head"))

KILLING_SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import test_extraction_on_devices as t
from refdet.extraction import computing
root, device = Path(sys.argv[1]), sys.argv[2]
start, calls = computing.start_detecting, []
def start_or_die(*args, **kwargs):
    calls.append(args)
    if len(calls) == 12:
        while not (root / "killed.h5.parts" / "000000.shard").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return start(*args, **kwargs)
computing.start_detecting = start_or_die
t.extract(root, device, "killed.h5")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory, images, and an instances file with two objects in each."""
    folder, random = tmp_path_factory.mktemp("extraction"), np.random.default_rng(0)
    saved_model(folder / "run", *SMALL)
    (folder / "images").mkdir()
    instances: dict[str, Any] = {"images": [], "annotations": [], "categories": [
        {"id": id_, "name": name} for id_, name in NAMES.items()]}  # fmt: skip
    for number in range(1, COUNT + 1):
        height, width = SIZES[number % len(SIZES)]
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        instances["images"].append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        for place, (x, y) in enumerate(((3, 4), (15, 12))):
            instances["annotations"].append({
                "id": 10 * number + place, "image_id": number, "category_id": (3, 44)[place], "iscrowd": 0,
                "bbox": [x, y, 20, 25], "area": 500, "segmentation": [[x, y, x + 20, y, x + 20, y + 25, x, y + 25]],
            })  # fmt: skip
    (folder / "instances.json").write_text(json.dumps(instances))
    return folder


def extract(root: Path, device: str, name: str, images: int = COUNT, **changes: Any) -> refdet.Summary:
    """Extract the first images into ``root / name``; ``changes`` are arguments of `refdet.extract_features`."""
    every = ImageList.of_instances(root / "instances.json")
    image_list = ImageList(every.records[:images], every.index, every.name)
    arguments = {"options": OPTIONS, "batch_size": 4, **changes}
    return refdet.extract_features(root / "run", root / "images", root / name, image_list, device=device, **arguments)


def link_inputs(folder: Path, root: Path) -> None:
    """Link the detector and the images of ``root`` into another folder, for other stores."""
    for path in (root / "run", root / "images", root / "instances.json"):
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)


def assert_near(actual: Path, expected: Path, share: float = 0.99) -> None:
    """Check that a store has the images of another, and a share of its regions, with nearly the same features."""
    total = same = 0
    with store.open(actual) as actual_store, store.open(expected) as expected_store:
        assert list(actual_store) == list(expected_store) and expected_store.regions > len(expected_store)
        for image_id in expected_store:
            ours, theirs = actual_store[image_id], expected_store[image_id]
            for name, values in theirs.maps.items():
                np.testing.assert_allclose(ours.maps[name], values, rtol=1e-4, atol=1e-4)
            near = np.abs(ours.boxes[:, None] - theirs.boxes).max(axis=2, initial=0) < 0.01
            near &= ours.category_ids[:, None] == theirs.category_ids
            total, same = total + len(theirs), same + int(near.any(axis=0).sum())
            for i, j in np.argwhere(near).tolist():
                np.testing.assert_allclose(ours.features["fc7"][i], theirs.features["fc7"][j], rtol=1e-3, atol=1e-3)
    assert same >= share * total


@pytest.fixture(scope="module")
def whole(root: Path) -> Callable[[str], Path]:
    """A function that returns the finished store of a device."""

    def finished(device: str) -> Path:
        name = f"whole-{device}.h5"
        if not (root / name).exists():
            assert extract(root, device, name).errors == 0
        return root / name

    return finished


@on_every_gpu
def test_stores_of_every_device_agree_and_are_reproducible(
    device: str, root: Path, whole: Callable[[str], Path]
) -> None:
    assert_near(whole(device), whole("cpu"))
    again = extract(root, device, f"again-{device}.h5", workers=4)
    assert contents(root / f"again-{device}.h5") == contents(whole(device))
    stages = {"input", "backbone", "proposals", "classes and boxes", "postprocessing", "features and masks"}
    assert set(again.computing) == stages and all(seconds > 0 for seconds in again.computing.values())


@on_devices
@pytest.mark.parametrize("masks", ["annotated", "predicted"])
def test_features_of_annotations_agree_with_the_cpu(device: str, root: Path, masks: str) -> None:
    options = ExtractOptions(regions="annotations", masks=masks, features=("pool5", "fc7"))
    for where in {"cpu", device}:
        extract(root, where, f"{masks}-{device}-{where}.h5", images=12, options=options)
    with (
        store.open(root / f"{masks}-{device}-{device}.h5") as ours,
        store.open(root / f"{masks}-{device}-cpu.h5") as theirs,
    ):
        assert ours.regions == theirs.regions == 24
        for image in theirs:
            for name in options.features:
                actual, expected = ours[image].features[name], theirs[image].features[name]
                assert (np.linalg.norm(actual - expected, axis=1) <= 1e-4 * np.linalg.norm(expected, axis=1)).all()


@pytest.mark.gpu
def test_images_of_one_shape_are_copied_together_from_pinned_memory(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_device, pinned = transforms.to_device, []

    def recording_to_device(values: torch.Tensor, target: torch.device) -> torch.Tensor:
        if values.dtype == torch.uint8 and values.dim() == 4:
            pinned.append(values.is_pinned())
        return to_device(values, target)

    monkeypatch.setattr(transforms, "to_device", recording_to_device)
    extract(root, "cuda", "pinned.h5", images=12)
    assert pinned and all(pinned) and len(pinned) < 12


@on_devices
def test_a_killed_extraction_is_resumed(device: str, root: Path, whole: Callable[[str], Path], tmp_path: Path) -> None:
    link_inputs(tmp_path, root)
    arguments = [sys.executable, "-c", KILLING_SCRIPT, str(tmp_path), device]
    process = subprocess.run(arguments, env=environment(Path(__file__).parent), capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    done = extract(tmp_path, device, "killed.h5", resume=True)
    assert 0 < done.computed < COUNT == done.images
    assert contents(tmp_path / "killed.h5") == contents(whole(device))


@on_devices
def test_an_extraction_started_on_the_cpu_can_be_finished_on_a_gpu(
    device: str, root: Path, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link_inputs(tmp_path, root)
    start, calls = computing.start_detecting, []

    def start_or_interrupt(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return start(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="`resume=True`"):
        patch.setattr(computing, "start_detecting", start_or_interrupt)
        extract(tmp_path, "cpu", "a.h5")
    assert 0 < extract(tmp_path, device, "a.h5", resume=True).computed < COUNT
    assert_near(tmp_path / "a.h5", whole("cpu"))


@on_devices
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_an_extraction_in_another_precision_records_it(device: str, root: Path, precision: str) -> None:
    out = root / f"{precision}-{device}.h5"
    options = replace(OPTIONS, precision=precision, dtype="float16")
    extract(root, device, out.name, images=12, say=lambda line: None, options=options)
    with store.open(out) as found:
        assert found.regions > 0 and (not is_gpu(device) or found.options["precision"] == precision)


@on_devices
def test_the_automatic_batch_size_fits(device: str, root: Path) -> None:
    done = extract(root, device, f"auto-{device}.h5", images=40, batch_size="auto")
    assert done.errors == 0 and done.batch_size in (1, 2, 4, 8, 16, 32)
    if is_gpu(device):
        assert done.batch_size == 32  # the most, as the images are small


@pytest.fixture
def hungry_detector(root: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A function that returns a folder with a detector whose batches need more memory than its weights."""

    def prepare(device: str) -> Path:
        width = 64 if is_gpu(device) else 8
        saved_model(tmp_path / "run", f"model.width={width}", "input.min_sizes=[256]", "input.max_size=512")
        link_inputs(tmp_path, root)
        return tmp_path

    return prepare


def detection_fits(root: Path, device: str, images: int) -> Callable[[], bool]:
    """A function that loads the detector and detects regions in a batch, and returns whether memory was enough."""
    record = CocoIndex.load(root / "instances.json").images[3]
    pixels = ImageSource.open(root / "images").read(record)

    def fits() -> bool:
        try:
            detector = loading.load(root / "run", resolve_device(device), for_inference=True)
            with detector.inference():
                detect_batch(detector.model, [pixels] * images, [record] * images, list(NAMES), OPTIONS)
        except torch.cuda.OutOfMemoryError:
            return False
        except RuntimeFailure as error:
            assert "too little memory for the detector" in str(error)
            return False
        return True

    return fits


@on_devices
def test_batches_are_split_if_memory_is_short(
    device: str, hungry_detector: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out_of_memory = hungry_detector(device), []
    options = ExtractOptions(score_threshold=0.1, max_regions=10)
    extract(folder, device, "whole.h5", images=24, options=options)
    empty_cache = torch.cuda.empty_cache  # called after running out of memory
    with memory_of(device) as memory, too_little_memory(memory, detection_fits(folder, device, 6)):
        assert detection_fits(folder, device, 1)()
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "empty_cache", lambda: out_of_memory.append(1) or empty_cache())
            done = extract(folder, device, "short.h5", images=24, batch_size=6, options=options)
    assert done.errors == 0 and done.images == 24 and out_of_memory
    assert_near(folder / "short.h5", folder / "whole.h5")


@on_devices
def test_too_little_memory_for_one_image_is_reported(device: str, hungry_detector: Callable[[str], Path]) -> None:
    folder = hungry_detector(device)
    with (
        memory_of(device) as memory,
        too_little_memory(memory, detection_fits(folder, device, 1)),
        pytest.raises(RuntimeFailure, match="too little memory for"),
    ):
        extract(folder, device, "none.h5", images=8)
    resume = (folder / "none.h5.parts").exists()  # not if memory was too small even for the detector
    assert extract(folder, device, "none.h5", images=8, resume=resume).images == 8


@on_devices
def test_evaluation_uses_the_regions_that_extraction_stores(device: str, root: Path) -> None:
    """They are equal to the bit on one device, as the computation is the same."""
    extract(root, device, f"measured-{device}.h5", images=12, options=ExtractOptions(features=()))
    detector = loading.load(root / "run", resolve_device(device), for_inference=True)
    index = CocoIndex.load(root / "instances.json")
    records = list(index.images.values())[:12]
    with store.open(root / f"measured-{device}.h5") as written:
        for found in detect_regions(detector, ImageSource.open(root / "images"), records):
            stored = written[found.image_id]
            for name in ("boxes", "scores", "category_ids"):
                np.testing.assert_array_equal(getattr(found, name), getattr(stored, name))
            assert found.masks == stored.masks
    metrics = {where: evaluate(root / "run", root / "instances.json", root / "images", device=where)
               for where in {device, "cpu"}}  # fmt: skip
    for kind in ("bbox", "segm"):
        assert metrics[device][kind] == pytest.approx(metrics["cpu"][kind], abs=0.01)
