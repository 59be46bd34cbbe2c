"""Held-out images in unusual places of a list: under other keys, as text, beside other images, in nested parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from damaged_images import encoded
from foreign_weights import call
from split_examples import scene, write_refs

from refdet.errors import InputError
from refdet.splits.build import build_split
from refdet.splits.duplicates import audit_content
from refdet.splits.leak_audit import audit

HELD_OUT, FREE = 100667, 493652
HELD_NAME, FREE_NAME = f"{HELD_OUT:012d}.jpg", f"{FREE:012d}.jpg"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_refs(tmp_path / "refer", {("refcoco", "unc"): [(HELD_OUT, "val")]})


LEAKS: dict[str, Any] = {
    "null under its name": {HELD_NAME: None, FREE_NAME: {"a": 1}},
    "true under its name": {HELD_NAME: True, FREE_NAME: {"a": 1}},
    "a number under its name": {HELD_NAME: 0.5, FREE_NAME: 0.5},
    "cocoid in a member": {"1": {"cocoid": HELD_OUT, "cap": "x"}, "2": {"cocoid": FREE, "cap": "y"}},
    "coco_id below": [{"file_name": "1.jpg", "meta": {"coco_id": HELD_OUT}}],
    "coco_id below another name": [{"file_name": FREE_NAME, "meta": {"coco_id": HELD_OUT}}],
    "id in a member": {"1": {"id": HELD_OUT, "cap": ["a"]}, "2": {"id": FREE}},
    "coco_image_id": [{"file_name": "1.jpg", "coco_image_id": HELD_OUT}],
    "COCO_ID": [{"file_name": "1.jpg", "COCO_ID": HELD_OUT}],
    "original_id": {"images": [{"id": 1, "file_name": "1.jpg", "original_id": HELD_OUT}]},
    "an id as text": [{"file_name": "1.jpg", "meta": {"image_id": str(HELD_OUT)}}],
    "an id as a float": [{"file_name": "1.jpg", "m": {"image_id": float(HELD_OUT)}}],
    "ids in a list": [{"file_name": "1.jpg", "imgs": [str(HELD_OUT)]}],
    "a second id": [{"file_name": "1.jpg", "img_id": str(HELD_OUT), "id": 1}],
    "a pair": [["1.jpg", HELD_OUT]],
    "a number of a name": {"1.jpg": HELD_OUT},
    "in info": {"train": [FREE_NAME], "info": {"more": [HELD_NAME]}},
    "in categories": {"train": [FREE_NAME], "categories": {"dog": [HELD_NAME]}},
    "beside images": {"images": [{"id": FREE, "file_name": FREE_NAME}], "val": [HELD_NAME]},
    "a license of that number": [{"id": HELD_OUT, "file_name": "x.jpg", "license": "http://l/000000000001.html"}],
}


@pytest.mark.parametrize("kind", LEAKS)
def test_a_hidden_held_out_image_is_a_leak(root: Path, tmp_path: Path, kind: str) -> None:
    source = tmp_path / "list.json"
    source.write_text(json.dumps(LEAKS[kind]))
    assert audit(source, root).leaked
    try:
        split = build_split(source, root, tmp_path / "out.json").out
    except InputError as error:
        assert "no images left" in str(error) or "'val' refers to held-out images" in str(error)
    else:
        assert str(HELD_OUT) not in split.read_text() and audit(split, root).leaked == []


UNKNOWN: dict[str, Any] = {
    "one of several in objects": [{"images": [{"path": FREE_NAME}, {"path": "beach.jpg"}]}],
    "two names": [{"image1": FREE_NAME, "image2": "beach.jpg"}],
    "a COCO category": [{"file": "beach.jpg", "objects": [{"coco_category_id": 18}]}, FREE_NAME],
    "a COCO annotation": [{"meta": {"coco_ann_id": 18, "cocoAnnotationId": 19}}, FREE_NAME],
    "a file beside an address": {"images": [{"id": 5, "file_name": "copy.jpg", "coco_url": f"http://x/{FREE_NAME}"}]},
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_image_without_a_coco_number_is_unknown(root: Path, tmp_path: Path, kind: str) -> None:
    source = tmp_path / "list.json"
    source.write_text(json.dumps(UNKNOWN[kind]))
    found = audit(source, root)
    assert found.leaked == [] and len(found.unknown) == 1


@pytest.mark.parametrize(
    ("rows", "leaked", "unknown"),
    [
        (f"1,{HELD_OUT}.jpg\n2,{FREE}.jpg\n", [HELD_OUT], 0),
        ("1\tbeach.jpg\n2\thouse.jpg\n", [], 2),
        (f"1,{HELD_OUT}\n2,{FREE}\n", [1], 2),
        (f'1;"a/{HELD_NAME}";x\n2;"a/{FREE_NAME}";y\n', [HELD_OUT], 0),
        (f"{FREE} a dog\n", [], 0),
        (f"{FREE_NAME},beach.jpg,1\nbeach.jpg {FREE_NAME}\n", [], 2),
        (f"{FREE_NAME}\t{FREE_NAME}\t1\n{FREE_NAME},http://flickr/1_b.jpg\n", [], 0),
        (f"http://x/{FREE_NAME},http://flickr/1_b.jpg\n", [], 0),
        (f"photo {FREE}.jpg\nphoto {FREE}.jpg,1\n", [], 2),
        (f"my images/{FREE}.jpg\n{FREE}.jpg 1\n", [], 0),
        (f"a/{HELD_OUT}.jpg,b/{FREE}.jpg\n", [HELD_OUT], 0),
        (f"a/{HELD_OUT}.jpg b/{FREE}.jpg\n", [HELD_OUT], 0),
        (f"a/beach.jpg,b/{FREE}.jpg\n", [], 1),
    ],
)
def test_all_columns_of_a_table_are_searched(
    root: Path, tmp_path: Path, rows: str, leaked: list[int], unknown: int
) -> None:
    source = tmp_path / "rows.csv"
    source.write_text(rows + "9\n")
    found = audit(source, root)
    assert found.leaked == leaked and len(found.unknown) == unknown


def test_class_names_are_not_mistaken_for_images(root: Path, tmp_path: Path) -> None:
    tree = {"metainfo": {"classes": ["dog", "cat"]}, "data_list": [{"img_path": FREE_NAME}]}
    (tmp_path / "list.json").write_text(json.dumps(tree))
    found = audit(tmp_path / "list.json", root)
    assert (found.images, found.unknown, found.leaked) == (1, [], [])


COPIES: dict[str, Any] = {
    "one of several": [{"images": [FREE_NAME, "copy.jpg"]}],
    "the second of two": [{"image": "house.jpg", "image2": "copy.jpg"}, {"image": FREE_NAME}],
    "a member of a running number": {"1": {"file_name": "copy.jpg"}, str(FREE): {"file_name": FREE_NAME}},
    "a running id": [{"id": 1, "img": {"path": "copy.jpg"}}, {"image": FREE_NAME}],
}


@pytest.mark.parametrize("kind", COPIES)
def test_every_image_of_an_entry_is_compared(root: Path, tmp_path: Path, kind: str) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name, seed in ((HELD_NAME, 0), ("copy.jpg", 0), (FREE_NAME, 1), ("house.jpg", 2), (f"{1:012d}.jpg", 3)):
        (images / name).write_bytes(encoded(scene(seed), "JPEG"))
    (tmp_path / "list.json").write_text(json.dumps(COPIES[kind]))
    found = audit_content(tmp_path / "list.json", root, images)
    assert len(found.copies) == 1 and found.copies[0].refer_image_id == HELD_OUT and found.missing == []


def test_every_image_of_a_row_is_compared(root: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    names = (HELD_NAME, 0), ("a copy.jpg", 0), ("copy.jpg", 0), (FREE_NAME, 1), ("house.jpg", 2), ("photo.jpg", 3)
    for name, seed in (*names, ("my photo.jpg", 0)):
        (images / name).write_bytes(encoded(scene(seed), "JPEG"))
    for row in (
        "house.jpg,copy.jpg,1",
        f"{FREE_NAME}\tcopy.jpg",
        "house.jpg copy.jpg",
        "a copy.jpg,1",
        "my photo.jpg;1",
    ):
        (tmp_path / "rows.csv").write_text(f"{row}\n{FREE_NAME}\n")
        found = audit_content(tmp_path / "rows.csv", root, images)
        assert len(found.copies) == 1 and found.copies[0].refer_image_id == HELD_OUT and found.missing == [], row


def test_an_image_identified_only_by_an_unconfirmed_id_is_not_proven(root: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name, seed in ((HELD_NAME, 0), (f"{1:012d}.jpg", 3), (FREE_NAME, 1)):
        (images / name).write_bytes(encoded(scene(seed), "JPEG"))
    (tmp_path / "list.json").write_text(json.dumps([{"id": 1, "caption": "x"}, {"image": FREE_NAME}]))
    arguments = ["audit", "--instances", str(tmp_path / "list.json"), "--refer-root", str(root), "--find-duplicates",
                 "--images", str(images)]  # fmt: skip
    done = call(*arguments)
    assert done.exit_code == 1 and "not proven: 1 image not compared (first: 1)" in done.stderr
