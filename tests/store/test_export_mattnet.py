"""export --format mattnet: its files, read the way MAttNet's loaders read them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from export_examples import (
    ANNOTATIONS,
    BROKEN,
    DETECTIONS,
    HEIGHT,
    WIDTH,
    add_heads,
    regions,
    write_dataset,
    write_store,
)
from pycocotools import mask as coco_mask

from refdet.errors import InputError
from refdet.store.export.mattnet import export_mattnet
from refdet.store.export.mattnet_prepro import Prepro, PreproOptions, prepare
from refdet.store.export.record import ExportResult

HEADS = [np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4), np.ones((2, 1, 5), np.float32), None]
INFOS = [(480.0, 640.0, 2.5), (200.0, 300.0, 1.5), (0.0, 0.0, 0.0)]


class MAttNetLoader:
    """Reads the files as MAttNet's Loader, DetsLoader and GtMRCNLoader do, with their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info = json.loads((folder / "data.json").read_text())
        self.Images = {image["image_id"]: image for image in self.info["images"]}
        self.Refs = {ref["ref_id"]: ref for ref in self.info["refs"]}
        self.Anns = {ann["ann_id"]: ann for ann in self.info["anns"]}
        self.Sentences = {sentence["sent_id"]: sentence for sentence in self.info["sentences"]}
        self.labels = h5py.File(folder / "data.h5", "r")["labels"]
        assert self.labels.shape == (len(self.Sentences), self.info["label_length"])
        dets = json.loads((folder / "dets.json").read_text())
        self.Dets = {det["det_id"]: det for det in dets}
        for image in self.Images.values():
            image["det_ids"] = []
        for det in dets:
            self.Images[det["image_id"]]["det_ids"] += [det["det_id"]]
        self.splits = {i: self.Refs[image["ref_ids"][0]]["split"] for i, image in self.Images.items()}
        self.det_feats = h5py.File(folder / "det_feats.h5", "r")
        self.ann_feats = h5py.File(folder / "ann_feats.h5", "r")
        assert self.det_feats["fc7"].shape[1] == self.ann_feats["fc7"].shape[1] == 2048

    def head(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        with h5py.File(self.folder / "head" / f"{image_id}.h5", "r") as feats:
            return np.array(feats["head"]), np.array(feats["im_info"])

    def corners(self, det_ids: list[int]) -> np.ndarray:
        """Boxes as x and y of the first and the last pixel, by MAttNet's xywh_to_xyxy."""
        boxes = np.vstack([self.Dets[det_id]["box"] for det_id in det_ids])
        return np.hstack((boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - 1))


@pytest.fixture
def prepro(tmp_path: Path) -> Prepro:
    return prepare(write_dataset(tmp_path / "refer"), "refcoco", "unc", PreproOptions(word_count_threshold=0))


@pytest.fixture
def done(tmp_path: Path, prepro: Prepro) -> ExportResult:
    dets = write_store(tmp_path / "dets.h5", DETECTIONS, "float16")
    add_heads(dets, HEADS, INFOS)
    anns = write_store(tmp_path / "anns.h5", ANNOTATIONS)
    return export_mattnet(dets, tmp_path / "out", anns, prepro, {"dataset": "refcoco"})


def test_detections_are_ordered_by_class_within_an_image(done: ExportResult, tmp_path: Path) -> None:
    loader = MAttNetLoader(tmp_path / "out")
    assert loader.splits == {3: "train", 4: "testB", 5: "val"}
    assert loader.Images[4]["det_ids"] == [0, 1, 2, 3] and loader.Images[3]["det_ids"] == [4]
    dets = [loader.Dets[det_id] for det_id in range(5)]
    # image by image; within one, in the detector's order of classes; within a class, by descending score
    assert [(det["category_name"], det["category_id"], det["region"]) for det in dets] == [
        ("cat", 2, 3),
        ("cat", 2, 1),
        ("dog", 1, 2),
        ("dog", 1, 0),
        ("dog", 1, 4),
    ]
    assert [loader.Dets[i]["score"] for i in (0, 4)] == pytest.approx([0.85, 0.7])
    assert all(det["h5_id"] == det_id for det_id, det in loader.Dets.items())


def test_mattnets_inclusive_corners_are_those_of_the_store(done: ExportResult, tmp_path: Path) -> None:
    loader = MAttNetLoader(tmp_path / "out")
    half_open = DETECTIONS[0].boxes[[3, 1, 2, 0]].astype(np.float64)
    np.testing.assert_allclose(loader.corners([0, 1, 2, 3]), half_open - [0, 0, 1, 1], rtol=0, atol=1e-12)


def test_h5_id_is_the_row_of_the_features(done: ExportResult, tmp_path: Path) -> None:
    loader = MAttNetLoader(tmp_path / "out")
    for name in ("pool5", "fc7"):
        values = loader.det_feats[name][loader.Dets[1]["h5_id"]]  # region 1 of image 4, as above
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, DETECTIONS[0].features[name][1].astype(np.float16))
        for image in ANNOTATIONS[:2]:
            assert image.ann_ids is not None
            for place, ann_id in enumerate(image.ann_ids.tolist()):
                row = loader.ann_feats[name][loader.Anns[ann_id]["h5_id"]]
                np.testing.assert_array_equal(row, image.features[name][place])
        for crowd_or_broken in (12, 11):
            assert not loader.ann_feats[name][loader.Anns[crowd_or_broken]["h5_id"]].any()
    assert any(note.startswith("2 of 6 annotations") for note in done.notes)


