"""Stores from shards: round trips, the schema, identical bytes for identical regions, full disks and damage."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_examples import HEADER, PLAN, make_regions, record

from refdet import store
from refdet.errors import InputError, RuntimeFailure
from refdet.extraction import shards
from refdet.extraction.open_extraction import open_extraction
from refdet.structures.regions import Regions


def assert_equal(a: Regions, b: Regions) -> None:
    for name in ("image_id", "file_name", "height", "width", "error"):
        assert getattr(a, name) == getattr(b, name)
    for name in ("boxes", "scores", "category_ids"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(b, name).dtype
    assert (a.masks or ()) == (b.masks or ())
    if len(a):
        np.testing.assert_array_equal(a.ann_ids, b.ann_ids)
        for feature, values in a.features.items():
            np.testing.assert_array_equal(values, b.features[feature])


def write(out: Path, images: list[Regions], shard_places: list[list[int]]) -> None:
    """Write a store from shards that hold the images at given places of the list."""
    batches = [[[record(images[i]) for i in places]] for places in shard_places]
    with open_extraction(out, PLAN, HEADER, batches, resume=True) as parts:
        assert parts is not None
        for number, places in enumerate(shard_places):
            put(parts, number, [images[i] for i in places])
        parts.merge([record(image) for image in images])


def put(parts: shards.ShardSet, number: int, images: list[Regions]) -> None:
    """Write a shard."""
    with parts.write(number) as add:
        for image in images:
            add(parts.encode([image]))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(0, 4), max_size=7), data=st.data())
def test_regions_survive_a_round_trip_in_any_order_of_shards(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], data: st.DataObject
) -> None:
    images = [
        make_regions(10 + i, n) if n else Regions.empty(10 + i, "a.jpg", 3, 4, "no fïle") for i, n in enumerate(counts)
    ]
    order = data.draw(st.permutations(range(len(images))))
    size = data.draw(st.integers(1, 4))
    folder = tmp_path_factory.mktemp("store")
    write(folder / "a.h5", images, [list(order[i : i + size]) for i in range(0, len(order), size)])
    assert [path.name for path in folder.iterdir()] == ["a.h5"]
    with store.open(folder / "a.h5") as found:
        assert list(found) == [image.image_id for image in images]
        assert len(found) == len(images)
        assert found.regions == sum(counts)
        row = 0
        for image in images:
            assert_equal(image, found[image.image_id])
            assert found.rows(image.image_id) == range(row, row + len(image))
            for region in range(len(image)):
                assert found.region(row) == (image.image_id, region)
                row += 1
        assert found.errors == {image.image_id: "no fïle" for image in images if not len(image)}
        assert found.errors is found.errors  # cached
        with pytest.raises(IndexError):
            found.region(row)
        with pytest.raises(KeyError):
            found[9]


@pytest.mark.parametrize(
    "read",
    [lambda found: found[1], lambda found: found[:1], lambda found: found.boxes(1), lambda found: found.to_dataframe()],
    ids=["image", "slice", "boxes", "data frame"],
)
def test_a_closed_store_is_not_called_damaged(tmp_path: Path, read: Callable[[store.Store], object]) -> None:
    write(tmp_path / "a.h5", [make_regions(1, 2)], [[0]])
    with store.open(tmp_path / "a.h5") as found:
        read(found)
    with pytest.raises(InputError, match=r"a\.h5: the store is closed; read it before that, or open it again$"):
        read(found)


def test_a_row_is_an_integer(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", [make_regions(1, 2)], [[0]])
    with store.open(tmp_path / "a.h5") as found:
        assert found.region(np.int64(1)) == (1, 1)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            found.region(0.5)  # type: ignore[arg-type]


def test_datasets_and_attributes_are_those_of_the_documented_schema(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", [make_regions(1, 2), make_regions(2, 3)], [[1], [0]])
    with h5py.File(tmp_path / "a.h5") as file:
        assert set(file.attrs) == {"schema", "classes", "recipe", "provenance", "options", "complete"}
        assert file.attrs["schema"] == "refdet-features/1"
        assert bool(file.attrs["complete"])
        datasets = {f"{group}/{name}": (data.dtype.name, data.shape)
                    for group in file for name, data in file[group].items()}  # fmt: skip
        dtype, _ = datasets.pop("regions/mask_counts")  # whose length depends on the masks
        assert dtype == "uint8"
        assert h5py.check_string_dtype(file["images/file_name"].dtype).encoding == "utf-8"
    assert datasets == {
        "images/id": ("int64", (2,)), "images/file_name": ("object", (2,)), "images/error": ("object", (2,)),
        "images/height": ("int32", (2,)), "images/width": ("int32", (2,)), "images/region_start": ("int64", (3,)),
        "regions/box": ("float32", (5, 4)), "regions/score": ("float32", (5,)),
        "regions/category_id": ("int64", (5,)), "regions/ann_id": ("int64", (5,)),
        "regions/mask_start": ("int64", (6,)),
        "features/pool5": ("float32", (5, 4)), "features/fc7": ("float32", (5, 6)),
        "checksums/crc32": ("uint32", (2, 9)),
    }  # fmt: skip


def test_the_order_of_shards_does_not_change_the_bytes(tmp_path: Path) -> None:
    images = [make_regions(i, 1 + i % 3) for i in range(9)]
    for name, shard_places in (("a.h5", [list(range(9))]), ("b.h5", [[8, 0], [3], [7, 6, 5], [1, 2, 4]])):
        write(tmp_path / name, images, shard_places)
    digests = {hashlib.sha256((tmp_path / name).read_bytes()).digest() for name in ("a.h5", "b.h5")}
    assert len(digests) == 1


def test_float16_is_used_for_features_only(tmp_path: Path) -> None:
    plan = replace(PLAN, dtype="float16")
    image = make_regions(1, 3)
    with open_extraction(tmp_path / "a.h5", plan, HEADER, [[[record(image)]]], resume=False) as parts:
        assert parts is not None
        put(parts, 0, [image])
        parts.merge([record(image)])
    with store.open(tmp_path / "a.h5") as found:
        assert found[1].features["fc7"].dtype == np.float16
        np.testing.assert_array_equal(found[1].features["fc7"], image.features["fc7"].astype(np.float16))
        np.testing.assert_array_equal(found[1].boxes, image.boxes)
        assert found.read(1, features=()).features == {}


def test_without_a_shard_of_each_image_no_store_is_written(tmp_path: Path) -> None:
    images = [make_regions(1, 2), make_regions(2, 2)]
    batches = [[[record(images[0])]]]
    with (
        pytest.raises(KeyError),
        open_extraction(tmp_path / "a.h5", PLAN, HEADER, batches, resume=False) as parts,
    ):
        assert parts is not None
        put(parts, 0, images[:1])
        parts.merge([record(image) for image in images])
    assert not (tmp_path / "a.h5").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_text("not HDF5"), "not a readable HDF5 file"),
        (lambda path: h5py.File(path, "w").close(), "no schema"),
        (lambda path: _attributes(path, schema="refdet-features/9"), "refdet-features/9"),
        (lambda path: _attributes(path, schema=store.SCHEMA), "missing attribute classes"),
        (lambda path: _damage(path, "complete"), "incomplete"),
        (lambda path: _damage(path, "classes"), "damaged"),
        (lambda path: _truncate(path), "not a readable HDF5 file"),
    ],
)
def test_a_file_that_is_not_a_store_is_refused(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "bad.h5"
    make(path)
    with pytest.raises(InputError, match=message) as raised:
        store.open(path)
    assert "bad.h5" in str(raised.value)


def _attributes(path: Path, **values: object) -> None:
    with h5py.File(path, "w") as file:
        file.attrs.update(values)


def _damage(path: Path, name: str) -> None:
    write(path, [make_regions(1, 2)], [[0]])
    with h5py.File(path, "a") as file:
        file.attrs[name] = False if name == "complete" else "{"


def _truncate(path: Path) -> None:
    write(path, [make_regions(1, 2)], [[0]])
    path.write_bytes(path.read_bytes()[:-300])


def test_a_full_disk_keeps_the_finished_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [make_regions(1, 2), make_regions(2, 2)]
    batches = [[[record(image)]] for image in images]

    def raise_disk_full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    disk_full = pytest.raises(RuntimeFailure, match=r"000001.shard: no space left.*`resume=True`")
    with disk_full, open_extraction(tmp_path / "a.h5", PLAN, HEADER, batches, resume=False) as parts:
        assert parts is not None
        put(parts, 0, images[:1])
        monkeypatch.setattr(shards.ShardWriter, "finish", raise_disk_full)
        put(parts, 1, images[1:])
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "a.h5.parts").iterdir()) == ["000000.shard", "lock", "plan.json"]
    with open_extraction(tmp_path / "a.h5", PLAN, HEADER, batches, resume=True) as parts:
        assert parts is not None
        assert parts.missing_shards() == [1] and parts.finished_images == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("Can't write data (file write failed: time = now, errno = 28, error message = 'No space left')"),
        RuntimeError("Can't decrement id ref count (unable to close file, errno = 28, error message = 'No space')"),
    ],
)
def test_a_full_disk_during_the_merge_keeps_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    image = make_regions(1, 2)

    def fail(self: object, regions: Regions) -> None:
        raise error

    disk_full = pytest.raises(RuntimeFailure, match=r"a.h5: no space left.*`resume=True`")
    with disk_full, open_extraction(tmp_path / "a.h5", PLAN, HEADER, [[[record(image)]]], resume=False) as parts:
        assert parts is not None
        put(parts, 0, [image])
        with monkeypatch.context() as patch:
            patch.setattr(store.StoreWriter, "put", fail)
            parts.merge([record(image)])
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5.parts"]
    with open_extraction(tmp_path / "a.h5", PLAN, HEADER, [[[record(image)]]], resume=True) as parts:
        assert parts is not None
        parts.merge([record(image)])
    with store.open(tmp_path / "a.h5") as found:
        assert_equal(found[1], image)


def test_too_little_space_is_reported_before_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shards.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RuntimeFailure, match="no space left"):
        write(tmp_path / "a.h5", [make_regions(1, 2)], [[0]])


def test_a_damaged_shard_is_reported_and_not_merged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [make_regions(1, 2), make_regions(2, 2)]
    batches = [[[record(image)]] for image in images]
    shard = tmp_path / "a.h5.parts" / "000000.shard"
    error = pytest.raises(RuntimeFailure, match="000000.shard: damaged.*`resume=True`")
    with error, open_extraction(tmp_path / "a.h5", PLAN, HEADER, batches, resume=False) as parts:
        assert parts is not None
        put(parts, 0, images[:1])
        put(parts, 1, images[1:])
        shard.write_bytes(shard.read_bytes()[:100])
        parts.merge([record(image) for image in images])
    assert not shard.exists() and not (tmp_path / "a.h5").exists()
    other = shard.with_name("000001.shard")
    other.write_bytes(other.read_bytes()[:100])
    with open_extraction(tmp_path / "a.h5", PLAN, HEADER, batches, resume=True) as parts:
        assert parts is not None
        assert parts.missing_shards() == [0, 1]
    assert "000001.shard: damaged" in caplog.text and not other.exists()
