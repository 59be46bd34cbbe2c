"""A shard on disk: its images one by one, and numbers that no store should hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupted_extraction import BATCHES, RECORDS, compute, load
from store_examples import HEADER, PLAN, make_regions

from refdet.data.coco import ImageRecord
from refdet.errors import RuntimeFailure
from refdet.extraction.pipeline import Finish, extract
from refdet.extraction.plan import Plan
from refdet.extraction.shard_arrays import BlockLocation, ShardError, ShardWriter, read, read_at
from refdet.structures.regions import Regions

FEATURES = {"pool5": np.zeros((2, 4), np.float32), "fc7": np.zeros((2, 6), np.float32)}


def write(path: Path, images: list[Regions], plan: Plan = PLAN) -> list[BlockLocation]:
    with path.open("wb") as file:
        writer = ShardWriter(file, {"shard": 0}, plan)
        places = [writer.add(image) for image in images]
        writer.finish()
    return places


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data(), counts=st.lists(st.integers(0, 3), max_size=4))
def test_a_shard_gives_back_what_was_put_in(
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
    with path.open("wb") as file:
        writer = ShardWriter(file, {"shard": 0}, plan)
        for image in images:
            writer.add(image)
        writer.finish()
    found = [regions for regions, _ in read(path, {"shard": 0}, plan)]
    assert len(found) == len(images)
    for one, other in zip(found, images, strict=True):
        assert (one.image_id, one.file_name, one.masks) == (other.image_id, other.file_name, other.masks)
        for name, values in other.features.items():
            assert one.features[name].dtype == plan.dtype
            np.testing.assert_array_equal(one.features[name], values.astype(plan.dtype))
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.category_ids, other.category_ids)
    with pytest.raises(ShardError, match="another extraction"):
        list(read(path, {"shard": 1}, plan))


def test_each_image_is_read_alone_in_any_order(tmp_path: Path) -> None:
    images = [make_regions(i, n) for i, n in enumerate((3, 0, 1, 4))]
    places = write(tmp_path / "a", images)
    assert [place for _, place in read(tmp_path / "a", {"shard": 0}, PLAN)] == places
    for k in (2, 0, 3, 1):
        found = read_at(tmp_path / "a", places[k], PLAN)
        assert (found.image_id, found.masks) == (k, images[k].masks)
        np.testing.assert_array_equal(found.boxes, images[k].boxes)
        if len(images[k]):
            np.testing.assert_array_equal(found.features["fc7"], images[k].features["fc7"])


def test_damage_to_one_image_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    places = write(tmp_path / "a", [make_regions(i, 2) for i in range(3)])
    data = bytearray((tmp_path / "a").read_bytes())
    data[places[1].start + 9] ^= 1
    (tmp_path / "a").write_bytes(data[: places[2].start + 5])
    read_at(tmp_path / "a", places[0], PLAN)
    for k, says in ((1, "a checksum does not fit"), (2, "it is cut")):
        with pytest.raises(ShardError, match=says):
            read_at(tmp_path / "a", places[k], PLAN)
    (tmp_path / "a").unlink()
    with pytest.raises(ShardError, match="it is gone"):
        read_at(tmp_path / "a", places[0], PLAN)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [7e4, -7e4, np.inf, np.nan])
def test_a_number_that_does_not_fit_is_an_error_and_not_infinity(tmp_path: Path, dtype: str, value: float) -> None:
    features = {"pool5": FEATURES["pool5"], "fc7": FEATURES["fc7"].copy()}
    features["fc7"][1, 3] = value
    image, plan = replace(make_regions(7, 2), features=features), replace(PLAN, dtype=dtype)
    if np.isfinite(value) and dtype == "float32":
        write(tmp_path / "a", [image], plan)
        return
    says = (
        "reaches 70000, more than float16 can hold .65504.*--dtype float32" if np.isfinite(value) else "is not finite"
    )
    with pytest.raises(RuntimeFailure, match=rf"image 7 \(ümlaut_7.jpg\): fc7 {says}"):
        write(tmp_path / "a", [image], plan)


def test_such_a_number_stops_the_run_and_leaves_no_store(tmp_path: Path) -> None:
    def overflows(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        if batch == BATCHES[2]:
            large = {name: values + 1e5 for name, values in FEATURES.items()}
            return lambda: [replace(make_regions(r.id, 2), features=large) for r in batch]
        return compute(batch, images)

    out, plan = tmp_path / "a.h5", replace(PLAN, dtype="float16")
    with pytest.raises(RuntimeFailure, match=f"image {BATCHES[2][0].id} .*: fc7 reaches 100000, .*--dtype float32"):
        extract(out, plan, HEADER, BATCHES, RECORDS, load, overflows, shard_images=2)
    assert not out.exists()