def test_masks_json_has_the_pixels_of_each_detection(done: ExportResult, tmp_path: Path) -> None:
    masks = {m["det_id"]: m for m in json.loads((tmp_path / "out" / "masks.json").read_text())}
    dets = json.loads((tmp_path / "out" / "dets.json").read_text())
    assert [{k: v for k, v in masks[d["det_id"]].items() if k != "rle"} for d in dets] == dets
    for det in dets:
        pixels = coco_mask.decode(masks[det["det_id"]]["rle"])
        x, y, w, h = det["box"]
        expected = np.zeros((HEIGHT, WIDTH), np.uint8)
        expected[round(y) : round(y + h), round(x) : round(x + w)] = 1
        np.testing.assert_array_equal(pixels, expected)


def test_head_maps_are_written_to_a_file_per_image(done: ExportResult, tmp_path: Path) -> None:
    loader = MAttNetLoader(tmp_path / "out")
    head, info = loader.head(4)
    assert head.dtype == info.dtype == np.float32
    np.testing.assert_array_equal(head[0], HEADS[0])
    np.testing.assert_array_equal(info, [INFOS[0]])
    assert loader.head(3)[0].shape == (1, 2, 1, 5)
    assert sorted(path.name for path in (tmp_path / "out" / "head").iterdir()) == ["3.h5", "4.h5"]
    assert "1 of 3 images has no head map" in done.notes


def test_files_have_the_oldest_hdf5_layout_and_no_unused_space(done: ExportResult, tmp_path: Path) -> None:
    """The h5py of MAttNet's time reads no newer layout; space that was reserved is released."""
    for name in ("det_feats.h5", "ann_feats.h5", "head/4.h5", "data.h5"):
        path = tmp_path / "out" / name
        assert path.read_bytes()[8] == 0  # the version of the superblock
        with h5py.File(path) as file:
            values = sum(file[name].nbytes for name in file)
        assert values < path.stat().st_size < values + 8192


def test_images_without_detections_are_noted(done: ExportResult) -> None:
    assert done.empty == {5: "cannot be read"} and (done.images, done.regions) == (3, 5)
    assert any("`lower_threshold_if_empty=True`" in note for note in done.notes)
    assert not any("values per region" in note for note in done.notes)


def test_without_annotations_only_files_of_detections_are_written(tmp_path: Path) -> None:
    dets = write_store(tmp_path / "dets.h5", DETECTIONS, masks=False)
    done = export_mattnet(dets, tmp_path / "out", None, None, {})
    assert done.files == ["det_feats.h5", "dets.json"]
    notes = " ".join(done.notes)
    assert all(name in notes for name in ("no masks.json", "no ann_feats.h5", "no head/*.h5", "no data.json"))


