"""Validation during training: what it measures, what it keeps, and resuming a run that was stopped during it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_examples import run, squares

from refdet.detector import checkpoint
from refdet.detector.checkpoint import read_tensors
from refdet.errors import InputError, Interrupted
from refdet.evaluation.detection import evaluate
from refdet.training import best, validator
from refdet.training.best import read_best
from refdet.training.validation import is_due, validations_after

pytestmark = pytest.mark.slow

LEARNS = ["train.lr=0.02", "model.anchor_sizes=[8,16,32,48,64]"]
EVERY_2 = [*LEARNS, "train.steps=6", "train.eval_every=2", "train.log_every=2"]


def learnable_squares(root: Path, images: int) -> None:
    """Write the `squares`, with visible objects that a detector can learn."""
    squares(root, images=images)
    for path in (root / "images").iterdir():
        with Image.open(path) as picture:
            pen = ImageDraw.Draw(picture)
            pen.rectangle((8, 8, 37, 37), (255, 255, 255))
            pen.rectangle((50, 20, 79, 49), (0, 0, 255))
            picture.save(path)


@pytest.fixture(scope="module")
def trained_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training images; validation images under ``val``; and a run ``start``, whose weights find some of the objects."""
    root = tmp_path_factory.mktemp("validation")
    learnable_squares(root, 4)
    learnable_squares(root / "val", 3)
    run(root, *LEARNS, "train.steps=60", out="start")
    return root


@pytest.fixture
def data(trained_data: Path, tmp_path: Path) -> Path:
    """A copy of `trained_data` that a test may change and train in."""
    shutil.copytree(trained_data, tmp_path / "data", ignore=shutil.ignore_patterns("whole*"))
    return tmp_path / "data"


def train(root: Path, *changes: str, out: str = "run", **more: Any) -> Path:
    """Train from ``start`` with validation; returns the run directory."""
    val = {"val_instances": root / "val/instances.json", "val_images": root / "val/images"}
    run(root, *changes, out=out, **{"weights": root / "start", **val, **more})
    return root / out


@pytest.fixture(scope="module")
def whole(trained_data: Path) -> Callable[[float], Path]:
    """Uninterrupted runs of 6 steps: a function from ``train.ema`` to the run directory."""
    return functools.cache(lambda ema: train(trained_data, *EVERY_2, f"train.ema={ema}", out=f"whole-{ema}"))


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def validations(out: Path) -> list[dict[str, Any]]:
    return [row for row in rows(out) if "val_bbox_AP" in row]


def evaluate_run(root: Path, checkpoint: Path) -> dict[str, float]:
    """Metrics by ``refdet evaluate``, under their names in metrics.jsonl."""
    results = evaluate(checkpoint, root / "val/instances.json", root / "val/images", device="cpu")
    return {
        f"val_{kind}_{name}": value
        for kind, values in results.items()
        for name, value in (values or {}).items()
        if value is not None
    }


