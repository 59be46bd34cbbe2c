"""Image files that were replaced by others since an earlier session are noticed when an extraction resumes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detector_folder import DetectorFolder
from filelock import FileLock
from interrupted_extraction import BATCHES, RECORDS
from part_extraction import run_part
from PIL import Image
from pycocotools import mask as coco_mask
from resumable_extraction import run
from store_examples import PLAN, contents, make_regions

from refdet.data.coco import ImageRecord
from refdet.data.image_source import ImageSource
from refdet.errors import Interrupted, RuntimeFailure
from refdet.extraction import parts
from refdet.extraction.in_threads import map_in_threads
from refdet.extraction.stamped_source import StampedSource
from refdet.extraction.steps import Finish
from refdet.store.codec import EncodedImage, encode_all
from refdet.store.shard_file import ShardError, _encode_header, as_shard_error, parse_image
from refdet.structures.regions import Regions

FIRST, SECOND, LAST = (batch[0] for batch in (BATCHES[0], BATCHES[1], BATCHES[3]))  # each in another shard


def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
    """A region for each image, whose features are pixels of the image."""
    found = [
        Regions(
            record.id, record.file_name, record.height, record.width,
            boxes=np.float32([[0, 0, 1, 1]]), scores=np.float32([1]), category_ids=np.array([3]),
            ann_ids=np.array([1]), masks=(coco_mask.encode(np.asfortranarray(image[..., 0]))["counts"],),
            features={"pool5": np.float32(image[:1, :4, 0]), "fc7": np.float32(image[:1, :6, 1])},
        )
        for record, image in zip(batch, images, strict=True)
    ]  # fmt: skip
    return lambda: found


def write_image(path: Path, record: ImageRecord, seed: int) -> None:
    """Write an image of noise, whose file has the same size for every seed."""
    pixels = np.random.default_rng([record.id, seed]).integers(0, 256, (record.height, record.width, 3), np.uint8)
    Image.fromarray(pixels).save(path, "BMP")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for record in RECORDS:
        write_image(folder / record.file_name, record, 0)
    return folder


def extract(out: Path, images: Path, stop_before: int | None = None, **options: Any) -> Any:
    """Extract with a newly opened source, interrupted before the batch of an index if it is given."""
    source = StampedSource.open(images)
    assert not source.locate(RECORDS)

    def interruptible(batch: list[ImageRecord], pixels: list[np.ndarray]) -> Finish:
        if stop_before is not None and batch == BATCHES[stop_before]:
            raise KeyboardInterrupt
        return compute(batch, pixels)

    return run(out, load=source.read, source=source, compute=interruptible, **options)


def extract_one(out: Path, images: Path, part: str) -> Any:
    """Extract a part with a newly opened source."""
    source = StampedSource.open(images)
    source.locate(RECORDS)
    return run_part(out, part, load=source.read, source=source, compute=compute)


def interrupted(out: Path, images: Path) -> None:
    with pytest.raises(Interrupted):
        extract(out, images, stop_before=2)


def replace_image(images: Path, record: ImageRecord) -> None:
    """Replace an image by another one of the same name, size and time of modification."""
    path = images / record.file_name
    before = path.stat()
    write_image(path, record, 1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns


def test_replaced_images_are_computed_again(tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "a.h5"
    interrupted(out, images)
    replace_image(images, SECOND)
    replace_image(images, LAST)  # not computed yet
    assert extract(out, images, resume=True).computed == len(RECORDS) - len(BATCHES[0])
    assert (
        f"1 image was replaced by another file since the regions were computed (first: {SECOND.file_name}); "
        "computing 1 shard again" in caplog.text
    )
    extract(tmp_path / "b.h5", images)
    assert contents(out) == contents(tmp_path / "b.h5")


def test_an_interrupted_recomputation_is_resumed(tmp_path: Path, images: Path) -> None:
    out = tmp_path / "a.h5"
    interrupted(out, images)
    replace_image(images, FIRST)
    with pytest.raises(Interrupted):
        extract(out, images, stop_before=0, resume=True)
    assert extract(out, images, resume=True).computed == len(RECORDS) - len(BATCHES[1])


@pytest.mark.parametrize("change", ["copied", "touched", "zipped", "written again"])
def test_the_same_contents_are_not_computed_again(
    tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    out = tmp_path / "a.h5"
    interrupted(out, images)
    source = images
    if change == "copied":
        source = Path(shutil.copytree(images, tmp_path / "copy", copy_function=shutil.copyfile))
    elif change == "zipped":
        source = tmp_path / "images.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for record in RECORDS:
                archive.write(images / record.file_name, record.file_name)
    else:
        for record in RECORDS:
            path = images / record.file_name
            path.touch() if change == "touched" else path.write_bytes(path.read_bytes())
    assert extract(out, source, resume=True).computed == len(BATCHES[2] + BATCHES[3])
    assert "replaced" not in caplog.text


def test_members_of_a_zip_are_compared_by_their_checksums(tmp_path: Path, images: Path) -> None:
    def write_zip() -> Path:
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for record in RECORDS:
                archive.write(images / record.file_name, record.file_name)
        return tmp_path / "images.zip"

    out = tmp_path / "a.h5"
    interrupted(out, write_zip())
    replace_image(images, SECOND)
    assert extract(out, write_zip(), resume=True).computed == len(RECORDS) - len(BATCHES[0])
    extract(tmp_path / "b.h5", images)
    assert contents(out) == contents(tmp_path / "b.h5")


@pytest.fixture
def was_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, by loading or by looking for replaced images."""
    names, data = [], ImageSource.data

    def read_data(source: ImageSource, name: str, *size: int) -> bytes:
        names.append(name)
        return data(source, name, *size)

    monkeypatch.setattr(ImageSource, "data", read_data)
    return names


