"""Which of the numbers in a list of images are COCO's, and what build-split and audit make of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from split_examples import write, write_refs

from refdet.data.coco import CocoIndex
from refdet.data.coco_numbers import bare_number, coco_numbers, numbers_in_name
from refdet.data.leaks import audit
from refdet.data.splits import build_split
from refdet.errors import InputError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A REFER root that holds out images 2, 3 and 1234."""
    refs = [(1, "train"), (2, "val"), (3, "testA"), (1234, "testB")]
    return write_refs(tmp_path / "refer", {("refcoco", "unc"): refs, ("refcocog", "umd"): [(3, "val")]})


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("COCO_train2014_000000000009.jpg", {9}),
        ("train2014/COCO_train2014_000000000009.jpg", {9}),
        ("000000000009.jpg", {9}),
        ("000000000009", {9}),
        ("http://images.cocodataset.org/train2017/000000000009.jpg", {9}),
        ("COCO_train2014_000000000009_4.jpg", {9}),
        ("000000000009_crop.png?size=2", {9}),
        (r"D:\coco\000000000009.jpg", {9}),
        ("000000000009/crop.jpg", {9}),
        ("http://x/get?f=000000000009.jpg", {9}),
        ("http://x/000000000009.jpg?a=b/c", {9}),
        ("202401021530.jpg", set()),
        ("0000000000009.jpg", set()),
        ("9.jpg", set()),
        ("kitchen.jpg", set()),
        ("", set()),
        ("\u0660" * 12 + ".jpg", set()),
    ],
)
def test_numbers_in_names(name: str, numbers: set[int]) -> None:
    assert numbers_in_name(name) == numbers


def test_bare_numbers() -> None:
    assert [bare_number(name) for name in ("9", "9.jpg", "a/b/9.jpg", "000000000009")] == [9, 9, 9, 9]
    others = ("", "1000092795.jpg", "1234567", "9a.jpg", "9" * 13, "\u0669.jpg", "9.jpg.gz")
    others += ("VG_100K/9.jpg", "x/VG_100K_2/9.jpg")
    assert [bare_number(name) for name in others] == [None] * len(others)


def test_numbers_of_entries() -> None:
    assert coco_numbers({"coco_url": "http://mscoco.org/images/57870"}, 5) == {5, 57870}
    assert coco_numbers({"coco_id": 7, "url": "https://x/VG_100K_2/1.jpg"}, 1) == {7}
    assert coco_numbers({"coco_id": None, "url": "https://x/VG_100K_2/1.jpg"}, 1) == frozenset()
    assert coco_numbers({"coco_id": None, "file_name": "000000000009.jpg"}, 1) == {9}  # its name knows better
    assert coco_numbers({"cocoid": 7, "filename": "x.jpg"}, 1) == {7}  # Karpathy's key
    assert coco_numbers({"file_name": "43780.jpg"}, 1) == {1, 43780}
    assert coco_numbers({"img_id": "COCO_train2014_000000000009"}, None) == {9}


@pytest.mark.parametrize(
    "entry",
    [
        {"file_name": "VG_100K/2.jpg"},
        {"url": "https://x/VG_100K_2/2.jpg"},
        {"image_url": "https://x/VG_100K_2/2.jpg", "objects": []},
        {"regions": [{"image_id": 2, "phrase": "a dog"}]},
        {"regions": []},
        {"objects": [{"object_id": 7}]},
    ],
)
def test_an_id_of_visual_genome_is_no_coco_id(root: Path, tmp_path: Path, entry: dict[str, Any]) -> None:
    assert coco_numbers(entry, 2) == frozenset() and coco_numbers(entry | {"coco_id": 3}, 2) == {3}
    found = audit(write(tmp_path / "f.json", {"images": [{"id": 2, **entry}, {"id": 9}]}), root)
    assert (found.leaked, found.unidentified, found.unknown) == ([], 1, [2])
    with pytest.raises(InputError, match="none of its 1 entries has a COCO image id"):
        source = tmp_path / "list.json"
        source.write_text(json.dumps([{"image_id": 2, **entry}]))
        audit(source, root)


def test_numbers_other_than_the_id_leak(root: Path, tmp_path: Path) -> None:
    for key, value in (("file_name", "2.jpg"), ("cocoid", 2), ("image_url", "http://x/000000000002.jpg")):
        assert audit(write(tmp_path / "f.json", {"images": [{"id": 70, key: value}]}), root).leaked == [70]
    lxmert = tmp_path / "lxmert.json"
    lxmert.write_text('[{"img_id": "COCO_train2014_000000000002"}, {"img_id": "COCO_train2014_000000000009"}]')
    assert audit(lxmert, root).leaked == [2]


def test_ids_that_nothing_confirms_are_told(root: Path, tmp_path: Path) -> None:
    def told(images: list[dict[str, Any]]) -> bool:
        notes = audit(write(tmp_path / "f.json", {"images": images}), root).notes
        return any("ids unconfirmed" in note for note in notes)

    assert told([{"id": 1, "file_name": "1.jpg"}, {"id": 9, "file_name": "a.jpg"}]) and told([{"id": 1}])
    assert not told([{"id": 1}, {"id": 9, "file_name": "000000000009.jpg"}]) and not told([{"id": 1, "coco_id": 1}])
    assert not told([{"id": 1, "coco_url": "http://mscoco.org/images/1"}])


@pytest.mark.parametrize(
    "line",
    ["train/000000000002.jpg,1,2 a/b", "2,1,2", "2\ta dog", "2.jpg a dog", "http://x/y?f=000000000002.jpg",
     "COCO_train2014_000000000002/image.jpg"],
)  # fmt: skip
def test_rows_of_text(root: Path, tmp_path: Path, line: str) -> None:
    source = tmp_path / "rows.csv"
    source.write_text(f"image,x\n{line}\n9,1\n")
    found = audit(source, root)
    assert found.leaked == [2] and found.unknown == ["image,x"]
    out = build_split(source, root, tmp_path / "out.csv").out
    assert out.read_text() == "image,x\n9,1\n"


def test_a_pipe_is_refused(root: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for work in (
        lambda: audit(tmp_path / "pipe.json", root),
        lambda: CocoIndex.load(tmp_path / "pipe.json"),
        lambda: audit("/dev/zero", root),
    ):
        with pytest.raises(InputError, match="not a file"):
            work()
