"""The average of the weights, the schedules of the learning rate, and how many states stay."""

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


def test_the_average_is_the_sum_of_weighted_steps_and_counts_with_the_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    average, expected = WeightAverage(model, 0.6), model.state_dict()["0.weight"].double()
    for step in range(1, 9):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        model(torch.randn(2, 3, 5, 5))  # which moves the norm's statistics
        decay = min(0.6, (1 + step) / (10 + step))
        expected = expected * decay + model.state_dict()["0.weight"].double() * (1 - decay)
        average.update(model, step)
    found = average.state_dict()
    torch.testing.assert_close(found["0.weight"].double(), expected)
    assert found["1.num_batches_tracked"] == 8 and not torch.equal(found["1.running_mean"], model[1].running_mean)
    assert found.keys() == model.state_dict().keys()
    other = WeightAverage(model, 0.6)
    other.load_state_dict(found)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in found.items())


def test_the_cosine_falls_from_the_whole_rate_to_nothing() -> None:
    options = tiny("train.schedule=cosine", "train.steps=100", "train.warmup_steps=10", "train.lr=0.5").train
    rates = [learning_rate(step, options) for step in range(101)]
    assert rates[0] == pytest.approx(0.05) and rates[50] == pytest.approx(0.25) and rates[100] == pytest.approx(0)
    for step in range(10, 101):
        assert rates[step] == pytest.approx(0.25 * (1 + math.cos(math.pi * step / 100)))
    assert all(before > after for before, after in zip(rates[10:], rates[11:], strict=False))
    stepped = tiny("train.steps=100", "train.lr_milestones=[0.5]", "train.warmup_steps=10", "train.lr=0.5").train
    assert [learning_rate(step, stepped) for step in (10, 49, 50)] == pytest.approx([0.5, 0.5, 0.05])


@pytest.mark.parametrize(
    ("change", "said"),
    [("train.schedule=linear", "step, cosine"), ("train.ema=1", "train.ema: must be"), ("train.keep=-1", "train.keep")],
)
def test_values_out_of_range_are_refused(change: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        tiny(change)


def test_recipes_of_before_have_none_of_them() -> None:
    tree = load("demo").to_dict()
    assert not {"schedule", "keep", "eval_every", "ema"} & tree["train"].keys()


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "kept"), [(1, [5]), (2, [4, 5]), (0, [1, 2, 3, 4, 5])])
def test_as_many_states_stay_as_were_asked_for(tmp_path: Path, keep: int, kept: list[int]) -> None:
    squares(tmp_path)
    every = ["train.checkpoint_interval=1", f"train.keep={keep}"]
    run(tmp_path, *every, "train.steps=3")
    run(tmp_path, *every, "train.steps=5", resume=True)
    assert [int(path.stem.removeprefix("step-")) for path in state_paths(tmp_path / "run")] == kept


@pytest.mark.slow
def test_another_average_is_another_run(tmp_path: Path) -> None:
    squares(tmp_path)
    run(tmp_path, "train.ema=0.9")
    with pytest.raises(InputError, match="train.ema was 0.9 and is now 0.5"):
        run(tmp_path, "train.ema=0.5", "train.steps=3", resume=True)
    with pytest.raises(InputError, match="train.schedule was step and is now cosine"):
        run(tmp_path, "train.ema=0.9", "train.schedule=cosine", "train.steps=3", resume=True)


def test_the_time_left_counts_the_validations_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("refdet.training.clock.time.perf_counter", lambda: now[0])

    class Bar:
        disable, start_t, last_print_t = False, 5.0, 7.0

    clock, bar = TrainingClock(10, 50), Bar()
    assert clock.time_left(10, 0) == ""
    now[0] += 20  # ten steps
    assert clock.time_left(20, 0) == "01:00" and clock.time_left(20, 2) == ""
    with clock.pause(bar):  # type: ignore[arg-type]
        now[0] += 30
    assert clock.time_left(20, 2) == "02:00" and clock.lap() == 20
    assert (bar.start_t, bar.last_print_t) == (35.0, 37.0)
    assert (clock.seconds, clock.step_seconds) == (50, 20)
