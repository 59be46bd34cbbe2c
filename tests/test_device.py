"""`refdet.device`: choice of the device, precision of float32 arithmetic, and copies to a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detector_examples import small_recipe
from training_examples import run, squares

import refdet
from refdet import store
from refdet.data.coco import CocoIndex
from refdet.data.instances_provenance import provenance_of_instances
from refdet.detector import checkpoint, predictor
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.device import exact_float32, float32_arithmetic, resolve_device, supported_precision, to_device
from refdet.errors import InputError
from refdet.evaluation.detection import evaluate
from refdet.extraction import computing
from refdet.extraction.extract import extract_features
from refdet.extraction.image_list import ImageList
from refdet.extraction.options import ExtractOptions
from refdet.training import trainer

BACKENDS = torch.backends
NEWER = (BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.cuda.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.matmul)


def settings() -> list[object]:
    """PyTorch's settings of float32 precision; "unreadable" if its older and newer settings contradict each other."""
    older: list[Callable[[], object]] = [
        lambda: BACKENDS.cudnn.allow_tf32, lambda: BACKENDS.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision
    ]  # fmt: skip
    found: list[object] = [setting.fp32_precision for setting in NEWER]
    for read in older:
        try:
            found.append(read())
        except RuntimeError:
            found.append("unreadable")
    return found


@pytest.fixture
def restore_settings() -> Iterator[None]:
    """Restore PyTorch's precision settings after the test."""
    before = [setting.fp32_precision for setting in NEWER]
    allow_tf32, matmul_precision = BACKENDS.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    yield
    BACKENDS.fp32_precision = "none"
    BACKENDS.cudnn.allow_tf32 = allow_tf32
    torch.set_float32_matmul_precision(matmul_precision)
    for setting, value in zip(NEWER, before, strict=True):
        setting.fp32_precision = value


def keep_settings() -> None:
    pass


def change_older_settings() -> None:
    BACKENDS.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("medium")


def change_newer_settings() -> None:
    BACKENDS.fp32_precision = "tf32"


def change_both() -> None:
    change_older_settings()
    BACKENDS.cudnn.conv.fp32_precision = BACKENDS.cuda.matmul.fp32_precision = "tf32"


# `settings()` during exact float32 and TF32 arithmetic on a GPU; oneDNN (the last two of NEWER) has no TF32 here
EXACT = ["ieee"] * 5 + [False, False, "highest"]
TF32 = ["tf32"] * 3 + ["ieee"] * 2 + [True, True, "high"]


@pytest.mark.parametrize("change", [keep_settings, change_older_settings, change_newer_settings, change_both])
def test_exact_float32_overrides_and_restores_all_settings(restore_settings: None, change: Callable[[], None]) -> None:
    change()
    before = settings()
    assert before != EXACT
    with exact_float32():
        assert settings() == EXACT
    assert settings() == before
    with pytest.raises(ZeroDivisionError), exact_float32():
        raise ZeroDivisionError
    assert settings() == before


@pytest.mark.parametrize("change", [keep_settings, change_older_settings, change_newer_settings, change_both])
@pytest.mark.parametrize(("precision", "wanted"), [("tf32", TF32), ("float32", EXACT), ("bfloat16", EXACT)])
def test_float32_arithmetic_overrides_and_restores_all_settings(
    restore_settings: None, change: Callable[[], None], precision: str, wanted: list[object]
) -> None:
    change()
    before = settings()
    with float32_arithmetic(precision):
        assert settings() == wanted
        with float32_arithmetic("tf32"), exact_float32():
            assert settings() == EXACT
        assert settings() == wanted
    assert settings() == before


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:1", 1), (None, 0), ("auto", 0)])
def test_resolving_a_gpu_makes_it_the_current_device(
    monkeypatch: pytest.MonkeyPatch, name: str | None, index: int
) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("refdet.device.torch.zeros", lambda count, device: SimpleNamespace(item=float,
        device=torch.device(device) if ":" in device else torch.device(device, 0)))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert resolve_device(name) == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index)]


def test_the_cpu_and_an_invalid_gpu_do_not_change_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", pytest.fail)
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="`device` cuda:97: cannot be used"):
        resolve_device("cuda:97")


