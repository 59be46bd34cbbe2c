"""Pickles of arrays that any version of numpy loads, whatever strings they contain."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_examples import DETECTIONS, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from refdet.store.export import portable_pickle
from refdet.store.export.npz import export_npz, write_npz

# the only globals that a pickle may request: every version of numpy and Python has them
GLOBALS = {"numpy ndarray", "numpy dtype", "_codecs encode"}
# strings that look like references to numpy modules in the bytes of a pickle
HOSTILE = st.sampled_from(["cnumpy._core.multiarray\n", "numpy._core", "cnumpy.core.multiarray\n_reconstruct\n", "R."])
TEXTS = st.lists(HOSTILE | st.text(max_size=5), max_size=4).map("".join)
ARRAYS = st.sampled_from([
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.zeros((0, 4), np.float32),
    np.array(3, np.int64),
    np.arange(4, dtype=np.float16)[::2],
    np.asfortranarray(np.arange(6).reshape(2, 3)),
    np.array([b"cnumpy._core", b"a"]),
    np.array(["cnumpy._core.multiarray\n", "é"]),
    np.frombuffer(b"cnumpy._core.multiarray\n", np.uint8),
])  # fmt: skip
VALUES = st.recursive(TEXTS | st.integers() | ARRAYS, lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6)  # fmt: skip


class RecordingUnpickler(pickle.Unpickler):
    """Records the globals that a pickle requests."""

    def __init__(self, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled))
        self.requested: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.requested.add(f"{module} {name}")
        return super().find_class(module, name)


def requested_globals(pickled: bytes) -> set[str]:
    """Globals that a pickle requests, as "module name"."""
    recorder = RecordingUnpickler(pickled)
    recorder.load()
    return recorder.requested


def opcodes(pickled: bytes) -> set[str]:
    """Names of the opcodes of a pickle."""
    return {code.name for code, _, _ in pickletools.genops(pickled)}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(map(equal, a.values(), b.values()))
    return type(a) is type(b) and a == b


@settings(derandomize=True, deadline=None, max_examples=200)
@given(VALUES, st.sampled_from([2, 4]))
def test_values_survive_a_round_trip(value: Any, protocol: int) -> None:
    pickled = portable_pickle.dumps(value, protocol)
    assert equal(value, pickle.loads(pickled))
    # these need a registry or a function of the program that loads them
    assert not opcodes(pickled) & {"EXT1", "PERSID", "BINPERSID"}


@pytest.mark.parametrize("protocol", [2, 4])
def test_only_globals_of_every_numpy_version_are_requested(protocol: int) -> None:
    value = {"cnumpy._core.multiarray\n": np.arange(3), "a": [np.zeros((2, 2), np.float16), np.array({"b": 1}, object)]}
    pickled = portable_pickle.dumps(value, protocol)
    assert requested_globals(pickled) <= GLOBALS and pickle.loads(pickled)["a"][1].item() == {"b": 1}


def test_loaded_arrays_are_writable() -> None:
    array = pickle.loads(portable_pickle.dumps(np.arange(3), 4))
    array[0] = 7
    assert array.tolist() == [7, 1, 2] and array.flags.owndata


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.dictionaries(TEXTS, TEXTS | ARRAYS, max_size=4))
def test_a_dict_in_an_npz_survives_a_round_trip(tmp_path_factory: pytest.TempPathFactory, info: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    write_npz(path, {"info": info, "x": np.arange(3)})
    found = np.load(path, allow_pickle=True)
    assert found["info"].shape == () and found["info"].dtype == object
    assert equal(info, found["info"].item()) and found["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "name", ["cnumpy._core.multiarray", "xnumpy._core.multiarray_reconstruct", "cnumpy.core.multiarray"]
)
def test_an_image_named_like_a_numpy_module_keeps_its_name(tmp_path: Path, name: str) -> None:
    images = [replace(DETECTIONS[0], file_name=f"{name}.jpg")]
    export_npz(write_store(tmp_path / "a.h5", images), tmp_path / "out")
    path = tmp_path / "out" / f"{name}.npz"
    info = np.load(path, allow_pickle=True)["info"].item()
    assert info["image_id"] == name and info["category_id"].tolist() == [1, 2, 1, 2]
    with zipfile.ZipFile(path) as archive:
        member = archive.read("info.npy")
    pickled = member[member.index(b"\n") + 1 :]  # the header of an .npy file ends with a newline
    assert requested_globals(pickled) <= GLOBALS
    # Python 2 can read it: it has no opcode of protocol 4
    assert not opcodes(pickled) & {"STACK_GLOBAL", "FRAME"}
