"""The synthetic dataset on disk: layout, annotations that match the pixels, determinism, splits."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from refdet.data import shapes
from refdet.errors import InputError

REFS = {
    "refcoco": ("unc", "google"),
    "refcoco+": ("unc",),
    "refcocog": ("umd", "google"),
}


def load_coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def load_refs(root: Path, dataset: str, split_by: str) -> list[dict]:
    return pickle.loads((root / "refer" / dataset / f"refs({split_by}).p").read_bytes())


def images_of(refs: list[dict], split: str) -> set[int]:
    return {r["image_id"] for r in refs if r["split"] == split}


def files_below(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("split", ["train2014", "val2014"])
def test_files_and_annotations_match_the_pixels(shapes_root: Path, split: str) -> None:
    coco = load_coco(shapes_root / "annotations" / f"instances_{split}.json")
    assert len(coco.imgs) == {"train2014": 60, "val2014": 12}[split]
    assert {p.name for p in (shapes_root / split).iterdir()} == {i["file_name"] for i in coco.imgs.values()}
    assert len(coco.dataset["annotations"]) == len(coco.anns), "annotation ids repeat"
    for image in coco.imgs.values():
        assert image["file_name"] == f"COCO_{split}_{image['id']:012d}.jpg"
        with Image.open(shapes_root / split / image["file_name"]) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        assert pixels.shape == (image["height"], image["width"], 3)
        objects_at = np.zeros(pixels.shape[:2], dtype=int)
        for annotation in coco.imgToAnns[image["id"]]:
            mask = coco.annToMask(annotation).astype(bool)
            objects_at += mask
            ys, xs = np.nonzero(mask)
            x, y, w, h = annotation["bbox"]
            assert (x, y, x + w, y + h) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert annotation["area"] == mask.sum()
            # Most pixels inside the mask are close to its median color, and fewer around it.
            median_color = np.median(pixels[mask], axis=0)
            near = np.abs(pixels - median_color).max(axis=2) < 40
            inside = near[mask].mean()
            assert inside > (0.3 if annotation["iscrowd"] else 0.5), annotation["id"]
            around = np.zeros_like(mask)
            around[max(0, int(y) - 6) : int(y + h) + 6, max(0, int(x) - 6) : int(x + w) + 6] = True
            assert near[around & ~mask].mean() < inside - 0.25, annotation["id"]
        assert objects_at.max() <= 1, "visible masks overlap"


def test_json_has_the_keys_of_coco(shapes_root: Path) -> None:
    data = json.loads((shapes_root / "annotations" / "instances_train2014.json").read_text())
    assert set(data) == {"info", "licenses", "images", "annotations", "categories"}
    assert set(data["images"][0]) == set(
        ["license", "file_name", "coco_url", "height", "width", "date_captured", "flickr_url", "id"]
    )
    for annotation in data["annotations"]:
        assert set(annotation) == set(["segmentation", "area", "iscrowd", "image_id", "bbox", "category_id", "id"])
        if isinstance(annotation["segmentation"], dict):
            assert all(isinstance(c, int) for c in annotation["segmentation"]["counts"])
        else:
            assert not annotation["iscrowd"]
            assert all(len(p) >= 6 and len(p) % 2 == 0 for p in annotation["segmentation"])
    ids = [c["id"] for c in data["categories"]]
    assert len(ids) >= 8 and len(set(ids)) == len(ids) and ids != list(range(ids[0], ids[0] + len(ids)))
    assert {a["category_id"] for a in data["annotations"]} == set(ids)


def test_keys_equal_those_of_real_files(shapes_root: Path, shared: Path) -> None:
    real = shared / "data" / "coco_mini"
    real_file = json.loads((real / "annotations" / "instances_val2017.json").read_text())
    synthetic_file = json.loads((shapes_root / "annotations" / "instances_val2014.json").read_text())
    assert set(real_file) == set(synthetic_file)
    for kind in ("images", "annotations", "categories"):
        assert set(real_file[kind][0]) == set(synthetic_file[kind][0])
    real_ref = pickle.loads((real / "refer" / "refcoco" / "refs(unc).p").read_bytes())[0]
    synthetic_ref = load_refs(shapes_root, "refcoco", "unc")[0]
    assert set(real_ref) == set(synthetic_ref)
    assert set(real_ref["sentences"][0]) == set(synthetic_ref["sentences"][0])


def test_every_kind_of_annotation_and_image_occurs(shapes_root: Path) -> None:
    coco = load_coco(shapes_root / "annotations" / "instances_train2014.json")
    annotations = list(coco.anns.values())
    polygons = [a for a in annotations if isinstance(a["segmentation"], list)]
    assert any(len(a["segmentation"]) > 1 for a in polygons)
    assert any(isinstance(a["segmentation"], dict) and not a["iscrowd"] for a in annotations)
    crowds = [a for a in annotations if a["iscrowd"]]
    assert crowds and len(crowds) < 0.1 * len(coco.imgs)
    for crowd in crowds:
        mates = [a for a in coco.imgToAnns[crowd["image_id"]] if a["category_id"] == crowd["category_id"]]
        assert mates == [crowd]
    cut = 0
    for a in annotations:
        image = coco.imgs[a["image_id"]]
        x, y, w, h = a["bbox"]
        cut += x == 0 or y == 0 or x + w == image["width"] or y + h == image["height"]
    assert 3 <= cut < 0.3 * len(annotations)
    modes = Counter(Image.open(shapes_root / "train2014" / i["file_name"]).mode for i in coco.imgs.values())
    assert modes == {"RGB": 54, "L": 6}
    assert len({(i["height"], i["width"]) for i in coco.imgs.values()}) >= 5


def test_objects_of_one_category_overlap_too_little_for_nms(shapes_root: Path) -> None:
    coco = load_coco(shapes_root / "annotations" / "instances_train2014.json")
    for together in coco.imgToAnns.values():
        assert 3 <= sum(not a["iscrowd"] for a in together) <= 8
        for k, a in enumerate(together):
            for b in together[:k]:
                (ax, ay, aw, ah), (bx, by, bw, bh) = a["bbox"], b["bbox"]
                both = max(0, min(ax + aw, bx + bw) - max(ax, bx)) * max(0, min(ay + ah, by + bh) - max(ay, by))
                iou = both / (aw * ah + bw * bh - both)
                assert iou < (0.2 if a["category_id"] == b["category_id"] else 0.45)


def test_minival_and_valminusminival_partition_val(shapes_root: Path) -> None:
    folder = shapes_root / "annotations"
    val, mini, rest = (
        load_coco(folder / f"instances_{name}2014.json") for name in ("val", "minival", "valminusminival")
    )
    assert set(mini.imgs) | set(rest.imgs) == set(val.imgs) and not set(mini.imgs) & set(rest.imgs)
    assert set(mini.anns) | set(rest.anns) == set(val.anns) and not set(mini.anns) & set(rest.anns)
    train = load_coco(folder / "instances_train2014.json")
    assert not set(train.imgs) & set(val.imgs) and not set(train.anns) & set(val.anns)


@pytest.mark.parametrize("dataset", REFS)
def test_refs_refer_to_annotations_of_train2014(shapes_root: Path, dataset: str) -> None:
    train = load_coco(shapes_root / "annotations" / "instances_train2014.json")
    own = load_coco(shapes_root / "refer" / dataset / "instances.json")
    for image_id in own.imgs:
        assert own.imgs[image_id] == train.imgs[image_id]
        assert own.imgToAnns[image_id] == train.imgToAnns[image_id]
    for split_by in REFS[dataset]:
        path = shapes_root / "refer" / dataset / f"refs({split_by}).p"
        assert path.read_bytes()[:2] == b"\x80\x02"
        refs = load_refs(shapes_root, dataset, split_by)
        assert {r["image_id"] for r in refs} == set(own.imgs)
        assert len({r["ref_id"] for r in refs}) == len(refs) == len({r["ann_id"] for r in refs})
        sent_ids = [i for r in refs for i in r["sent_ids"]]
        assert len(set(sent_ids)) == len(sent_ids)
        for ref in refs:
            annotation = own.anns[ref["ann_id"]]
            assert not annotation["iscrowd"]
            assert annotation["image_id"] == ref["image_id"]
            assert annotation["category_id"] == ref["category_id"]
            assert ref["file_name"].startswith(f"COCO_train2014_{ref['image_id']:012d}_")
            assert ref["sent_ids"] == [s["sent_id"] for s in ref["sentences"]]
            assert 1 <= len(ref["sentences"]) <= 4
            for sentence in ref["sentences"]:
                assert sentence["tokens"] == sentence["sent"].split()
                assert sentence["raw"].lower().rstrip(".") == sentence["sent"]


@pytest.mark.parametrize("images", [20, 60])
def test_splits_have_the_properties_of_the_real_ones(shapes_root: Path, tmp_path: Path, images: int) -> None:
    root = shapes_root if images == 60 else shapes.write(tmp_path / "few", seed=3, images=images)
    train = load_coco(root / "annotations" / "instances_train2014.json")
    unc, plus = load_refs(root, "refcoco", "unc"), load_refs(root, "refcoco+", "unc")
    umd = load_refs(root, "refcocog", "umd")
    for refs, splits in (
        (unc, ("train", "val", "testA", "testB")),
        (plus, ("train", "val", "testA", "testB")),
        (umd, ("train", "val", "test")),
    ):
        assert {r["split"] for r in refs} == set(splits)
        groups = [images_of(refs, s) for s in splits]
        assert sum(len(g) for g in groups) == len(set().union(*groups)), "a split shares images with another"
    for split in ("val", "testA", "testB"):
        assert images_of(unc, split) == images_of(plus, split)
    for ref in unc:
        persons = sum(a["category_id"] == 1 for a in train.imgToAnns[ref["image_id"]])
        if ref["split"] == "testA":
            assert ref["category_id"] == 1 and persons > 1
        if ref["split"] == "testB":
            assert ref["category_id"] != 1
    google = load_refs(root, "refcoco", "google")
    assert {r["split"] for r in google} == {"train", "val", "test"}
    assert [r["ann_id"] for r in google] == [r["ann_id"] for r in unc]
    assert {r["split"] for r in load_refs(root, "refcocog", "google")} == {"train", "val"}
    if images == 60:
        held = images_of(google, "val") | images_of(google, "test")
        assert held & images_of(google, "train"), "google divides objects, not images"


def test_files_depend_only_on_the_seed_and_the_size(shapes_root: Path, tmp_path: Path) -> None:
    again = files_below(shapes.write(tmp_path / "again", seed=0, images=60))
    assert again == files_below(shapes_root)
    other = files_below(shapes.write(tmp_path / "other", seed=1, images=20))
    assert not set(other.values()) & set(again.values())


def test_existing_folders_and_invalid_arguments_are_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(InputError, match="exists; choose another"):
        shapes.write(tmp_path)
    with pytest.raises(InputError, match="exists; choose another"):
        shapes.write(tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "mine"
    with pytest.raises(InputError, match="too few"):
        shapes.write(tmp_path / "new", images=shapes.MIN_IMAGES - 1)
    for many in (shapes.MAX_IMAGES + 1, 10**9):
        with pytest.raises(InputError, match="too many"):
            shapes.write(tmp_path / "new", images=many)
    with pytest.raises(InputError, match="negative"):
        shapes.write(tmp_path / "new", seed=-1)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shapes, "write_refer", full)
    with pytest.raises(OSError, match="No space left"):
        shapes.write(tmp_path / "out", images=20)
    assert not list(tmp_path.iterdir())