@pytest.mark.parametrize("name", ["meta", "mps:0", "xla", "privateuseone", "gpu", ""])
def test_a_device_without_values_is_refused_in_one_short_line(name: str) -> None:
    if name.startswith("mps") and torch.backends.mps.is_available():
        pytest.skip("this machine has such a device")
    with pytest.raises(InputError, match=f"^`device` {name}: cannot be used ") as caught:
        resolve_device(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_tests_without_the_gpu_mark_use_the_cpu() -> None:
    assert resolve_device(None) == torch.device("cpu")
    script = "from refdet.device import resolve_device; print(resolve_device(None))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert found == "cpu\n"


@pytest.fixture(scope="module")
def run_directory(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    index = CocoIndex.load(shapes_root / "annotations" / "instances_train2014.json")
    torch.manual_seed(0)
    recipe, folder = small_recipe(), tmp_path_factory.mktemp("run")
    meta = checkpoint.CheckpointMetadata(recipe, tuple(index.categories.items()), provenance_of_instances(index), 0)
    checkpoint.save(folder, MaskRCNN(recipe, len(index.categories)), meta)
    return folder


def images_of(shapes_root: Path, count: int) -> ImageList:
    every = ImageList.of_instances(shapes_root / "annotations" / "instances_train2014.json")
    return ImageList(every.records[:count], every.index, every.name)


@pytest.mark.parametrize("regions", ["detections", "annotations"])
def test_extraction_uses_exact_float32_by_default(
    restore_settings: None, run_directory: Path, shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    regions: str,
) -> None:  # fmt: skip
    seen = []
    name = "start_detecting" if regions == "detections" else "start_describing"
    start = getattr(predictor, name)

    def record_settings(*args: Any, **kwargs: Any) -> Any:
        seen.append(settings())
        return start(*args, **kwargs)

    monkeypatch.setattr(computing, name, record_settings)
    torch.set_float32_matmul_precision("medium")
    before = settings()
    options = ExtractOptions(regions=regions)
    extract_features(run_directory, shapes_root / "train2014", tmp_path / "a.h5", images_of(shapes_root, 3),
                     options=options, device="cpu")  # fmt: skip
    assert seen and all(during == EXACT for during in seen)
    assert settings() == before


def fake_cpu(monkeypatch: pytest.MonkeyPatch, bfloat16: bool) -> None:
    """Make PyTorch report a CPU with or without bfloat16 arithmetic."""
    fake = SimpleNamespace(mkldnn=SimpleNamespace(_is_mkldnn_bf16_supported=lambda: bfloat16))
    monkeypatch.setattr("refdet.device.torch.ops", fake)


@pytest.mark.parametrize(("cpu_has_bfloat16", "device", "requested", "expected"), [
    (True, "cpu", "bfloat16", "bfloat16"), (False, "cpu", "bfloat16", "float32"), (False, "cpu", "float32", "float32"),
    (False, "cuda", "bfloat16", "bfloat16"), (True, "cpu", "tf32", "float32"), (True, "meta", "tf32", "float32"),
])  # fmt: skip
def test_bfloat16_falls_back_to_float32_on_a_cpu_without_it(
    monkeypatch: pytest.MonkeyPatch, cpu_has_bfloat16: bool, device: str, requested: str, expected: str
) -> None:
    fake_cpu(monkeypatch, cpu_has_bfloat16)
    assert supported_precision(requested, torch.device(device)) == expected
    monkeypatch.setattr("refdet.device.torch.ops", SimpleNamespace())  # a PyTorch without oneDNN
    assert supported_precision("bfloat16", torch.device("cpu")) == "float32"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "float32"), ((8, 0), "tf32"), ((9, 0), "tf32")])
def test_tf32_falls_back_to_float32_before_compute_capability_8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert supported_precision("tf32", torch.device("cuda:1")) == expected
    assert supported_precision("float32", torch.device("cuda:1")) == "float32"


