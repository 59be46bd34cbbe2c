"""A whole extraction on a GPU: pinned images, events, the thread in the background, batches that fit, and resuming."""

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

KILLED = """
import os, signal, sys, time
from pathlib import Path
import test_extraction_on_devices as t
from refdet.extraction import computing
root, device = Path(sys.argv[1]), sys.argv[2]
start, calls = computing.start_detecting, []
def killed(*given, **named):
    calls.append(given)
    if len(calls) == 12:
        while not (root / "killed.h5.parts" / "000000.shard").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return start(*given, **named)
computing.start_detecting = killed
t.extract(root, device, "killed.h5")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory, images, and an instances file with two objects in each."""
    folder, random = tmp_path_factory.mktemp("extraction"), np.random.default_rng(0)
    saved_model(folder / "run", *SMALL)
    (folder / "images").mkdir()
    tree: dict[str, Any] = {"images": [], "annotations": [], "categories": [
        {"id": id_, "name": name} for id_, name in NAMES.items()]}  # fmt: skip
    for number in range(1, COUNT + 1):
        height, width = SIZES[number % len(SIZES)]
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        tree["images"].append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        for place, (x, y) in enumerate(((3, 4), (15, 12))):
            tree["annotations"].append({
                "id": 10 * number + place, "image_id": number, "category_id": (3, 44)[place], "iscrowd": 0,
                "bbox": [x, y, 20, 25], "area": 500, "segmentation": [[x, y, x + 20, y, x + 20, y + 25, x, y + 25]],
            })  # fmt: skip
    (folder / "instances.json").write_text(json.dumps(tree))
    return folder


def extract(root: Path, device: str, name: str, images: int = COUNT, **more: Any) -> refdet.Summary:
    every = ImageList.of_instances(root / "instances.json")
    chosen = ImageList(every.records[:images], every.index, every.name)
    given = {"options": OPTIONS, "batch_size": 4, **more}
    return refdet.extract_features(root / "run", root / "images", root / name, chosen, device=device, **given)


def linked(folder: Path, root: Path) -> None:
    """The same in a folder of its own, for other stores."""
    for path in (root / "run", root / "images", root / "instances.json"):
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)


def assert_near(found: Path, wanted: Path, share: float = 0.99) -> None:
    """The same images and nearly the same regions, the first ones with nearly the same features."""
    total = same = 0
    with store.open(found) as ours, store.open(wanted) as theirs:
        assert list(ours) == list(theirs) and theirs.regions > len(theirs)
        for image in theirs:
            one, other = ours[image], theirs[image]
            for name, values in other.maps.items():
                np.testing.assert_allclose(one.maps[name], values, rtol=1e-4, atol=1e-4)
            near = np.abs(one.boxes[:, None] - other.boxes).max(axis=2, initial=0) < 0.01
            near &= one.category_ids[:, None] == other.category_ids
            total, same = total + len(other), same + int(near.any(axis=0).sum())
            for mine, his in np.argwhere(near).tolist():
                np.testing.assert_allclose(one.features["fc7"][mine], other.features["fc7"][his], rtol=1e-3, atol=1e-3)
    assert same >= share * total


@pytest.fixture(scope="module")
def whole(root: Path) -> Callable[[str], Path]:
    """The finished store of a device."""

    def finished(device: str) -> Path:
        name = f"whole-{device}.h5"
        if not (root / name).exists():
            assert extract(root, device, name).errors == 0
        return root / name

    return finished


@on_every_gpu
def test_the_store_is_the_one_of_the_cpu_and_twice_the_same(
    device: str, root: Path, whole: Callable[[str], Path]
) -> None:
    assert_near(whole(device), whole("cpu"))
    again = extract(root, device, f"again-{device}.h5", workers=4)
    assert contents(root / f"again-{device}.h5") == contents(whole(device))
    parts = {"input", "backbone", "proposals", "classes and boxes", "postprocessing", "features and masks"}
    assert set(again.computing) == parts and all(seconds > 0 for seconds in again.computing.values())


@on_devices
@pytest.mark.parametrize("masks", ["annotated", "predicted"])
def test_annotations_are_described_as_on_the_cpu(device: str, root: Path, masks: str) -> None:
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
                one, other = ours[image].features[name], theirs[image].features[name]
                assert (np.linalg.norm(one - other, axis=1) <= 1e-4 * np.linalg.norm(other, axis=1)).all()


