"""Repairing a store: resuming computes only the batches of images that were broken and now can be read."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from interrupted_extraction import BATCHES, RECORDS, interrupt_at
from store_examples import HEADER, PLAN, contents, make_regions

from refdet import store
from refdet.data.coco import ImageRecord
from refdet.errors import InputError, Interrupted, RuntimeFailure
from refdet.extraction import repair
from refdet.extraction.pipeline import extract
from refdet.extraction.plan import Plan
from refdet.extraction.repair import repair_folder
from refdet.extraction.steps import Finish
from refdet.extraction.summary import Summary
from refdet.files.atomic import temporary_path
from refdet.files.lock import exclusive_lock
from refdet.structures.regions import Regions

pytestmark = pytest.mark.slow

PLANS = {
    "all columns": PLAN,
    "no features": replace(PLAN, features=()),
    "no masks": replace(PLAN, masks=False, ann_ids=False),
    "float16, compressed": replace(PLAN, dtype="float16", compression="gzip"),
    "maps": replace(PLAN, maps=("head",)),
}


class Extraction:
    """An extraction some of whose images may be broken, which records the batches it computes.

    Attributes:
        out: the store.
        plan: what is computed.
        computed: image ids of each batch of the last call.
    """

    def __init__(self, out: Path, plan: Plan = PLAN) -> None:
        self.out, self.plan = out, plan
        self.computed: list[list[int]] = []

    def __call__(self, broken: Collection[int] = (), resume: bool = False, **changes: Any) -> Summary:
        def load(record: ImageRecord) -> np.ndarray:
            if record.id in broken:
                raise InputError(f"{record.file_name}: not a readable image")
            return np.zeros((record.height, record.width, 3), np.uint8)

        given: dict[str, Any] = {
            "plan": self.plan, "header": replace(HEADER, options=self.plan.options), "batches": BATCHES,
            "records": RECORDS, "load": load, "compute": self.compute, "shard_images": 2, "resume": resume,
        }  # fmt: skip
        self.computed.clear()
        return extract(self.out, **{**given, **changes})

    def compute(self, batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        self.computed.append([record.id for record in batch])

        def finish() -> list[Regions]:
            # the regions depend on the size of the batch, as rounding does
            return [self.regions(record, len(batch)) for record in batch]

        return finish

    def regions(self, record: ImageRecord, size: int) -> Regions:
        made = make_regions(record.id, record.id % 4, seed=size)
        if not self.plan.maps:
            return made
        info = np.array([record.id, 2, 3], np.float32)
        return replace(made, maps={"head": np.full((2, 3, record.id + 1), record.id, np.float32)}, im_info=info)


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> Plan:
    return PLANS[request.param]


def whole_contents(folder: Path, plan: Plan = PLAN) -> dict[str, Any]:
    """Contents of the store of an extraction without broken images."""
    Extraction(folder / "whole.h5", plan)()
    return contents(folder / "whole.h5")


@pytest.mark.parametrize("broken", [(4,), (3, 4), (2, 3, 4), (0, 5, 9), (0,), tuple(range(1, 10))])
def test_repair_computes_only_affected_batches_and_gives_the_same_store(
    tmp_path: Path, broken: tuple[int, ...], plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    run = Extraction(tmp_path / "a.h5", plan)
    assert run(broken).errors == len(broken)
    done = run(resume=True)
    affected = [[r.id for r in batch] for batch in BATCHES if any(r.id in broken for r in batch)]
    assert run.computed == affected and (done.errors, done.computed) == (0, sum(map(len, affected)))
    images = "1 previously unusable image" if len(broken) == 1 else f"{len(broken)} previously unusable images"
    assert f"note: {images} can now be read" in caplog.text
    assert contents(run.out) == whole_contents(tmp_path, plan)
    with store.open(run.out) as found:
        assert found.run["images"] == 10 and found.run["repaired"]["images"] == done.computed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "whole.h5"]
    assert run(resume=True).computed == 0 and not run.computed


def test_images_may_be_repaired_one_after_another(tmp_path: Path) -> None:
    run = Extraction(tmp_path / "a.h5")
    run((0, 3, 4))
    assert run((3, 4), resume=True).errors == 2 and run.computed == [[0, 1]]
    assert run((4,), resume=True).errors == 1 and run.computed == [[2, 3, 2]]  # another image in place of 4
    with store.open(run.out) as found:
        assert found.errors == {4: f"{RECORDS[4].file_name}: not a readable image"}
    assert run(resume=True).errors == 0
    assert contents(run.out) == whole_contents(tmp_path)


def test_regions_of_images_that_can_no_longer_be_read_are_kept(
    tmp_path: Path, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    run = Extraction(tmp_path / "a.h5", plan)
    run((4,))
    assert run((2, 3), resume=True).errors == 0 and run.computed == [[4, 4, 4]]
    assert f"2 images beside repaired ones can no longer be read (first: {RECORDS[2].file_name}: not" in caplog.text
    assert f"{run.out} keeps the regions it has of these images" in caplog.text
    assert contents(run.out) == whole_contents(tmp_path, plan) and not repair_folder(run.out).exists()
    assert run((2, 3), resume=True).computed == 0


def test_a_store_whose_images_are_still_broken_does_not_change(tmp_path: Path) -> None:
    run = Extraction(tmp_path / "a.h5")
    run((3, 4))
    before = run.out.read_bytes()
    assert run((3, 4), resume=True).computed == 0 and run.out.read_bytes() == before and not run.computed
    with pytest.raises(RuntimeFailure, match=f"`strict`: {RECORDS[4].file_name}: not a readable image; .* of 2 images"):
        run((4,), resume=True, strict=True)
    assert run.out.read_bytes() == before and not run.computed and not repair_folder(run.out).exists()
    assert run(resume=True, strict=True).errors == 0


def test_an_interrupted_repair_is_resumed(tmp_path: Path) -> None:
    run = Extraction(tmp_path / "a.h5")
    run((0, 3, 5))
    before = run.out.read_bytes()
    with pytest.raises(Interrupted, match="4 of 7 images .*a.h5.repair.*`resume=True`"):
        run(resume=True, compute=interrupt_at(BATCHES[3], run.compute))
    assert run.out.read_bytes() == before and len(list(repair_folder(run.out).glob("*.shard"))) == 2
    assert run(resume=True).errors == 0 and run.computed == [[2, 3, 4]]
    assert contents(run.out) == whole_contents(tmp_path) and not repair_folder(run.out).exists()


def test_a_repair_killed_as_it_starts_is_resumed(tmp_path: Path) -> None:
    run = Extraction(tmp_path / "a.h5")
    run((3,))
    folder = repair_folder(run.out)
    folder.mkdir()
    for left in (folder / "lock", temporary_path(folder / "repair.json")):
        left.touch()
    assert run(resume=True).errors == 0 and not folder.exists()


def test_finished_shards_are_kept_while_their_images_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Extraction(tmp_path / "a.h5")
    run((0, 3, 5))
    folder = repair_folder(run.out)
    with pytest.raises(Interrupted, match="`resume=True`"):
        run(resume=True, compute=interrupt_at(BATCHES[3], run.compute))
    assert run((0, 3, 5), resume=True).errors == 3 and len(list(folder.glob("*.shard"))) == 2  # as on an unmounted disk
    assert "a.h5.repair is kept: it has finished shards of repaired images, which cannot be read now" in caplog.text
    with (
        exclusive_lock(folder, "lock", "wait for it to finish"),
        pytest.raises(InputError, match="another process .*wait for it to finish"),
    ):
        run((0, 3, 5), resume=True)
    assert run(resume=True).errors == 0 and run.computed == [[2, 3, 4]]
    assert contents(run.out) == whole_contents(tmp_path) and not folder.exists()


@pytest.mark.parametrize("name", ["a.h5", "refcoco"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_repair_killed_during_its_merge_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, name: str
) -> None:
    run = Extraction(tmp_path / name)
    run((4,))
    replace_file: Callable[..., None] = repair.os.replace

    def replace_until_killed(source: Path, target: Path) -> None:
        if Path(target) == run.out:
            if moment == "after":
                replace_file(source, target)
            raise RuntimeError("killed")
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(repair.os, "replace", replace_until_killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(resume=True)
    temporary_path(repair_folder(run.out) / name).write_text("half a store")
    assert run(resume=True).errors == 0 and not run.computed
    assert contents(run.out) == whole_contents(tmp_path) and not repair_folder(run.out).exists()


def test_shards_of_another_repair_are_discarded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Extraction(tmp_path / "a.h5")
    run((0, 4))

    def compute_others(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        return lambda: [make_regions(r.id, 3, seed=99) for r in batch]

    with pytest.raises(Interrupted, match="`resume=True`"):
        run(resume=True, compute=interrupt_at(BATCHES[3], compute_others))
    run.out.rename(tmp_path / "old.h5")  # kept, so that the new store cannot have the same inode
    run((0, 4))
    assert run(resume=True).errors == 0 and run.computed == [[0, 1], [2, 3, 4]]
    assert "finished shards in" in caplog.text and "a.h5.repair are of another repair and are discarded" in caplog.text
    assert contents(run.out) == whole_contents(tmp_path)


def test_other_options_and_another_batch_size_are_refused(tmp_path: Path) -> None:
    run = Extraction(tmp_path / "a.h5")
    run((4,))
    for changes, message in (
        ({"plan": replace(PLAN, options={**PLAN.options, "dtype": "float16"})}, "`dtype` was float32"),
        ({"plan": replace(PLAN, batch_size=8)}, "`batch_size` was 4 and is now 8; use the same"),
        ({"header": replace(HEADER, recipe="other", options=PLAN.options)}, "another recipe"),
    ):
        with pytest.raises(InputError, match=message):
            run(resume=True, **changes)
    repair_folder(run.out).mkdir()
    (repair_folder(run.out) / "thesis.txt").write_text("not refdet's")
    with pytest.raises(InputError, match="a.h5.repair: needed .* contains other files; move it"):
        run(resume=True)
    assert (repair_folder(run.out) / "thesis.txt").read_text() == "not refdet's"
    assert run((4,), resume=True).computed == 0


def test_a_damaged_store_is_named_and_not_changed(tmp_path: Path) -> None:
    run = Extraction(tmp_path / "a.h5")
    run((4,))
    with h5py.File(run.out, "r+") as file:
        file["regions/mask_start"][-1] = -5
    before = run.out.read_bytes()
    with pytest.raises(InputError, match="a.h5: damaged: .*mask_start.*; extract it again"):
        run(resume=True)
    assert run.out.read_bytes() == before


@pytest.mark.parametrize("strict", [False, True])
def test_no_store_is_written_if_every_image_failed(tmp_path: Path, strict: bool) -> None:
    run = Extraction(tmp_path / "a.h5")
    message = "`strict`" if strict else "none of 10 images could be used .first: ümlaut_7.jpg: not a readable image.; "
    for resume in (False, True, True):
        with pytest.raises(RuntimeFailure, match=message):
            run(range(10), resume=resume, strict=strict)
        assert not run.out.exists() and not run.computed
    assert run(range(1, 10), resume=True).errors == 9  # image 0 was repaired
    assert run.computed == [[0, 0]]
    assert run(resume=True).errors == 0 and contents(run.out) == whole_contents(tmp_path)


def test_a_finished_store_without_a_usable_image_is_a_failure(tmp_path: Path) -> None:
    """Older versions wrote such stores."""
    run = Extraction(tmp_path / "a.h5")
    images = [replace(make_regions(r.id, 0), error="broken", features={}) for r in RECORDS]
    rows = [store.ImageRow(r.image_id, r.file_name, r.height, r.width, "broken", 0, 0) for r in images]
    columns = store.Columns({"fc7": (0,), "pool5": (0,)}, "float32", True, True)
    with store.create(run.out, replace(HEADER, options=PLAN.options), columns, rows) as writer:
        for image in images:
            writer.put(image)
    before = run.out.read_bytes()
    with pytest.raises(RuntimeFailure, match="none of 10 images could be used .first: broken.; .*a.h5 has no regions"):
        run(range(10), resume=True)
    assert run.out.read_bytes() == before
    assert run(resume=True).errors == 0 and contents(run.out) == whole_contents(tmp_path)


def test_images_without_regions_are_not_a_failure(tmp_path: Path) -> None:
    def compute_no_regions(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        return lambda: [make_regions(r.id, 0) for r in batch]

    assert Extraction(tmp_path / "a.h5")(compute=compute_no_regions).regions == 0


def test_an_unfinished_extraction_retries_broken_images(tmp_path: Path) -> None:
    run = Extraction(tmp_path / "a.h5")
    with pytest.raises(Interrupted, match="`resume=True`"):
        run((0, 9), compute=interrupt_at(BATCHES[3], run.compute))
    assert run((9,), resume=True).errors == 1 and run.computed == [[0, 1], [2, 3, 4]]


def test_an_unfinished_extraction_keeps_a_shard_whose_images_can_no_longer_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Extraction(tmp_path / "a.h5")
    with pytest.raises(Interrupted, match="`resume=True`"):
        run((0, 9), compute=interrupt_at(BATCHES[3], run.compute))
    assert run((1,), resume=True).errors == 1 and run.computed == [[7, 8, 9], [2, 3, 4]]
    assert (
        "note: 1 finished shard is not computed again for repaired images, as other images of the shard can no longer "
        f"be read (first: {RECORDS[1].file_name}: not a readable image)" in caplog.text
    )
    assert run((1,), resume=True).errors == 0 and run.computed == [[0, 0]]  # now the store is repaired
    assert contents(run.out) == whole_contents(tmp_path)
