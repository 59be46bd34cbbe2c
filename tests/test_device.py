"""How exactly a device computes, and how it is given what the host has."""

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
    """What decides how float32 is computed; "unreadable" where older and newer settings contradict each other."""
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
def restored() -> Iterator[None]:
    before = [setting.fp32_precision for setting in NEWER]
    convolutions, products = BACKENDS.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    yield
    BACKENDS.fp32_precision = "none"
    BACKENDS.cudnn.allow_tf32 = convolutions
    torch.set_float32_matmul_precision(products)
    for setting, value in zip(NEWER, before, strict=True):
        setting.fp32_precision = value


def as_they_are() -> None:
    pass


def older() -> None:
    BACKENDS.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("medium")


def newer() -> None:
    BACKENDS.fp32_precision = "tf32"


def both() -> None:
    older()
    BACKENDS.cudnn.conv.fp32_precision = BACKENDS.cuda.matmul.fp32_precision = "tf32"


EXACT = ["ieee"] * 5 + [False, False, "highest"]
TF32 = ["tf32"] * 3 + ["ieee"] * 2 + [True, True, "high"]


@pytest.mark.parametrize("change", [as_they_are, older, newer, both])
def test_float32_is_float32_whatever_was_set_and_it_stays_set(restored: None, change: Callable[[], None]) -> None:
    change()
    before = settings()
    assert before != EXACT
    with exact_float32():
        assert settings() == EXACT
    assert settings() == before
    with pytest.raises(ZeroDivisionError), exact_float32():
        raise ZeroDivisionError
    assert settings() == before


@pytest.mark.parametrize("change", [as_they_are, older, newer, both])
@pytest.mark.parametrize(("precision", "wanted"), [("tf32", TF32), ("float32", EXACT), ("bfloat16", EXACT)])
def test_a_precision_is_what_it_says_whatever_was_set(
    restored: None, change: Callable[[], None], precision: str, wanted: list[object]
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
def test_the_gpu_that_is_chosen_becomes_the_current_one(
    monkeypatch: pytest.MonkeyPatch, name: str | None, index: int
) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("refdet.device.torch.zeros", lambda count, device: SimpleNamespace(item=float,
        device=torch.device(device) if ":" in device else torch.device(device, 0)))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert resolve_device(name) == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index)]


def test_a_device_that_is_refused_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_test_without_a_mark_computes_on_the_cpu() -> None:
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
def test_extraction_computes_float32_in_float32(
    restored: None, run_directory: Path, shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    regions: str,
) -> None:  # fmt: skip
    seen = []
    name = "start_detecting" if regions == "detections" else "start_describing"
    start = getattr(predictor, name)

    def watched(*given: Any, **named: Any) -> Any:
        seen.append(settings())
        return start(*given, **named)

    monkeypatch.setattr(computing, name, watched)
    torch.set_float32_matmul_precision("medium")
    before = settings()
    options = ExtractOptions(regions=regions)
    extract_features(run_directory, shapes_root / "train2014", tmp_path / "a.h5", images_of(shapes_root, 3),
                     options=options, device="cpu")  # fmt: skip
    assert seen and all(one == EXACT for one in seen)
    assert settings() == before


def processor(monkeypatch: pytest.MonkeyPatch, bfloat16: bool) -> None:
    """Have PyTorch say of the processor that it has bfloat16 arithmetic, or that it has not."""
    fake = SimpleNamespace(mkldnn=SimpleNamespace(_is_mkldnn_bf16_supported=lambda: bfloat16))
    monkeypatch.setattr("refdet.device.torch.ops", fake)


@pytest.mark.parametrize(("there", "name", "given", "expected"), [
    (True, "cpu", "bfloat16", "bfloat16"), (False, "cpu", "bfloat16", "float32"), (False, "cpu", "float32", "float32"),
    (False, "cuda", "bfloat16", "bfloat16"), (True, "cpu", "tf32", "float32"), (True, "meta", "tf32", "float32"),
])  # fmt: skip
def test_bfloat16_is_computed_where_there_is_arithmetic_for_it(
    monkeypatch: pytest.MonkeyPatch, there: bool, name: str, given: str, expected: str
) -> None:
    processor(monkeypatch, there)
    assert supported_precision(given, torch.device(name)) == expected
    monkeypatch.setattr("refdet.device.torch.ops", SimpleNamespace())  # a PyTorch without oneDNN
    assert supported_precision("bfloat16", torch.device("cpu")) == "float32"


