"""Workers that prefetch batches: if one dies, hangs or lacks shared memory, training saves its last step and ends."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import training_examples
from training_examples import run, squares, tiny

from refdet.data.coco import CocoIndex
from refdet.data.image_source import ImageSource
from refdet.data.training_batches import TrainingBatches
from refdet.detector import checkpoint
from refdet.errors import Interrupted, RuntimeFailure
from refdet.interrupt import Stop, StopRequested
from refdet.training import batch_workers
from refdet.training.batch_workers import check_shared_memory, prefetch_batches

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
# Trains the `squares` in the folder sys.argv[1]; the other arguments change keys of the tiny recipe.
TRAIN_SCRIPT = (
    "import sys; from pathlib import Path; from refdet.cli.main import main; from training_examples import TINY\n"
    "root, *more = sys.argv[1:]\n"
    "words = [w for change in [*TINY, *more] for w in ('--set', change)]\n"
    "main(['train', '--recipe', 'demo', *words, '--instances', root + '/instances.json', '--images', root + '/images',"
    " '--out', root + '/run', '--device', 'cpu'])\n"
)


class FaultyBatches(TrainingBatches):
    """Batches of the `squares`; making the one of step ``at`` calls ``fault`` first (-1: none does)."""

    def __init__(self, root: Path, at: int, fault: Callable[[], object], *changes: str) -> None:
        recipe = tiny("train.steps=6", *changes)
        super().__init__(CocoIndex.load(squares(root)), ImageSource.open(root / "images"), recipe)
        self.at, self.fault = at, fault

    def __getitem__(self, step: int):  # type: ignore[no-untyped-def]
        if step == self.at:
            self.fault()
        return super().__getitem__(step)


def send_signal(number: signal.Signals) -> Callable[[], object]:
    """A fault that sends a signal to the process in which it is called."""

    def send() -> None:
        faulthandler.disable()  # pytest enables it; it would print the stack of each thread
        os.kill(os.getpid(), number)

    return send


def image_ids_of(batches: FaultyBatches, workers: int = 2, stop: Stop | None = None) -> list[list[int]]:
    """Ids of the images in each of the batches of steps 0 to 5."""
    with prefetch_batches(batches, range(6), workers, CPU, stop or Stop()) as ahead:
        return [batch.image_ids for batch in ahead]


@pytest.mark.parametrize("workers", [0, 1, 2, 9])
def test_batches_come_in_the_order_of_their_steps(tmp_path: Path, workers: int) -> None:
    batches = FaultyBatches(tmp_path, -1, lambda: None)
    assert image_ids_of(batches, workers) == [batches[step].image_ids for step in range(6)]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (send_signal(signal.SIGKILL), "worker process: killed, possibly because memory ran out"),
        (send_signal(signal.SIGBUS), "SIGBUS, probably as /dev/shm is full; .*--shm-size=1024m.*`train.workers=0`"),
        (send_signal(signal.SIGSEGV), "worker process: ended by SIGSEGV"),
        (lambda: os._exit(3), "worker process: ended with exit code 3"),
    ],
)
@pytest.mark.parametrize("at", [0, 3])
def test_a_dead_worker_is_an_error(tmp_path: Path, fault: Callable[[], object], message: str, at: int) -> None:
    with pytest.raises(RuntimeFailure, match=message):
        image_ids_of(FaultyBatches(tmp_path, at, fault))
    assert not multiprocessing.active_children()


@contextmanager
def few_open_files(more: int) -> Iterator[None]:
    """Let this process, and those that it starts, open only ``more`` files in addition to those that are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))  # the limit is one of descriptor numbers
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_batches_of_many_images_need_few_open_files(tmp_path: Path) -> None:
    batches = FaultyBatches(tmp_path, -1, lambda: None, "train.batch_size=60")
    with few_open_files(40):
        assert list(map(len, image_ids_of(batches))) == [60] * 6


def raise_in_worker(error: Exception) -> Callable[[], object]:
    """A fault that raises an error."""

    def raise_error() -> None:
        raise error

    return raise_error


def test_an_unexpected_error_in_a_worker_is_raised_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="by design") as caught:
        image_ids_of(FaultyBatches(tmp_path, 3, raise_in_worker(ZeroDivisionError("by design"))))
    assert "in raise_error" in str(caught.value.__cause__)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_interrupts_waiting_for_a_batch_that_never_comes(
    tmp_path: Path, workers: int, number: signal.Signals
) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it waits for a writer
    begun = tmp_path / "begun"
    batches = FaultyBatches(tmp_path, 2, lambda: (begun.touch(), open(tmp_path / "pipe").read()))  # noqa: SIM115
    thread = threading.Thread(target=send_signal_once_begun, args=(begun, number))
    with Stop.watch() as stop:
        thread.start()
        with pytest.raises(StopRequested):
            image_ids_of(batches, workers, stop)
    assert not multiprocessing.active_children()  # the hanging worker too
    thread.join()