@pytest.mark.gpu
def test_images_of_a_shape_are_copied_at_once_from_pinned_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, pinned = transforms.to_device, []

    def watched(values: torch.Tensor, target: torch.device) -> torch.Tensor:
        if values.dtype == torch.uint8 and values.dim() == 4:
            pinned.append(values.is_pinned())
        return copy(values, target)

    monkeypatch.setattr(transforms, "to_device", watched)
    extract(root, "cuda", "pinned.h5", images=12)
    assert pinned and all(pinned) and len(pinned) < 12


@on_devices
def test_a_killed_extraction_is_resumed(device: str, root: Path, whole: Callable[[str], Path], tmp_path: Path) -> None:
    linked(tmp_path, root)
    arguments = [sys.executable, "-c", KILLED, str(tmp_path), device]
    process = subprocess.run(arguments, env=environment(Path(__file__).parent), capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    done = extract(tmp_path, device, "killed.h5", resume=True)
    assert 0 < done.computed < COUNT == done.images
    assert contents(tmp_path / "killed.h5") == contents(whole(device))


@on_devices
def test_what_the_cpu_began_a_gpu_may_finish(
    device: str, root: Path, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked(tmp_path, root)
    start, calls = computing.start_detecting, []

    def stops(*given: Any, **named: Any) -> Any:
        calls.append(given)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return start(*given, **named)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="`resume=True`"):
        patch.setattr(computing, "start_detecting", stops)
        extract(tmp_path, "cpu", "a.h5")
    assert extract(tmp_path, device, "a.h5", resume=True).computed < COUNT
    assert_near(tmp_path / "a.h5", whole("cpu"))


@on_devices
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_other_precisions(device: str, root: Path, precision: str) -> None:
    out = root / f"{precision}-{device}.h5"
    extract(
        root,
        device,
        out.name,
        images=12,
        say=lambda line: None,
        options=replace(OPTIONS, precision=precision, dtype="float16"),
    )
    with store.open(out) as found:
        assert found.regions > 0 and (not is_gpu(device) or found.options["precision"] == precision)


@on_devices
def test_the_automatic_batch_size_fits(device: str, root: Path) -> None:
    done = extract(root, device, f"auto-{device}.h5", images=40, batch_size="auto")
    assert done.errors == 0 and done.batch_size in (1, 2, 4, 8, 16, 32)
    assert not is_gpu(device) or done.batch_size == 32  # of images as small as these


@pytest.fixture
def roomy(root: Path, tmp_path: Path) -> Callable[[str], Path]:
    """The images, and a detector whose batches need more memory than its weights."""

    def prepared(device: str) -> Path:
        width = 64 if is_gpu(device) else 8
        saved_model(tmp_path / "run", f"model.width={width}", "input.min_sizes=[256]", "input.max_size=512")
        linked(tmp_path, root)
        return tmp_path

    return prepared


def computes(root: Path, device: str, images: int) -> Callable[[], bool]:
    """A function that loads the detector and detects regions of the largest images: whether memory is enough."""
    record = CocoIndex.load(root / "instances.json").images[3]
    pixels = ImageSource.open(root / "images").read(record)

    def computed() -> bool:
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

    return computed


@on_devices
def test_batches_are_cut_where_memory_is_short(
    device: str, roomy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cut = roomy(device), []
    options = ExtractOptions(score_threshold=0.1, max_regions=10)
    extract(folder, device, "whole.h5", images=24, options=options)
    empty = torch.cuda.empty_cache
    with memory_of(device) as memory, too_little_memory(memory, computes(folder, device, 6)):
        assert computes(folder, device, 1)()
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "empty_cache", lambda: cut.append(1) or empty())
            done = extract(folder, device, "short.h5", images=24, batch_size=6, options=options)
    assert done.errors == 0 and done.images == 24 and cut
    assert_near(folder / "short.h5", folder / "whole.h5")


@on_devices
def test_too_little_memory_for_one_image_is_told(device: str, roomy: Callable[[str], Path]) -> None:
    folder = roomy(device)
    with (
        memory_of(device) as memory,
        too_little_memory(memory, computes(folder, device, 1)),
        pytest.raises(RuntimeFailure, match="too little memory for"),
    ):
        extract(folder, device, "none.h5", images=8)
    resume = (folder / "none.h5.parts").exists()  # unless there was no room for the detector itself
    assert extract(folder, device, "none.h5", images=8, resume=resume).images == 8


@on_devices
def test_evaluation_measures_what_is_extracted(device: str, root: Path) -> None:
    """Bit for bit, on one device, as both are one computation."""
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
    rates = {where: evaluate(root / "run", root / "instances.json", root / "images", device=where)
             for where in {device, "cpu"}}  # fmt: skip
    for kind in ("bbox", "segm"):
        assert rates[device][kind] == pytest.approx(rates["cpu"][kind], abs=0.01)
