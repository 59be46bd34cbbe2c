"""Training on a GPU or the CPU: every arithmetic, workers, resuming, and detection with the weights."""

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
VARIANTS: dict[str, tuple[str, ...]] = {
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


def assert_same(actual: Path, expected: Path, device: str) -> None:
    """Assert that two runs have the same weights and losses.

    Exactly on the CPU; within a tolerance on a GPU, which sums gradients in no fixed order.
    """
    actual_weights, expected_weights = weights(actual), weights(expected)
    assert actual_weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        if is_gpu(device):
            torch.testing.assert_close(actual_weights[name], value, rtol=2e-2, atol=2e-3)
        else:
            assert torch.equal(actual_weights[name], value), name
    np.testing.assert_allclose(losses(actual), losses(expected), rtol=5e-2 if is_gpu(device) else 0)


@on_devices
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_gives_the_same_weights_as_an_uninterrupted_one(
    device: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    squares(tmp_path, images=6)
    changes = (*VARIANTS[variant], *STEPS)
    assert run(tmp_path, *changes, out="whole", device=device).steps == 4
    original, calls = trainer.start_step, []

    def start_step(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "start_step", start_step)
        run(tmp_path, *changes, out="halves", device=device)
    assert checkpoint.load_meta(tmp_path / "halves").step == 2
    run(tmp_path, *changes, out="halves", device=device, resume=True)
    assert_same(tmp_path / "halves", tmp_path / "whole", device)
    whole_losses = losses(tmp_path / "whole")
    assert len(whole_losses) == 4 and np.isfinite(whole_losses).all()
    if is_gpu(device):
        arithmetic = "bfloat16" if "bfloat16" in variant else "float32" if "float32" in variant else "tf32"
        assert f"(as requested), {arithmetic}, kernels" in caplog.text


@on_every_gpu
def test_weights_trained_on_a_gpu_give_the_same_features_on_the_cpu(device: str, tmp_path: Path) -> None:
    squares(tmp_path)
    run(tmp_path, "train.steps=3", "train.bf16=true", device=device)
    assert all(value.device.type == "cpu" and value.isfinite().all() for value in weights(tmp_path / "run").values())
    regions = []
    for name in ("cpu", device):
        detector = refdet.load_detector(tmp_path / "run", device=name)
        assert str(detector.device).startswith(name)
        regions.append(detector.describe(tmp_path / "images" / "1.png", [[8, 8, 38, 38], [50, 20, 80, 50]]))
    np.testing.assert_allclose(regions[0].features["fc7"], regions[1].features["fc7"], rtol=1e-3, atol=1e-4)


@on_devices
def test_a_run_started_on_the_cpu_resumes_on_another_device(device: str, tmp_path: Path) -> None:
    squares(tmp_path)
    run(tmp_path, "train.steps=2")
    assert run(tmp_path, "train.steps=4", device=device, resume=True).steps == 4
    assert np.isfinite(losses(tmp_path / "run")).all() and len(losses(tmp_path / "run")) == 4


@on_devices
def test_batches_for_a_gpu_are_pinned_with_and_without_workers(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squares(tmp_path)
    original, pinned = trainer.start_step, []

    def start_step(model: Any, sgd: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        pinned.append(batch.images.data.is_pinned())
        return original(model, sgd, batch, *args, **kwargs)

    monkeypatch.setattr(trainer, "start_step", start_step)
    for workers in (0, 1):
        run(tmp_path, "train.steps=2", f"train.workers={workers}", out=f"run-{workers}", device=device)
    assert pinned == [is_gpu(device)] * 4


@on_devices
def test_the_first_loss_is_the_same_in_every_run(device: str, tmp_path: Path) -> None:
    """Because the initial weights, the batch and the samples are the same."""
    squares(tmp_path)
    for out in ("first", "second"):
        run(tmp_path, "train.steps=1", out=out, device=device)
    first, second = (losses(tmp_path / out)[0] for out in ("first", "second"))
    assert first == pytest.approx(second, rel=1e-5 if is_gpu(device) else 0)
