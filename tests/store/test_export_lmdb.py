"""export --format lmdb: databases that the readers of vilbert-multi-task and vilbert_beta open."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from export_examples import ANNOTATIONS, DETECTIONS, HEIGHT, WIDTH, write_store

from refdet.errors import InputError, RuntimeFailure
from refdet.store.export.lmdb import export_lmdb
from refdet.structures.regions import Regions


class ViLBERTReader:
    """Reads like ImageFeaturesH5Reader of vilbert-multi-task or, if arrays are base64 text, of vilbert_beta.

    Args:
        path: the database.
        width: values per region.
        text: whether arrays are base64 text.
    """

    def __init__(self, path: Path, width: int = 2048, text: bool = False) -> None:
        lmdb = pytest.importorskip("lmdb")
        self.width, self.text = width, text
        self.env = lmdb.open(str(path), max_readers=1, readonly=True, lock=False, readahead=False, meminit=False)
        with self.env.begin(write=False) as transaction:
            self.ids: list[bytes] = pickle.loads(transaction.get(b"keys"))

    def item(self, image_id: int) -> dict[str, Any]:
        assert str(image_id).encode() in self.ids
        with self.env.begin(write=False) as transaction:
            found = pickle.loads(transaction.get(str(image_id).encode()))
        assert isinstance(found, dict)
        return found

    def array(self, item: dict[str, Any], name: str, width: int) -> np.ndarray:
        if self.text:
            n = int(item["num_boxes"])
            return np.frombuffer(base64.b64decode(item[name]), dtype=np.float32).reshape(n, width)
        values = item[name].reshape(-1, width)
        assert isinstance(values, np.ndarray) and values.dtype == np.float32 and values.flags.writeable
        return values

    def __getitem__(self, image_id: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Features, their number and positions (x1, y1, x2, y2, area, in 0..1); the first is the whole image."""
        item = self.item(image_id)
        height, width = int(item["image_h"]), int(item["image_w"])
        features, boxes = self.array(item, "features", self.width), self.array(item, "boxes", 4)
        n = len(features)
        positions = np.zeros((n, 5), np.float32)
        positions[:, :4] = boxes / [width, height, width, height]
        positions[:, 4] = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 2] - boxes[:, 0]) / (width * height)
        mean = features.sum(axis=0, keepdims=True) / n
        return np.concatenate([mean, features]), n + 1, np.concatenate([[[0, 0, 1, 1, 1]], positions])


@pytest.mark.parametrize("consumer", ["vilbert-multi-task", "vilbert-beta"])
@pytest.mark.parametrize("images", [DETECTIONS, ANNOTATIONS], ids=["detections", "annotations"])
def test_vilbert_reads_the_database(tmp_path: Path, images: list[Regions], consumer: str) -> None:
    pytest.importorskip("lmdb")
    done = export_lmdb(write_store(tmp_path / "a.h5", images, "float16"), tmp_path / "out", consumer=consumer)
    reader = ViLBERTReader(tmp_path / "out", text=consumer == "vilbert-beta")
    assert reader.ids == [str(regions.image_id).encode() for regions in images[:2]]
    for regions in images[:2]:
        features, n, positions = reader[regions.image_id]
        assert n == len(regions) + 1
        np.testing.assert_array_equal(features[1:], regions.features["fc7"].astype(np.float16))
        np.testing.assert_allclose(positions[1:, :4] * [WIDTH, HEIGHT, WIDTH, HEIGHT], regions.boxes, rtol=1e-6)
        sides = regions.boxes[:, 2:] - regions.boxes[:, :2]
        np.testing.assert_allclose(positions[1:, 4], sides.prod(axis=1) / (WIDTH * HEIGHT), rtol=1e-5)
        item = reader.item(regions.image_id)
        assert (item["image_id"], item["num_boxes"]) == (str(regions.image_id), len(regions))
    assert done.empty == {5: "cannot be read"} and len(done.notes) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data.mdb", "provenance.json"]
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["options"]["for"] == consumer


