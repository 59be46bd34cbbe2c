"""Pickles of arrays that name nothing of numpy's that another version lacks, whatever text is among them."""

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

GLOBALS = {"numpy ndarray", "numpy dtype", "_codecs encode"}
# text that a search through the bytes of a pickle would take for a module's name
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


class Recorder(pickle.Unpickler):
    """Keeps the names of the globals that a pickle asks for."""

    def __init__(self, text: bytes) -> None:
        super().__init__(io.BytesIO(text))
        self.named: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.named.add(f"{module} {name}")
        return super().find_class(module, name)


def named(text: bytes) -> set[str]:
    recorder = Recorder(text)
    recorder.load()
    return recorder.named


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(map(same, a.values(), b.values()))
    return type(a) is type(b) and a == b


@settings(derandomize=True, deadline=None, max_examples=200)
@given(VALUES, st.sampled_from([2, 4]))
def test_values_come_back_as_they_were(value: Any, protocol: int) -> None:
    text = portable_pickle.dumps(value, protocol)
    assert same(value, pickle.loads(text))
    assert not {code.name for code, _, _ in pickletools.genops(text)} & {"EXT1", "PERSID", "BINPERSID"}


@pytest.mark.parametrize("protocol", [2, 4])
def test_only_names_of_every_numpy_are_asked_for(protocol: int) -> None:
    value = {"cnumpy._core.multiarray\n": np.arange(3), "a": [np.zeros((2, 2), np.float16), np.array({"b": 1}, object)]}
    text = portable_pickle.dumps(value, protocol)
    assert named(text) <= GLOBALS and pickle.loads(text)["a"][1].item() == {"b": 1}


def test_arrays_can_be_written_to() -> None:
    found = pickle.loads(portable_pickle.dumps(np.arange(3), 4))
    found[0] = 7
    assert found.tolist() == [7, 1, 2] and found.flags.owndata


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.dictionaries(TEXTS, TEXTS | ARRAYS, max_size=4))
def test_a_dict_in_an_npz_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, info: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    write_npz(path, {"info": info, "x": np.arange(3)})
    found = np.load(path, allow_pickle=True)
    assert found["info"].shape == () and found["info"].dtype == object
    assert same(info, found["info"].item()) and found["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "name", ["cnumpy._core.multiarray", "xnumpy._core.multiarray_reconstruct", "cnumpy.core.multiarray"]
)
def test_an_image_keeps_its_name(tmp_path: Path, name: str) -> None:
    images = [replace(DETECTIONS[0], file_name=f"{name}.jpg")]
    export_npz(write_store(tmp_path / "a.h5", images), tmp_path / "out")
    path = tmp_path / "out" / f"{name}.npz"
    info = np.load(path, allow_pickle=True)["info"].item()
    assert info["image_id"] == name and info["category_id"].tolist() == [1, 2, 1, 2]
    with zipfile.ZipFile(path) as archive:
        member = archive.read("info.npy")
    text = member[member.index(b"\n") + 1 :]
    assert named(text) <= GLOBALS
    assert not {code.name for code, _, _ in pickletools.genops(text)} & {"STACK_GLOBAL", "FRAME"}  # as Python 2 reads
