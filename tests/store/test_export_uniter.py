"""export --format lmdb --for uniter: databases that UNITER's DetectFeatLmdb opens for referring expressions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import export_examples
import msgspec
import numpy as np
import pytest
from export_examples import ANNOTATIONS, DETECTIONS, HEIGHT, WIDTH, write_store

from refdet.errors import InputError
from refdet.store.export.lmdb import export_lmdb
from refdet.structures.regions import Regions

ARRAY_KEYS = {b"nd", b"type", b"kind", b"shape", b"data"}


class UniterReader:
    """Reads like DetectFeatLmdb with ``conf_th=-1`` and ``num_bb=100``: at most 100 regions of an image."""

    def __init__(self, folder: Path) -> None:
        lmdb = pytest.importorskip("lmdb")
        self.env = lmdb.open(str(folder / "feat_numbb100"), readonly=True, create=False)
        with self.env.begin(buffers=True) as transaction:
            self.names = json.loads(bytes(transaction.get(b"__keys__")).decode("utf-8"))
            self.keys = [bytes(key) for key, _ in transaction.cursor()]

    def raw(self, name: str) -> bytes:
        with self.env.begin() as transaction:
            found = transaction.get(name.encode("utf-8"))
        assert isinstance(found, bytes)
        return found

    def dump(self, name: str) -> dict[str, np.ndarray]:
        dump = msgspec.msgpack.decode(self.raw(name), type=dict[str, dict[bytes, Any]])
        assert all(set(packed) == ARRAY_KEYS and packed[b"nd"] is True for packed in dump.values())
        arrays = {key: np.frombuffer(packed[b"data"], np.dtype(packed[b"type"])).reshape(packed[b"shape"])
                  for key, packed in dump.items()}  # fmt: skip
        return {key: values[:100] for key, values in arrays.items()}

    def positions(self, name: str) -> np.ndarray:
        """x1, y1, x2, y2, width, height and area of each box (n, 7), in 0..1 of the image."""
        box = self.dump(name)["norm_bb"].astype(np.float32)
        return np.concatenate([box, box[:, 4:5] * box[:, 5:]], axis=1)


@pytest.mark.parametrize(
    ("images", "prefix"),
    [(DETECTIONS, "visual_grounding_det_coco"), (ANNOTATIONS, "visual_grounding_coco_gt")],
    ids=["detections", "annotations"],
)
def test_uniter_reads_the_database(tmp_path: Path, images: list[Regions], prefix: str) -> None:
    pytest.importorskip("lmdb")
    done = export_lmdb(write_store(tmp_path / "a.h5", images), tmp_path / "out", consumer="uniter")
    reader = UniterReader(tmp_path / "out")
    assert reader.names == [f"{prefix}_{r.image_id:012}.npz" for r in images[:2]]
    assert sorted(reader.keys) == sorted([b"__keys__", *(name.encode() for name in reader.names)])
    for regions, name in zip(images[:2], reader.names, strict=True):
        dump, n = reader.dump(name), len(regions)
        assert {key: (values.shape, values.dtype) for key, values in dump.items()} == {
            "norm_bb": ((n, 6), np.float16), "features": ((n, 2048), np.float16),
            "conf": ((n,), np.float16), "soft_labels": ((n, 3), np.float16),
        }  # fmt: skip
        np.testing.assert_array_equal(dump["features"], regions.features["fc7"].astype(np.float16))
        np.testing.assert_array_equal(dump["conf"], regions.scores.astype(np.float16))
        positions = reader.positions(name)
        sides = regions.boxes[:, 2:] - regions.boxes[:, :2]
        np.testing.assert_allclose(positions[:, :4] * [WIDTH, HEIGHT, WIDTH, HEIGHT], regions.boxes, rtol=1e-3)
        np.testing.assert_allclose(positions[:, 4:6] * [WIDTH, HEIGHT], sides, rtol=1e-3)
        np.testing.assert_allclose(positions[:, 6] * WIDTH * HEIGHT, sides.prod(axis=1), rtol=2e-3)
    assert done.empty == {5: "cannot be read"} and any("1 image without regions is omitted" in n for n in done.notes)


def test_soft_labels_are_the_class_probabilities_of_the_store(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    random = np.random.default_rng(0)
    images = [
        replace(r, features={"fc7": r.features["fc7"], "class_prob": random.random((len(r), 3), np.float32)})
        for r in DETECTIONS[:2]
    ]
    done = export_lmdb(write_store(tmp_path / "a.h5", images), tmp_path / "out", consumer="uniter")
    found = UniterReader(tmp_path / "out").dump("visual_grounding_det_coco_000000000004.npz")["soft_labels"]
    np.testing.assert_array_equal(found, images[0].features["class_prob"].astype(np.float16))
    assert not any("soft_labels" in note for note in done.notes)


def test_without_class_probabilities_soft_labels_are_derived_from_scores(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    images = [export_examples.regions(4, [1, 2, 1], [0.75, 0.5, 1.5])]  # scores of given boxes may exceed 1
    done = export_lmdb(write_store(tmp_path / "a.h5", images), tmp_path / "out", consumer="uniter")
    found = UniterReader(tmp_path / "out").dump("visual_grounding_det_coco_000000000004.npz")["soft_labels"]
    # columns: background, cat (id 2) and dog (id 1), in the order of the store's classes
    assert found.tolist() == [[0.25, 0, 0.75], [0.5, 0.5, 0], [0, 0, 1]]
    assert any("soft_labels are derived from scores and categories, as a.h5 has no class_prob" in n for n in done.notes)


def test_annotation_ids_are_written_in_the_order_of_their_regions(tmp_path: Path) -> None:
    """UNITER finds the region of a ref by the index of its annotation in this list."""
    pytest.importorskip("lmdb")
    done = export_lmdb(write_store(tmp_path / "a.h5", ANNOTATIONS), tmp_path / "gt", consumer="uniter")
    data = json.loads((tmp_path / "gt" / "iid_to_ann_ids.json").read_text())
    assert data == {"iid_to_ann_ids": {"3": [7, 8], "4": [9, 6]}}
    assert done.files == ["feat_numbb100/data.mdb", "iid_to_ann_ids.json"]
    done = export_lmdb(write_store(tmp_path / "d.h5", DETECTIONS), tmp_path / "det", consumer="uniter")
    assert done.files == ["feat_numbb100/data.mdb"] and not (tmp_path / "det" / "iid_to_ann_ids.json").exists()


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (1e5, False), (np.nan, False), (-np.inf, False)])
def test_features_beyond_float16_are_refused(tmp_path: Path, value: float, fits: bool) -> None:
    pytest.importorskip("lmdb")
    features = {"fc7": DETECTIONS[0].features["fc7"].copy()}
    features["fc7"][1, 7] = value
    path = write_store(tmp_path / "a.h5", [replace(DETECTIONS[0], features=features)])
    if fits:
        export_lmdb(path, tmp_path / "out", consumer="uniter")
        return
    with pytest.raises(InputError, match="image 4: features is out of the range of float16"):
        export_lmdb(path, tmp_path / "out", consumer="uniter")
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


def test_regions_beyond_100_and_other_widths_are_noted(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    n = 101
    many = Regions(
        1, "1.jpg", 60, 80, np.tile(np.array([[1, 2, 3, 4]], np.float32), (n, 1)),
        np.linspace(1, 0, n, dtype=np.float32), np.ones(n, np.int64), features={"fc7": np.zeros((n, 16), np.float32)},
    )  # fmt: skip
    done = export_lmdb(write_store(tmp_path / "a.h5", [many]), tmp_path / "out", consumer="uniter")
    assert any(note.startswith("1 image has more than 100 regions") for note in done.notes)
    assert "fc7 has 16 values per region, but uniter expects 2048" in done.notes
    assert len(UniterReader(tmp_path / "out").dump("visual_grounding_det_coco_000000000001.npz")["conf"]) == 100


def test_records_are_equal_to_those_of_msgpack_numpy(tmp_path: Path) -> None:
    msgpack, msgpack_numpy = pytest.importorskip("msgpack"), pytest.importorskip("msgpack_numpy")
    pytest.importorskip("lmdb")
    export_lmdb(write_store(tmp_path / "a.h5", DETECTIONS), tmp_path / "out", consumer="uniter")
    reader = UniterReader(tmp_path / "out")
    name = reader.names[0]
    dump = msgpack.unpackb(reader.raw(name), object_hook=msgpack_numpy.decode, raw=False)
    assert {key: values.tobytes() for key, values in dump.items()} == {
        key: values.tobytes() for key, values in reader.dump(name).items()
    }
    assert msgpack.packb(dump, default=msgpack_numpy.encode, use_bin_type=True) == reader.raw(name)
