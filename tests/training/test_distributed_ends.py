"""Errors and signals in several processes: reported once, with the same exit code in all, after the steps are saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from distributed_examples import CHANGES, assert_same_network, losses, train, trained
from process_groups import Ended, Fault, Launcher
from training_examples import tiny

from refdet.data.coco import CocoIndex
from refdet.data.image_source import ImageSource
from refdet.data.training_batches import TrainingBatches
from refdet.detector import checkpoint
from refdet.files.lock import exclusive_lock
from refdet.training.run_folder import IN_USE_FIX, LOCK

pytestmark = pytest.mark.slow

SIX_STEPS = ("model.norm=batch", "train.steps=6", "train.checkpoint_interval=2")


def assert_ended(ended: Ended, code: int, message: str) -> None:
    """Assert that all processes ended with an exit code, and one of them printed an error that contains `message`."""
    assert ended.codes == [code] * len(ended.codes), ended
    assert len(ended.said) == 1 and message in ended.said[0], ended
    assert all("Traceback" not in text for text in ended.outputs), ended


def saved_step(run: Path) -> int:
    """Step of the weights in a run directory."""
    return checkpoint.load_meta(run).step


def test_an_unreadable_image_in_one_process_stops_all(launcher: Launcher, noise: Path, tmp_path: Path) -> None:
    shutil.copytree(noise, tmp_path / "noise")
    recipe = tiny(*CHANGES)
    batches = TrainingBatches(CocoIndex.load(noise / "instances.json"), ImageSource.open(noise / "images"), recipe)
    early = {image for step in (0, 1) for image in batches[step].image_ids}
    # the first image that the second process reads in the third step, and no process before
    bad = next(image for image in batches[2].image_ids[2:] if image not in early)
    path = tmp_path / "noise" / "images" / f"{bad}.png"
    path.write_bytes(path.read_bytes()[:200])
    ended = train(launcher, tmp_path / "noise", "run", 2, *SIX_STEPS, "train.workers=1")
    assert_ended(ended, 2, f"{bad}.png: ")
    assert "after step 2, which is saved; replace the file and continue with --resume" in ended.said[0]
    assert saved_step(tmp_path / "noise" / "run") == 2
    alone = train(launcher, tmp_path / "noise", "alone", 1, *SIX_STEPS, variables={"WORLD_SIZE": ""})
    assert (alone.codes, alone.said) == ([2], ended.said)


def test_a_loss_that_is_not_finite_in_one_process_stops_all(launcher: Launcher, noise: Path) -> None:
    ended = train(launcher, noise, "infinite", 2, *SIX_STEPS, fault=Fault("infinite", 1, 4))
    assert_ended(ended, 1, "the loss is not finite (loss_box_reg) on images ")
    assert saved_step(noise / "infinite") == 2 and len(losses(noise / "infinite")) == 3


def test_a_signal_to_one_process_saves_and_stops_all(launcher: Launcher, noise: Path) -> None:
    ended = train(launcher, noise, "signal", 2, *SIX_STEPS, "train.workers=1", fault=Fault("SIGTERM", 1, 3))
    assert_ended(ended, 130, "stopped by SIGTERM after step 3, which is saved; continue with --resume")
    assert saved_step(noise / "signal") == 3


def test_a_killed_process_stops_all_and_torchrun_restarts_them(launcher: Launcher, noise: Path) -> None:
    ended = train(launcher, noise, "killed", 2, *SIX_STEPS, fault=Fault("SIGKILL", 1, 4))
    assert ended.codes == [1, -9] and len(ended.said) == 1
    assert "another process of this training ended without an error message" in ended.said[0]
    assert saved_step(noise / "killed") == 3  # and not 2, the last regular save
    trained(launcher, noise, "unharmed", 2, *SIX_STEPS)
    for rank in (0, 1):
        again = trained(launcher, noise, f"again-{rank}", 2, *SIX_STEPS, fault=Fault("SIGKILL", rank, 4), restarts=1)
        assert "note: torchrun has started the processes again" in again.outputs[0]
        assert_same_network(noise / f"again-{rank}", noise / "unharmed", 1e-6, 1e-5)


def test_without_the_first_process_nothing_is_saved_and_the_others_do_not_claim_it(
    launcher: Launcher, noise: Path
) -> None:
    ended = train(launcher, noise, "headless", 2, *SIX_STEPS, fault=Fault("SIGKILL", 0, 4))
    assert ended.codes == [-9, 1] and saved_step(noise / "headless") == 2
    log = (noise / "headless" / "logs" / "rank-1.log").read_text()
    assert "error: another process of this training ended" in log and "what was saved before is kept" in log
    assert "is saved" not in log


def test_a_restart_does_not_continue_a_run_of_another_job(launcher: Launcher, noise: Path) -> None:
    before = (noise / "weights" / "model.safetensors").read_bytes()
    ended = train(launcher, noise, "weights", 2, *SIX_STEPS, restarts=1)
    assert (
        ended.codes == [1]
        and [line.partition("exists")[2] for line in ended.said]
        == ["; choose another, remove it, or continue it with --resume"] * 2
    )  # once for each start
    assert (noise / "weights" / "model.safetensors").read_bytes() == before


def test_a_full_disk_of_the_first_process_stops_all(launcher: Launcher, noise: Path) -> None:
    ended = train(launcher, noise, "full", 2, *SIX_STEPS, fault=Fault("full disk", 0, 3))
    assert_ended(ended, 1, "no space left on the disk; what was saved is kept")
    assert saved_step(noise / "full") == 2


def test_differences_between_processes_are_named(launcher: Launcher, noise: Path, tmp_path: Path) -> None:
    tree = json.loads((noise / "instances.json").read_text())
    tree["annotations"][0]["bbox"][2] += 1
    (tmp_path / "instances.json").write_text(json.dumps(tree))
    other = {1: ["--instances", str(tmp_path / "instances.json")]}
    assert_ended(train(launcher, noise, "no", 2, *SIX_STEPS, of_rank=other), 2, "torchrun: the hash of --instances is ")
    ended = train(launcher, noise, "no", 2, *SIX_STEPS, of_rank={1: ["--set", "train.lr=0.1"]})
    assert_ended(ended, 2, "torchrun: train.lr is 0.1 in process 1 on ")
    (tmp_path / "images").mkdir()
    ended = train(launcher, noise, "no", 2, *SIX_STEPS, of_rank={1: ["--images", str(tmp_path / "images")]})
    assert_ended(ended, 2, "images")
    assert not (noise / "no").exists()


def test_invalid_arguments_are_reported_once(launcher: Launcher, noise: Path) -> None:
    ended = train(launcher, noise, "no", 3, *SIX_STEPS)
    assert_ended(ended, 2, "train.batch_size: 4 images cannot be divided among 3 processes; give a multiple of 3")
    ended = train(launcher, noise, "no", 2, *SIX_STEPS, "train.accumulate=4")
    assert_ended(ended, 2, "among 2 processes, each in 4 passes (train.accumulate); give a multiple of 8")
    assert_ended(train(launcher, noise, "no", 2, options=["--bogus"]), 2, "--bogus")
    assert_ended(train(launcher, noise, "weights", 2), 2, "exists; choose another")
    with exclusive_lock(noise / "weights", LOCK, IN_USE_FIX):
        ended = train(launcher, noise, "weights", 2, *SIX_STEPS, options=["--resume"])
    assert_ended(ended, 2, "another process is writing to it")
    assert not (noise / "no").exists()
