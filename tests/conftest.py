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

# Processes started with nohup or in the background of a script inherit ignored signals; tests send SIGHUP and SIGINT.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# A file system in memory, and the free space that the tests need there.
SHARED_MEMORY, REQUIRED_SPACE = Path("/dev/shm"), 8 * 2**30

# Files that a GPU driver creates: without one of them, the tests do not import torch to look for GPUs.
GPU_DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def pytest_configure() -> None:
    """Keep temporary files in memory if they fit: refdet fsyncs the many small files of the tests, slow on a disk."""
    if not os.access(SHARED_MEMORY, os.W_OK) or shutil.disk_usage(SHARED_MEMORY).free < REQUIRED_SPACE:
        return
    if _has_fine_timestamps(SHARED_MEMORY):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(SHARED_MEMORY))


def _has_fine_timestamps(folder: Path) -> bool:
    """Whether two writes in a row get different modification times, from which refdet sees that a file has changed."""
    with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as file:
        times = [file.write(b"x") and os.stat(file.name).st_mtime_ns for _ in range(2)]
    return times[0] != times[1]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Hide the GPU from tests that are not marked gpu, and from their fixtures and subprocesses.

    Results are bitwise reproducible only on the CPU.
    """
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("gpu") is None and any(map(os.path.exists, GPU_DRIVER_FILES)):
            import torch

            if torch.cuda.is_available():
                torch.cuda.init()  # reads CUDA_VISIBLE_DEVICES: gpu tests of this process still see the GPUs
                patch.setenv("CUDA_VISIBLE_DEVICES", "")
                patch.setattr(torch.cuda, "is_available", lambda: False)
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first: with --dist loadfile, a slow file that starts last runs alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Collect garbage rarely: each collection traverses a million objects of the imported modules and the tests.

    `gc.freeze` would not help: `refer.plain_files` calls `gc.get_freeze_count`, which traverses the frozen objects.
    """
    gc.set_threshold(50_000, 50, 50)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip thorough tests unless requested, and gpu tests if GPUs or the compiled CUDA kernels are missing."""
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
        pytest.skip("too few GPUs")
    if mark.kwargs.get("kernels") and "cuda" not in DEVICES:
        pytest.skip("no CUDA kernels")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real COCO images and refs beside the repository; skips the test if there is none."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "data" / "coco_mini").is_dir():
        pytest.skip("no real data beside the repository")
    return path


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic shapes dataset with 60 train images, in the layouts of COCO and REFER."""
    from refdet.data import shapes

    return shapes.write(tmp_path_factory.mktemp("shapes") / "data", seed=0, images=60)


@pytest.fixture(scope="session")
def instances(shapes_root: Path) -> Path:
    """The val instances file of the shapes dataset."""
    return shapes_root / "annotations" / "instances_val2014.json"


@pytest.fixture(scope="session")
def train_instances(shapes_root: Path) -> Path:
    """The train instances file of the shapes dataset."""
    return shapes_root / "annotations" / "instances_train2014.json"


@pytest.fixture(scope="session", autouse=True)
def temporary_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep refdet's cache in a temporary folder, also in subprocesses."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def check_hdf5_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check HDF5 files in this process: a subprocess for each of many files takes too long."""
    monkeypatch.setattr(hdf5_access, "check_in_subprocess", hdf5_sandbox.check_in_process)
