"""The pipeline of an extraction: its plan, its stages, `strict`, and errors in its background thread."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupted_extraction import BATCHES, BROKEN, RECORDS, compute, environment, interrupt_at
from interrupted_extraction import load as load_with_one_broken
from resumable_extraction import load
from store_examples import HEADER, PLAN, contents, make_regions

from refdet import store
from refdet.data.coco import CocoIndex, ImageRecord
from refdet.errors import InputError, Interrupted, RuntimeFailure
from refdet.extraction import load_ahead, pipeline
from refdet.extraction.pipeline import extract
from refdet.extraction.plan import split_into_shards
from refdet.extraction.steps import Finish
from refdet.extraction.summary import Summary
from refdet.extraction.timing import STAGES
from refdet.store import hdf5_file
from refdet.structures.regions import Regions

pytestmark = pytest.mark.slow


def run(out: Path, **changes: Any) -> Summary:
    given: dict[str, Any] = {
        "plan": PLAN, "header": replace(HEADER, options=PLAN.options), "batches": BATCHES, "records": RECORDS,
        "load": load, "compute": compute, "shard_images": 2,
    }  # fmt: skip
    return extract(out, **{**given, **changes})


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 5), max_size=20), images=st.integers(1, 9))
def test_shards_are_whole_batches_in_order(sizes: list[int], images: int) -> None:
    batches = [[ImageRecord(100 * i + j, "", 1, 1) for j in range(size)] for i, size in enumerate(sizes)]
    shards = split_into_shards(batches, images)
    assert [batch for shard in shards for batch in shard] == batches
    for shard in shards[:-1]:
        assert sum(map(len, shard)) >= images > sum(map(len, shard[:-1]))


def test_resuming_with_other_batches_or_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "a.h5"
    with pytest.raises(Interrupted, match="0 of 10 .*`resume=True`"):
        run(out, compute=interrupt_at(BATCHES[0]))
    with pytest.raises(
        InputError, match="started with different settings: `batch_size` was 4 and is now 8; use the same"
    ):
        run(out, plan=replace(PLAN, batch_size=8), resume=True)
    with pytest.raises(InputError, match="started with different settings: other shards"):
        run(out, batches=BATCHES[::-1], resume=True)
    (tmp_path / "a.h5.parts" / "plan.json").write_text('{"score_threshold": 0.05}')
    with pytest.raises(InputError, match="started with different settings: another version"):
        run(out, resume=True)
    (tmp_path / "a.h5.parts" / "000000.shard").write_text("shard")
    (tmp_path / "a.h5.parts" / "plan.json").write_text("")
    with pytest.raises(InputError, match="plan.json: damaged"):
        run(out, resume=True)


def test_a_shard_of_another_extraction_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Shards may be left without a plan if removing their folder was interrupted."""

    def compute_others(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        return lambda: [make_regions(r.id, 1, seed=1) for r in batch]

    other_plan, out = replace(PLAN, options={"score_threshold": 0.9}), tmp_path / "a.h5"
    with pytest.raises(Interrupted):
        run(out, compute=interrupt_at(BATCHES[2], compute_others), plan=other_plan)
    (tmp_path / "a.h5.parts" / "plan.json").unlink()
    assert run(out).computed == 10
    assert "000001.shard: belongs to another extraction" in caplog.text
    run(tmp_path / "whole.h5")
    assert contents(out) == contents(tmp_path / "whole.h5")


def test_strict_stops_at_a_broken_image_and_keeps_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "a.h5"
    with pytest.raises(RuntimeFailure, match=f"`strict`: ümlaut_{BROKEN}.jpg: not a readable image; .*`resume=True`"):
        run(out, load=load_with_one_broken, strict=True)
    assert not out.exists()
    with pytest.raises(RuntimeFailure, match=f"ümlaut_{BROKEN}.jpg"):
        run(out, load=load_with_one_broken, strict=True, resume=True)
    repaired = run(out, strict=True, resume=True)
    assert (repaired.computed, repaired.errors) == (len(BATCHES[3]), 0)
    run(tmp_path / "whole.h5")
    assert contents(out) == contents(tmp_path / "whole.h5")


def test_strict_computes_shards_with_broken_images_again(tmp_path: Path) -> None:
    def load_with_first_batch_broken(record: ImageRecord) -> np.ndarray:
        if record.id == BATCHES[0][1].id:
            raise InputError("broken")
        return load(record)

    out = tmp_path / "a.h5"
    with pytest.raises(Interrupted, match="5 of 10"):
        run(out, load=load_with_first_batch_broken, compute=interrupt_at(BATCHES[2]))
    with pytest.raises(RuntimeFailure, match="`strict`: broken"):
        run(out, load=load_with_first_batch_broken, strict=True, resume=True)
    assert run(out, strict=True, resume=True).computed == 10 - len(BATCHES[1])


def test_strict_refuses_a_finished_store_with_broken_images(tmp_path: Path) -> None:
    assert run(tmp_path / "a.h5", load=load_with_one_broken).errors == 1
    with pytest.raises(RuntimeFailure, match=f"`strict`: ümlaut_{BROKEN}.jpg: .* no regions of 1 image"):
        run(tmp_path / "a.h5", load=load_with_one_broken, strict=True, resume=True)


def test_a_broken_image_is_replaced_so_that_its_batch_keeps_its_size(tmp_path: Path) -> None:
    computed: list[list[int]] = []

    def recording_compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        computed.append([r.id for r in batch])
        return compute(batch, images)

    def load_unless_broken(record: ImageRecord) -> np.ndarray:
        if record.id in (2, 4, 5, 6):
            raise InputError(f"{record.id} is\0broken \udcff")
        return load(record)

    run(tmp_path / "a.h5", load=load_unless_broken, compute=recording_compute)
    assert computed == [[7, 8, 9], [0, 1], [3, 3, 3]]  # of 5 and 6, both broken, nothing is computed
    run(tmp_path / "whole.h5")
    with store.open(tmp_path / "a.h5") as found, store.open(tmp_path / "whole.h5") as whole:
        assert found.errors == {i: f"{i} is?broken ?" for i in (2, 4, 5, 6)}
        for i in (0, 1, 3, 7, 8, 9):
            np.testing.assert_array_equal(found[i].boxes, whole[i].boxes)
            np.testing.assert_array_equal(found[i].features["fc7"], whole[i].features["fc7"])
            assert found[i].masks == whole[i].masks


@pytest.mark.parametrize("bad", [-1, 0, 2, 3])
def test_an_error_in_the_background_thread_is_raised(tmp_path: Path, bad: int) -> None:
    def compute_but_fail_to_finish(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        def fail() -> list[Regions]:
            raise RuntimeError("the device is gone")

        return fail if batch == BATCHES[bad] else compute(batch, images)

    with pytest.raises(RuntimeError, match="the device is gone"):
        run(tmp_path / "a.h5", compute=compute_but_fail_to_finish)
    assert not list((tmp_path / "a.h5.parts").glob(".*"))
    assert "finish and write" not in [thread.name for thread in threading.enumerate()]
    left = len(BATCHES) - bad % len(BATCHES)
    assert run(tmp_path / "a.h5", resume=True).computed == sum(map(len, BATCHES[-left:]))


def test_batches_are_finished_in_order_in_a_background_thread(tmp_path: Path) -> None:
    finished: list[tuple[int, bool]] = []
    second_started = threading.Event()

    def recording_compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        if batch == BATCHES[1]:
            second_started.set()
        regions = compute(batch, images)

        def finish() -> list[Regions]:
            assert second_started.wait(10)  # the second batch is computed before the first is finished
            finished.append((batch[0].id, threading.current_thread() is threading.main_thread()))
            return regions()

        return finish

    done = run(tmp_path / "a.h5", compute=recording_compute)
    assert finished == [(batch[0].id, False) for batch in BATCHES]
    assert tuple(done.stages) == STAGES and all(seconds > 0 for seconds in done.stages.values())
    assert done.images_per_second == pytest.approx(done.computed / done.seconds)
    assert sum(done.stages[name] for name in ("load", "compute", "wait")) <= done.seconds


def test_the_background_thread_is_at_most_three_batches_behind(tmp_path: Path) -> None:
    """One that it works on and two that wait, as all of them are in the memory of the GPU."""
    started = finished = most_unfinished = 0

    def counting_compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        nonlocal started, most_unfinished
        started += 1
        most_unfinished = max(most_unfinished, started - finished)
        regions = compute(batch, images)

        def finish() -> list[Regions]:
            nonlocal finished
            time.sleep(0.01)
            finished += 1
            return regions()

        return finish

    run(tmp_path / "a.h5", compute=counting_compute, batches=[[r] for r in RECORDS])
    assert 1 < most_unfinished <= 4  # with the one that is being computed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_background_thread_finish_its_batches(tmp_path: Path, number: signal.Signals) -> None:
    """The signal interrupts the third of four batches; the first two, of 5 images, are finished."""
    code = (
        "import os, sys, time; from pathlib import Path; import test_pipeline as t\n"
        "def slow(batch, images):\n"
        "    if batch == t.BATCHES[2]: os.kill(os.getpid(), int(sys.argv[2])); time.sleep(9)\n"
        "    regions = t.compute(batch, images)\n"
        "    return lambda: time.sleep(0.2) or regions()\n"
        "t.run(Path(sys.argv[1]), compute=slow)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.h5"), str(int(number))]
    process = subprocess.run(command, env=environment(Path(__file__).parent), capture_output=True, text=True)
    assert "5 of 10 images are finished" in process.stderr and "`resume=True`" in process.stderr
    assert run(tmp_path / "a.h5", resume=True).computed == 5


@pytest.mark.parametrize("lacks", ["masks", "ann_ids", "features"])
def test_regions_that_lack_a_column_are_refused(tmp_path: Path, lacks: str) -> None:
    def compute_incomplete(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        changes: dict[str, Any] = {lacks: {} if lacks == "features" else None}
        return lambda: [replace(make_regions(r.id, 2), **changes) for r in batch]

    with pytest.raises(ValueError, match="image .*: no "):
        run(tmp_path / "a.h5", compute=compute_incomplete)


def test_features_that_change_their_shape_are_refused(tmp_path: Path) -> None:
    def compute_other_shapes(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        width = 6 if batch == BATCHES[2] else 5
        features = {"pool5": np.zeros((2, 4), np.float32), "fc7": np.zeros((2, width), np.float32)}
        return lambda: [replace(make_regions(r.id, 2), features=features) for r in batch]

    with pytest.raises(RuntimeFailure, match=r"000002.shard: fc7 of image 5 has shape \(6,\), others have \(5,\)"):
        run(tmp_path / "a.h5", compute=compute_other_shapes)


def test_disk_space_for_the_store_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[tuple[int, int]] = []  # start and end in the file
    monkeypatch.setattr(pipeline.Timer, "summary", lambda *_: {})  # the times in the attribute "run" differ
    with monkeypatch.context() as patch:
        patch.setattr(
            hdf5_file.os, "posix_fallocate", lambda handle, start, space: reserved.append((start, start + space))
        )
        run(tmp_path / "a.h5")
    run(tmp_path / "b.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    covered = list(reserved)
    with h5py.File(tmp_path / "a.h5") as file:  # if the disk fills up in these columns, HDF5 does not crash
        for group in ("regions", "features"):
            for data in file[group].values():
                if (offset := data.id.get_offset()) is not None:
                    covered.append((offset, offset + data.id.get_storage_size()))
    end = 0
    for first, last in sorted(covered):
        assert first <= end
        end = max(end, last)
    assert reserved and end >= (tmp_path / "a.h5").stat().st_size

    def full(handle: int, start: int, space: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hdf5_file.os, "posix_fallocate", full)
    with pytest.raises(RuntimeFailure, match="c.h5: no space left on the disk; finished shards are kept"):
        run(tmp_path / "c.h5")
    assert not (tmp_path / "c.h5").exists() and len(list((tmp_path / "c.h5.parts").glob("*.shard"))) == 4


def test_the_reserved_space_suffices_for_long_names_and_errors(tmp_path: Path) -> None:
    records = [ImageRecord(i, f"{'ü' * (i % 90)}{i}.jpg", 40, 50) for i in range(400)]

    def fail(record: ImageRecord) -> np.ndarray:
        raise InputError("why " * (record.id % 60))

    reserved: list[int] = []
    reserve = hdf5_file._reserve

    def recording_reserve(file: h5py.File, space: int, start: int = 0) -> None:
        reserved.append(space)
        reserve(file, space, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hdf5_file, "_reserve", recording_reserve)
        run(tmp_path / "a.h5", records=records, batches=[records], load=fail)
    assert reserved[0] >= (tmp_path / "a.h5").stat().st_size


def test_file_names_with_nul_or_surrogates_are_refused(tmp_path: Path) -> None:
    for name in ("a\\u0000.jpg", "a\\udc80.jpg"):
        path = tmp_path / "i.json"
        entry = f'{{"id": 7, "file_name": "{name}", "height": 4, "width": 4}}'
        path.write_text(f'{{"images": [{entry}], "annotations": [], "categories": []}}')
        with pytest.raises(InputError, match="i.json: image 7: 'file_name' .* contains NUL or unpaired surrogates"):
            CocoIndex.load(path)


def test_memory_grows_by_less_than_two_kilobytes_per_image(tmp_path: Path) -> None:
    """The features of an image take 40 kB."""

    def compute_wide(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        def finish() -> list[Regions]:
            return [
                replace(
                    make_regions(r.id, 2),
                    features={"pool5": np.zeros((2, 5000), np.float32), "fc7": np.zeros((2, 10), np.float32)},
                )
                for r in batch
            ]

        return finish

    def measure_peak(count: int) -> int:
        """Extract this many images; returns the most memory allocated, in bytes."""
        records = [ImageRecord(i, f"{i}.jpg", 8, 8) for i in range(count)]
        batches = [records[i : i + 4] for i in range(0, count, 4)]
        pixels = np.zeros((8, 8, 3), np.uint8)
        changes = {"records": records, "batches": batches, "load": lambda record: pixels, "compute": compute_wide}
        tracemalloc.start()
        try:
            run(tmp_path / f"{len(list(tmp_path.iterdir()))}.h5", **changes, shard_images=32)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    measure_peak(40)  # the first use imports modules and fills caches
    # the lower of two, as other threads of the process may allocate memory meanwhile
    assert (min(measure_peak(440), measure_peak(440)) - measure_peak(40)) / 400 < 2000


@pytest.mark.parametrize(("max_pixels", "waiting"), [(1 << 28, 10), (40, 4), (1, 2)])
def test_images_are_loaded_ahead_up_to_a_number_of_pixels(
    monkeypatch: pytest.MonkeyPatch, max_pixels: int, waiting: int
) -> None:
    """At least the next batch, of two images of 10 pixels, is loaded ahead."""
    monkeypatch.setattr(load_ahead, "_MAX_PIXELS", max_pixels)
    batches = [[ImageRecord(2 * i, "", 5, 2), ImageRecord(2 * i + 1, "", 5, 2)] for i in range(10)]
    loaded: list[int] = []

    def recording_load(record: ImageRecord) -> np.ndarray:
        loaded.append(record.id)
        return load(record)

    yielded = []
    for number, images in enumerate(load_ahead.load_ahead(recording_load, batches, 1)):
        yielded += [int(image[0, 0, 0]) for image in images if not isinstance(image, str)]
        assert len(loaded) <= 2 * number + waiting
    assert yielded == sorted(loaded) == list(range(20))
