"""Compressed stores on disks that are too small: their size is bounded in advance, and HDF5 does not crash."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from interrupted_extraction import environment
from store_examples import HEADER, PLAN, contents, make_regions

from refdet.data.coco import ImageRecord
from refdet.errors import RuntimeFailure
from refdet.extraction.pipeline import extract
from refdet.extraction.steps import Finish
from refdet.store import hdf5_file
from refdet.structures.regions import Regions

pytestmark = pytest.mark.slow

IMAGES = 200
RECORDS = [ImageRecord(i, f"{i}.jpg", 40, 50) for i in range(IMAGES)]
ORDER = np.random.default_rng(0).permutation(IMAGES).tolist()
BATCHES = [[RECORDS[i] for i in ORDER[k : k + 4]] for k in range(0, IMAGES, 4)]  # in another order than in the store
MIB = 1 << 20


def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
    def regions(record: ImageRecord) -> Regions:
        n, random = record.id % 9, np.random.default_rng(record.id)
        # noise is incompressible; an image takes less than a chunk
        noise = np.nan_to_num(random.integers(0, 2**32, (n, 3000), np.uint32).view(np.float32), posinf=0, neginf=0)
        features = {"fc7": noise, "pool5": noise[:, :1000]}
        return replace(make_regions(record.id, n), features=features)

    return lambda: [regions(record) for record in batch]


def run(out: Path, compression: str, resume: bool = False) -> None:
    pixels = np.zeros((40, 50, 3), np.uint8)
    plan = replace(PLAN, compression=compression, options={**PLAN.options, "compression": compression})
    extract(out, plan, HEADER, BATCHES, RECORDS, lambda record: pixels, compute, resume, shard_images=8)


@pytest.mark.parametrize("compression", ["lzf", "gzip"])
def test_the_reserved_space_suffices_and_no_chunk_is_written_twice(
    tmp_path: Path, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved: list[int] = []
    monkeypatch.setattr(hdf5_file, "_reserve", lambda file, space, start=0: reserved.append(space))
    run(tmp_path / "a.h5", compression)
    size = (tmp_path / "a.h5").stat().st_size
    assert size <= reserved[0] < size + 8 * MIB
    with h5py.File(tmp_path / "a.h5") as file:
        features_size = sum(file[f"features/{name}"].id.get_storage_size() for name in ("fc7", "pool5"))
    assert size - features_size < MIB / 4  # a chunk written twice would leave a hole
    run(tmp_path / "b.h5", "none")
    with h5py.File(tmp_path / "a.h5") as a, h5py.File(tmp_path / "b.h5") as b:
        for name in ("fc7", "pool5"):
            np.testing.assert_array_equal(a[f"features/{name}"], b[f"features/{name}"])


# Extracts to argv[1] with a limit on the size of files during the merge, and without reserving space.
CHILD = """
import resource, sys
from pathlib import Path
import test_compressed_space as t
from refdet.errors import RuntimeFailure
from refdet.extraction.shards import ShardSet
from refdet.store import hdf5_file
hdf5_file._reserve = lambda file, space, start=0: None
merge = ShardSet.merge
def merge_within_limit(self, *rest):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
    try: merge(self, *rest)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
ShardSet.merge = merge_within_limit
try: t.run(Path(sys.argv[1]), sys.argv[2])
except (RuntimeFailure, OSError, RuntimeError) as error: print("failed", error)
"""


@pytest.mark.parametrize("compression", ["none", "lzf"])
def test_a_store_that_cannot_be_written_is_an_error_and_not_a_crash(tmp_path: Path, compression: str) -> None:
    """Where a file system cannot reserve space, HDF5 may fail at any write."""
    run(tmp_path / "whole.h5", compression)
    size = (tmp_path / "whole.h5").stat().st_size
    for number, limit in enumerate((1000, 30_000, size // 2, size - 50)):
        out = tmp_path / str(number) / "a.h5"
        command = [sys.executable, "-c", CHILD, str(out), compression, str(limit)]
        process = subprocess.run(command, env=environment(Path(__file__).parent), capture_output=True, text=True)
        assert (process.returncode, "failed" in process.stdout) == (0, True), (limit, process)
        assert not out.exists() and not list(out.parent.glob(".*"))
    run(out, compression, resume=True)
    assert contents(out) == contents(tmp_path / "whole.h5")


@pytest.mark.parametrize("compression", ["lzf", "gzip"])
def test_a_full_tmpfs_is_reported_for_compressed_stores(tmp_path: Path, compression: str) -> None:
    disk, out = tmp_path / "disk", tmp_path / "disk" / "a.h5"
    disk.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    code = f"import test_compressed_space as t; t.print_outcome('{out}', '{compression}')"
    outcomes = []
    for kib in (24_500, 25_200, 25_300, 27_500):  # shards and store take about 25 MB
        script = f'mount -t tmpfs -o size={kib}k none {disk} && {sys.executable} -c "{code}"'
        command = ["unshare", "-rm", "sh", "-c", script]
        done = subprocess.run(command, env=environment(Path(__file__).parent), capture_output=True, text=True)
        assert done.returncode == 0, (kib, done)
        if "written" in done.stdout:
            outcomes.append("written")
        else:
            assert "no space left" in done.stdout, (kib, done)
            outcomes.append("full")
    assert (outcomes[0], outcomes[-1]) == ("full", "written")
    assert outcomes == sorted(outcomes)  # a larger disk is never too small where a smaller one sufficed


def print_outcome(out: str, compression: str) -> None:
    """Extract, and print "written" or the error."""
    try:
        run(Path(out), compression)
    except RuntimeFailure as error:
        print(error)
    else:
        print("written")
