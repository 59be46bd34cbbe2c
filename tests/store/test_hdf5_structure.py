"""HDF5 files are checked for structures that no store has; stores in every HDF5 layout pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from hostile_stores import STRUCTURES, repeat_text, share_bytes, write_store

from refdet import store
from refdet.errors import InputError
from refdet.store import schema
from refdet.store.hdf5_sandbox import check_in_process

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("check_hdf5_in_process")]


@pytest.mark.parametrize("libver", ["", "earliest"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_that_no_store_has_is_refused(tmp_path: Path, name: str, libver: str) -> None:
    edit, message = STRUCTURES[name]
    path = write_store(tmp_path / "a.h5", libver=libver)
    with h5py.File(path, "r+") as file:
        edit(file)
    with pytest.raises(InputError, match=rf"a\.h5: refused: .*({message}).*; extract it again$") as raised:
        store.open(path)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("change", "libver", "message"),
    [(repeat_text, "", "/x declares 100000000 bytes of strings in a file of"),
     (share_bytes, "earliest", "its datasets overlap")],
)  # fmt: skip
def test_bytes_that_are_used_several_times_are_refused(
    tmp_path: Path, change: Callable[[Path], None], libver: str, message: str
) -> None:
    path = write_store(tmp_path / "a.h5", libver=libver)
    change(path)
    assert message in check_in_process(path)


@pytest.mark.parametrize("compression", ["none", "gzip", "lzf"])
@pytest.mark.parametrize("libver", ["", "earliest", "v108", "v110", "v112", "latest"])
def test_stores_in_every_layout_pass(tmp_path: Path, compression: str, libver: str) -> None:
    path = write_store(tmp_path / "a.h5", compression, libver)
    assert check_in_process(path) == ""
    with store.open(path) as found:
        assert [len(found[i]) for i in found] == [3, 0, 2]


def test_datasets_that_users_add_with_h5py_are_accepted(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["extra/numbers"] = np.arange(10.0)
        file["extra/big_endian"] = np.arange(10, dtype=">i2")
        file["extra/names"] = ["a", "ß"]
        file["extra/old_names"] = np.array([b"a", b"bc"])
        file["extra/yes"] = np.array([True, False])
        file["features/own"] = np.zeros((5, 3), np.float16)
        file["extra"].attrs["note"] = "by hand"
        file["extra"].attrs["numbers"] = [1, 2]
        file.create_dataset(
            "extra/extensible", data=np.zeros((4, 3)), maxshape=(None, 3), compression="gzip", shuffle=True
        )
    with store.open(path) as found:
        assert found[10].features["own"].shape == (3, 3)


def test_highly_compressed_zeros_are_accepted(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        data = np.zeros((5, 2**20), np.float32)
        file.create_dataset("features/zeros", data=data, chunks=(1, 2**16), compression="gzip", shuffle=True)
        assert file["features/zeros"].id.get_storage_size() * 500 < data.nbytes
    with store.open(path) as found:
        assert not found[10].features["zeros"].any()


def test_incompressible_chunks_are_accepted(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.h5")
    values = np.random.default_rng(0).integers(0, 2**32, (5, 4096), np.uint32).view(np.float32)
    with h5py.File(path, "r+") as file:
        for compression in ("gzip", "lzf"):
            file.create_dataset(f"features/{compression}", data=values, chunks=(2, 4096), compression=compression)
    with store.open(path) as found:
        for compression in ("gzip", "lzf"):
            np.testing.assert_array_equal(found[10].features[compression].view(np.uint32), values[:3].view(np.uint32))


def _attribute(name: str, value: object) -> Callable[[h5py.File], None]:
    return lambda file: file.attrs.__setitem__(name, value)


def _column(name: str, values: np.ndarray) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = values

    return change


def _group(name: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_group(name)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_attribute("classes", "[1]"), "classes is not a list of ids and names"),
        (_attribute("classes", '[{"id": true, "name": "a"}]'), "classes is not"),
        (_attribute("classes", '[{"id": "1", "name": "a"}]'), "classes is not"),
        (_attribute("classes", '[{"id": 1, "name": null}]'), "classes is not"),
        (_attribute("classes", '[{"id": 1e400, "name": "a"}]'), "classes is not"),
        (_attribute("classes", f'[{{"id": {2**63}, "name": "a"}}]'), "classes is not"),
        (_attribute("classes", "{}"), "not a JSON list"),
        (_attribute("classes", "[" * 100_000), "classes is not valid JSON: .*recursion"),
        (_attribute("classes", b"[]\xff"), "classes is not valid JSON: .*Extra data"),
        (_attribute("options", "7"), "not a JSON object"),
        (_attribute("provenance", "[]"), "not a JSON object"),
        (_attribute("run", '"x"'), "not a JSON object"),
        (_attribute("provenance", 3), "attribute provenance is not text"),
        (_attribute("options", np.zeros(2)), "attribute options is not text"),
        (_column("images/height", np.array([9, 0, 9], np.int32)), "not positive"),
        (_column("images/width", np.array([9, 7, -1], np.int32)), "not positive"),
        (_column("images/height", np.array([9, 9, 9], np.float32)), "images/height has dtype float32"),
        (_column("images/height", np.array([9, 9, 9], ">i4")), "images/height has dtype >i4"),
        (_column("images/id", np.array([1, 1, 2])), "duplicate image"),
        (_column("images/id", np.array([[1, 2, 3]])), r"images/id has .* shape \(1, 3\)"),
        (_column("images/file_name", np.array([b"a", b"b", b"c"])), "images/file_name has"),
        (_column("images/region_start", np.array([0, 2**31 - 1, -5, 5], np.int32)), "does not ascend"),
        (_column("images/region_start", np.array([0, 2**63 - 1, -(2**63), 5])), "does not ascend"),
        (_column("images/region_start", np.array([1, 3, 3, 5])), "does not ascend"),
        (_column("regions/box", np.zeros((5, 4))), "regions/box has dtype float64"),
        (_column("regions/box", np.zeros((5, 5), np.float32)), "regions/box has"),
        (_column("regions/score", np.zeros(4, np.float32)), "regions/score has"),
        (_column("regions/mask_counts", np.zeros(10, np.int8)), "regions/mask_counts has"),
        (_column("features/fc7", np.zeros((5, 2), ">f4")), "features/fc7 has"),
        (_column("features/fc7", np.zeros((5, 2), "i4")), "features/fc7 has"),
        (_column("features/fc7", np.zeros((4, 2), "f4")), "features/fc7 has"),
        (_column("maps/head_start", np.array([0, 24, 48, 73])), "does not ascend"),
        (_group("features/fc7"), "features/fc7 is not an array"),
        (_group("images/id"), "images/id is not an array"),
        (_column("images/id", np.array(3)), "images/id is not an array"),
        (_group("regions/score"), "regions/score is not an array"),
        (_group("regions/mask_counts"), "regions/mask_counts is not an array"),
        (_group("maps/head"), "maps/head is not an array"),
        (lambda file: file.__delitem__("regions/mask_start"), "regions/mask_start is missing"),
        (lambda file: (file.__delitem__("regions"), file.__setitem__("regions", np.zeros(3))), "regions/box"),
    ],
)  # fmt: skip
def test_columns_or_attributes_of_another_type_or_shape_are_refused(
    tmp_path: Path, change: Callable[[h5py.File], None], message: str
) -> None:
    path = write_store(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(InputError, match=rf"a\.h5: (damaged|missing|refused).*({message})") as raised:
        store.open(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("starts", [[0, 2**63 - 1, -(2**63), 6, 8, 10], [0, -2, 4, 6, 8, 10], [0, 2, 4, 99, 8, 10]])
def test_mask_offsets_are_checked_when_an_image_is_read(tmp_path: Path, starts: list[int]) -> None:
    path = write_store(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["regions/mask_start"][:] = starts
    with store.open(path) as found, pytest.raises(InputError, match="damaged: regions/mask_start"):
        found.read(10, ())


@pytest.mark.parametrize("shape", [[2, 3, 5], [-1, 3, 4], [-2, -3, 4], [2**31 - 1] * 3])
def test_map_shapes_are_checked_when_an_image_is_read(tmp_path: Path, shape: list[int]) -> None:
    path = write_store(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["maps/head_shape"][0] = shape
    with store.open(path) as found, pytest.raises(InputError, match="maps/head of image 10 has 24 values"):
        found.read(10, ("head",))


def test_an_image_that_is_much_larger_than_the_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_store(tmp_path / "a.h5", "gzip")
    with h5py.File(path, "r+") as file:
        data = np.zeros((5, 2**18), np.float32)
        file.create_dataset("features/zeros", data=data, chunks=(1, 2**18), compression="gzip")
    store.open(path).close()
    monkeypatch.setattr(schema, "MAX_IMAGE_BYTES", 2**20)
    message = re.escape(f"features/zeros of an image takes {3 * 2**20} bytes, but the file has {path.stat().st_size}")
    with pytest.raises(InputError, match=message):
        store.open(path)
