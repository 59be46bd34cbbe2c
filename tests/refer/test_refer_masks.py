"""Boxes and masks of refs, including RefClef's lists of RLEs, and invalid ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from refer_examples import INSTANCES, REFS, refclef, write

from refer import REFER, ReferDataError, available
from refer.masks import can_be_drawn, decode


def test_refclef_masks_and_overlapping_splits(tmp_path: Path) -> None:
    refclef(tmp_path)
    assert available(tmp_path) == [("refclef", "berkeley"), ("refclef", "unc")]
    r = REFER(tmp_path, "refclef", "berkeley")
    assert str(tmp_path / "images/saiapr_tc-12") == r.IMAGE_DIR
    found = r.getMask(r.Refs[0])
    assert found["area"] == 27 and found["mask"].dtype == np.uint8
    assert found["mask"][:3].all() and found["mask"][:, 7].all() and not found["mask"][3:, :7].any()
    assert r.getRefIds(split="testA") == [1, 4] and r.getRefIds(split="testB") == [2, 4]
    assert r.getRefIds(split="testAB") == [4] and r.getRefIds(split="test") == [1, 2, 4]
    r.Anns[7]["segmentation"][0]["size"] = [8, 6]
    with pytest.raises(ReferDataError, match="annotation 7: parts of a segmentation have different sizes"):
        r.getMask(r.Refs[0])


def test_refclef_annotation_ids_may_be_strings(tmp_path: Path) -> None:
    root = tmp_path / "text"
    annotations = [a | {"id": f"8_{a['id']}"} if a["id"] != 9 else a for a in INSTANCES["annotations"]]
    refs = [r | {"ann_id": f"8_{r['ann_id']}"} if r["ann_id"] != 9 else r for r in REFS]
    instances = INSTANCES | {"annotations": annotations}
    r = REFER(write(root, refs, dataset="refclef", instances=instances), "refclef")
    assert r.refToAnn[0]["id"] == "8_7" and r.annToRef["8_7"]["ref_id"] == 0 and r.annToRef[9]["ref_id"] == 2
    assert r.getAnnIds(ref_ids=[0, 2]) == ["8_7", 9]
    assert [[a["id"] for a in r.loadAnns(ids)] for ids in ("8_7", ["8_7", 9], 9)] == [["8_7"], ["8_7", 9], [9]]
    assert r.getRefBox(0) == [1, 0, 4, 2] and r.getMask(r.Refs[0])["area"] == 12
    assert r.to_dataframe()["ann_id"].tolist() == ["8_7", "8_8", 9, "8_6"]
    with pytest.raises(ReferDataError, match="no annotation with id '8_1'"):
        r.loadAnns("8_1")
    for wrong in ("a\nb", "x" * 65, 9.0, None):
        write(root, [refs[0] | {"ann_id": wrong}], dataset="refclef", instances=instances)
        with pytest.raises(ReferDataError, match=r"refs\(unc\)\.p: .*ann_id"):
            REFER(root, "refclef")
    write(root, refs, dataset="refclef", instances=INSTANCES | {"annotations": [*annotations, annotations[0]]})
    with pytest.raises(ReferDataError, match="annotations: id 8_6 is a duplicate"):
        REFER(root, "refclef")
    write(root, REFS, instances=instances)
    with pytest.raises(ReferDataError, match="'id' is '8_6'; it must be of type int"):
        REFER(root, "refcoco")


def fail_unchecked(*_: Any) -> None:
    raise AssertionError("a polygon reached pycocotools unchecked")


BAD_SEGMENTATIONS = [
    "x", 5, {"size": [6, 8]}, {"counts": [48]}, {"size": [6, 8], "counts": [47]}, {"size": [6, 8], "counts": [-1, 49]},
    {"size": [6, 8], "counts": [1.5, 46.5]}, {"size": [6, 8], "counts": "~~~~"}, {"size": [6, 8], "counts": "oooo"},
    {"size": [6, 8], "counts": ""}, {"size": [6, 8], "counts": "caf\xe9"}, {"size": [10**9, 10**9], "counts": [10**18]},
    {"size": [6, -8], "counts": [48]}, {"size": ["6", 8], "counts": [48]}, {"size": 6, "counts": [48]},
    [[0, 0, 1, 1, 2]], [[0, 0, 10**12, 0, 10**12, 10**12]], [[0, 0, float("nan"), 0, 1, 1]], [["0"] * 6],
    [[0, 0, 9000, 0, 0, 9000] * 40000], [[0, 0, 9000, 0, 0, 9000]] * 40000, [[0, 0, 10**400, 0, 1, 1]],
    [[0, 0, float("inf"), 0, 1, 1]], [None], [[None] * 6], [[0, 0, 4, 0, 4, 2], {"size": [3, 3], "counts": [9]}],
]  # fmt: skip


@pytest.mark.parametrize("segmentation", BAD_SEGMENTATIONS, ids=lambda value: f"{value!a:.40}")
def test_an_invalid_segmentation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segmentation: Any) -> None:
    if not (isinstance(segmentation, list) and dict in map(type, segmentation)):
        # pycocotools would allocate all the memory for some of these polygons.
        monkeypatch.setattr("refer.masks.coco_mask.frPyObjects", fail_unchecked)
    r = REFER(write(tmp_path))
    r.refToAnn[0]["segmentation"] = segmentation
    with pytest.raises(ReferDataError, match="refcoco: annotation 7"):
        r.getMask(r.Refs[0])


@pytest.mark.parametrize("size", [[8, 6], [3, 16], [12, 16]])
@pytest.mark.parametrize("in_list", [False, True])
def test_an_rle_of_another_size_than_its_image_is_refused(tmp_path: Path, size: list[int], in_list: bool) -> None:
    r = REFER(write(tmp_path))
    image = r.Imgs[r.Refs[0]["image_id"]]
    assert [image["height"], image["width"]] == [6, 8]
    rle = {"size": size, "counts": [size[0] * size[1]]}
    r.refToAnn[0]["segmentation"] = [rle] if in_list else rle
    with pytest.raises(ReferDataError, match=r"annotation 7: its RLE has size .*, but its image is \[6, 8\]"):
        r.getMask(r.Refs[0])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), height=st.integers(1, 40), width=st.integers(1, 40))
def test_masks_equal_pycocotools(data: st.DataObject, height: int, width: int) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    mask = np.asfortranarray(np.random.default_rng(seed).random((height, width)) < data.draw(st.floats(0, 1)))
    rle = coco_mask.encode(mask.astype(np.uint8))
    runs = np.diff(np.flatnonzero(np.diff(np.r_[2, mask.ravel("F"), 2]))).tolist()
    counts = runs if not mask[0, 0] else [0, *runs]
    for segmentation in (rle, rle | {"counts": rle["counts"].decode()}, {"size": [height, width], "counts": counts}):
        assert np.array_equal(decode(segmentation, height, width), mask)
    point = st.floats(-5, 45, width=32)
    polygons = data.draw(st.lists(st.lists(point, min_size=6, max_size=6), max_size=3))
    union = (
        coco_mask.decode(coco_mask.frPyObjects(polygons, height, width)).max(axis=2)
        if polygons
        else np.zeros(mask.shape)
    )
    assert np.array_equal(decode(polygons, height, width), union)


@pytest.mark.parametrize("box", [None, "x", [1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, float("nan")], [1, 2, 3, 10**400]])
def test_an_invalid_box_is_named(tmp_path: Path, box: Any) -> None:
    r = REFER(write(tmp_path))
    r.refToAnn[0]["bbox"] = box
    for call in (lambda: r.getRefBox(0), r.to_dataframe):
        with pytest.raises(ReferDataError, match="annotation 7"):
            call()


def test_masks_are_the_union_of_overlapping_polygons(tmp_path: Path) -> None:
    r = REFER(write(tmp_path, REFS))
    assert r.getRefBox(0) == [1, 0, 4, 2]
    found = r.getMask(r.loadRefs(0)[0])
    expected = np.zeros((6, 8), np.uint8)
    expected[:2, :4] = expected[:4, :2] = 1
    assert np.array_equal(found["mask"], expected) and found["area"] == 12
    r.refToAnn[0]["segmentation"] = {"size": [6, 8], "counts": [0, 3, 45]}
    assert r.getMask(r.loadRefs(0)[0])["mask"][:3, 0].tolist() == [1, 1, 1]
    r.refToAnn[0]["segmentation"] = {"size": [6, 8]}
    with pytest.raises(ReferDataError, match="annotation 7"):
        r.getMask(r.loadRefs(0)[0])


def test_limits_of_outlines() -> None:
    # Its outline has 4 * 99 pixels, so 2525 of them stay just below the limit of 1,000,000.
    square = [0, 0, 99, 0, 99, 99, 0, 99]
    assert can_be_drawn([square] * 2525, 6, 8) and not can_be_drawn([square] * 2526, 6, 8)
    assert can_be_drawn([[0, 0, 10_008, 0, -10_008, 1], []], 6, 8) and not can_be_drawn([[0, 0, 10_009, 0]], 6, 8)
    assert decode([square] * 9, 6, 8).all()
