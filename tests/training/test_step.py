"""Steps whose losses are read late: they are those of SGD, and after a loss that is not finite nothing is saved."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from training_examples import run, squares, steps_of, tiny

from refdet.detector import checkpoint
from refdet.detector.checkpoint import read_tensors
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.errors import RuntimeFailure
from refdet.training import trainer
from refdet.training.optim import build_optimizer, momentum_of, restore_momentum, set_lr

pytestmark = pytest.mark.slow


def network() -> nn.Module:
    """A small network with a convolution, a norm and a linear layer."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5))
    return layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def backward(model: nn.Module, step: int) -> None:
    """Compute gradients from random inputs, which depend on the step only."""
    model.zero_grad()
    model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))).square().sum().backward()


def test_steps_are_the_same_as_those_of_unfused_sgd() -> None:
    options = tiny("train.momentum=0.9", "train.weight_decay=0.01").train
    ours, plain = network(), network()
    sgd = build_optimizer(ours, options)
    plain_groups = []
    for group in sgd.param_groups:
        is_weight = group["params"][0].ndim > 1
        members = [p for p in plain.parameters() if (p.ndim > 1) == is_weight]
        plain_groups.append({"params": members, "weight_decay": group["weight_decay"]})
    plain_sgd = torch.optim.SGD(
        plain_groups,
        lr=0.1, momentum=0.9, foreach=False, fused=False,
    )  # fmt: skip
    for step in range(4):
        rate = 0.1 / (step + 1)
        set_lr(sgd, rate)
        for group in plain_sgd.param_groups:
            group["lr"] = rate
        for model, optimizer in ((ours, sgd), (plain, plain_sgd)):
            backward(model, step)
            optimizer.step()
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_parameters_may_lack_a_gradient_or_saved_momentum() -> None:
    model = network()
    sgd = build_optimizer(model, tiny().train)
    backward(model, 0)
    model[3].weight.grad = None
    before = model[3].weight.detach().clone()
    sgd.step()
    assert torch.equal(model[3].weight, before)
    kept = {name: value.clone() for name, value in momentum_of(model, sgd).items() if name != "3.bias"}
    again = build_optimizer(model, tiny().train)
    restore_momentum(model, again, kept)
    backward(model, 1)
    again.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not momentum_of(model, build_optimizer(model, tiny("train.momentum=0").train))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_and_all_later_ones_change_nothing(bad: float) -> None:
    model = network()
    sgd = build_optimizer(model, tiny().train)
    for step, loss in enumerate((1.0, bad, 1.0)):
        kept = [t.detach().clone() for t in (*model.parameters(), *momentum_of(model, sgd).values())]
        backward(model, step)
        sgd.guard(torch.tensor([0.5, loss]))
        sgd.step()
        now = [*model.parameters(), *momentum_of(model, sgd).values()]
        assert all(torch.equal(a, b) == (step > 0) for a, b in zip(kept, now, strict=True))


def make_loss_nan(monkeypatch: pytest.MonkeyPatch, call: int, also: Callable[[], object] = lambda: None) -> None:
    """Make a loss NaN in a call of `MaskRCNN.compute_losses`, counted from 1, in which also `also` is called."""
    original, calls = MaskRCNN.compute_losses, []

    def compute_losses(self: MaskRCNN, *args: object) -> dict[str, torch.Tensor]:
        calls.append(args)
        terms = original(self, *args)  # type: ignore[arg-type]
        if len(calls) != call:
            return terms
        also()
        return {**terms, "loss_classifier": terms["loss_classifier"] * float("nan")}

    monkeypatch.setattr(MaskRCNN, "compute_losses", compute_losses)


@pytest.mark.parametrize("changes", [(), ("train.log_every=100",), ("train.checkpoint_interval=1",),
                                     ("train.log_every=100", "train.checkpoint_interval=3")])  # fmt: skip
def test_a_loss_that_is_not_finite_is_never_saved(
    tmp_path: Path, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The changes vary whether a row is logged and whether weights are saved at the bad step and before."""
    squares(tmp_path)
    make_loss_nan(monkeypatch, 3)
    with pytest.raises(RuntimeFailure, match=r"loss is not finite \(loss_classifier\) on images \d, \d;"):
        run(tmp_path, "train.steps=8", *changes)
    monkeypatch.undo()
    saved = (tmp_path / "run" / "model.json").exists()
    assert saved == ("train.checkpoint_interval=1" in changes)
    if saved:
        assert checkpoint.load_meta(tmp_path / "run").step == 2
        run(tmp_path, "train.steps=8", *changes, resume=True)
        run(tmp_path, "train.steps=8", *changes, out="whole")
        whole, resumed = (read_tensors(tmp_path / out / "model.safetensors")[0] for out in ("whole", "run"))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_signal_after_a_bad_step_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squares(tmp_path)
    make_loss_nan(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(RuntimeFailure, match="loss is not finite"):
        run(tmp_path, "train.steps=8", "train.log_every=100")
    assert not (tmp_path / "run" / "model.json").exists()


def test_losses_are_read_a_step_late_and_logged_for_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squares(tmp_path)
    events: list[str] = []
    original = trainer.start_step

    class RecordedStep:
        def __init__(self, number: int, pending: trainer.PendingStep) -> None:
            self.number, self.pending = number, pending

        def losses(self) -> dict[str, float]:
            events.append(f"read {self.number}")
            return self.pending.losses()

    def start_step(*args: object) -> RecordedStep:
        number = sum(event.startswith("start") for event in events)
        events.append(f"start {number}")
        return RecordedStep(number, original(*args))  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "start_step", start_step)
    run(tmp_path, "train.steps=5", "train.log_every=4")
    assert events == ["start 0", "start 1", "read 0", "start 2", "read 1", "start 3", "read 2", "read 3", "start 4",
                      "read 4"]  # fmt: skip
    assert steps_of(tmp_path / "run") == [4, 5]
