"""The moving average of the weights, learning rate schedules, the number of states kept, and the time left."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from training_examples import run, squares, tiny

from refdet.config.recipe import load
from refdet.errors import InputError
from refdet.training.clock import TrainingClock
from refdet.training.ema import WeightAverage
from refdet.training.optim import learning_rate
from refdet.training.run_folder import state_paths


def test_the_average_weights_each_step_and_copies_batch_counters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    average, expected = WeightAverage(model, 0.6), model.state_dict()["0.weight"].double()
    for step in range(1, 9):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        model(torch.randn(2, 3, 5, 5))  # updates the norm's running statistics
        decay = min(0.6, (1 + step) / (10 + step))
        expected = expected * decay + model.state_dict()["0.weight"].double() * (1 - decay)
        average.update(model, step)
    found = average.state_dict()
    torch.testing.assert_close(found["0.weight"].double(), expected)
    assert found["1.num_batches_tracked"] == 8 and not torch.equal(found["1.running_mean"], model[1].running_mean)
    assert found.keys() == model.state_dict().keys()
    restored = WeightAverage(model, 0.6)
    restored.load_state_dict(found)
    assert all(torch.equal(restored.state_dict()[name], value) for name, value in found.items())


def test_the_cosine_schedule_falls_from_the_full_learning_rate_to_zero() -> None:
    options = tiny("train.schedule=cosine", "train.steps=100", "train.warmup_steps=10", "train.lr=0.5").train
    rates = [learning_rate(step, options) for step in range(101)]
    assert rates[0] == pytest.approx(0.05) and rates[50] == pytest.approx(0.25) and rates[100] == pytest.approx(0)
    for step in range(10, 101):
        assert rates[step] == pytest.approx(0.25 * (1 + math.cos(math.pi * step / 100)))
    assert all(before > after for before, after in zip(rates[10:], rates[11:], strict=False))
    stepped = tiny("train.steps=100", "train.lr_milestones=[0.5]", "train.warmup_steps=10", "train.lr=0.5").train
    assert [learning_rate(step, stepped) for step in (10, 49, 50)] == pytest.approx([0.5, 0.5, 0.05])


@pytest.mark.parametrize(
    ("change", "message"),
    [("train.schedule=linear", "step, cosine"), ("train.ema=1", "train.ema: must be"), ("train.keep=-1", "train.keep")],
)
def test_invalid_values_are_rejected(change: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(change)


def test_recipes_leave_out_keys_that_have_their_default() -> None:
    tree = load("demo").to_dict()
    assert not {"schedule", "keep", "eval_every", "ema"} & tree["train"].keys()


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "kept"), [(1, [5]), (2, [4, 5]), (0, [1, 2, 3, 4, 5])])
def test_train_keep_is_the_number_of_states_kept(tmp_path: Path, keep: int, kept: list[int]) -> None:
    squares(tmp_path)
    changes = ["train.checkpoint_interval=1", f"train.keep={keep}"]
    run(tmp_path, *changes, "train.steps=3")
    run(tmp_path, *changes, "train.steps=5", resume=True)
    assert [int(path.stem.removeprefix("step-")) for path in state_paths(tmp_path / "run")] == kept


@pytest.mark.slow
def test_resuming_with_another_average_or_schedule_is_rejected(tmp_path: Path) -> None:
    squares(tmp_path)
    run(tmp_path, "train.ema=0.9")
    with pytest.raises(InputError, match="train.ema was 0.9 and is now 0.5"):
        run(tmp_path, "train.ema=0.5", "train.steps=3", resume=True)
    with pytest.raises(InputError, match="train.schedule was step and is now cosine"):
        run(tmp_path, "train.ema=0.9", "train.schedule=cosine", "train.steps=3", resume=True)


def test_the_time_left_includes_the_validations_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("refdet.training.clock.time.perf_counter", lambda: now[0])

    class FakeBar:
        """The attributes of a tqdm bar that a pause moves."""

        disable, start_t, last_print_t = False, 5.0, 7.0

    clock, bar = TrainingClock(10, 50), FakeBar()
    assert clock.time_left(10, 0) == ""
    now[0] += 20  # ten steps
    assert clock.time_left(20, 0) == "01:00" and clock.time_left(20, 2) == ""
    with clock.pause(bar):  # type: ignore[arg-type]
        now[0] += 30
    assert clock.time_left(20, 2) == "02:00" and clock.lap() == 20
    assert (bar.start_t, bar.last_print_t) == (35.0, 37.0)
    assert (clock.seconds, clock.step_seconds) == (50, 20)
