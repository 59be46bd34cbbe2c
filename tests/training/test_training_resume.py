"""What --resume continues, what it starts from the beginning with a note, and what it rejects without changing it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training_examples
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_examples import run, squares, steps_of, tiny

from refdet.detector import checkpoint
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.errors import InputError
from refdet.files.lock import exclusive_lock
from refdet.training.run_folder import LOCK
from refdet.training.state import max_disk_bytes

pytestmark = pytest.mark.slow

Damage = Callable[[Path], object]

SCRIPT_KILLED_AT_STEP_3 = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(training_examples.__file__).parent)!r})
import training_examples
from training_examples import run
from refdet.training import trainer
original, calls = trainer.start_step, []
def start_step(*args):
    calls.append(args)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
trainer.start_step = start_step
run(Path(sys.argv[1]), "train.steps=4", "train.checkpoint_interval=100")
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset and a finished run of two steps."""
    root = tmp_path_factory.mktemp("finished")
    squares(root)
    run(root)
    return root


@pytest.fixture
def resumable(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished` that a test may change."""
    return shutil.copytree(finished, tmp_path, dirs_exist_ok=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of all files under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state(root: Path) -> Path:
    """Path of a state of the run."""
    return next((root / "run" / "state").glob("step-*.safetensors"))


@pytest.mark.parametrize("folder_exists", [False, True])
def test_with_nothing_to_resume_the_run_starts_with_a_note(
    tmp_path: Path, folder_exists: bool, caplog: pytest.LogCaptureFixture
) -> None:
    squares(tmp_path)
    if folder_exists:
        (tmp_path / "run").mkdir()
    assert run(tmp_path, resume=True).steps == 2
    assert "nothing to resume in" in caplog.text and "starting from the beginning" in caplog.text


FOREIGN: dict[str, dict[str, str]] = {
    "notes": {".model.notes.txt": "of a month", "metrics.jsonl": "my own log\n"},
    "a log of another program with the same keys": {"metrics.jsonl": '{"step": 900, "loss": 1}\n', ".step-1.txt": "x"},
    "events of another program": {"events.out.tfevents.1.host": "x"},
    "old temporary names": {".model.0123abcd.safetensors": "x", ".metrics.0123abcd.jsonl": "x"},
    "states of another program": {"state/step-00000100.safetensors": "x" * 99, "state/.step-2.x": "y"},
    "a name like a state": {"state/step-final.safetensors": "x", "README.md": "mine"},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_folder_that_is_no_run_is_rejected_and_left_unchanged(tmp_path: Path, files: dict[str, str]) -> None:
    squares(tmp_path)
    for name, text in files.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = contents(tmp_path / "run")
    for resume in (True, False):
        with pytest.raises(InputError, match=r"choose another|another `out`"):
            run(tmp_path, resume=resume)
    assert contents(tmp_path / "run") == before


def test_resuming_keeps_the_users_files_and_removes_temporary_ones(resumable: Path) -> None:
    mine = [
        resumable / "run" / ".model.notes.txt",
        resumable / "run" / "state" / ".step-2.kept",
        resumable / "run" / "README.md",
    ]
    for path in mine:
        path.write_text("mine")
    killed = [resumable / "run" / ".model.0123abcd.refdet-tmp.safetensors",
              resumable / "run" / "state" / ".step-00000003.0123abcd.refdet-tmp.safetensors"]  # fmt: skip
    for path in killed:
        path.write_text("half")
    run(resumable, "train.steps=4", resume=True)
    assert all(path.read_text() == "mine" for path in mine) and not any(path.exists() for path in killed)


def test_a_run_killed_before_its_first_save_starts_again_and_logs_each_step_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    squares(tmp_path)
    # in a new Python, as a fork of a process that has trained cannot compute gradients
    killed = subprocess.run(
        [sys.executable, "-c", SCRIPT_KILLED_AT_STEP_3, str(tmp_path)], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert steps_of(tmp_path / "run") == [1, 2]
    with pytest.raises(InputError, match="continue it with `resume=True`"):
        run(tmp_path, "train.steps=4")
    run(tmp_path, "train.steps=4", resume=True)
    assert "ended before its first save: starting from the beginning" in caplog.text
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]
    board = EventAccumulator(str(tmp_path / "run"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4]


def test_a_resumed_run_logs_each_step_once(resumable: Path) -> None:
    with (resumable / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "loss": 1.0}\n')  # of a run that was killed before step 4
    run(resumable, "train.steps=5", resume=True)
    assert steps_of(resumable / "run") == [1, 2, 3, 4, 5]
    board = EventAccumulator(str(resumable / "run"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_a_finished_run_can_be_extended(resumable: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run(resumable, "train.steps=4", resume=True).steps == 4
    assert "train.steps was 2 and is now 4" in caplog.text and "train.lr_milestones" in caplog.text
    assert checkpoint.load_meta(resumable / "run").recipe.train.steps == 4
    with pytest.raises(InputError, match="train.steps=3, but 4 steps are done; give 4 or more"):
        run(resumable, "train.steps=3", resume=True)


@pytest.mark.parametrize(
    "line", ["", "{", "[]", '{"step": "2"}', '{"step": 1', "\udcff", "null", "[" * 9999, '{"x": 1}']
)
def test_damaged_log_lines_are_counted_and_dropped(
    resumable: Path, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    log = resumable / "run" / "metrics.jsonl"
    log.write_bytes(line.encode(errors="surrogateescape") + b"\n" + log.read_bytes())
    run(resumable, "train.steps=3", resume=True)
    assert steps_of(resumable / "run") == [1, 2, 3]
    assert ("1 line is damaged" in caplog.text) == bool(line)


def rewrite(change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> Damage:
    """Damage a state file by changing its tensors or its metadata."""

    def damage(path: Path) -> None:
        tensors, metadata = checkpoint.read_tensors(path)
        change(tensors, metadata)
        checkpoint.write_tensors(path, tensors, metadata)

    return damage


NAME = "model/rpn.conv.weight"
DAMAGED: dict[str, Damage] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "cut in its head": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "no metadata": rewrite(lambda tensors, metadata: metadata.clear()),
    "metadata that is no JSON": rewrite(lambda tensors, metadata: metadata.update(meta="{")),
    "metadata of another kind": rewrite(lambda tensors, metadata: metadata.update(meta="[1]")),
    "a recipe with unknown keys": rewrite(
        lambda tensors, metadata: metadata.update(meta=metadata["meta"].replace('"depth"', '"deep"'))
    ),
    "a step below 0": rewrite(
        lambda tensors, metadata: metadata.update(meta=metadata["meta"].replace('"step": 2', '"step": -2'))
    ),
    "names of another kind": rewrite(lambda tensors, metadata: metadata.update(fresh="5")),
    "a tensor less": rewrite(lambda tensors, metadata: tensors.pop(NAME)),
    "a tensor more": rewrite(lambda tensors, metadata: tensors.update({"model/x": torch.zeros(1)})),
    "another shape": rewrite(lambda tensors, metadata: tensors.update({NAME: torch.zeros(3)})),
    "not a number": rewrite(lambda tensors, metadata: tensors[NAME].fill_(float("nan"))),
    "momentum of another shape": rewrite(
        lambda tensors, metadata: tensors.update({"momentum/rpn.conv.weight": torch.zeros(3)})
    ),
    "momentum of nothing": rewrite(lambda tensors, metadata: tensors.update({"momentum/x": torch.zeros(3)})),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_state_is_reported_in_one_line_and_nothing_changes(resumable: Path, damage: Damage) -> None:
    path = state(resumable)
    damage(path)
    before = contents(resumable / "run")
    with pytest.raises(InputError, match="damaged .*there is no older one: start again with another `out`") as caught:
        run(resumable, "train.steps=4", resume=True)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 800
    assert contents(resumable / "run") == before


def test_the_error_of_a_damaged_state_names_the_older_state(resumable: Path) -> None:
    shutil.copy(state(resumable), resumable / "run" / "state" / "step-00000009.safetensors")
    (resumable / "run" / "state" / "step-00000009.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"step-00000009.*damaged.*continues from step-00000002.safetensors"):
        run(resumable, "train.steps=4", resume=True)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a box": lambda tree: tree["annotations"][0]["bbox"].__setitem__(2, 29),
    "a mask": lambda tree: tree["annotations"][0]["segmentation"][0].__setitem__(0, 9),
    "a category": lambda tree: tree["annotations"][0].update(category_id=5),
    "a crowd": lambda tree: tree["annotations"][0].update(iscrowd=1),
    "a file name": lambda tree: tree["images"][0].update(file_name="2.png"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_resuming_on_changed_data_is_rejected(
    resumable: Path, change: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    squares(resumable, change)
    with pytest.raises(InputError, match="other boxes, masks, categories, crowds or file names"):
        run(resumable, "train.steps=4", resume=True)
    saved_by_older_version = rewrite(lambda tensors, metadata: metadata.pop("training_data_sha256"))
    saved_by_older_version(state(resumable))
    assert run(resumable, "train.steps=4", resume=True).steps == 4
    assert "saved by an older refdet" in caplog.text


def test_resuming_with_other_empty_images_is_rejected_and_the_default_is_not_saved(resumable: Path) -> None:
    assert "empty_images" not in json.loads((resumable / "run" / "model.json").read_text())["recipe"]["train"]
    with pytest.raises(InputError, match="train.empty_images was False and is now True"):
        run(resumable, "train.steps=4", "train.empty_images=true", resume=True)


PADDING = "input.size_divisibility"


@pytest.mark.parametrize(("now", "noted"), [(1, False), (32, True)])
def test_a_run_older_than_padding_continues_without_padding(
    resumable: Path, now: int, noted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    older = rewrite(lambda _, metadata: metadata.update(meta=metadata["meta"].replace(', "size_divisibility": 1', "")))
    older(state(resumable))
    assert run(resumable, "train.steps=3", f"{PADDING}={now}", resume=True).steps == 3
    assert (f"{PADDING} stays 0, as the run was started; new runs have 32" in caplog.text) == noted
    assert "size_divisibility" not in json.loads((resumable / "run" / "model.json").read_text())["recipe"]["input"]
    run(resumable, "train.steps=3", out="plain")
    assert contents(resumable / "run")["model.safetensors"] == contents(resumable / "plain")["model.safetensors"]


@pytest.mark.parametrize(("then", "now"), [(1, 32), (32, 1), (32, 0)])
def test_resuming_with_other_padding_is_rejected(resumable: Path, then: int, now: int) -> None:
    run(resumable, f"{PADDING}={then}", out="new")
    with pytest.raises(InputError, match=f"{PADDING} was {then} and is now {now}"):
        run(resumable, "train.steps=4", f"{PADDING}={now}", out="new", resume=True)
    assert run(resumable, "train.steps=3", f"{PADDING}={then}", out="new", resume=True).steps == 3


@pytest.mark.parametrize(("sides", "noted"), [("[48,64]", True), ("[64]", False)])
def test_a_run_older_than_short_sides_per_image_draws_them_per_step(
    resumable: Path, sides: str, noted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    more, per_step = f"input.min_sizes={sides}", "input.short_side_per=step"
    run(resumable, more, per_step, "train.steps=1", out="older")
    assert "short_side_per" not in json.loads((resumable / "older" / "model.json").read_text())["recipe"]["input"]
    run(resumable, more, "train.steps=3", out="older", resume=True)
    assert ('input.short_side_per stays "step", as the run was started' in caplog.text) == noted
    run(resumable, more, per_step, "train.steps=3", out="plain")
    assert contents(resumable / "older")["model.safetensors"] == contents(resumable / "plain")["model.safetensors"]
    run(resumable, more, "train.steps=3", out="newer")
    with pytest.raises(InputError, match="input.short_side_per was image and is now step"):
        run(resumable, more, per_step, "train.steps=4", out="newer", resume=True)


def test_an_older_run_of_fpn_res50_continues_in_float32(resumable: Path, caplog: pytest.LogCaptureFixture) -> None:
    for steps, given in ((1, "train.bf16=false"), (2, "train.bf16=true")):
        small = ("model.depth=50", "model.width=4", f"train.steps={steps}", given)
        run(resumable, *small, out="deep", resume=steps > 1)
    assert "train.bf16 stays false, as the run was started" in caplog.text
    assert not checkpoint.load_meta(resumable / "deep").recipe.train.bf16


def test_an_older_run_keeps_its_box_losses_and_its_initial_weights(
    resumable: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ["proposals.smooth_l1_beta=0", "head.smooth_l1_beta=0", "model.zero_init_residual=false"]
    run(resumable, "train.steps=1", "model.zero_init_residual=true", out="older")
    kept = json.loads((resumable / "older" / "model.json").read_text())["recipe"]
    assert not {"smooth_l1_beta", "zero_init_residual"} & {
        key for part in ("model", "proposals", "head") for key in kept[part]
    }
    run(resumable, "train.steps=2", *keys, out="older", resume=True)
    for key in ("proposals.smooth_l1_beta stays 0.1111111111111111", "head.smooth_l1_beta stays 1.0"):
        assert f"{key}, as the run was started" in caplog.text
    found = checkpoint.load_meta(resumable / "older").recipe
    assert (found.proposals.smooth_l1_beta, found.head.smooth_l1_beta, found.model.zero_init_residual) == (
        1 / 9,
        1,
        True,
    )
    run(resumable, "train.steps=1", *keys, out="newer")
    with pytest.raises(InputError, match="head.smooth_l1_beta was 0.0 and is now 1.0"):
        run(resumable, "train.steps=2", keys[0], keys[2], out="newer", resume=True)


def test_a_run_in_use_by_another_process_is_rejected(resumable: Path) -> None:
    with (
        exclusive_lock(resumable / "run", LOCK, "x"),
        pytest.raises(InputError, match="another process is writing to it"),
    ):
        run(resumable, "train.steps=4", resume=True)
    assert run(resumable, "train.steps=4", resume=True).steps == 4


def test_the_card_says_what_is_not_checked_and_is_kept_once_edited(resumable: Path) -> None:
    card = resumable / "run" / "README.md"
    text = card.read_text()
    assert "not checked (not built by refdet build-split" in text and "refdet audit --instances" in text
    assert "2 of 2, batch size 2" in text and "| initial weights | random |" in text
    run(resumable, "train.steps=3", resume=True)
    assert "3 of 3" in card.read_text()
    card.write_text("# my own\n")
    run(resumable, "train.steps=4", resume=True)
    assert card.read_text() == "# my own\n"


def test_resuming_with_other_weights_does_not_load_them_and_says_so(
    resumable: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(resumable, out="other")
    caplog.clear()
    run(resumable, "train.steps=3", resume=True, weights=resumable / "other")
    assert "`weights`" in caplog.text and "not loaded" in caplog.text and "started from random weights" in caplog.text


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_run_directory_is_not_larger_than_estimated(tmp_path: Path, keep: int) -> None:
    squares(tmp_path)
    options = (f"train.keep={keep}", "train.steps=5", "train.checkpoint_interval=1")
    run(tmp_path, *options)
    states = list((tmp_path / "run/state").glob("*.safetensors"))
    assert len(states) == (keep or 5)
    written = sum(path.stat().st_size for path in [*states, tmp_path / "run/model.safetensors"])
    recipe = tiny(*options)
    limit = max_disk_bytes(MaskRCNN(recipe, 2), recipe.train, validated=False)
    assert written < limit < 2.5 * written