NOT_COMPUTED = {record.file_name for record in BATCHES[2] + BATCHES[3]}  # by `interrupted`


def test_unchanged_files_are_not_read(tmp_path: Path, images: Path, was_read: list[str]) -> None:
    out = tmp_path / "a.h5"
    interrupted(out, images)
    was_read.clear()
    extract(out, images, resume=True)
    assert sorted(was_read) == sorted(NOT_COMPUTED)


@pytest.mark.parametrize("damage", [None, "[1]", '{"x": 1}', '{"1": [1.5]}'])
def test_copied_files_are_read_once(tmp_path: Path, images: Path, was_read: list[str], damage: str | None) -> None:
    out, copy = tmp_path / "a.h5", tmp_path / "copy"
    interrupted(out, images)
    shutil.copytree(images, copy, copy_function=shutil.copyfile)
    with pytest.raises(Interrupted):
        extract(out, copy, stop_before=2, resume=True)
    if damage is not None:
        (tmp_path / "a.h5.parts" / "stamps.json").write_text(damage)
    was_read.clear()
    extract(out, copy, resume=True)
    compared = {record.file_name for record in BATCHES[0] + BATCHES[1]}
    assert {*was_read} == (NOT_COMPUTED if damage is None else NOT_COMPUTED | compared)
    assert not (tmp_path / "a.h5.parts").exists()


def test_a_copy_that_is_replaced_later_is_computed_again(tmp_path: Path, images: Path) -> None:
    out, copy = tmp_path / "a.h5", tmp_path / "copy"
    interrupted(out, images)
    shutil.copytree(images, copy, copy_function=shutil.copyfile)
    with pytest.raises(Interrupted):
        extract(out, copy, stop_before=2, resume=True)
    replace_image(copy, SECOND)
    assert extract(out, copy, resume=True).computed == len(RECORDS) - len(BATCHES[0])
    extract(tmp_path / "b.h5", copy)
    assert contents(out) == contents(tmp_path / "b.h5")


@pytest.mark.parametrize("also", [None, BATCHES[0][1]])
def test_an_unusable_replacement_keeps_the_regions_of_the_earlier_file(
    tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture, also: ImageRecord | None
) -> None:
    """Even if another image of the shard was replaced too, as a shard is computed as a whole."""
    extract(tmp_path / "b.h5", images)
    out = tmp_path / "a.h5"
    interrupted(out, images)
    (images / FIRST.file_name).write_bytes(b"broken")
    if also is not None:
        replace_image(images, also)
    assert extract(out, images, resume=True).computed == len(BATCHES[2] + BATCHES[3])
    assert contents(out) == contents(tmp_path / "b.h5")
    assert "note: 1 image was replaced by another file that cannot be used (first: " in caplog.text
    assert ("1 finished shard is not computed again" in caplog.text) == (also is not None)
    assert "since the regions were computed" not in caplog.text


