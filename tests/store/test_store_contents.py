"""Contents of a store: round trips of any columns, the table, checksums, and damage that verifying finds."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
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


def arrays_of(regions: Regions) -> dict[str, np.ndarray]:
    """All arrays of regions by name."""
    named = {"boxes": regions.boxes, "scores": regions.scores, "category_ids": regions.category_ids}
    named |= regions.features
    named |= {f"map {name}": values for name, values in regions.maps.items()}
    optional = {"ann_ids": regions.ann_ids, "im_info": regions.im_info}
    return named | {name: values for name, values in optional.items() if values is not None}


def assert_equal(actual: Regions, expected: Regions) -> None:
    for name in ("image_id", "file_name", "height", "width", "error", "masks"):
        assert getattr(actual, name) == getattr(expected, name), name
    arrays, expected_arrays = arrays_of(actual), arrays_of(expected)
    assert set(arrays) == set(expected_arrays)
    for name, values in arrays.items():
        assert values.dtype == expected_arrays[name].dtype, name
        np.testing.assert_array_equal(values, expected_arrays[name], err_msg=name)


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
def test_regions_of_any_columns_survive_a_round_trip(
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
            assert_equal(image, found[image.image_id])
        for part in (slice(1, 3), slice(None, None, -2), slice(-2, None)):
            assert [r.image_id for r in found[part]] == [r.image_id for r in images[part]]
        frame = found.to_dataframe()
        assert len(frame) == found.regions == sum(map(len, images))
        assert frame["image_id"].tolist() == [image.image_id for image in images for _ in range(len(image))]
        np.testing.assert_array_equal(
            frame[["x1", "y1", "x2", "y2"]], np.concatenate([np.zeros((0, 4), np.float32), *(r.boxes for r in images)])
        )
    with pytest.MonkeyPatch.context() as patch:
        # starting a process for each example takes too long
        patch.setattr(hdf5_access, "check_in_subprocess", hdf5_sandbox.check_in_process)
        result = verify(path)
    assert (result.problems, result.unchecked) == ([], [])


def all_columns() -> store.Columns:
    features = {"pool5": (5,), "spatial_fc7": (2, 7, 7), "class_prob": (3,)}
    return store.Columns(features, masks=True, ann_ids=True, maps=("head",))


@pytest.fixture(scope="module")
def intact_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("intact") / "a.h5"
    columns = all_columns()
    images = [draw(10 + i, n, columns, f"{i}.jpg") for i, n in enumerate((3, 0, 2, 4))]
    write(path, [*images, draw(14, 0, columns, "lost.jpg", "cannot be read")], columns)
    return path


def test_the_dataframe_has_category_names_and_areas(intact_store: Path) -> None:
    with store.open(intact_store) as found:
        frame, regions = found.to_dataframe(), found[12]
        rows = frame[frame["image_id"] == 12]
        assert rows.index.tolist() == list(found.rows(12)) and frame.index.name == "region"
        assert rows["category"].tolist() == [{3: "dög", 7: "cat"}[c] for c in regions.category_ids.tolist()]
        sides = regions.boxes[:, 2:] - regions.boxes[:, :2]
        np.testing.assert_array_equal(rows["area"], sides[:, 0] * sides[:, 1])
        np.testing.assert_array_equal(rows["ann_id"], regions.ann_ids)
        with pytest.raises(KeyError, match="no feature 'fc7'"):
            found.read(12, features=("fc7",))
        assert set(found.read(12, features=("pool5", "head")).maps) == {"head"}
        assert not found.read(12, features=("pool5",)).maps


def test_checksums_are_as_documented(intact_store: Path) -> None:
    with h5py.File(intact_store) as file:
        table = file["checksums/crc32"]
        names = json.loads(table.attrs["columns"])
        a, b = file["images/region_start"][2:4]
        for name in ("regions/box", "regions/ann_id", "features/spatial_fc7"):
            assert table[2, names.index(name)] == zlib.crc32(file[name][a:b].tobytes())
        assert table[2, names.index("images")] == zlib.crc32(f"12\t9\t7\t{a}\t{b}\t2.jpg\t".encode())


def test_the_attribute_run_does_not_change_the_data(tmp_path: Path) -> None:
    columns = store.Columns(features={"pool5": (4,)})
    row = [store.ImageRow(1, "a.jpg", 9, 7, "", 2, 0)]
    for name, run in (("a.h5", None), ("b.h5", {"images_per_second": 3.5})):
        with store.create(tmp_path / name, HEADER, columns, row) as writer:
            writer.put(draw(1, 2, columns))
            writer.finish(run)
    with store.open(tmp_path / "a.h5") as a, store.open(tmp_path / "b.h5") as b:
        assert (a.run, b.run) == ({}, {"images_per_second": 3.5})
        assert_equal(a[1], b[1])
        np.testing.assert_array_equal(a.file["checksums/crc32"], b.file["checksums/crc32"])


def test_regions_that_do_not_match_their_row_are_refused(tmp_path: Path) -> None:
    columns = all_columns()
    regions = draw(1, 2, columns)
    row = store.ImageRow(1, "a.jpg", 9, 7, "", 2, sum(map(len, regions.masks or ())), regions.maps["head"].shape)
    for wrong_row, message in (
        (row._replace(map_shape=(2, 3, 4)), "map has shape"),
        (row._replace(mask_bytes=1), "mask_counts"),
        (row._replace(regions=3), "expected 3"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            store.create(tmp_path / "a.h5", HEADER, columns, [wrong_row]) as writer,
        ):
            writer.put(regions)
    other_columns = store.Columns({"pool5": (4,)}, masks=True, ann_ids=True)
    with (
        pytest.raises(ValueError, match="pool5"),
        store.create(tmp_path / "a.h5", HEADER, other_columns, [row]) as writer,
    ):
        writer.put(regions)
    assert not (tmp_path / "a.h5").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps": {"head": np.zeros((2, 3))}}, "maps must be"),
        ({"maps": {"head": np.zeros((2, 3, 4))}, "im_info": None}, "without im_info"),
        ({"im_info": np.zeros(3)}, "im_info must be"),
        ({"features": {"pool5": np.zeros((3, 4, 4))}}, "2 boxes"),
    ],
)
def test_regions_with_invalid_maps_or_features_are_refused(changes: dict, message: str) -> None:
    fields = {"im_info": np.ones(3, np.float32)} | changes
    with pytest.raises(ValueError, match=message):
        Regions(1, "", 9, 7, np.zeros((2, 4), np.float32), np.zeros(2, np.float32), np.zeros(2, np.int64), **fields)


def _replace(file: h5py.File, name: str, values: np.ndarray) -> None:
    del file[name]
    file[name] = values


def _change(name: str, index: object, value: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[name][index] = value

    return change


def _without_checksums(change: Callable[[h5py.File], None]) -> Callable[[h5py.File], None]:
    def change_both(file: h5py.File) -> None:
        del file["checksums"]
        change(file)

    return change_both


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
def test_damage_is_reported_with_its_part_and_images(
    intact_store: Path, tmp_path: Path, change: Callable[[h5py.File], None], images: list[int], part: str
) -> None:
    from refdet.cli.main import main

    path = tmp_path / "a.h5"
    shutil.copy(intact_store, path)
    with h5py.File(path, "r+") as file:
        change(file)
    found = verify(path)
    assert part in [problem.part for problem in found.problems]
    assert found.damaged_images == images
    done = CliRunner().invoke(main, ["inspect", str(path), "--verify", "--json"])
    assert done.exit_code == 1 and json.loads(done.stdout) == found.to_json()
    printed = CliRunner().invoke(main, ["inspect", str(path), "--verify"])
    assert printed.exit_code == 1 and str(found.problems[0]) in printed.stdout and "a.h5: damaged" in printed.stderr


def test_a_store_without_checksums_is_reported_as_unchecked(intact_store: Path, tmp_path: Path) -> None:
    from refdet.cli.main import main

    shutil.copy(intact_store, tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file["checksums"]
    for path, text in ((intact_store, ""), (tmp_path / "a.h5", "not checked: no checksums")):
        done = CliRunner().invoke(main, ["inspect", str(path), "--verify"])
        assert done.exit_code == 0 and "OK: 5 images, 9 regions" in done.stdout and text in done.stdout
    (tmp_path / "x.json").write_text("{}")
    assert CliRunner().invoke(main, ["inspect", str(tmp_path / "x.json"), "--verify"]).exit_code == 2


@pytest.mark.usefixtures("check_hdf5_in_process")
@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_flipped_bits_and_truncation_are_detected(tmp_path: Path, compression: str) -> None:
    columns = store.Columns({"pool5": (300,)}, masks=True, maps=("head",), compression=compression)
    write(tmp_path / "a.h5", [draw(i, 5, columns) for i in range(6)], columns)
    whole = (tmp_path / "a.h5").read_bytes()
    with h5py.File(tmp_path / "a.h5") as file:
        data = file["features/pool5"]
        first = data.id.get_offset() if compression == "none" else data.id.get_chunk_info(0).byte_offset
        size = data.id.get_storage_size()
    random = np.random.default_rng(0)
    anywhere, in_features = random.integers(len(whole), size=60), random.integers(first, first + size, 20)
    offsets = [*anywhere.tolist(), *in_features.tolist()]
    damaged = tmp_path / "damaged.h5"
    undetected = []
    for number, offset in enumerate(offsets):
        content = bytearray(whole)
        content[offset] ^= 1 << int(random.integers(8))
        damaged.write_bytes(content)
        found = verify(damaged)
        if not found.problems:
            undetected.append(number)
            with store.open(tmp_path / "a.h5") as a, store.open(damaged) as b:
                for image_id in a:  # the byte belongs to no data
                    assert_equal(a[image_id], b[image_id])
        else:
            with suppress(InputError), store.open(damaged) as b:  # and no other error
                for image_id in b:
                    b[image_id]
                b.to_dataframe()
    assert not [number for number in undetected if number >= len(anywhere)]
    assert len(undetected) < len(anywhere) / 2
    for length in (0, 7, 100, 2000, len(whole) // 2, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        assert verify(damaged).problems