def test_extraction_with_tf32_on_a_cpu_says_that_it_uses_float32(
    run_directory: Path, shapes_root: Path, tmp_path: Path
) -> None:
    messages: list[str] = []
    extract_features(run_directory, shapes_root / "train2014", tmp_path / "a.h5", images_of(shapes_root, 3),
                     options=ExtractOptions(precision="tf32"), device="cpu", say=messages.append)  # fmt: skip
    note = "note: `precision` tf32: this processor has no tf32 arithmetic: computing in float32, which is exact"
    assert messages == [note]
    with store.open(tmp_path / "a.h5") as extracted:
        assert extracted.options["precision"] == "float32"


@pytest.mark.parametrize(("precision", "wanted"), [("float32", EXACT), ("tf32", TF32)])
def test_extraction_detection_and_evaluation_use_the_requested_precision(
    restore_settings: None, run_directory: Path, shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    precision: str, wanted: list[object],
) -> None:  # fmt: skip
    seen = []
    start = predictor.start_detecting

    def record_settings(*args: Any, **kwargs: Any) -> Any:
        seen.append(settings())
        return start(*args, **kwargs)

    for module in (computing, predictor):
        monkeypatch.setattr(module, "start_detecting", record_settings)
    for module_name in ("refdet.device", "refdet.detector.detector", "refdet.extraction.extract_on_device"):
        monkeypatch.setattr(f"{module_name}.supported_precision", lambda precision, device: precision)
    change_older_settings()
    images, instances = shapes_root / "val2014", shapes_root / "annotations" / "instances_val2014.json"
    index = CocoIndex.load(instances)
    image_list = ImageList(list(index.images.values())[:2], index, "two")
    extract_features(run_directory, images, tmp_path / "a.h5", image_list, device="cpu",
                     options=ExtractOptions(precision=precision))  # fmt: skip
    refdet.load_detector(run_directory, device="cpu", precision=precision).detect(np.zeros((64, 96, 3), np.uint8))
    extracted = len(seen)
    evaluate(run_directory, instances, images, device="cpu", precision=precision)
    assert len(seen) > extracted >= 2 and all(during == wanted for during in seen)


@pytest.mark.parametrize(("change", "wanted"), [("train.tf32=true", TF32), ("train.tf32=false", EXACT)])
def test_training_uses_tf32_only_if_the_recipe_says_so(
    restore_settings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, wanted: list[object]
) -> None:
    seen = []
    step = trainer.start_step
    monkeypatch.setattr(trainer, "start_step", lambda *args: seen.append(settings()) or step(*args))
    squares(tmp_path)
    change_older_settings()
    run(tmp_path, change, "train.steps=1", out="cpu")
    assert seen == [EXACT]  # a CPU has no TF32
    monkeypatch.setattr(trainer, "supported_precision", lambda precision, device: precision)
    before = settings()
    run(tmp_path, change, "train.steps=1")
    assert seen == [EXACT, wanted] and settings() == before


def test_extraction_with_unsupported_bfloat16_says_so_and_equals_float32(
    run_directory: Path, shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module_name = "refdet.extraction.extract_on_device"
    monkeypatch.setattr(f"{module_name}.supported_precision", lambda precision, device: "float32")
    images, messages = images_of(shapes_root, 3), []
    for name, precision in (("a.h5", "bfloat16"), ("b.h5", "float32")):
        extract_features(run_directory, shapes_root / "train2014", tmp_path / name, images,
                         options=ExtractOptions(precision=precision), device="cpu", say=messages.append)  # fmt: skip
    assert messages == [
        "note: `precision` bfloat16: this processor has no bfloat16 arithmetic: "
        "computing in float32, which is faster here and exact"
    ]
    with store.open(tmp_path / "a.h5") as first, store.open(tmp_path / "b.h5") as second:
        assert first.options == second.options and first.options["precision"] == "float32"
        for image in first:
            np.testing.assert_array_equal(first[image].features["fc7"], second[image].features["fc7"])


def test_to_device_copies_asynchronously_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers, pinned = [], []

    def pin(values: torch.Tensor) -> torch.Tensor:
        pinned.append(values.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda values: any(values is copy for copy in pinned))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **kwargs: transfers.append((args, kwargs)) or x)
    values, cuda = torch.arange(3), torch.device("cuda:1")
    first = to_device(values, cuda)
    assert first is pinned[0] and to_device(first, cuda) is first
    assert transfers == [((cuda,), {"non_blocking": True})] * 2 and len(pinned) == 1