def test_a_signal_at_the_end_of_a_timeout_does_not_wait_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Alarms as often as the timeouts of waiting for a batch, so that some come just when it times out. After the 100th,
    # SIGTERM is sent.
    interval = 0.004
    monkeypatch.setattr(batch_workers, "_POLL_SECONDS", interval)
    os.mkfifo(tmp_path / "pipe")  # opening it waits for a writer
    alarms: list[int] = []

    def on_alarm(number: int, frame: object) -> None:
        alarms.append(number)
        if len(alarms) == 100:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(alarms) == 500:
            signal.setitimer(signal.ITIMER_REAL, 0)
            pytest.fail("SIGTERM was not noticed")

    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        with Stop.watch() as stop:
            batches = FaultyBatches(tmp_path, 0, lambda: open(tmp_path / "pipe").read())  # noqa: SIM115
            with prefetch_batches(batches, range(6), 1, CPU, stop) as ahead, pytest.raises(StopRequested):
                signal.setitimer(signal.ITIMER_REAL, interval, interval)
                next(ahead)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def send_signal_once_begun(begun: Path, number: signal.Signals) -> None:
    """Send a signal to this process once the file `begun` exists."""
    while not begun.exists():
        time.sleep(0.01)
    time.sleep(0.2)  # until the main thread, too, waits for the batch
    send_signal(number)()


def test_training_resumes_exactly_after_a_killed_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squares(tmp_path)
    original = TrainingBatches.__getitem__

    def make_batch(self: TrainingBatches, step: int) -> object:
        if step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingBatches, "__getitem__", make_batch)
        with pytest.raises(RuntimeFailure, match=r"killed.*\(training stopped after step 4, which is saved"):
            run(tmp_path, "train.steps=6", "train.workers=1")
    assert checkpoint.load_meta(tmp_path / "run").step == 4
    run(tmp_path, "train.steps=6", "train.workers=1", resume=True)
    run(tmp_path, "train.steps=6", out="whole")
    resumed, whole = (checkpoint.read_tensors(tmp_path / name / "model.safetensors")[0] for name in ("run", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_signal_before_the_first_step_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squares(tmp_path)

    def make_batch(self: TrainingBatches, step: int) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal should have ended this")

    with monkeypatch.context() as patch:
        patch.setattr(TrainingBatches, "__getitem__", make_batch)
        with pytest.raises(
            Interrupted, match="stopped by SIGTERM before the first step; start again with `resume=True`"
        ):
            run(tmp_path)
    assert not (tmp_path / "run" / "model.json").exists()
    assert run(tmp_path, resume=True).steps == 2


def test_too_little_shared_memory_is_reported_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = FaultyBatches(tmp_path, -1, lambda: None)  # of 2 images of 64x96x3 uint8: 36,864 bytes
    needed = 5 * 36864  # two prefetched batches for each of two workers, and the current one
    monkeypatch.setattr(batch_workers, "_free_bytes", lambda: needed)
    check_shared_memory(batches, workers=2)
    monkeypatch.setattr(batch_workers, "_free_bytes", lambda: needed - 1)
    check_shared_memory(batches, workers=0)  # needs none
    with pytest.raises(
        RuntimeFailure, match=r"/dev/shm is too small: .*--shm-size=1m, or train with `train.workers=0`"
    ):
        check_shared_memory(batches, workers=2)
    with pytest.raises(RuntimeFailure, match="/dev/shm"):
        run(tmp_path, "train.workers=2")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(batch_workers, "_free_bytes", lambda: None)  # a system without /dev/shm
    check_shared_memory(batches, workers=2)


def test_shared_memory_that_fills_up_while_training_is_reported() -> None:
    """A worker cannot send its batch. The check before the first step is disabled, as if it had passed."""
    mount = "mount -t tmpfs -o size=64k none /dev/shm"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    without_check = "import refdet.training.trainer; refdet.training.trainer.check_shared_memory = lambda *_: None\n"
    paths = os.pathsep.join([str(Path(training_examples.__file__).parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # the default folder may be in /dev/shm
        squares(Path(folder))
        Path(folder, "code.py").write_text(without_check + TRAIN_SCRIPT)
        command = f"{mount} && exec timeout 60 {sys.executable} {folder}/code.py {folder} train.workers=2"
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", command], env={**os.environ, "PYTHONPATH": paths}, capture_output=True,
            text=True,
        )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert "/dev/shm is too small" in lines[0] and "--shm-size" in lines[0] and "train.workers=0" in lines[0]
    assert "Traceback" not in done.stderr
