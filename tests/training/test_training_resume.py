"""What --resume goes on with, what it starts anew with a note, and what it refuses without touching it."""

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

Spoil = Callable[[Path], object]

KILLED_AT_THE_THIRD_STEP = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(training_examples.__file__).parent)!r})
import training_examples
from training_examples import run
from refdet.training import trainer
step, calls = trainer.start_step, []
def killed(*given):
    calls.append(given)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*given)
trainer.start_step = killed
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
def begun(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished`, to be changed."""
    return shutil.copytree(finished, tmp_path, dirs_exist_ok=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state(root: Path) -> Path:
    return next((root / "run" / "state").glob("step-*.safetensors"))


@pytest.mark.parametrize("there", [False, True])
def test_where_nothing_was_begun_it_starts_with_a_note(
    tmp_path: Path, there: bool, caplog: pytest.LogCaptureFixture
) -> None:
    squares(tmp_path)
    if there:
        (tmp_path / "run").mkdir()
    assert run(tmp_path, resume=True).steps == 2
    assert "nothing to resume in" in caplog.text and "starting from the beginning" in caplog.text


FOREIGN: dict[str, dict[str, str]] = {
    "notes": {".model.notes.txt": "of a month", "metrics.jsonl": "my own log\n"},
    "our log of another program": {"metrics.jsonl": '{"step": 900, "loss": 1}\n', ".step-1.txt": "x"},
    "events of another program": {"events.out.tfevents.1.host": "x"},
    "old temporary names": {".model.0123abcd.safetensors": "x", ".metrics.0123abcd.jsonl": "x"},
    "states of another program": {"state/step-00000100.safetensors": "x" * 99, "state/.step-2.x": "y"},
    "a name like a state": {"state/step-final.safetensors": "x", "README.md": "mine"},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(tmp_path: Path, files: dict[str, str]) -> None:
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


def test_files_beside_those_of_a_run_stay(begun: Path) -> None:
    mine = [begun / "run" / ".model.notes.txt", begun / "run" / "state" / ".step-2.kept", begun / "run" / "README.md"]
    for path in mine:
        path.write_text("mine")
    killed = [begun / "run" / ".model.0123abcd.refdet-tmp.safetensors",
              begun / "run" / "state" / ".step-00000003.0123abcd.refdet-tmp.safetensors"]  # fmt: skip
    for path in killed:
        path.write_text("half")
    run(begun, "train.steps=4", resume=True)
    assert all(path.read_text() == "mine" for path in mine) and not any(path.exists() for path in killed)


def test_killed_before_the_first_save_it_starts_again_and_says_every_step_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    squares(tmp_path)
    # In a Python of its own: after a training in this process, a fork of it cannot compute gradients.
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AT_THE_THIRD_STEP, str(tmp_path)], capture_output=True, text=True
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


def test_a_run_that_goes_on_says_every_step_once(begun: Path) -> None:
    with (begun / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "loss": 1.0}\n')  # of a run that was killed before step 4
    run(begun, "train.steps=5", resume=True)
    assert steps_of(begun / "run") == [1, 2, 3, 4, 5]
    board = EventAccumulator(str(begun / "run"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_a_finished_run_is_prolonged(begun: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run(begun, "train.steps=4", resume=True).steps == 4
    assert "train.steps was 2 and is now 4" in caplog.text and "train.lr_milestones" in caplog.text
    assert checkpoint.load_meta(begun / "run").recipe.train.steps == 4
    with pytest.raises(InputError, match="train.steps=3, but 4 steps are done; give 4 or more"):
        run(begun, "train.steps=3", resume=True)


@pytest.mark.parametrize(
    "line", ["", "{", "[]", '{"step": "2"}', '{"step": 1', "\udcff", "null", "[" * 9999, '{"x": 1}']
)
def test_damaged_lines_of_the_log_are_counted_and_left_out(
    begun: Path, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    log = begun / "run" / "metrics.jsonl"
    log.write_bytes(line.encode(errors="surrogateescape") + b"\n" + log.read_bytes())
    run(begun, "train.steps=3", resume=True)
    assert steps_of(begun / "run") == [1, 2, 3]
    assert ("1 line is damaged" in caplog.text) == bool(line)


def rewritten(change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> Spoil:
    def spoil(path: Path) -> None:
        tensors, metadata = checkpoint.read_tensors(path)
        change(tensors, metadata)
        checkpoint.write_tensors(path, tensors, metadata)

    return spoil


NAME = "model/rpn.conv.weight"
DAMAGED: dict[str, Spoil] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "cut in its head": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "no metadata": rewritten(lambda t, m: m.clear()),
    "metadata that is no JSON": rewritten(lambda t, m: m.update(meta="{")),
    "metadata of another kind": rewritten(lambda t, m: m.update(meta="[1]")),
    "a recipe with unknown keys": rewritten(lambda t, m: m.update(meta=m["meta"].replace('"depth"', '"deep"'))),
    "a step below 0": rewritten(lambda t, m: m.update(meta=m["meta"].replace('"step": 2', '"step": -2'))),
    "names of another kind": rewritten(lambda t, m: m.update(fresh="5")),
    "a tensor less": rewritten(lambda t, m: t.pop(NAME)),
    "a tensor more": rewritten(lambda t, m: t.update({"model/x": torch.zeros(1)})),
    "another shape": rewritten(lambda t, m: t.update({NAME: torch.zeros(3)})),
    "not a number": rewritten(lambda t, m: t[NAME].fill_(float("nan"))),
    "momentum of another shape": rewritten(lambda t, m: t.update({"momentum/rpn.conv.weight": torch.zeros(3)})),
    "momentum of nothing": rewritten(lambda t, m: t.update({"momentum/x": torch.zeros(3)})),
}


@pytest.mark.parametrize("spoil", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_state_is_one_line_and_nothing_is_touched(begun: Path, spoil: Spoil) -> None:
    path = state(begun)
    spoil(path)
    before = contents(begun / "run")
    with pytest.raises(InputError, match="damaged .*there is no older one: start again with another `out`") as caught:
        run(begun, "train.steps=4", resume=True)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 800
    assert contents(begun / "run") == before


def test_a_damaged_state_names_the_older_one(begun: Path) -> None:
    shutil.copy(state(begun), begun / "run" / "state" / "step-00000009.safetensors")
    (begun / "run" / "state" / "step-00000009.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"step-00000009.*damaged.*continues from step-00000002.safetensors"):
        run(begun, "train.steps=4", resume=True)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a box": lambda t: t["annotations"][0]["bbox"].__setitem__(2, 29),
    "a mask": lambda t: t["annotations"][0]["segmentation"][0].__setitem__(0, 9),
    "a category": lambda t: t["annotations"][0].update(category_id=5),
    "a crowd": lambda t: t["annotations"][0].update(iscrowd=1),
    "a file name": lambda t: t["images"][0].update(file_name="2.png"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_other_data_is_another_run(begun: Path, change: Callable, caplog: pytest.LogCaptureFixture) -> None:
    squares(begun, change)
    with pytest.raises(InputError, match="other boxes, masks, categories, crowds or file names"):
        run(begun, "train.steps=4", resume=True)
    rewritten(lambda t, m: m.pop("training_data_sha256"))(state(begun))  # as an older refdet saved it
    assert run(begun, "train.steps=4", resume=True).steps == 4
    assert "saved by an older refdet" in caplog.text


def test_empty_images_make_another_run_and_older_runs_have_no_such_key(begun: Path) -> None:
    assert "empty_images" not in json.loads((begun / "run" / "model.json").read_text())["recipe"]["train"]
    with pytest.raises(InputError, match="train.empty_images was False and is now True"):
        run(begun, "train.steps=4", "train.empty_images=true", resume=True)


PADDING = "input.size_divisibility"


@pytest.mark.parametrize(("now", "noted"), [(1, False), (32, True)])
def test_a_run_of_before_padding_goes_on_without(
    begun: Path, now: int, noted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rewritten(lambda t, m: m.update(meta=m["meta"].replace(', "size_divisibility": 1', "")))(state(begun))
    assert run(begun, "train.steps=3", f"{PADDING}={now}", resume=True).steps == 3
    assert (f"{PADDING} stays 0, as the run was started; new runs have 32" in caplog.text) == noted
    assert "size_divisibility" not in json.loads((begun / "run" / "model.json").read_text())["recipe"]["input"]
    run(begun, "train.steps=3", out="plain")
    assert contents(begun / "run")["model.safetensors"] == contents(begun / "plain")["model.safetensors"]


@pytest.mark.parametrize(("then", "now"), [(1, 32), (32, 1), (32, 0)])
def test_other_padding_is_another_run(begun: Path, then: int, now: int) -> None:
    run(begun, f"{PADDING}={then}", out="new")
    with pytest.raises(InputError, match=f"{PADDING} was {then} and is now {now}"):
        run(begun, "train.steps=4", f"{PADDING}={now}", out="new", resume=True)
    assert run(begun, "train.steps=3", f"{PADDING}={then}", out="new", resume=True).steps == 3


@pytest.mark.parametrize(("sides", "noted"), [("[48,64]", True), ("[64]", False)])
def test_a_run_of_before_short_sides_of_images_draws_them_for_steps(
    begun: Path, sides: str, noted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    more, per_step = f"input.min_sizes={sides}", "input.short_side_per=step"
    run(begun, more, per_step, "train.steps=1", out="older")
    assert "short_side_per" not in json.loads((begun / "older" / "model.json").read_text())["recipe"]["input"]
    run(begun, more, "train.steps=3", out="older", resume=True)
    assert ('input.short_side_per stays "step", as the run was started' in caplog.text) == noted
    run(begun, more, per_step, "train.steps=3", out="plain")
    assert contents(begun / "older")["model.safetensors"] == contents(begun / "plain")["model.safetensors"]
    run(begun, more, "train.steps=3", out="newer")
    with pytest.raises(InputError, match="input.short_side_per was image and is now step"):
        run(begun, more, per_step, "train.steps=4", out="newer", resume=True)


def test_an_older_run_of_fpn_res50_goes_on_in_float32(begun: Path, caplog: pytest.LogCaptureFixture) -> None:
    for steps, given in ((1, "train.bf16=false"), (2, "train.bf16=true")):
        small = ("model.depth=50", "model.width=4", f"train.steps={steps}", given)
        run(begun, *small, out="deep", resume=steps > 1)
    assert "train.bf16 stays false, as the run was started" in caplog.text
    assert not checkpoint.load_meta(begun / "deep").recipe.train.bf16


def test_an_older_run_keeps_its_box_losses_and_its_initial_weights(
    begun: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ["proposals.smooth_l1_beta=0", "head.smooth_l1_beta=0", "model.zero_init_residual=false"]
    run(begun, "train.steps=1", "model.zero_init_residual=true", out="older")
    kept = json.loads((begun / "older" / "model.json").read_text())["recipe"]
    assert not {"smooth_l1_beta", "zero_init_residual"} & {
        key for part in ("model", "proposals", "head") for key in kept[part]
    }
    run(begun, "train.steps=2", *keys, out="older", resume=True)
    for key in ("proposals.smooth_l1_beta stays 0.1111111111111111", "head.smooth_l1_beta stays 1.0"):
        assert f"{key}, as the run was started" in caplog.text
    found = checkpoint.load_meta(begun / "older").recipe
    assert (found.proposals.smooth_l1_beta, found.head.smooth_l1_beta, found.model.zero_init_residual) == (
        1 / 9,
        1,
        True,
    )
    run(begun, "train.steps=1", *keys, out="newer")
    with pytest.raises(InputError, match="head.smooth_l1_beta was 0.0 and is now 1.0"):
        run(begun, "train.steps=2", keys[0], keys[2], out="newer", resume=True)


def test_one_process_at_a_time(begun: Path) -> None:
    with exclusive_lock(begun / "run", LOCK, "x"), pytest.raises(InputError, match="another process is writing to it"):
        run(begun, "train.steps=4", resume=True)
    assert run(begun, "train.steps=4", resume=True).steps == 4


def test_the_card_says_what_is_not_checked_and_stays_what_somebody_made_of_it(begun: Path) -> None:
    card = begun / "run" / "README.md"
    text = card.read_text()
    assert "not checked (not built by refdet build-split" in text and "refdet audit --instances" in text
    assert "2 of 2, batch size 2" in text and "| initial weights | random |" in text
    run(begun, "train.steps=3", resume=True)
    assert "3 of 3" in card.read_text()
    card.write_text("# my own\n")
    run(begun, "train.steps=4", resume=True)
    assert card.read_text() == "# my own\n"


def test_other_weights_are_not_loaded_and_the_log_says_so(begun: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(begun, out="other")
    caplog.clear()
    run(begun, "train.steps=3", resume=True, weights=begun / "other")
    assert "`weights`" in caplog.text and "not loaded" in caplog.text and "started from random weights" in caplog.text


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_run_directory_stays_below_the_size_announced(tmp_path: Path, keep: int) -> None:
    squares(tmp_path)
    options = (f"train.keep={keep}", "train.steps=5", "train.checkpoint_interval=1")
    run(tmp_path, *options)
    states = list((tmp_path / "run/state").glob("*.safetensors"))
    assert len(states) == (keep or 5)
    written = sum(path.stat().st_size for path in [*states, tmp_path / "run/model.safetensors"])
    recipe = tiny(*options)
    limit = max_disk_bytes(MaskRCNN(recipe, 2), recipe.train, validated=False)
    assert written < limit < 2.5 * written
