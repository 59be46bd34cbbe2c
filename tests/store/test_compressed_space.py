"""Compressed stores on disks that are too small: their space is known before, and a failure is no crash."""

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
BATCHES = [[RECORDS[i] for i in ORDER[k : k + 4]] for k in range(0, IMAGES, 4)]  # far from the order of the file
MIB = 1 << 20


def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
    def regions(record: ImageRecord) -> Regions:
        n, random = record.id % 9, np.random.default_rng(record.id)
        # noise does not become smaller, and an image is less than a chunk
        noise = np.nan_to_num(random.integers(0, 2**32, (n, 3000), np.uint32).view(np.float32), posinf=0, neginf=0)
        features = {"fc7": noise, "pool5": noise[:, :1000]}
        return replace(make_regions(record.id, n), features=features)

    return lambda: [regions(record) for record in batch]


def run(out: Path, compression: str, resume: bool = False) -> None:
    picture = np.zeros((40, 50, 3), np.uint8)
    plan = replace(PLAN, compression=compression, options={**PLAN.options, "compression": compression})
    extract(out, plan, HEADER, BATCHES, RECORDS, lambda record: picture, compute, resume, shard_images=8)


@pytest.mark.parametrize("compression", ["lzf", "gzip"])
def test_the_space_set_aside_is_enough_and_no_chunk_is_written_twice(
    tmp_path: Path, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(hdf5_file, "_reserve", lambda file, space, start=0: seen.append(space))
    run(tmp_path / "a.h5", compression)
    size = (tmp_path / "a.h5").stat().st_size
    assert size <= seen[0] < size + 8 * MIB
    with h5py.File(tmp_path / "a.h5") as file:
        held = sum(file[f"features/{name}"].id.get_storage_size() for name in ("fc7", "pool5"))
    assert size - held < MIB / 4  # a chunk that had grown would have left a hole
    run(tmp_path / "b.h5", "none")
    with h5py.File(tmp_path / "a.h5") as a, h5py.File(tmp_path / "b.h5") as b:
        for name in ("fc7", "pool5"):
            np.testing.assert_array_equal(a[f"features/{name}"], b[f"features/{name}"])


CHILD = """
import resource, sys
from pathlib import Path
import test_compressed_space as t
from refdet.store import hdf5_file
from refdet.errors import RuntimeFailure
from refdet.structures.regions import Regions
hdf5_file._reserve = lambda file, space, start=0: None
merge = t.store_merge()
def limited(self, *rest):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
    try: merge(self, *rest)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
t.set_merge(limited)
try: t.run(Path(sys.argv[1]), sys.argv[2])
except (RuntimeFailure, OSError, RuntimeError) as error: print("failed", error)
"""


def store_merge() -> object:
    from refdet.extraction.shards import ShardSet

    return ShardSet.merge


def set_merge(merge: object) -> None:
    from refdet.extraction.shards import ShardSet

    ShardSet.merge = merge  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize("compression", ["none", "lzf"])
def test_a_store_that_cannot_be_written_is_no_crash(tmp_path: Path, compression: str) -> None:
    """Without space set aside, as where a file system cannot: HDF5 fails wherever it is."""
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
def test_a_disk_that_is_really_full_of_compressed_chunks(tmp_path: Path, compression: str) -> None:
    disk, out = tmp_path / "disk", tmp_path / "disk" / "a.h5"
    disk.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    code = f"import test_compressed_space as t; t.on_a_small_disk('{out}', '{compression}')"
    ends = []
    for kib in (24_500, 25_200, 25_300, 27_500):
        script = f'mount -t tmpfs -o size={kib}k none {disk} && {sys.executable} -c "{code}"'
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script],
            env=environment(Path(__file__).parent),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (kib, done)
        ends.append("whole" if "whole" in done.stdout else "full" if "no space left" in done.stdout else done.stdout)
    assert (ends[0], ends[-1], ends) == ("full", "whole", sorted(ends))


def on_a_small_disk(out: str, compression: str) -> None:
    try:
        run(Path(out), compression)
    except RuntimeFailure as error:
        print(error)
    else:
        print("whole")