def same_weights(first: Path, second: Path) -> bool:
    a, b = (read_tensors(path / "model.safetensors")[0] for path in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("ema", [0, 0.5])
def test_validation_measures_the_same_as_evaluate_and_keeps_the_best(
    trained_data: Path, whole: Callable, ema: float
) -> None:
    out = whole(ema)
    validation_rows = validations(out)
    assert len({row["val_bbox_AP"] for row in validation_rows}) > 1 and validation_rows[-1]["val_segm_AP"] > 0
    assert [row["step"] for row in validation_rows] == [2, 4, 6]
    assert all(row.get("weights") == ("ema" if ema else None) for row in validation_rows)
    metrics = {name: value for name, value in validation_rows[-1].items() if name.startswith("val_")}
    assert metrics == evaluate_run(trained_data, out)  # exactly
    kept = read_best(out)
    assert kept is not None and kept.value == max(row["val_bbox_AP"] for row in validation_rows)
    assert kept.rates == evaluate_run(trained_data, out / "best")
    assert checkpoint.load_meta(out / "best").step == kept.step
    board = EventAccumulator(str(out))
    board.Reload()
    assert [event.step for event in board.Scalars("val/segm_AP")] == [2, 4, 6]
    card = (out / "README.md").read_text()
    assert "## AP on 3 images of instances.json" in card and "step 6 | 0." in card and "box AP" in card
    assert kept.step == 6 or f"| boxes, best, step {kept.step} | {kept.value:.3f} |" in card
    assert ("an exponential average over the steps (train.ema=0.5)" in card) == bool(ema)


def test_validation_does_not_change_the_weights(data: Path, whole: Callable) -> None:
    run(data, *EVERY_2, out="alone", weights=data / "start")
    assert same_weights(whole(0), data / "alone")
    assert not (data / "alone/best").exists()


@pytest.mark.parametrize(("step", "ema"), [(3, 0), (2, 0.5), (3, 0.5)])
def test_a_resumed_run_gives_the_same_weights_and_validations(
    data: Path, whole: Callable, step: int, ema: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [*EVERY_2, f"train.ema={ema}"]
    from refdet.training import trainer

    original, calls = trainer.start_step, []

    def start_step(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "start_step", start_step)
        with pytest.raises(Interrupted, match=f"after step {step}, which is saved"):
            train(data, *changes, out="halves")
    train(data, *changes, out="halves", resume=True)
    assert validations(data / "halves") == validations(whole(ema))
    assert same_weights(data / "halves", whole(ema)) and same_weights(data / "halves/best", whole(ema) / "best")
    (state,) = (data / "halves/state").iterdir()
    a, b = (read_tensors(path)[0] for path in (state, whole(ema) / "state" / state.name))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert any(name.startswith("ema/") for name in a) == bool(ema)


class Killed(BaseException):
    """Stands for SIGKILL. The code patched with it must not clean up in a `finally` clause either."""


def raise_killed(*given: object, **more: object) -> None:
    raise Killed


Kill = Callable[[pytest.MonkeyPatch], None]  # patches a function so that it raises Killed


def kill_while_measuring(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(validator, "detection_ap", raise_killed)


def kill_while_writing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(best, "write_json", raise_killed)
    patch.setattr(shutil, "rmtree", lambda *given, **more: None)


def kill_between_renames(patch: pytest.MonkeyPatch) -> None:
    original = os.replace

    def replace_or_die(source: Path, target: Path) -> None:
        if Path(target).name == "best" and "refdet-tmp" in Path(source).name:
            raise Killed
        original(source, target)

    patch.setattr(best.os, "replace", replace_or_die)
    patch.setattr(shutil, "rmtree", lambda *given, **more: None)


def kill_before_the_row(patch: pytest.MonkeyPatch) -> None:
    from refdet.training.metrics_log import MetricsLog

    patch.setattr(MetricsLog, "write_validation", raise_killed)


@pytest.mark.parametrize(
    ("kill", "at"),
    [
        (kill_while_measuring, 2),
        (kill_while_writing, 6),
        (kill_between_renames, 2),
        (kill_between_renames, 6),
        (kill_before_the_row, 6),
    ],
)
def test_a_run_killed_during_a_validation_loses_nothing(
    data: Path, whole: Callable, kill: Kill, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = validator.Validator.validate

    def validate(self: Any, weights: Any, meta: Any, *given: Any) -> Any:
        if meta.step == at:
            if self._best is not None and kill in (kill_while_writing, kill_between_renames):
                self._best = replace(self._best, value=-1.0)  # so that this validation replaces the best
            kill(patch)
        return original(self, weights, meta, *given)

    with monkeypatch.context() as patch:
        patch.setattr(validator.Validator, "validate", validate)
        with pytest.raises(Killed):
            train(data, *EVERY_2, out="halves")
    assert [row["step"] for row in validations(data / "halves")] == [2, 4][: at // 2 - 1]
    train(data, *EVERY_2, out="halves", resume=True)
    assert validations(data / "halves") == validations(whole(0))
    assert same_weights(data / "halves", whole(0))
    kept = read_best(data / "halves")
    assert kept is not None and kept.rates == evaluate_run(data, data / "halves/best")
    assert kept.value == max(row["val_bbox_AP"] for row in validations(whole(0)))
    assert not [path for path in (data / "halves").iterdir() if "refdet-tmp" in path.name]


def test_a_signal_stops_a_validation_and_resuming_repeats_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = validator.detection_ap

    def detection_ap(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(validator, "detection_ap", detection_ap)
        with pytest.raises(
            Interrupted, match="stopped by SIGTERM during validation, after step 2, which is saved; continue with"
        ):
            train(data, *EVERY_2)
    assert not validations(data / "run") and not (data / "run/best").exists()
    train(data, *EVERY_2, resume=True)
    assert [row["step"] for row in validations(data / "run")] == [2, 4, 6]


def test_a_finished_run_can_be_validated_later(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(data, *LEARNS, "train.steps=2", weights=data / "start")
    train(data, *LEARNS, "train.steps=2", resume=True)
    (row,) = validations(data / "run")
    assert row["step"] == 2 and evaluate_run(data, data / "run")["val_bbox_AP"] == row["val_bbox_AP"]
    train(data, *LEARNS, "train.steps=2", resume=True)
    assert len(validations(data / "run")) == 1 and "2 steps are done" in caplog.text
    run(data, *LEARNS, "train.steps=4", resume=True)
    assert "was validated before, but is not now; give `val_instances`" in caplog.text


def test_other_validation_data_replaces_the_best(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(data, *LEARNS, "train.steps=2")
    squares(data / "val", images=2)
    train(data, *LEARNS, "train.steps=3", resume=True)
    assert "best was chosen on other data (instances.json); the next validation replaces it" in caplog.text
    kept = read_best(data / "run")
    assert kept is not None and (kept.step, kept.images) == (3, 2)
    squares(data / "val", images=1)
    train(data, *LEARNS, "train.steps=3", resume=True)  # all steps are done
    kept = read_best(data / "run")
    assert kept is not None and (kept.step, kept.images) == (3, 1)
    (data / "run/best/validation.json").write_text('{"metric": 3}')
    with pytest.raises(
        InputError, match=r"validation\.json: damaged \(metric: str is needed, not 3\); remove the fold"
    ):
        train(data, *LEARNS, "train.steps=4", resume=True)


def test_a_run_killed_during_its_first_validation_on_other_data_loses_nothing(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(data, *LEARNS, "train.steps=2")
    squares(data / "val", images=2)
    with monkeypatch.context() as patch:
        kill_before_the_row(patch)
        with pytest.raises(Killed):
            train(data, *LEARNS, "train.steps=2", resume=True)
    train(data, *LEARNS, "train.steps=2", resume=True)
    first, second = validations(data / "run")
    kept = read_best(data / "run")
    assert kept is not None and (first["step"], second["step"]) == (2, 2)
    assert first["data_sha256"] != second["data_sha256"] == kept.data_sha256


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a category": (lambda t: t["categories"][0].update(name="c"), "classes"),
    "no objects": (lambda t: t["annotations"].clear(), "`val_instances` .*AP is not defined"),
    "no images": (lambda t: (t["annotations"].clear(), t["images"].clear()), "has no images to evaluate on"),
    "a missing image": (lambda t: t["images"][0].update(file_name="none.png"), "`val_images` .*: 1 of .*none.png"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_invalid_validation_data_is_rejected_before_the_first_step(data: Path, change: Callable, message: str) -> None:
    squares(data / "val", change)
    with pytest.raises(InputError, match=message):
        train(data, *EVERY_2)
    assert not (data / "run").exists()


def test_validation_images_that_are_trained_on_are_counted(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    squares(data / "val", lambda tree: tree["images"][0].update(file_name="1.png"), images=3)
    train(data, *LEARNS, "train.steps=1")
    assert "3 of 3 images are trained on too, by file name" in caplog.text
    assert "validation: 3 images of instances.json, at the end, with the weights; best/ keeps" in caplog.text
    with pytest.raises(InputError, match="`val_images`: these images need annotations"):
        run(data, val_images=data / "val/images", out="other")


@pytest.mark.parametrize(("steps", "every", "due"), [(6, 2, [2, 4, 6]), (7, 3, [3, 6, 7]), (5, 0, [5]), (3, 9, [3])])
def test_validations_are_due_at_each_interval_and_at_the_end(steps: int, every: int, due: list[int]) -> None:
    from training_examples import tiny

    options = tiny(f"train.steps={steps}", f"train.eval_every={every}").train
    assert [step for step in range(1, steps + 1) if is_due(step, options)] == due
    for step in range(steps + 1):
        assert validations_after(step, options) == sum(later > step for later in due), step
