"""The store's contents: whatever regions there are come back, and damage is found and named."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from sound_regions import HEADER, draw

from refdet import store
from refdet.errors import InputError
from refdet.store import hdf5_access, hdf5_sandbox
from refdet.store.verify import verify
from refdet.structures.regions import Regions

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


def write(path: Path, images: list[Regions], columns: store.Columns) -> None:
    rows = [
        store.ImageRow(r.image_id, r.file_name, r.height, r.width, r.error, len(r), sum(map(len, r.masks or ())),
                       r.maps["head"].shape if r.maps else (0, 0, 0))
        for r in images
    ]  # fmt: skip
    with store.create(path, HEADER, columns, rows) as writer:
        for image in images:
            writer.put(image)


def assert_same(a: Regions, b: Regions) -> None:
    for name in ("image_id", "file_name", "height", "width", "error", "masks"):
        assert getattr(a, name) == getattr(b, name), name
    arrays = [({"boxes": r.boxes, "scores": r.scores, "category_ids": r.category_ids} | dict(r.features)
               | {f"map {k}": v for k, v in r.maps.items()}
               | ({} if r.ann_ids is None else {"ann_ids": r.ann_ids})
               | ({} if r.im_info is None else {"im_info": r.im_info})) for r in (a, b)]  # fmt: skip
    assert set(arrays[0]) == set(arrays[1])
    for name, values in arrays[0].items():
        assert values.dtype == arrays[1][name].dtype, name
        np.testing.assert_array_equal(values, arrays[1][name], err_msg=name)


COLUMNS = st.builds(
    store.Columns,
    features=st.dictionaries(
        st.sampled_from(["pool5", "fc7", "spatial_fc7", "class_prob", "fünf"]),
        st.lists(st.integers(1, 3), max_size=3).map(tuple),
        max_size=3,
    ),
    dtype=st.sampled_from(["float32", "float16"]),
    masks=st.booleans(),
    ann_ids=st.booleans(),
    maps=st.sampled_from([(), ("head",)]),
    compression=st.sampled_from(["none", "gzip", "lzf"]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    columns=COLUMNS,
    sizes=st.lists(st.tuples(st.integers(0, 4), NAMES, NAMES), max_size=6),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    columns: store.Columns,
    sizes: list[tuple[int, str, str]],
) -> None:
    images = [draw(5 * i + 2, 0 if error else n, columns, name, error) for i, (n, name, error) in enumerate(sizes)]
    path = tmp_path_factory.mktemp("any") / "a.h5"
    write(path, images, columns)
    with store.open(path) as found:
        assert list(found) == [image.image_id for image in images]
        for image in images:
            assert_same(image, found[image.image_id])
        for part in (slice(1, 3), slice(None, None, -2), slice(-2, None)):
            assert [r.image_id for r in found[part]] == [r.image_id for r in images[part]]
        frame = found.to_dataframe()
        assert len(frame) == found.regions == sum(map(len, images))
        assert frame["image_id"].tolist() == [image.image_id for image in images for _ in range(len(image))]
        np.testing.assert_array_equal(
            frame[["x1", "y1", "x2", "y2"]], np.concatenate([np.zeros((0, 4), np.float32), *(r.boxes for r in images)])
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            hdf5_access, "check_in_subprocess", hdf5_sandbox.check_in_process
        )  # a process for each takes too long
        result = verify(path)
    assert (result.problems, result.unchecked) == ([], [])


def everything() -> store.Columns:
    features = {"pool5": (5,), "spatial_fc7": (2, 7, 7), "class_prob": (3,)}
    return store.Columns(features, masks=True, ann_ids=True, maps=("head",))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "a.h5"
    columns = everything()
    images = [draw(10 + i, n, columns, f"{i}.jpg") for i, n in enumerate((3, 0, 2, 4))]
    write(path, [*images, draw(14, 0, columns, "lost.jpg", "cannot be read")], columns)
    return path


def test_frame_names_and_measures(sound: Path) -> None:
    with store.open(sound) as found:
        frame, regions = found.to_dataframe(), found[12]
        own = frame[frame["image_id"] == 12]
        assert own.index.tolist() == list(found.rows(12)) and frame.index.name == "region"
        assert own["category"].tolist() == [{3: "dög", 7: "cat"}[c] for c in regions.category_ids.tolist()]
        sides = regions.boxes[:, 2:] - regions.boxes[:, :2]
        np.testing.assert_array_equal(own["area"], sides[:, 0] * sides[:, 1])
        np.testing.assert_array_equal(own["ann_id"], regions.ann_ids)
        with pytest.raises(KeyError, match="no feature 'fc7'"):
            found.read(12, features=("fc7",))
        assert set(found.read(12, features=("pool5", "head")).maps) == {"head"}
        assert not found.read(12, features=("pool5",)).maps


def test_the_checksums_are_as_documented(sound: Path) -> None:
    with h5py.File(sound) as file:
        table = file["checksums/crc32"]
        names = json.loads(table.attrs["columns"])
        a, b = file["images/region_start"][2:4]
        for name in ("regions/box", "regions/ann_id", "features/spatial_fc7"):
            assert table[2, names.index(name)] == zlib.crc32(file[name][a:b].tobytes())
        assert table[2, names.index("images")] == zlib.crc32(f"12\t9\t7\t{a}\t{b}\t2.jpg\t".encode())


def test_the_run_is_told_and_changes_nothing_else(tmp_path: Path) -> None:
    columns = store.Columns(features={"pool5": (4,)})
    row = [store.ImageRow(1, "a.jpg", 9, 7, "", 2, 0)]
    for name, run in (("a.h5", None), ("b.h5", {"images_per_second": 3.5})):
        with store.create(tmp_path / name, HEADER, columns, row) as writer:
            writer.put(draw(1, 2, columns))
            writer.finish(run)
    with store.open(tmp_path / "a.h5") as a, store.open(tmp_path / "b.h5") as b:
        assert (a.run, b.run) == ({}, {"images_per_second": 3.5})
        assert_same(a[1], b[1])
        np.testing.assert_array_equal(a.file["checksums/crc32"], b.file["checksums/crc32"])


def test_wrong_regions_are_not_written(tmp_path: Path) -> None:
    columns = everything()
    good = draw(1, 2, columns)
    row = store.ImageRow(1, "a.jpg", 9, 7, "", 2, sum(map(len, good.masks or ())), good.maps["head"].shape)
    for wrong, says in (
        (row._replace(map_shape=(2, 3, 4)), "map has shape"),
        (row._replace(mask_bytes=1), "mask_counts"),
        (row._replace(regions=3), "expected 3"),
    ):
        with pytest.raises(ValueError, match=says), store.create(tmp_path / "a.h5", HEADER, columns, [wrong]) as writer:
            writer.put(good)
    narrow = store.Columns({"pool5": (4,)}, masks=True, ann_ids=True)
    with pytest.raises(ValueError, match="pool5"), store.create(tmp_path / "a.h5", HEADER, narrow, [row]) as writer:
        writer.put(good)
    assert not (tmp_path / "a.h5").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"maps": {"head": np.zeros((2, 3))}}, "maps must be"),
        ({"maps": {"head": np.zeros((2, 3, 4))}, "im_info": None}, "without im_info"),
        ({"im_info": np.zeros(3)}, "im_info must be"),
        ({"features": {"pool5": np.zeros((3, 4, 4))}}, "2 boxes"),
    ],
)
def test_regions_check_their_maps(changes: dict, says: str) -> None:
    good = {"im_info": np.ones(3, np.float32)} | changes
    with pytest.raises(ValueError, match=says):
        Regions(1, "", 9, 7, np.zeros((2, 4), np.float32), np.zeros(2, np.float32), np.zeros(2, np.int64), **good)


def _replace(file: h5py.File, name: str, values: np.ndarray) -> None:
    del file[name]
    file[name] = values


def _change(name: str, place: object, value: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[name][place] = value

    return change


def _without_checksums(change: Callable[[h5py.File], None]) -> Callable[[h5py.File], None]:
    def both(file: h5py.File) -> None:
        del file["checksums"]
        change(file)

    return both


@pytest.mark.usefixtures("check_hdf5_in_process")
@pytest.mark.parametrize(
    ("change", "images", "part"),
    [
        (_change("features/spatial_fc7", (4, 1, 2, 3), 9), [12], "features/spatial_fc7"),
        (_change("regions/ann_id", 0, 1), [10], "regions/ann_id"),
        (_change("regions/category_id", 5, 1), [13], "regions/category_id"),
        (_change("regions/mask_counts", slice(0, 2), [0, 255]), [10], "regions/mask_counts"),
        (_change("regions/mask_start", 2, 10**6), [10], "regions/mask_counts"),
        (_change("maps/head", 0, 1), [10], "maps/head"),
        (_change("maps/head_shape", (1, 2), 50), [11], "maps/head"),
        (_change("maps/im_info", (2, 0), 50), [12], "maps/im_info"),
        (_change("images/height", 3, 4), [13], "images"),
        (_change("images/file_name", 0, "x.jpg"), [10], "images"),
        (_change("images/error", 3, "none"), [13], "images/error"),
        (_change("checksums/crc32", (2, 0), 1), [12], "images"),
        (_without_checksums(_change("regions/box", (0, 2), 50)), [10], "regions/box"),
        (_without_checksums(_change("regions/box", (0, 0), np.nan)), [10], "regions/box"),
        (_without_checksums(_change("regions/score", 3, 1.5)), [12], "regions/score"),
        (_without_checksums(_change("regions/score", 3, np.inf)), [12], "regions/score"),
        (_without_checksums(_change("features/pool5", (8, 0), np.inf)), [13], "features/pool5"),
        (lambda file: file.attrs.__setitem__("recipe", "x"), [], "attributes"),
        (lambda file: file.__delitem__("features/pool5"), [], "features/pool5"),
        (lambda file: file.__delitem__("regions/box"), [], "file"),
        (lambda file: file.__delitem__("maps/im_info"), [], "file"),
        (lambda file: _replace(file, "regions/score", np.zeros(8, np.float32)), [], "file"),
        (lambda file: _replace(file, "regions/box", np.zeros((9, 4), np.int64)), [], "file"),
        (lambda file: _replace(file, "images/file_name", np.zeros(5)), [], "file"),
        (lambda file: _replace(file, "checksums/crc32", np.zeros((5, 3), np.uint32)), [], "checksums/crc32"),
        (_change("images/region_start", 2, 9), [], "file"),
        (_change("images/region_start", 5, 8), [], "file"),
        (_change("images/id", 1, 10), [], "file"),
        (_change("maps/head_start", 1, 10**6), [], "file"),
        (lambda file: file.attrs.__setitem__("classes", "[1]"), [], "file"),
        (lambda file: file.attrs.__setitem__("options", "[]"), [], "file"),
        (lambda file: file.attrs.__setitem__("complete", False), [], "file"),
    ],
)
def test_damage_is_named(
    sound: Path, tmp_path: Path, change: Callable[[h5py.File], None], images: list[int], part: str
) -> None:
    from refdet.cli.main import main

    path = tmp_path / "a.h5"
    shutil.copy(sound, path)
    with h5py.File(path, "r+") as file:
        change(file)
    found = verify(path)
    assert part in [problem.part for problem in found.problems]
    if images:
        assert found.damaged_images == images
    done = CliRunner().invoke(main, ["inspect", str(path), "--verify", "--json"])
    assert done.exit_code == 1 and json.loads(done.stdout) == found.to_json()
    told = CliRunner().invoke(main, ["inspect", str(path), "--verify"])
    assert told.exit_code == 1 and str(found.problems[0]) in told.stdout and "a.h5: damaged" in told.stderr


def test_a_store_without_checksums_says_so(sound: Path, tmp_path: Path) -> None:
    from refdet.cli.main import main

    shutil.copy(sound, tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file["checksums"]
    for path, text in ((sound, ""), (tmp_path / "a.h5", "not checked: no checksums")):
        done = CliRunner().invoke(main, ["inspect", str(path), "--verify"])
        assert done.exit_code == 0 and "OK: 5 images, 9 regions" in done.stdout and text in done.stdout
    (tmp_path / "x.json").write_text("{}")
    assert CliRunner().invoke(main, ["inspect", str(tmp_path / "x.json"), "--verify"]).exit_code == 2


@pytest.mark.usefixtures("check_hdf5_in_process")
@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_flipped_bytes_and_cuts_are_found(tmp_path: Path, compression: str) -> None:
    columns = store.Columns({"pool5": (300,)}, masks=True, maps=("head",), compression=compression)
    write(tmp_path / "a.h5", [draw(i, 5, columns) for i in range(6)], columns)
    whole = (tmp_path / "a.h5").read_bytes()
    with h5py.File(tmp_path / "a.h5") as file:
        data = file["features/pool5"]
        first = data.id.get_offset() if compression == "none" else data.id.get_chunk_info(0).byte_offset
        size = data.id.get_storage_size()
    random = np.random.default_rng(0)
    places = [*random.integers(len(whole), size=60).tolist(), *random.integers(first, first + size, 20).tolist()]
    damaged = tmp_path / "damaged.h5"
    unseen = []
    for number, place in enumerate(places):
        content = bytearray(whole)
        content[place] ^= 1 << int(random.integers(8))
        damaged.write_bytes(content)
        found = verify(damaged)
        if not found.problems:
            unseen.append(number)
            with store.open(tmp_path / "a.h5") as a, store.open(damaged) as b:
                for image_id in a:  # a byte that belongs to nothing
                    assert_same(a[image_id], b[image_id])
        else:
            try:
                with store.open(damaged) as b:
                    for image_id in b:
                        b[image_id]
                    b.to_dataframe()
            except InputError:
                pass
    assert not [number for number in unseen if number >= 60]
    for length in (0, 7, 100, 2000, len(whole) // 2, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        assert verify(damaged).problems
