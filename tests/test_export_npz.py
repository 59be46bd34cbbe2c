"""export --format npz: files that readers of bottom-up-attention take."""

from __future__ import annotations

import pickletools
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from export_examples import DETECTIONS, write_store

from refdet.errors import InputError
from refdet.export.npz import export_npz


def test_a_file_is_what_bottom_up_attention_writes(tmp_path: Path) -> None:
    done = export_npz(write_store(tmp_path / "a.h5", DETECTIONS, "float16"), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.npz"))
    assert names == [f"COCO_train2014_{i:012}.npz" for i in (3, 4, 5)]
    # openvqa finds image ids so
    assert [int(name.split("_")[-1].split(".")[0]) for name in names] == [3, 4, 5]
    regions = DETECTIONS[0]
    found = np.load(tmp_path / "out" / names[1], allow_pickle=True)
    assert set(found) == {"x", "bbox", "num_bbox", "image_h", "image_w", "info"}
    np.testing.assert_array_equal(found["x"], regions.features["fc7"].astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(found["bbox"], regions.boxes)
    assert found["x"].dtype == found["bbox"].dtype == np.float32
    assert (int(found["num_bbox"]), int(found["image_h"]), int(found["image_w"])) == (4, 6, 8)
    info = found["info"].item()
    assert (info["image_id"], info["num_boxes"]) == ("COCO_train2014_000000000004", 4)
    assert info["objects_id"].tolist() == [2, 1, 2, 1] and info["category_id"].tolist() == [1, 2, 1, 2]
    np.testing.assert_array_equal(info["objects_conf"], regions.scores)
    assert (done.images, done.regions, done.empty) == (3, 5, {5: "cannot be read"})


def test_an_image_without_regions_has_a_file_of_none(tmp_path: Path) -> None:
    done = export_npz(write_store(tmp_path / "a.h5", DETECTIONS), tmp_path / "out", "pool5", "id")
    found = np.load(tmp_path / "out" / "5.npz")  # without the pickle, as readers of x alone do it
    assert found["x"].shape == (0, 1024) and found["bbox"].shape == (0, 4) and found["num_bbox"] == 0
    assert done.notes == ["1 images have no regions; their files hold 0 boxes"]


def test_the_pickle_names_nothing_that_old_numpy_lacks(tmp_path: Path) -> None:
    export_npz(write_store(tmp_path / "a.h5", DETECTIONS), tmp_path / "out", names="id")
    with zipfile.ZipFile(tmp_path / "out" / "4.npz") as archive:
        member = archive.read("info.npy")
    text = member[member.index(b"\n") + 1 :]
    needed = {value for code, value, _ in pickletools.genops(text) if code.name == "GLOBAL"}
    assert needed <= {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype", "_codecs encode"}
    assert not {code.name for code, _, _ in pickletools.genops(text)} & {"STACK_GLOBAL", "FRAME"}


def test_the_same_store_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.h5", DETECTIONS)
    for name in ("one", "two"):
        export_npz(path, tmp_path / name)
    files = sorted((tmp_path / "one").iterdir())
    assert len(files) == 4
    assert all(file.read_bytes() == (tmp_path / "two" / file.name).read_bytes() for file in files)


def test_refusals(tmp_path: Path) -> None:
    spatial = {"spatial": np.zeros((4, 2), np.float32)}
    nameless = write_store(tmp_path / "n.h5", [replace(DETECTIONS[0], file_name="", features=spatial)])
    twice = write_store(tmp_path / "t.h5", [replace(r, file_name=f"{r.image_id}/a.jpg") for r in DETECTIONS])
    for path, feature, message in (
        (nameless, "spatial", "image 4 has none; export with --names id"),
        (nameless, "fc7", "has no feature fc7, but spatial"),
        (twice, "fc7", "images 4 and 3 are both 'a'"),
    ):
        with pytest.raises(InputError, match=message):
            export_npz(path, tmp_path / "out", feature)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert export_npz(nameless, tmp_path / "out", "spatial", "id").images == 1


def test_a_feature_of_more_than_a_vector_is_refused(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.h5", DETECTIONS)
    with h5py.File(path, "a") as file:
        file["features/spatial_fc7"] = np.zeros((5, 3, 7, 7), np.float32)
    with pytest.raises(InputError, match="spatial_fc7 is 3 x 7 x 7 for a region"):
        export_npz(path, tmp_path / "out", "spatial_fc7")