def test_a_zip_that_is_gone_is_no_replaced_image(tmp_path: Path, images: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(images / FIRST.file_name, FIRST.file_name)
    source = StampedSource.open(tmp_path / "images.zip")
    source.locate([FIRST])
    source = pickle.loads(pickle.dumps(source))  # as in another process, which must open the zip again
    (tmp_path / "images.zip").unlink()
    with pytest.raises(RuntimeFailure, match=r"images\.zip: can no longer be read"):
        source.replaced({FIRST.id: (1, 2, 3)})


def test_many_files_are_looked_at_at_once() -> None:
    barrier = threading.Barrier(4)
    assert sorted(map_in_threads(lambda _: barrier.wait(60), range(4), "wait")) == [0, 1, 2, 3]


def test_images_that_are_gone_keep_their_regions(tmp_path: Path, images: Path) -> None:
    out = tmp_path / "a.h5"
    interrupted(out, images)
    (images / FIRST.file_name).unlink()
    source = StampedSource.open(images)
    source.locate(RECORDS)
    done = run(out, load=source.read, source=source, compute=compute, resume=True)
    assert done.computed == len(BATCHES[2] + BATCHES[3]) and done.errors == 0


def test_an_interrupted_repair_computes_replaced_images_again(tmp_path: Path, images: Path) -> None:
    out, paths = tmp_path / "a.h5", [images / record.file_name for record in (FIRST, SECOND)]
    intact = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(b"broken")
    assert extract(out, images).errors == 2
    for path, data in zip(paths, intact, strict=True):
        path.write_bytes(data)
    with pytest.raises(Interrupted):
        extract(out, images, stop_before=1, resume=True)
    replace_image(images, FIRST)
    assert extract(out, images, resume=True).computed == len(BATCHES[0] + BATCHES[1])
    extract(tmp_path / "b.h5", images)
    assert contents(out) == contents(tmp_path / "b.h5")


def test_a_part_computes_replaced_images_again(tmp_path: Path, images: Path) -> None:
    out = tmp_path / "a.h5"
    extract_one(out, images, "1/2")
    replace_image(images, FIRST)
    assert extract_one(out, images, "1/2").computed == len(BATCHES[0])
    assert extract_one(out, images, "2/2").merged
    extract(tmp_path / "b.h5", images)
    found, expected = contents(out), contents(tmp_path / "b.h5")
    assert {name: found[name] for name in found if name.startswith("features")} == {
        name: expected[name] for name in expected if name.startswith("features")
    }


@pytest.mark.parametrize("merging", [False, True])
def test_a_part_fails_if_another_one_merges_the_old_regions(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, merging: bool
) -> None:
    out, find_retries = tmp_path / "a.h5", parts.find_retries
    lock = FileLock(tmp_path / "a.h5.parts" / parts.LOCK, fallback_to_soft=False)
    action = "is writing it" if merging else "wrote it meanwhile"

    def find_then_wait(*args: Any) -> set[int]:
        monkeypatch.setattr(parts, "find_retries", find_retries)
        found = find_retries(*args)
        if merging:
            lock.acquire()  # as during a long merge
        else:
            assert extract_one(out, images, "2/2").merged
        return found

    extract_one(out, images, "1/2")
    replace_image(images, FIRST)
    monkeypatch.setattr(parts, "find_retries", find_then_wait)
    monkeypatch.setattr(parts, "_LOCK_TIMEOUT", 0)
    with pytest.raises(RuntimeFailure, match=rf"a\.h5: another part {action} with the old regions of 1 image"):
        extract_one(out, images, "1/2")
    lock.release()
    assert [path.name for path in tmp_path.iterdir() if path != images] == ["a.h5.parts" if merging else "a.h5"]


def test_shards_without_stamps_are_not_compared(tmp_path: Path, images: Path) -> None:
    """As those of older versions."""
    out = tmp_path / "a.h5"
    with pytest.raises(Interrupted):
        run(out, stop_at=2)
    replace_image(images, FIRST)
    source = StampedSource.open(images)
    source.locate(RECORDS)
    assert run(out, source=source, resume=True).computed == len(BATCHES[2] + BATCHES[3])


@pytest.mark.parametrize("stamp", [3, "x", ["x"], [1.5], [2**64], {"a": 1}])
def test_an_invalid_stamp_is_damage(stamp: Any) -> None:
    regions = make_regions(1, 0)
    (image,) = encode_all([regions], PLAN.columns())
    header = _encode_header(replace(image, stamp=(1, 2)))
    tree = json.loads(header[4:])
    assert tree.pop("file") == [1, 2] and parse(tree).stamp == ()
    assert parse({**tree, "file": [1, 2]}).stamp == (1, 2)
    with pytest.raises(ShardError, match="damaged"):
        parse({**tree, "file": stamp})


def parse(tree: dict[str, Any]) -> EncodedImage:
    """The image in a block of a shard without regions, from its header."""
    header = json.dumps(tree).encode()
    with as_shard_error():
        return parse_image(len(header).to_bytes(4, "little") + header, PLAN.columns())[0]


@pytest.mark.parametrize("again", [("--part", "1/2"), ("--resume",)])
def test_the_command_notices_replaced_images(tmp_path: Path, again: tuple[str, ...]) -> None:
    folder, out = DetectorFolder(tmp_path, 40), tmp_path / "a.h5"
    part = ("--part", "1/2", "--regions", "annotations")  # the first of two shards, of 32 images
    assert folder.extract(out, *part).exit_code == 0
    assert "part 1/2 was complete" in folder.extract(out, *part).stdout
    folder.replace_images()
    done = folder.extract(out, "--regions", "annotations", *again)
    assert "images/s" in done.stdout and " images were replaced by another file" in done.stderr
