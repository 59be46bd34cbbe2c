"""export --format npz: files for readers of bottom-up-attention's features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from export_examples import DETECTIONS, HEIGHT, WIDTH, write_store

from refdet.errors import InputError
from refdet.store.export import consumers
from refdet.store.export.npz import export_npz
from refdet.store.export.npz_layouts import LAYOUTS


def test_files_have_the_fields_of_bottom_up_attention(tmp_path: Path) -> None:
    done = export_npz(write_store(tmp_path / "a.h5", DETECTIONS, "float16"), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.npz"))
    assert names == [f"COCO_train2014_{i:012}.npz" for i in (3, 4, 5)]
    # how openvqa gets image ids
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
    assert info["objects_id"].tolist() == [1, 0, 1, 0] and info["objects_id"].dtype == np.int64
    assert info["category_id"].tolist() == [1, 2, 1, 2]
    np.testing.assert_array_equal(info["objects_conf"], regions.scores)
    assert (done.images, done.regions, done.empty) == (3, 5, {5: "cannot be read"})


def test_an_image_without_regions_gets_an_empty_file(tmp_path: Path) -> None:
    done = export_npz(write_store(tmp_path / "a.h5", DETECTIONS), tmp_path / "out", "pool5", "id")
    found = np.load(tmp_path / "out" / "5.npz")  # pickles are not allowed by default
    assert found["x"].shape == (0, 1024) and found["bbox"].shape == (0, 4) and found["num_bbox"] == 0
    assert done.notes[0].startswith("objects_id counts the detector's classes from 0, without the background")
    assert done.notes[1:] == ["1 image has no regions; written with 0 boxes"]


def test_the_same_store_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.h5", DETECTIONS)
    for name in ("one", "two"):
        export_npz(path, tmp_path / name)
    files = sorted((tmp_path / "one").iterdir())
    assert len(files) == 4
    assert all(file.read_bytes() == (tmp_path / "two" / file.name).read_bytes() for file in files)


def test_missing_or_duplicate_names_and_missing_features_are_refused(tmp_path: Path) -> None:
    spatial = {"spatial": np.zeros((4, 2), np.float32)}
    nameless = write_store(tmp_path / "n.h5", [replace(DETECTIONS[0], file_name="", features=spatial)])
    duplicate = write_store(tmp_path / "t.h5", [replace(r, file_name=f"{r.image_id}/a.jpg") for r in DETECTIONS])
    for path, feature, message in (
        (nameless, "spatial", r"image 4 has no name\); export with `names='id'`"),
        (nameless, "fc7", r"no feature fc7 \(it has spatial\)"),
        (duplicate, "fc7", "images 4 and 3 are both named 'a'"),
    ):
        with pytest.raises(InputError, match=message):
            export_npz(path, tmp_path / "out", feature)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert export_npz(nameless, tmp_path / "out", "spatial", "id").images == 1


def test_a_feature_with_more_than_one_dimension_is_refused(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.h5", DETECTIONS)
    with h5py.File(path, "a") as file:
        file["features/spatial_fc7"] = np.zeros((5, 3, 7, 7), np.float32)
    with pytest.raises(InputError, match="spatial_fc7 has shape 3 x 7 x 7 per region"):
        export_npz(path, tmp_path / "out", "spatial_fc7")


class PaddingLoader:
    """Reads like the loaders of openvqa and mcan-vqa: finds files by image id, pads x and boxes to 100 rows."""

    def __init__(self, folder: Path, gqa: bool = False) -> None:
        self.gqa = gqa
        self.path_of = {self.image_id(path.name): path for path in folder.glob("*.npz")}

    def image_id(self, name: str) -> str:
        return name.split(".")[0] if self.gqa else str(int(name.split("_")[-1].split(".")[0]))

    def __getitem__(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        file = np.load(self.path_of[str(image_id)])  # pickles are not allowed
        x = file["x"] if self.gqa else file["x"].transpose((1, 0))
        height, width = (file["height"], file["width"]) if self.gqa else (file["image_h"], file["image_w"])
        boxes = file["bbox"] / np.array([width, height, width, height], np.float32)
        return tuple(np.pad(values[:100], ((0, 100 - len(values[:100])), (0, 0))) for values in (x, boxes))


@pytest.mark.parametrize(
    ("consumer", "names"), [("openvqa", None), ("mcan", None), ("mcan", "id"), ("openvqa", "file")]
)
def test_openvqa_and_mcan_find_their_images(tmp_path: Path, consumer: str, names: str | None) -> None:
    done = export_npz(write_store(tmp_path / "a.h5", DETECTIONS), tmp_path / "out", names=names, consumer=consumer)
    loader = PaddingLoader(tmp_path / "out")
    for regions in DETECTIONS:
        x, boxes = loader[regions.image_id]
        n = len(regions)
        assert x.shape == (100, 2048) and x.dtype == np.float32 and not x[n:].any()
        if n:
            np.testing.assert_array_equal(x[:n], regions.features["fc7"])
            np.testing.assert_allclose(boxes[:n] * [WIDTH, HEIGHT, WIDTH, HEIGHT], regions.boxes, rtol=1e-6)
    assert np.load(next((tmp_path / "out").glob("*4.*npz")))["x"].shape == (2048, 4)
    assert len(done.notes) == 2


def test_the_gqa_loader_of_openvqa_finds_its_images(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a.h5", DETECTIONS)
    done = export_npz(store, tmp_path / "out", names="id", consumer="openvqa-gqa")
    loader = PaddingLoader(tmp_path / "out", gqa=True)
    for regions in DETECTIONS[:2]:
        x, boxes = loader[regions.image_id]
        np.testing.assert_array_equal(x[: len(regions)], regions.features["fc7"])
        np.testing.assert_allclose(boxes[: len(regions)] * [WIDTH, HEIGHT, WIDTH, HEIGHT], regions.boxes, rtol=1e-6)
    assert "grid features" in done.notes[0]
    other = export_npz(store, tmp_path / "other", consumer="openvqa-gqa")
    assert any("3 images are read with another id" in note and "`names='id'`" in note for note in other.notes)


def test_rosita_finds_its_images(tmp_path: Path) -> None:
    done = export_npz(write_store(tmp_path / "a.h5", DETECTIONS), tmp_path / "out", consumer="rosita")
    assert done.files == ["npz_files/*.npz"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"npz_files", "provenance.json"}
    paths = list((tmp_path / "out" / "npz_files").iterdir())  # its converter reads all of them
    assert {path.name for path in paths} == {f"{regions.file_name}.npz" for regions in DETECTIONS}
    for regions in DETECTIONS[:2]:
        file = np.load(tmp_path / "out" / "npz_files" / f"{regions.file_name}.npz")
        assert (str(file["filename"]), int(file["num_boxes"])) == (regions.file_name, len(regions))
        assert (file["image_h"], file["image_w"]) == (6, 8)
        np.testing.assert_array_equal(file["x"], regions.features["fc7"])
        np.testing.assert_array_equal(file["boxes"], regions.boxes)
        assert file["objects_id"].tolist() == [{2: 0, 1: 1}[i] for i in regions.category_ids.tolist()]
        np.testing.assert_array_equal(file["objects_conf"], regions.scores)
        for name in ("x", "boxes", "objects_conf", "attrs_conf"):
            assert file[name].dtype == np.float32
        for name in ("objects_id", "attrs_id"):
            assert file[name].dtype == np.int64
        assert not file["attrs_id"].any() and len(file["attrs_conf"]) == len(regions)
    assert any("attrs_id and attrs_conf are zero" in note for note in done.notes)
    assert any("at which ROSITA's loaders fail" in note for note in done.notes)


def test_a_feature_width_that_the_reader_does_not_expect_is_noted(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a.h5", DETECTIONS)
    for consumer in consumers.NPZ:
        done = export_npz(store, tmp_path / consumer, "pool5", consumer=consumer)
        noted = any("pool5 has 1024 values per region" in note for note in done.notes)
        assert noted == (consumer != consumers.NPZ[0])  # the first is bottom-up-attention's format, of any width
    assert set(LAYOUTS) == set(consumers.NPZ)


def test_a_category_outside_the_classes_of_the_store_is_refused(tmp_path: Path) -> None:
    regions = replace(DETECTIONS[1], category_ids=np.array([9], np.int64))
    with pytest.raises(InputError, match="image 3: category 9 is not among the 2 classes"):
        export_npz(write_store(tmp_path / "a.h5", [regions]), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]
