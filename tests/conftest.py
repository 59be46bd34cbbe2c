"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from refdet.store import hdf5_access, hdf5_sandbox

# Under nohup, or in the background of a script, these are ignored; tests send them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


# A file system in memory, and the room that the tests need there.
MEMORY, ROOM = Path("/dev/shm"), 8 * 2**30


def pytest_configure() -> None:
    """Keep temporary files in memory if there is room: tests write many small ones, and sync each, as refdet does."""
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM and _tells_writes_apart(MEMORY):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def _tells_writes_apart(folder: Path) -> bool:
    """Whether a file that is written twice at once has two times of modification, as on a disk that takes its time."""
    with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as file:
        times = [file.write(b"x") and os.stat(file.name).st_mtime_ns for _ in range(2)]
    return times[0] != times[1]


# Of a driver, so that looking for GPUs costs nothing where there are none.
DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Compute on the CPU, with all fixtures and processes, unless a test is marked gpu or names another device.

    What is promised bit for bit is promised there.
    """
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("gpu") is None and any(map(os.path.exists, DRIVERS)):
            import torch

            if torch.cuda.is_available():
                torch.cuda.init()  # this process has read the variable
                patch.setenv("CUDA_VISIBLE_DEVICES", "")
                patch.setattr(torch.cuda, "is_available", lambda: False)
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first: with --dist loadfile, a long file that starts last is waited for alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Collect garbage seldom: each time, the million objects of the imports and of the tests themselves are looked at.

    They are not frozen, as counting frozen objects, which reading large files does, would look at them as well.
    """
    gc.set_threshold(50_000, 50, 50)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU, several, or the compiled kernels for it, where they are missing; and thorough tests."""
    if item.get_closest_marker("thorough") and not os.environ.get("REFDET_THOROUGH"):
        pytest.skip("runs with REFDET_THOROUGH=1")
    mark = item.get_closest_marker("gpu")
    if mark is None:
        return
    import torch

    from refdet.ops._library import DEVICES

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if torch.cuda.device_count() < mark.kwargs.get("count", 1):
        pytest.skip("not as many GPUs")
    if mark.kwargs.get("kernels") and "cuda" not in DEVICES:
        pytest.skip("no CUDA kernels")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real COCO images and refs beside the repository, where there is one."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "data" / "coco_mini").is_dir():
        pytest.skip("no real data beside the repository")
    return path


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small embedded dataset: COCO and REFER layouts with 60 train images."""
    from refdet.data import shapes

    return shapes.write(tmp_path_factory.mktemp("shapes") / "data", seed=0, images=60)


@pytest.fixture(scope="session")
def instances(shapes_root: Path) -> Path:
    """The val instances of the embedded dataset."""
    return shapes_root / "annotations" / "instances_val2014.json"


@pytest.fixture(scope="session")
def train_instances(shapes_root: Path) -> Path:
    """The train instances of the embedded dataset."""
    return shapes_root / "annotations" / "instances_train2014.json"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What refdet remembers of files goes into a folder of the tests, in the processes that they start too."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def opened_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look through stores in this process: one of its own for each of many files takes too long."""
    monkeypatch.setattr(hdf5_access, "check_in_subprocess", hdf5_sandbox.check_in_process)