def test_head_maps_may_be_in_the_store_of_annotations(tmp_path: Path, prepro: Prepro) -> None:
    dets = write_store(tmp_path / "dets.h5", [DETECTIONS[0]])
    anns = write_store(tmp_path / "anns.h5", ANNOTATIONS)
    add_heads(anns, HEADS, INFOS)
    done = export_mattnet(dets, tmp_path / "out", anns, prepro, {})
    with h5py.File(tmp_path / "out" / "head" / "3.h5") as file:
        np.testing.assert_array_equal(file["head"][0], HEADS[0])
    assert any(note.startswith("2 of 3 images of the dataset are not in dets.h5") for note in done.notes)


def test_images_outside_the_dataset_are_omitted(tmp_path: Path, prepro: Prepro) -> None:
    dets = write_store(tmp_path / "dets.h5", [regions(6, [1], [1]), *DETECTIONS])
    done = export_mattnet(dets, tmp_path / "out", None, prepro, {})
    exported: list[dict[str, Any]] = json.loads((tmp_path / "out" / "dets.json").read_text())
    assert {det["image_id"] for det in exported} == {3, 4}
    assert exported[-1]["region"] == 5  # rows of the store are counted with the omitted image
    assert any("1 image of dets.h5 not in the dataset" in note for note in done.notes)


def test_a_store_without_detections_is_exported(tmp_path: Path) -> None:
    empty = replace(BROKEN, masks=(), features={"fc7": np.zeros((0, 2048), np.float32)})
    export_mattnet(write_store(tmp_path / "dets.h5", [empty]), tmp_path / "out", None, None, {})
    assert json.loads((tmp_path / "out" / "dets.json").read_text()) == []
    with h5py.File(tmp_path / "out" / "det_feats.h5") as file:
        assert file["fc7"].shape == (0, 2048) and "pool5" not in file


def test_a_duplicate_annotation_is_refused(tmp_path: Path, prepro: Prepro) -> None:
    dets, twice = write_store(tmp_path / "d.h5", DETECTIONS), regions(3, [1, 2], [1, 1], [7, 7])
    anns = write_store(tmp_path / "a.h5", [twice, *ANNOTATIONS[1:]])
    with pytest.raises(InputError, match="duplicate annotation of image 3"):
        export_mattnet(dets, tmp_path / "out", anns, prepro, {})


def test_stores_that_do_not_fit_the_dataset_are_refused(tmp_path: Path, prepro: Prepro) -> None:
    dets, anns = write_store(tmp_path / "d.h5", DETECTIONS), write_store(tmp_path / "a.h5", ANNOTATIONS)
    anns_of_one_image = write_store(tmp_path / "one.h5", ANNOTATIONS[:1])
    without_features = write_store(tmp_path / "bare.h5", [replace(r, features={}) for r in DETECTIONS])
    renumbered = [replace(r, ann_ids=None if r.ann_ids is None else r.ann_ids + 1000) for r in ANNOTATIONS]
    anns_of_another_dataset = write_store(tmp_path / "renumbered.h5", renumbered)
    dets_of_another_dataset = write_store(tmp_path / "foreign.h5", [replace(DETECTIONS[0], image_id=99)])
    other_categories = replace(prepro, data=prepro.data | {"cat_to_ix": {"dog": 2, "cat": 1}})
    # detections, annotations, data.json and the error
    cases: list[tuple[Path, Path | None, Prepro | None, str]] = [
        (anns, None, None, "has annotations"),
        (dets, dets, prepro, "has detections"),
        (dets, anns, None, "the rows of ann_feats.h5 need a data.json"),
        (dets, anns_of_one_image, prepro, "2 of 3 images .* first: 4"),
        (dets, anns_of_another_dataset, prepro, "lacks all 6 annotations of the dataset"),
        (without_features, None, None, "no feature fc7"),
        (dets_of_another_dataset, None, prepro, "lacks all 3 images"),
        (dets, None, other_categories, "category cat has id 2, but 1 in the dataset"),
    ]
    for det_store, ann_store, data, message in cases:
        with pytest.raises(InputError, match=message):
            export_mattnet(det_store, tmp_path / "out", ann_store, data, {})
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
