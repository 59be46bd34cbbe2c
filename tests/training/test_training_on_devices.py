"""Training on a GPU: in every arithmetic, with workers, resumed, and used for detection afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import is_gpu, on_devices, on_every_gpu
from torch import Tensor
from training_examples import run, squares

import refdet
from refdet.detector import checkpoint
from refdet.training import trainer

pytestmark = pytest.mark.slow

C4 = ("model.neck=c4", "model.anchor_sizes=[16,32,64]")
KINDS: dict[str, tuple[str, ...]] = {
    "fpn": (),
    "fpn in bfloat16": ("train.bf16=true", "train.workers=2"),
    "fpn in float32": ("train.tf32=false",),
    "c4": (*C4, "train.workers=2"),
    "c4 in bfloat16": (*C4, "train.bf16=true", "model.depth=50"),
    "without masks": ("model.masks=false", "head.sample_with_replacement=true"),
}
STEPS = ("train.steps=4", "train.checkpoint_interval=2")


def weights(folder: Path) -> dict[str, Tensor]:
    return checkpoint.read_tensors(folder / checkpoint.MODEL)[0]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(found: Path, wanted: Path, device: str) -> None:
    """Bit for bit on the CPU; on a GPU gradients are summed in no fixed order."""
    one, other = weights(found), weights(wanted)
    assert one.keys() == other.keys()
    for name, value in other.items():
        if is_gpu(device):
            torch.testing.assert_close(one[name], value, rtol=2e-2, atol=2e-3)
        else:
            assert torch.equal(one[name], value), name
    np.testing.assert_allclose(losses(found), losses(wanted), rtol=5e-2 if is_gpu(device) else 0)


@on_devices
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_same_run(
    device: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    squares(tmp_path, images=6)
    changes = (*KINDS[kind], *STEPS)
    assert run(tmp_path, *changes, out="whole", device=device).steps == 4
    step, calls = trainer.start_step, []

    def stops(*given: Any, **named: Any) -> Any:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*given, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "start_step", stops)
        run(tmp_path, *changes, out="halves", device=device)
    assert checkpoint.load_meta(tmp_path / "halves").step == 2
    run(tmp_path, *changes, out="halves", device=device, resume=True)
    assert_same(tmp_path / "halves", tmp_path / "whole", device)
    found = losses(tmp_path / "whole")
    assert len(found) == 4 and np.isfinite(found).all()
    if is_gpu(device):
        arithmetic = "bfloat16" if "bfloat16" in kind else "float32" if "float32" in kind else "tf32"
        assert f"(as requested), {arithmetic}, kernels" in caplog.text


@on_every_gpu
def test_what_is_trained_detects_on_either_device(device: str, tmp_path: Path) -> None:
    squares(tmp_path)
    run(tmp_path, "train.steps=3", "train.bf16=true", device=device)
    assert all(value.device.type == "cpu" and value.isfinite().all() for value in weights(tmp_path / "run").values())
    found = []
    for where in ("cpu", device):
        detector = refdet.load_detector(tmp_path / "run", device=where)
        assert str(detector.device).startswith(where)
        found.append(detector.describe(tmp_path / "images" / "1.png", [[8, 8, 38, 38], [50, 20, 80, 50]]))
    np.testing.assert_allclose(found[0].features["fc7"], found[1].features["fc7"], rtol=1e-3, atol=1e-4)


@on_devices
def test_what_the_cpu_began_a_gpu_may_go_on_with(device: str, tmp_path: Path) -> None:
    squares(tmp_path)
    run(tmp_path, "train.steps=2")
    assert run(tmp_path, "train.steps=4", device=device, resume=True).steps == 4
    assert np.isfinite(losses(tmp_path / "run")).all() and len(losses(tmp_path / "run")) == 4


@on_devices
def test_batches_are_pinned_by_workers_and_without(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squares(tmp_path)
    step, pinned = trainer.start_step, []

    def watched(model: Any, sgd: Any, batch: Any, *given: Any, **named: Any) -> Any:
        pinned.append(batch.images.data.is_pinned())
        return step(model, sgd, batch, *given, **named)

    monkeypatch.setattr(trainer, "start_step", watched)
    for workers in (0, 1):
        run(tmp_path, "train.steps=2", f"train.workers={workers}", out=f"run-{workers}", device=device)
    assert pinned == [is_gpu(device)] * 4


@on_devices
def test_a_step_does_not_depend_on_the_run(device: str, tmp_path: Path) -> None:
    """Twice the same first loss: the same weights, batch and samples."""
    squares(tmp_path)
    for out in ("first", "second"):
        run(tmp_path, "train.steps=1", out=out, device=device)
    first, second = (losses(tmp_path / out)[0] for out in ("first", "second"))
    assert first == pytest.approx(second, rel=1e-5 if is_gpu(device) else 0)
