"""Training on the synthetic dataset, at a size that takes seconds."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from refdet.config import recipe
from refdet.config.recipe import Recipe
from refdet.config.renamed_keys import LOSSES
from refdet.data.coco import CocoIndex
from refdet.data.image_source import ImageSource
from refdet.data.training_batches import TrainingBatches
from refdet.detector import checkpoint, loading
from refdet.detector.checkpoint import read_tensors
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.errors import InputError, Interrupted, RuntimeFailure
from refdet.evaluation.detection import evaluate
from refdet.training import trainer
from refdet.training.optim import build_optimizer, learning_rate
from refdet.training.step import PendingStep
from refdet.training.summary import Summary
from refdet.training.train import train

pytestmark = pytest.mark.slow

TINY = ["model.width=8", "model.mask_channels=8", "model.rpn_channels=16", "train.batch_size=2", "train.workers=0",
        "head.batch_size_per_image=8", "train.warmup_steps=2", "train.log_every=2", "input.min_sizes=[80]"]  # fmt: skip


def tiny_recipe(*changes: str) -> Recipe:
    return recipe.load("demo").with_changes([*TINY, *changes])


def run(root: Path, out: Path, *changes: str, **more: object) -> Summary:
    instances = root / "annotations" / "instances_val2014.json"
    return train(tiny_recipe(*changes), instances, root / "val2014", out, device="cpu", **more)  # type: ignore[arg-type]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_other_commands_can_use_a_run_directory(shapes_root: Path, tmp_path: Path) -> None:
    summary = run(shapes_root, tmp_path / "run", "train.steps=4")
    assert summary.steps == 4 and summary.loss > 0
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4]
    loss_names = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    assert {"loss", "lr", "images_per_second"} | loss_names <= set(rows[0])
    assert all(row[old] == row[name] for row in rows for name, old in LOSSES.items())
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    loaded = loading.load(tmp_path / "run")
    index = CocoIndex.load(shapes_root / "annotations" / "instances_val2014.json")
    assert loaded.meta.step == 4
    assert dict(loaded.meta.categories) == index.categories
    assert loaded.meta.provenance.images == len(index.images)
    assert not loaded.model.training
    found = evaluate(
        tmp_path / "run", shapes_root / "annotations" / "instances_minival2014.json", shapes_root / "val2014",
        device="cpu",
    )  # fmt: skip
    assert 0 <= found["bbox"]["AP50"] <= 1 and 0 <= found["segm"]["AP50"] <= 1  # type: ignore[index]


# Step 5 of 6 reads a damaged image. Then the 4 steps before are saved or, as if the process was killed, only the
# regular save after step 3 remains.
@pytest.mark.parametrize(("workers", "saved"), [(0, 4), (1, 4), (0, 3)])
def test_a_resumed_run_gives_the_same_weights_as_an_uninterrupted_one(
    shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, saved: int
) -> None:
    run(shapes_root, tmp_path / "whole", "train.steps=6", "train.checkpoint_interval=3")
    shutil.copytree(shapes_root / "val2014", tmp_path / "images")
    paths = sorted((tmp_path / "images").glob("*.jpg"))
    instances = shapes_root / "annotations" / "instances_val2014.json"
    changes = tiny_recipe("train.steps=6", "train.checkpoint_interval=3", f"train.workers={workers}")

    batches = TrainingBatches(CocoIndex.load(instances), ImageSource.open(tmp_path / "images"), changes)
    early = {i for step in range(4) for i in batches[step].image_ids}
    late = [i for step in (4, 5) for i in batches[step].image_ids if i not in early]
    bad_path = next(p for p in paths if int(p.stem.split("_")[-1]) == late[0])
    good = bad_path.read_bytes()
    bad_path.write_bytes(b"gone")
    message = rf"{bad_path.name}: .*\(training stopped after step 4, which is saved; replace the file and continue with"
    with monkeypatch.context() as patch:
        if saved == 3:
            patch.setattr(trainer._Training, "_save_before_exit", lambda self, step, first: "without saving")
            message = f"{bad_path.name}: .*without saving"
        with pytest.raises(InputError, match=message):
            train(changes, instances, tmp_path / "images", tmp_path / "halves", device="cpu")
    assert checkpoint.load_meta(tmp_path / "halves").step == saved
    bad_path.write_bytes(good)
    train(changes, instances, tmp_path / "images", tmp_path / "halves", resume=True, device="cpu")

    whole, _ = read_tensors(tmp_path / "whole" / "model.safetensors")
    halves, _ = read_tensors(tmp_path / "halves" / "model.safetensors")
    assert whole.keys() == halves.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, halves[name]), name
    assert [r["step"] for r in metrics(tmp_path / "halves")] == [2, 4, 6]
    assert [r["loss"] for r in metrics(tmp_path / "halves")][-1] == metrics(tmp_path / "whole")[-1]["loss"]


@pytest.mark.parametrize(
    ("number", "name", "workers"),
    [(signal.SIGTERM, "SIGTERM", 0), (signal.SIGTERM, "SIGTERM", 1), (signal.SIGINT, "Ctrl-C", 1),
     (signal.SIGHUP, "SIGHUP", 0)],
)  # fmt: skip
def test_a_signal_saves_the_steps_done(
    shapes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    name: str,
    workers: int,
) -> None:
    original, calls = trainer.start_step, []

    def start_step(*args: object) -> PendingStep:
        calls.append(args)
        if len(calls) == 3:  # to every process of the job, as a scheduler does
            for process in multiprocessing.active_children():
                os.kill(process.pid, number)  # type: ignore[arg-type]
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # and again, as impatient users do
        return original(*args)  # type: ignore[arg-type]

    before = signal.getsignal(number)
    monkeypatch.setattr(trainer, "start_step", start_step)
    changes = ["train.steps=6", "train.checkpoint_interval=5000", f"train.workers={workers}"]
    with pytest.raises(Interrupted, match=rf"stopped by {name} after step 3, which is saved"):
        run(shapes_root, tmp_path / "run", *changes)
    assert checkpoint.load_meta(tmp_path / "run").step == 3
    assert signal.getsignal(number) == before and not multiprocessing.active_children()
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"train\.steps=2, but 3 steps are done; give 3 or more"):
        run(shapes_root, tmp_path / "run", "train.steps=2", resume=True)
    assert run(shapes_root, tmp_path / "run", *changes, resume=True).steps == 6


def test_resuming_before_the_first_save_starts_from_the_given_weights(shapes_root: Path, tmp_path: Path) -> None:
    run(shapes_root, tmp_path / "first", "train.steps=2")
    nearly_unchanged = ["train.steps=1", "train.lr=1e-9"]
    run(shapes_root, tmp_path / "second", *nearly_unchanged, weights=tmp_path / "first", resume=True)
    before, _ = read_tensors(tmp_path / "first" / "model.safetensors")
    after, _ = read_tensors(tmp_path / "second" / "model.safetensors")
    torch.testing.assert_close(after["head.fc6.weight"], before["head.fc6.weight"], atol=1e-5, rtol=0)


def test_resuming_a_finished_run_changes_nothing(shapes_root: Path, tmp_path: Path) -> None:
    run(shapes_root, tmp_path / "run", "train.steps=2")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert run(shapes_root, tmp_path / "run", "train.steps=2", resume=True).steps == 2
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def make_infinite(model: MaskRCNN, term: torch.Tensor) -> torch.Tensor:
    return term * float("inf")


def make_gradient_nonfinite(model: MaskRCNN, term: torch.Tensor) -> torch.Tensor:
    """Add 0 as a square root, whose slope at 0 is infinite."""
    weight = model.rpn.conv.weight
    return term + (weight - weight.detach()).abs().sqrt().sum()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(make_infinite, r"loss is not finite \(loss_box_reg\)"), (make_gradient_nonfinite, "gradient is not finite")],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_keeps_the_weights(
    shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable, message: str
) -> None:
    original, calls = MaskRCNN.compute_losses, []

    def compute_losses(self: MaskRCNN, *args: object) -> dict:
        calls.append(args)
        terms = original(self, *args)  # type: ignore[arg-type]
        return {**terms, "loss_box_reg": spoil(self, terms["loss_box_reg"])} if len(calls) == 4 else terms

    monkeypatch.setattr(MaskRCNN, "compute_losses", compute_losses)
    with pytest.raises(RuntimeFailure, match=rf"{message} on images \d+, \d+;"):
        run(shapes_root, tmp_path / "run", "train.steps=6", "train.checkpoint_interval=3")
    assert checkpoint.load_meta(tmp_path / "run").step == 3
    kept, _ = read_tensors(tmp_path / "run" / "model.safetensors")
    assert all(t.isfinite().all() for t in kept.values())


@pytest.mark.parametrize("changes", [["train.batch_size=1"], ["train.batch_size=2", "train.accumulate=2"]])
def test_an_image_that_is_too_small_for_batch_norm_is_named(
    shapes_root: Path, tmp_path: Path, changes: list[str]
) -> None:
    message = r"^images? \d.*: too small for batch norm, .*; lower train.accumulate, or start a new run with a larger"
    with pytest.raises(RuntimeFailure, match=message):
        run(shapes_root, tmp_path / "run", "train.steps=2", "input.min_sizes=[16]", "input.max_size=32", *changes)
    run(shapes_root, tmp_path / "pair", "train.steps=2", "input.min_sizes=[16]", "input.max_size=32")


def test_data_that_does_not_fit_the_run_or_weights_is_rejected(shapes_root: Path, tmp_path: Path) -> None:
    run(shapes_root, tmp_path / "run", "train.steps=2")
    with pytest.raises(InputError, match="exists; choose another"):
        run(shapes_root, tmp_path / "run", "train.steps=2")
    with pytest.raises(InputError, match=r"model\.width was 8 and is now 16"):
        run(shapes_root, tmp_path / "run", "train.steps=2", "model.width=16", resume=True)
    fewer = json.loads((shapes_root / "annotations" / "instances_val2014.json").read_text())
    gone = fewer["categories"].pop()["id"]
    fewer["annotations"] = [a for a in fewer["annotations"] if a["category_id"] != gone]
    (tmp_path / "fewer.json").write_text(json.dumps(fewer))
    with pytest.raises(InputError, match=r"the checkpoint has \d+ classes, the instances file \d+; .*reset_predictors"):
        train(tiny_recipe(), tmp_path / "fewer.json", shapes_root / "val2014", tmp_path / "b", weights=tmp_path / "run")
    with pytest.raises(InputError, match="classes"):
        evaluate(tmp_path / "run", tmp_path / "fewer.json", shapes_root / "val2014")
    with pytest.raises(InputError, match="no model.json there"):
        evaluate(tmp_path, tmp_path / "fewer.json", shapes_root / "val2014")
    for annotation in fewer["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(fewer))
    with pytest.raises(InputError, match=r"model\.masks=false"):
        train(tiny_recipe(), tmp_path / "boxes.json", shapes_root / "val2014", tmp_path / "b")
    boxes_only = tiny_recipe("model.masks=false", "train.steps=1")
    train(boxes_only, tmp_path / "boxes.json", shapes_root / "val2014", tmp_path / "b")
    assert not [name for name in read_tensors(tmp_path / "b" / "model.safetensors")[0] if "mask" in name]


def test_a_run_starts_from_weights_and_records_them_in_its_provenance(shapes_root: Path, tmp_path: Path) -> None:
    run(shapes_root, tmp_path / "first", "train.steps=2")
    run(shapes_root, tmp_path / "second", "train.steps=1", "train.lr=1e-9", weights=tmp_path / "first")
    before, _ = read_tensors(tmp_path / "first" / "model.safetensors")
    after, _ = read_tensors(tmp_path / "second" / "model.safetensors")
    torch.testing.assert_close(after["backbone.conv1.weight"], before["backbone.conv1.weight"], atol=1e-5, rtol=0)
    weights = checkpoint.load_meta(tmp_path / "second").provenance.weights
    assert weights is not None and weights.startswith("first (sha256 ")
    reset = ["train.steps=1", "train.lr=1e-9", "train.reset_predictors=true"]
    run(shapes_root, tmp_path / "third", *reset, weights=tmp_path / "first")
    third, _ = read_tensors(tmp_path / "third" / "model.safetensors")
    assert not torch.allclose(third["head.box.score.weight"], before["head.box.score.weight"])
    torch.testing.assert_close(third["backbone.conv1.weight"], before["backbone.conv1.weight"], atol=1e-5, rtol=0)


def test_frozen_norms_need_weights(shapes_root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.norm=frozen .*`weights=RUN_DIR`"):
        run(shapes_root, tmp_path / "run", "train.steps=1", "model.norm=frozen")
    assert not (tmp_path / "run").exists()


def test_a_state_without_the_prefixes_of_new_layers_resumes(shapes_root: Path, tmp_path: Path) -> None:
    run(shapes_root, tmp_path / "run", "train.steps=1")
    (state,) = (tmp_path / "run" / "state").glob("*.safetensors")
    tensors, metadata = read_tensors(state)
    checkpoint.write_tensors(state, tensors, {"meta": metadata["meta"]})
    assert run(shapes_root, tmp_path / "run", "train.steps=1", resume=True).steps == 1


def test_damaged_checkpoints_are_named(shapes_root: Path, tmp_path: Path) -> None:
    run(shapes_root, tmp_path / "run", "train.steps=1")
    model, meta = tmp_path / "run" / "model.safetensors", tmp_path / "run" / "model.json"
    tree = json.loads(meta.read_text())
    meta.write_text(json.dumps({**tree, "categories": tree["categories"][:-1]}))
    with pytest.raises(InputError, match=r"the weights do not fit the recipe: .* is \(\d+, "):
        loading.load(tmp_path / "run")
    meta.write_text(json.dumps({"recipe": {}}))
    with pytest.raises(InputError, match=r"model\.json"):
        loading.load(tmp_path / "run")
    meta.write_text(json.dumps(tree))
    model.write_bytes(model.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        loading.load(tmp_path / "run")


def test_the_learning_rate_warms_up_and_falls_at_milestones() -> None:
    options = tiny_recipe(
        "train.lr=1", "train.steps=100", "train.warmup_steps=10", "train.lr_milestones=[0.5, 0.75]"
    ).train
    rates = [round(learning_rate(step, options), 6) for step in (0, 5, 10, 49, 50, 74, 75, 99)]
    assert rates == [0.1, 0.55, 1, 1, 0.1, 0.1, 0.01, 0.01]
    short = tiny_recipe("train.lr=1", "train.steps=10", "train.warmup_steps=500", "train.lr_milestones=[0.9]").train
    assert [round(learning_rate(step, short), 6) for step in (0, 1, 2, 8, 9)] == [0.1, 0.55, 1, 1, 0.1]


def test_biases_and_norms_have_no_weight_decay() -> None:
    model = MaskRCNN(tiny_recipe(), 3)
    with_decay, without = build_optimizer(model, tiny_recipe().train).param_groups
    assert with_decay["weight_decay"] > 0 and without["weight_decay"] == 0
    assert all(p.ndim > 1 for p in with_decay["params"]) and all(p.ndim == 1 for p in without["params"])
    assert len(with_decay["params"]) + len(without["params"]) == len(list(model.parameters()))
