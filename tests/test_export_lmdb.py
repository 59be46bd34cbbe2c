"""export --format lmdb: a database that ViLBERT's reader opens."""

from __future__ import annotations

import base64
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_examples import ANNOTATIONS, DETECTIONS, write_store

from refdet.errors import InputError, WorkError
from refdet.export.lmdb import export_lmdb
from refdet.regions import Regions


class Reader:
    """Does what the ImageFeaturesH5Reader of ViLBERT does."""

    def __init__(self, path: Path, width: int = 2048) -> None:
        lmdb = pytest.importorskip("lmdb")
        self.width = width
        self.env = lmdb.open(str(path), max_readers=1, readonly=True, lock=False, readahead=False, meminit=False)
        with self.env.begin(write=False) as transaction:
            self.ids: list[bytes] = pickle.loads(transaction.get(b"keys"))

    def item(self, image_id: int) -> dict[str, Any]:
        self.ids.index(str(image_id).encode())
        with self.env.begin(write=False) as transaction:
            found = pickle.loads(transaction.get(str(image_id).encode()))
        assert isinstance(found, dict)
        return found

    def __getitem__(self, image_id: int) -> tuple[np.ndarray, int, np.ndarray]:
        item = self.item(image_id)
        height, width, n = int(item["image_h"]), int(item["image_w"]), int(item["num_boxes"])
        features = np.frombuffer(base64.b64decode(item["features"]), dtype=np.float32).reshape(n, self.width)
        boxes = np.frombuffer(base64.b64decode(item["boxes"]), dtype=np.float32).reshape(n, 4)
        place = np.zeros((n, 5), np.float32)
        place[:, :4] = boxes / [width, height, width, height]
        place[:, 4] = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 2] - boxes[:, 0]) / (width * height)
        whole = features.sum(axis=0, keepdims=True) / n
        return np.concatenate([whole, features]), n + 1, np.concatenate([[[0, 0, 1, 1, 1]], place])


@pytest.mark.parametrize("images", [DETECTIONS, ANNOTATIONS], ids=["detections", "annotations"])
def test_vilbert_reads_it(tmp_path: Path, images: list[Regions]) -> None:
    pytest.importorskip("lmdb")
    done = export_lmdb(write_store(tmp_path / "a.h5", images), tmp_path / "out")
    reader = Reader(tmp_path / "out")
    assert reader.ids == [str(regions.image_id).encode() for regions in images[:2]]
    for regions in images[:2]:
        features, n, place = reader[regions.image_id]
        assert n == len(regions) + 1
        np.testing.assert_array_equal(features[1:], regions.features["fc7"])
        np.testing.assert_allclose(place[1:, :4] * [8, 6, 8, 6], regions.boxes, rtol=1e-6)
        assert reader.item(regions.image_id)["image_id"] == str(regions.image_id)
    assert done.empty == {5: "cannot be read"} and len(done.notes) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data.mdb", "provenance.json"]


def test_class_probabilities_go_along(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    random = np.random.default_rng(0)
    images = [
        replace(r, features={"fc7": r.features["fc7"], "class_prob": random.random((len(r), 3), np.float32)})
        for r in DETECTIONS[:2]
    ]
    export_lmdb(write_store(tmp_path / "a.h5", images), tmp_path / "out")
    text = Reader(tmp_path / "out").item(4)["cls_prob"]
    found = np.frombuffer(base64.b64decode(text), np.float32).reshape(-1, 3)
    np.testing.assert_array_equal(found, images[0].features["class_prob"])


def test_it_grows_to_any_size(tmp_path: Path) -> None:
    """Many images, some of one region and some of a hundred; each commit holds a few."""
    pytest.importorskip("lmdb")
    random = np.random.default_rng(0)
    images = []
    for image_id in range(1, 201):
        n = 100 if image_id % 50 == 0 else image_id % 2
        images.append(Regions(
            image_id, f"{image_id}.jpg", 60, 80, random.random((n, 4), np.float32), np.ones(n, np.float32),
            np.ones(n, np.int64), features={"fc7": random.random((n, 1024), np.float32)},
        ))  # fmt: skip
    done = export_lmdb(write_store(tmp_path / "a.h5", images), tmp_path / "out")
    reader = Reader(tmp_path / "out", 1024)
    kept = [regions for regions in images if len(regions)]
    assert len(reader.ids) == len(kept) == done.images and len(done.empty) == 200 - len(kept)
    for regions in kept:
        np.testing.assert_array_equal(reader[regions.image_id][0][1:], regions.features["fc7"])
    assert any("ViLBERT's reader takes 2048" in note for note in done.notes)


def test_the_same_store_gives_the_same_records(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    path = write_store(tmp_path / "a.h5", DETECTIONS)
    records = []
    for name in ("one", "two"):
        export_lmdb(path, tmp_path / name)
        with Reader(tmp_path / name).env.begin() as transaction:
            records.append(list(transaction.cursor()))
    assert records[0] == records[1] and len(records[0]) == 3


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(InputError, match=r"pip install 'refdet\[lmdb\]'"):
        export_lmdb(write_store(tmp_path / "a.h5", DETECTIONS), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_lmdb_cannot_write_is_an_error_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lmdb")
    monkeypatch.setattr("refdet.export.lmdb._map_size", lambda regions, numbers: 65536)
    with pytest.raises(WorkError, match="lmdb cannot write it .*is the disk full"):
        export_lmdb(write_store(tmp_path / "a.h5", DETECTIONS), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]