@pytest.mark.parametrize(("capability", "usable"), [((7, 5), "float32"), ((8, 0), "tf32"), ((9, 0), "tf32")])
def test_tf32_is_computed_where_there_is_arithmetic_for_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], usable: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert supported_precision("tf32", torch.device("cuda:1")) == usable
    assert supported_precision("float32", torch.device("cuda:1")) == "float32"


def test_tf32_on_a_cpu_is_float32_and_told(run_directory: Path, shapes_root: Path, tmp_path: Path) -> None:
    said: list[str] = []
    extract_features(run_directory, shapes_root / "train2014", tmp_path / "a.h5", images_of(shapes_root, 3),
                     options=ExtractOptions(precision="tf32"), device="cpu", say=said.append)  # fmt: skip
    assert said == ["`precision` tf32: this processor has no tf32 arithmetic: computing in float32, which is exact"]
    with store.open(tmp_path / "a.h5") as found:
        assert found.options["precision"] == "float32"


@pytest.mark.parametrize(("precision", "wanted"), [("float32", EXACT), ("tf32", TF32)])
def test_all_that_detects_computes_in_the_precision_asked_for(
    restored: None, run_directory: Path, shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    precision: str, wanted: list[object],
) -> None:  # fmt: skip
    seen = []
    start = predictor.start_detecting

    def watched(*given: Any, **named: Any) -> Any:
        seen.append(settings())
        return start(*given, **named)

    for module in (computing, predictor):
        monkeypatch.setattr(module, "start_detecting", watched)
    for place in ("refdet.device", "refdet.detector.detector"):
        monkeypatch.setattr(f"{place}.supported_precision", lambda precision, device: precision)
    older()
    images, instances = shapes_root / "val2014", shapes_root / "annotations" / "instances_val2014.json"
    index = CocoIndex.load(instances)
    image_list = ImageList(list(index.images.values())[:2], index, "two")
    extract_features(run_directory, images, tmp_path / "a.h5", image_list, device="cpu",
                     options=ExtractOptions(precision=precision))  # fmt: skip
    refdet.load_detector(run_directory, device="cpu", precision=precision).detect(np.zeros((64, 96, 3), np.uint8))
    extracted = len(seen)
    evaluate(run_directory, instances, images, device="cpu", precision=precision)
    assert len(seen) > extracted >= 2 and all(one == wanted for one in seen)


@pytest.mark.parametrize(("change", "wanted"), [("train.tf32=true", TF32), ("train.tf32=false", EXACT)])
def test_a_training_computes_as_its_recipe_says(
    restored: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, wanted: list[object]
) -> None:
    seen = []
    step = trainer.start_step
    monkeypatch.setattr(trainer, "start_step", lambda *given: seen.append(settings()) or step(*given))
    squares(tmp_path)
    older()
    run(tmp_path, change, "train.steps=1", out="cpu")
    assert seen == [EXACT]  # a CPU has no TF32
    monkeypatch.setattr(trainer, "supported_precision", lambda precision, device: precision)
    before = settings()
    run(tmp_path, change, "train.steps=1")
    assert seen == [EXACT, wanted] and settings() == before


def test_extraction_says_that_it_computes_in_float32_instead(
    run_directory: Path, shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refdet.device.supported_precision", lambda precision, device: "float32")
    images, said = images_of(shapes_root, 3), []
    for name, precision in (("a.h5", "bfloat16"), ("b.h5", "float32")):
        extract_features(run_directory, shapes_root / "train2014", tmp_path / name, images,
                         options=ExtractOptions(precision=precision), device="cpu", say=said.append)  # fmt: skip
    assert said == ["`precision` bfloat16: this processor has no bfloat16 arithmetic: computing in float32, which is "
                    "faster here and exact"]  # fmt: skip
    with store.open(tmp_path / "a.h5") as first, store.open(tmp_path / "b.h5") as second:
        assert first.options == second.options and first.options["precision"] == "float32"
        for image in first:
            np.testing.assert_array_equal(first[image].features["fc7"], second[image].features["fc7"])


def test_what_goes_to_a_gpu_goes_from_pinned_memory_and_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, copies = [], []

    def pin(values: torch.Tensor) -> torch.Tensor:
        copies.append(values.clone())
        return copies[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda values: any(values is copy for copy in copies))
    monkeypatch.setattr(torch.Tensor, "to", lambda values, *where, **how: sent.append((values, where, how)) or values)
    values, cuda = torch.arange(3), torch.device("cuda:1")
    first = to_device(values, cuda)
    assert first is copies[0] and to_device(first, cuda) is first
    assert [(where, how) for _, where, how in sent] == [((cuda,), {"non_blocking": True})] * 2 and len(copies) == 1
