"""Shard files: round trips, reading single images, damage, and values that do not fit the data type."""

from __future__ import annotations

import json
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupted_extraction import BATCHES, RECORDS, compute, interrupt_at, load, run
from store_examples import HEADER, PLAN, contents, make_regions

from refdet.data.coco import ImageRecord
from refdet.errors import Interrupted, RuntimeFailure
from refdet.extraction.pipeline import extract
from refdet.extraction.plan import Plan
from refdet.extraction.steps import Finish
from refdet.store.codec import RawImage, decode, encode_all, region_bytes
from refdet.store.shard_file import BlockLocation, ShardError, ShardWriter, read
from refdet.store.shard_images import ImageReader
from refdet.structures.regions import Regions

FEATURES = {"pool5": np.zeros((2, 4), np.float32), "fc7": np.zeros((2, 6), np.float32)}


def write(path: Path, images: list[Regions], plan: Plan = PLAN) -> list[BlockLocation]:
    with path.open("wb", 0) as file:
        writer = ShardWriter(file, {"shard": 0})
        locations = writer.add(encode_all(images[:1], plan.columns())) + writer.add(
            encode_all(images[1:], plan.columns())
        )
        writer.finish()
    return locations


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data(), counts=st.lists(st.integers(0, 3), max_size=4))
def test_images_survive_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, counts: list[int]
) -> None:
    shapes = data.draw(st.tuples(*[st.lists(st.integers(0, 3), max_size=3).map(tuple)] * 2))
    plan = replace(PLAN, features=("a", "b"), dtype=data.draw(st.sampled_from(["float32", "float16"])))
    images = [
        replace(
            make_regions(i, n),
            features={name: np.random.default_rng(i).random((n, *shape)).astype(np.float32)
                      for name, shape in zip("ab", shapes, strict=True)},
        )
        for i, n in enumerate(counts)
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("shard") / "0.shard"
    write(path, images, plan)
    found = [decode(image) for image, _ in read(path, {"shard": 0}, plan)]
    assert len(found) == len(images)
    for actual, expected in zip(found, images, strict=True):
        assert (actual.image_id, actual.file_name) == (expected.image_id, expected.file_name)
        assert actual.masks == expected.masks
        for name, values in expected.features.items():
            assert actual.features[name].dtype == plan.dtype
            np.testing.assert_array_equal(actual.features[name], values.astype(plan.dtype))
        np.testing.assert_array_equal(actual.boxes, expected.boxes)
        np.testing.assert_array_equal(actual.category_ids, expected.category_ids)
    with pytest.raises(ShardError, match="another extraction"):
        list(read(path, {"shard": 1}, plan))


COLUMNS = PLAN.columns({name: values.shape[1:] for name, values in FEATURES.items()})


@pytest.mark.parametrize(
    "group_bytes", [pytest.param(0, id="initial buffer"), pytest.param(-(2**16), id="no initial buffer")]
)
def test_single_images_are_read_in_any_order(tmp_path: Path, group_bytes: int) -> None:
    images = encode_all([make_regions(i, n) for i, n in enumerate((3, 0, 1, 4))], COLUMNS)
    locations = write(tmp_path / "a", [make_regions(i, n) for i, n in enumerate((3, 0, 1, 4))])
    assert [location for _, location in read(tmp_path / "a", {"shard": 0}, PLAN)] == locations
    reader, last_two = ImageReader(COLUMNS, group_bytes, num_groups=2), []
    for k in (2, 0, 3, 1, 3):
        reader.next_group()
        found = reader.read(tmp_path / "a", images[k].row, locations[k])
        assert isinstance(found, RawImage)
        last_two = [*last_two[-1:], (k, found)]
        for j, raw in last_two:  # their memory is not reused yet
            arrays = [images[j].arrays[name] for name in region_bytes(COLUMNS) if name in images[j].arrays]
            assert b"".join(raw.parts) == b"".join(values.tobytes() for values in arrays)
            assert [zlib.crc32(part) for part in raw.parts][: len(arrays)] == [*images[j].checksums.values()]
            assert np.frombuffer(raw.mask_sizes, np.uint32).tolist() == list(images[j].mask_sizes)
    reader.close()


def test_a_reader_keeps_fewer_than_70_shards_open(tmp_path: Path) -> None:
    [image], [location] = encode_all([make_regions(1, 2)], COLUMNS), write(tmp_path / "0", [make_regions(1, 2)])
    for number in range(1, 80):
        (tmp_path / str(number)).write_bytes((tmp_path / "0").read_bytes())
    reader, opened = ImageReader(COLUMNS), len(os.listdir("/dev/fd"))
    for number in [*range(80), 0]:
        reader.read(tmp_path / str(number), image.row, location)
    assert len(os.listdir("/dev/fd")) - opened < 70
    reader.close()
    assert len(os.listdir("/dev/fd")) == opened


def test_damage_to_an_image_is_detected_when_it_is_read(tmp_path: Path) -> None:
    images = encode_all([make_regions(i, 2) for i in range(3)], COLUMNS)
    locations = write(tmp_path / "a", [make_regions(i, 2) for i in range(3)])
    data = bytearray((tmp_path / "a").read_bytes())
    data[locations[1].start + 9] ^= 1
    (tmp_path / "a").write_bytes(data[: locations[2].start + 5])

    def read_again(k: int) -> None:
        ImageReader(COLUMNS).read(tmp_path / "a", images[k].row, locations[k])

    read_again(0)
    for k, message in ((1, "checksum mismatch"), (2, "truncated")):
        with pytest.raises(ShardError, match=message):
            read_again(k)
    with pytest.raises(ShardError, match="images differ"):
        ImageReader(COLUMNS).read(tmp_path / "a", images[0].row._replace(regions=3), locations[0])
    (tmp_path / "a").unlink()
    with pytest.raises(ShardError, match="missing"):
        read_again(0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [7e4, -7e4, np.inf, np.nan])
def test_a_value_beyond_the_data_type_is_refused(tmp_path: Path, dtype: str, value: float) -> None:
    features = {"pool5": FEATURES["pool5"], "fc7": FEATURES["fc7"].copy()}
    features["fc7"][1, 3] = value
    image, plan = replace(make_regions(7, 2), features=features), replace(PLAN, dtype=dtype)
    if np.isfinite(value) and dtype == "float32":
        write(tmp_path / "a", [image], plan)
        return
    if np.isfinite(value):
        message = "reaches 70000, beyond the range of float16 .65504.*`dtype='float32'`"
    else:
        message = "contains NaN or inf"
    with pytest.raises(RuntimeFailure, match=rf"image 7 \(ümlaut_7.jpg\): fc7 {message}"):
        write(tmp_path / "a", [image], plan)


@pytest.mark.parametrize(("value", "message"), [(np.inf, "is beyond the range of float16"), (np.nan, "contains NaN")])
def test_infinity_in_float16_features_of_the_device_is_refused(tmp_path: Path, value: float, message: str) -> None:
    features = {name: values.astype(np.float16) for name, values in FEATURES.items()}
    features["fc7"][1, 3] = value
    with pytest.raises(RuntimeFailure, match=rf"image 7 \(ümlaut_7.jpg\): fc7 {message}"):
        write(tmp_path / "a", [replace(make_regions(7, 2), features=features)], replace(PLAN, dtype="float16"))


def test_a_value_beyond_float16_stops_an_extraction(tmp_path: Path) -> None:
    def compute_large(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        if batch == BATCHES[2]:
            large = {name: values + 1e5 for name, values in FEATURES.items()}
            return lambda: [replace(make_regions(r.id, 2), features=large) for r in batch]
        return compute(batch, images)

    out, plan = tmp_path / "a.h5", replace(PLAN, dtype="float16")
    with pytest.raises(RuntimeFailure, match=f"image {BATCHES[2][0].id} .*: fc7 reaches 100000, .*`dtype='float32'`"):
        extract(out, plan, HEADER, BATCHES, RECORDS, load, compute_large, shard_images=2)
    assert not out.exists()


def rewrite_second_image(path: Path, **changes: object) -> None:
    """Change fields in the header of a shard's second image, and update all checksums."""
    data = path.read_bytes()  # a line, and blocks: length, CRC-32, bytes
    blocks, at = [], data.index(b"\n") + 1
    while length := int.from_bytes(data[at : at + 8], "little"):
        blocks.append(data[at + 12 : at + 12 + length])
        at += 12 + length
    end = 4 + int.from_bytes(blocks[2][:4], "little")
    head = json.dumps(json.loads(blocks[2][4:end]) | changes).encode()
    blocks[2] = struct.pack("<I", len(head)) + head + blocks[2][end:]
    crcs = [zlib.crc32(block) for block in blocks]
    packed = [struct.pack("<QI", len(block), crc) + block for block, crc in zip(blocks, crcs, strict=True)]
    last = struct.pack("<QI", 0, zlib.crc32(b"".join(struct.pack("<I", crc) for crc in crcs)))
    path.write_bytes(data[: data.index(b"\n") + 1] + b"".join(packed) + last)


BOX, SCORE, CATEGORY = ["box", "<f4", [0, 4]], ["score", "<f4", [0]], ["category_id", "<i8", [0]]


@pytest.mark.parametrize(
    "changes",
    [
        {"id": {}}, {"id": 2**63}, {"id": True}, {"height": "9"}, {"height": -1}, {"width": 2**31}, {"file_name": 5},
        {"file_name": "a\0"}, {"error": "\ud800"}, {"masks": [-1, 1]}, {"masks": [2**62, 2**62]},
        {"arrays": [["box", "<f8", [0, 4]], SCORE, CATEGORY]},
        {"arrays": [BOX, SCORE, CATEGORY, ["x", "<f4", [0]]]}, {"arrays": [BOX, SCORE, ["category_id", "|O", [0]]]},
        {"arrays": [BOX, SCORE]}, {"arrays": [["box", "<f4", [-1, 4]], SCORE, CATEGORY]},
        {"arrays": [BOX, CATEGORY, SCORE], "masks": []}, {"arrays": [BOX, SCORE, CATEGORY], "masks": []},
    ],
)  # fmt: skip
def test_invalid_images_with_valid_checksums_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    write(tmp_path / "a", [make_regions(1, 0), make_regions(2, 2)])
    rewrite_second_image(tmp_path / "a")
    assert len(list(read(tmp_path / "a", {"shard": 0}, PLAN))) == 2
    rewrite_second_image(tmp_path / "a", **changes)
    with pytest.raises(ShardError, match="damaged: invalid image"):
        list(read(tmp_path / "a", {"shard": 0}, PLAN))


@pytest.mark.parametrize("missing", ["ann_id", "features/fc7"])
def test_an_image_without_a_column_of_the_plan_is_refused(tmp_path: Path, missing: str) -> None:
    plan = replace(PLAN, ann_ids=missing != "ann_id", features=() if missing == "features/fc7" else PLAN.features)
    write(tmp_path / "a", [make_regions(1, 2)], plan)
    with pytest.raises(ShardError, match=f"{missing} is missing|features/pool5"):
        list(read(tmp_path / "a", {"shard": 0}, PLAN))


def test_a_shard_with_other_images_is_computed_again(tmp_path: Path) -> None:
    out, folder = tmp_path / "a.h5", tmp_path / "a.h5.parts"

    with pytest.raises(Interrupted):
        run(out, compute=interrupt_at(BATCHES[2]))
    rewrite_second_image(folder / "000000.shard", id=4)
    run(out, resume=True)
    run(tmp_path / "whole.h5")
    assert contents(out) == contents(tmp_path / "whole.h5")
