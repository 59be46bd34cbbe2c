"""Extraction: interrupting and resuming, broken images, changed options, annotations as regions, and image lists."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from interrupted_extraction import BATCHES, RECORDS, environment, interrupt_at
from pycocotools import mask as coco_mask
from resumable_extraction import load
from store_examples import HEADER, PLAN, contents, make_regions

from refdet import store
from refdet.data.coco import Annotation, CocoIndex, ImageRecord
from refdet.errors import InputError, Interrupted
from refdet.extraction.given_regions import regions_from_annotations
from refdet.extraction.image_list import ImageList
from refdet.extraction.open_extraction import open_extraction
from refdet.extraction.pipeline import extract
from refdet.extraction.plan import split_into_shards
from refdet.extraction.steps import Finish
from refdet.extraction.summary import Summary
from refdet.files.atomic import TEMPORARY_MARK

SHARDS = split_into_shards(BATCHES, 2)


def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
    """As `interrupted_extraction.compute`, but some images have no regions."""
    assert [int(image[0, 0, 0]) for image in images] == [r.id for r in batch]
    return lambda: [make_regions(r.id, r.id % 4) for r in batch]


def run(out: Path, compute: object = compute, resume: bool = False, **changes: object) -> Summary:
    plan = replace(PLAN, **changes)  # type: ignore[arg-type]
    header = replace(HEADER, options=plan.options)
    return extract(out, plan, header, BATCHES, RECORDS, load, compute, resume, shard_images=2)  # type: ignore[arg-type]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("stopped_after", range(len(BATCHES)))
def test_an_interrupted_extraction_resumes_to_the_same_file(tmp_path: Path, stopped_after: int) -> None:
    run(tmp_path / "whole.h5")
    finished = sum(map(len, BATCHES[:stopped_after]))
    out = tmp_path / "a.h5"
    with pytest.raises(Interrupted, match=f"{finished} of 10 .*`resume=True`"):
        run(out, interrupt_at(BATCHES[stopped_after], compute))
    assert not out.exists()
    (tmp_path / "a.h5.parts" / ".000009.0123abcd.shard").write_text("a shard that was being written")
    (tmp_path / f".a.0123abcd.{TEMPORARY_MARK}.h5").write_text("a merge that was killed")
    with pytest.raises(InputError, match="add `resume=True`"):
        run(out)
    summary = run(out, resume=True)
    assert (summary.computed, summary.images) == (10 - finished, 10)
    assert contents(out) == contents(tmp_path / "whole.h5")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5", "whole.h5"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_keeps_its_shards(tmp_path: Path, number: signal.Signals) -> None:
    # two shards, of 3 + 2 images, are finished before the third batch
    code = (
        "import os, sys, time; from pathlib import Path; import test_extract as t\n"
        "def killed(batch, images):\n"
        "    if batch == t.BATCHES[2]:\n"
        # another thread writes the shards
        "        while not Path(sys.argv[1] + '.parts/000001.shard').exists(): time.sleep(0.01)\n"
        "        os.kill(os.getpid(), int(sys.argv[2]))\n"
        "    return t.compute(batch, images)\n"
        "t.run(Path(sys.argv[1]), killed)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "a.h5"), str(int(number))]
    process = subprocess.run(arguments, env=environment(Path(__file__).parent), capture_output=True, text=True)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode != 0 and "5 of 10 images are finished" in process.stderr
    assert run(tmp_path / "a.h5", resume=True).computed == 5
    run(tmp_path / "whole.h5")
    assert contents(tmp_path / "a.h5") == contents(tmp_path / "whole.h5")


def test_a_finished_store_is_refused_and_resuming_does_not_change_it(tmp_path: Path) -> None:
    run(tmp_path / "a.h5")
    with pytest.raises(InputError, match=r"a.h5 exists; choose another `out`"):
        run(tmp_path / "a.h5")
    before = digest(tmp_path / "a.h5")

    def compute_nothing(batch: object, images: object) -> Finish:
        raise AssertionError("nothing is left to compute")

    assert run(tmp_path / "a.h5", compute_nothing, resume=True).computed == 0
    assert digest(tmp_path / "a.h5") == before


@pytest.mark.parametrize("finished", [False, True])
def test_resuming_with_other_options_is_refused_with_their_names(tmp_path: Path, finished: bool) -> None:
    if finished:
        run(tmp_path / "a.h5")
    else:
        with open_extraction(tmp_path / "a.h5", PLAN, HEADER, SHARDS, resume=False):
            pass
    for key, value, message in (
        ("score_threshold", 0.1, "`score_threshold` was 0.05 and is now 0.1"),
        ("image_list_sha256", "0", "another image list"),
        ("boxes_sha256", "0", "another file of boxes"),
        ("crowd_as_object", True, "`crowd_as_object` was false and is now true"),
        ("box_format", "xyxy", "`box_format` was xywh and is now xyxy"),
        ("regions", "annotations", "`regions` was not set and is now annotations"),
    ):
        with pytest.raises(InputError, match=message):
            run(tmp_path / "a.h5", resume=True, options={**PLAN.options, key: value})


def test_two_processes_do_not_write_one_store(tmp_path: Path) -> None:
    with (
        open_extraction(tmp_path / "a.h5", PLAN, HEADER, SHARDS, resume=False),
        pytest.raises(InputError, match="another process"),
    ):
        run(tmp_path / "a.h5", resume=True)


def test_a_broken_image_gets_no_regions_and_its_error_is_stored(tmp_path: Path) -> None:
    def load_unless_broken(record: ImageRecord) -> np.ndarray:
        if record.id in (3, 7, 8, 9):  # one image of a batch, and all images of another
            raise InputError(f"{record.file_name}: not a readable image")
        return load(record)

    summary = extract(tmp_path / "a.h5", PLAN, HEADER, BATCHES, RECORDS, load_unless_broken, compute, shard_images=2)
    assert summary.errors == 4
    with store.open(tmp_path / "a.h5") as found:
        assert {i: len(found[i]) for i in found} == {i: 0 if i in (3, 7, 8, 9) else i % 4 for i in range(10)}
        assert found.errors[3].endswith("3.jpg: not a readable image")


def test_regions_in_another_order_than_their_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other images"):
        run(tmp_path / "a.h5", lambda batch, images: lambda: compute(batch, images)()[::-1])


def test_annotations_become_regions() -> None:
    image = ImageRecord(1, "a.jpg", 20, 30)
    crossing_border = Annotation(11, 1, 5, (-4.0, 2.5, 10.5, 30.0), None, 1.0, False)
    crowd = Annotation(12, 1, 5, (0.0, 0.0, 30.0, 20.0), None, 1.0, True)
    square = Annotation(13, 1, 5, (1, 1, 4, 4), [[1, 1, 4, 1, 4, 4, 1, 4]], 9.0, False)
    regions = regions_from_annotations(image, [crossing_border, crowd, square])
    assert regions.ann_ids is not None
    assert regions.ann_ids.tolist() == [11, 13]
    assert regions.boxes.tolist() == [[0, 2.5, 10.5, 20], [1, 1, 4, 4]]
    # without a segmentation, the mask is the box, up to a pixel at its edges
    assert coco_mask.area(regions.rles()).tolist() == pytest.approx([10.5 * 17.5, 9], abs=20)
    assert coco_mask.area(regions.rles()[1]) == 9
    assert len(regions_from_annotations(image, [])) == 0


def test_real_annotations_become_regions(shared: Path) -> None:
    index = CocoIndex.load(shared / "data/coco_mini/annotations/instances_train2017.json")
    found = [regions_from_annotations(record, index.annotations[i]) for i, record in index.images.items()]
    ids = [int(i) for regions in found if regions.ann_ids is not None for i in regions.ann_ids]
    assert len(ids) == 739 - 8  # without the crowds
    assert sorted(ids) == sorted(a["id"] for a in index.raw["annotations"] if not a["iscrowd"])


def test_the_image_list_of_refer_splits(shared: Path) -> None:
    root = shared / "data/coco_mini/refer"
    test_images = ImageList.of_refer(root, "refcoco", "unc", splits=["testA,testB"])
    assert [r.id for r in test_images.records] == sorted({r.id for r in test_images.records}) != []
    assert test_images.name == "refcoco/unc/testA,testB"
    assert len(ImageList.of_refer(root, "refcoco", "unc").records) == 4
    with pytest.raises(InputError, match="`splits` tset: no such split.*testA, testB, val"):
        ImageList.of_refer(root, "refcoco", "unc", splits=["tset"])  # a typo
    with pytest.raises(ValueError, match="^splits: a list of names is needed, not 'val'$"):  # not v, a and l
        ImageList.of_refer(root, "refcoco", "unc", splits="val")