def test_the_default_consumer_is_vilbert_multi_task_and_is_noted(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    done = export_lmdb(write_store(tmp_path / "a.h5", DETECTIONS), tmp_path / "out")
    assert ViLBERTReader(tmp_path / "out")[4][1] == 1 + len(DETECTIONS[0])
    assert "written as arrays for vilbert-multi-task" in done.notes[0] and "`consumer='vilbert-beta'`" in done.notes[0]


@pytest.mark.parametrize("consumer", ["vilbert-multi-task", "vilbert-beta"])
def test_class_probabilities_are_exported(tmp_path: Path, consumer: str) -> None:
    pytest.importorskip("lmdb")
    random = np.random.default_rng(0)
    images = [
        replace(r, features={"fc7": r.features["fc7"], "class_prob": random.random((len(r), 3), np.float32)})
        for r in DETECTIONS[:2]
    ]
    export_lmdb(write_store(tmp_path / "a.h5", images), tmp_path / "out", consumer=consumer)
    reader = ViLBERTReader(tmp_path / "out", text=consumer == "vilbert-beta")
    np.testing.assert_array_equal(reader.array(reader.item(4), "cls_prob", 3), images[0].features["class_prob"])


def test_pickles_name_nothing_that_old_numpy_lacks(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    export_lmdb(write_store(tmp_path / "a.h5", DETECTIONS), tmp_path / "out")
    with ViLBERTReader(tmp_path / "out").env.begin() as transaction:
        records = [record for _, record in transaction.cursor()]
    assert len(records) == 3
    for record in records:
        assert b"_core" not in record and record[:2] == b"\x80\x04"  # protocol 4


@pytest.mark.parametrize("map_size", [32768, 1 << 20, 64 << 20])
def test_the_database_grows_beyond_its_initial_map_size(
    tmp_path: Path, map_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 images of no region, one or a hundred, which make a database of several commits."""
    pytest.importorskip("lmdb")
    monkeypatch.setattr("refdet.store.export.lmdb.INITIAL_MAP_SIZE", map_size)
    random = np.random.default_rng(0)
    images = []
    for image_id in range(1, 201):
        n = 100 if image_id % 50 == 0 else image_id % 2
        images.append(Regions(
            image_id, f"{image_id}.jpg", 60, 80, random.random((n, 4), np.float32), np.ones(n, np.float32),
            np.ones(n, np.int64), features={"fc7": random.random((n, 1024), np.float32)},
        ))  # fmt: skip
    done = export_lmdb(write_store(tmp_path / "a.h5", images), tmp_path / "out")
    reader = ViLBERTReader(tmp_path / "out", 1024)
    exported = [regions for regions in images if len(regions)]
    assert len(reader.ids) == len(exported) == done.images and len(done.empty) == 200 - len(exported)
    for regions in exported:
        np.testing.assert_array_equal(reader[regions.image_id][0][1:], regions.features["fc7"])
    assert any("vilbert-multi-task expects 2048" in note for note in done.notes)


def test_the_same_store_gives_the_same_records(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    path = write_store(tmp_path / "a.h5", DETECTIONS)
    records = []
    for name in ("one", "two"):
        export_lmdb(path, tmp_path / name)
        with ViLBERTReader(tmp_path / name).env.begin() as transaction:
            records.append(list(transaction.cursor()))
    assert records[0] == records[1] and len(records[0]) == 3


def test_without_lmdb_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(InputError, match=r"pip install 'refdet\[lmdb\]'"):
        export_lmdb(write_store(tmp_path / "a.h5", DETECTIONS), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "free", "message"),
    [
        ("mdb_put: MDB_BAD_TXN", 1 << 30, r"out: lmdb cannot write the database \(mdb_put: MDB_BAD_TXN\)"),
        ("mdb_txn_commit: Input/output error", 1 << 30, "out: lmdb cannot write the database"),
        ("mdb_txn_commit: Input/output error", 4096, "out: disk full"),
        ("mdb_txn_commit: No space left on device", 1 << 30, "out: disk full"),
        ("mdb_txn_commit: File too large", 1 << 30, "out: file size limit of this process exceeded"),
    ],
)
def test_errors_of_lmdb_are_translated(
    tmp_path: Path, text: str, free: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lmdb = pytest.importorskip("lmdb")

    class Transaction:
        def __enter__(self) -> Transaction:
            raise lmdb.Error(text)

        def __exit__(self, *error: object) -> None: ...

    class Database(Transaction):
        def __enter__(self) -> Transaction:
            return self

        def begin(self, write: bool) -> Transaction:
            return Transaction()

    path = write_store(tmp_path / "a.h5", DETECTIONS)
    monkeypatch.setattr(lmdb, "open", lambda *_, **__: Database())
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr("refdet.store.export.lmdb.require_space", lambda *_: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RuntimeFailure, match=message):
        export_lmdb(path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]
