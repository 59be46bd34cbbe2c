"""Which numbers in a list of images are COCO image ids, and how build-split and audit use them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from split_examples import write, write_refs

from refdet.data.coco import CocoIndex
from refdet.data.image_evidence import evidence_of, evidence_of_image, ids_are_confirmed, lookup_number
from refdet.errors import InputError
from refdet.splits.build import build_split
from refdet.splits.leak_audit import audit
from refdet.structures.coco_ids import bare_number, is_image_file, numbers_in_name


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
def test_coco_numbers_in_file_names(name: str, numbers: set[int]) -> None:
    assert numbers_in_name(name) == numbers


def test_a_bare_number_is_a_whole_file_name() -> None:
    assert [bare_number(name) for name in ("9", "9.jpg", "a/b/9.jpg", "000000000009")] == [9, 9, 9, 9]
    others = ["", "1000092795.jpg", "1234567", "9a.jpg", "9" * 13, "\u0669.jpg", "9.jpg.gz"]
    others += ["VG_100K/9.jpg", "x/VG_100K_2/9.jpg"]  # ids of Visual Genome
    assert [bare_number(name) for name in others] == [None] * len(others)


def test_image_files_are_known_by_their_suffix() -> None:
    assert all(map(is_image_file, ("a.jpg", "x/y.PNG", "http://x/a.jpeg?w=3", "a.tif", ".jpg")))
    assert not any(map(is_image_file, ("a", "a.json", "a.jpg.txt", "jpg", "a man.", "x.jpg/y", "")))


def numbers_of(entry: Any, image_id: int | None = None) -> frozenset[int]:
    return evidence_of_image(entry, image_id).coco_ids


def test_coco_ids_of_an_entry() -> None:
    assert numbers_of({"id": 5, "coco_url": "http://mscoco.org/images/57870"}, 5) == {5, 57870}
    assert numbers_of({"id": 1, "coco_id": 7, "url": "https://x/VG_100K_2/1.jpg"}, 1) == {7}
    assert numbers_of({"id": 1, "coco_id": None, "url": "https://x/VG_100K_2/1.jpg"}, 1) == frozenset()
    assert numbers_of({"id": 1, "coco_id": None, "file_name": "000000000009.jpg"}, 1) == {9}  # a name of COCO
    # a coco_id does not say which file is read, so next to a file name without a number the id counts too
    assert numbers_of({"id": 1, "coco_id": None, "file_name": "x.jpg"}, 1) == {1}
    assert numbers_of({"id": 1, "cocoid": 7, "filename": "000000000007.jpg"}, 1) == {7}  # the keys of Karpathy's splits
    assert numbers_of({"id": 1, "coco_id": 7}, 1) == {7}
    assert numbers_of({"id": 1, "coco_id": 7, "file_name": "x"}, 1) == {1, 7}
    assert numbers_of({"id": 1, "file_name": "43780.jpg"}, 1) == {1, 43780}
    assert numbers_of({"img_id": "COCO_train2014_000000000009"}) == {9}
    assert numbers_of({"id": 5, "image_id": 7, "file_name": "a.jpg"}, 5) == {5, 7}
    assert numbers_of({"id": 4_000_000}, 4_000_000) == frozenset()  # larger than any id of COCO


# entries with a file name, NAME, in different places
ENTRIES = [
    {"image": ["NAME", "other.jpg"]}, {"images": ["other.jpg", "NAME"]}, {"image_path": "NAME"}, {"img_path": "NAME"},
    {"img_name": "NAME"}, {"meta": {"image": {"file": "NAME"}}}, {"conversations": [{"value": "look at NAME, please"}]},
    {"NAME": {"caption": "a cat"}}, {"meta": {"NAME": [1, 2]}}, {"a": [[[{"b": ["NAME"]}]]]}, ["x", ["NAME"]], "NAME",
]  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "name", ["coco/train2017/000000000009.jpg", "COCO_train2014_000000000009", r"D:\\x\\000000000009.png", "9.jpg"]
)
def test_a_file_name_is_found_anywhere_in_an_entry(entry: Any, name: str) -> None:
    found = evidence_of(json.loads(json.dumps(entry).replace("NAME", name)))
    in_sentence = isinstance(entry, dict) and "conversations" in entry
    assert found.coco_ids == (set() if in_sentence and name == "9.jpg" else {9})  # a bare number could be any number


def test_an_entry_is_identified_if_each_of_its_images_is() -> None:
    def is_identified(entry: Any, confirmed: bool = True) -> bool:
        return evidence_of(entry).is_identified(confirmed)

    assert is_identified({"image": ["000000000009.jpg", "000000000025.jpg"]})
    assert not is_identified({"image": ["000000000009.jpg", "kitchen.jpg"]})
    assert is_identified(
        {"file_name": "kitchen.jpg", "coco_url": "http://x/000000000009.jpg"}
    )  # two names of one image
    assert not is_identified({"id": 9, "image": "kitchen.jpg"})
    assert not is_identified({"id": 9, "image_path": ["a.png"]})
    assert is_identified({"id": 9, "caption": "a cat"})
    assert not is_identified({"id": 9, "caption": "a cat"}, confirmed=False)
    # null and negative numbers say that an image is not one of COCO
    assert is_identified({"coco_id": None, "file_name": "kitchen.jpg"})
    assert not is_identified({"caption": "a cat"})
    assert not is_identified({"coco_id": "nine", "file_name": "kitchen.jpg"})
    assert is_identified({"coco_id": -1}) and is_identified({"coco_id": 3})
    assert is_identified(9) and is_identified("9") and not is_identified("kitchen.jpg")


def test_ids_are_confirmed_by_names_in_the_same_file() -> None:
    def confirm(*pairs: tuple[int, int | None]) -> bool:
        """Whether entries with an id, and a COCO id or none, confirm the ids."""
        entries = [{"id": i} if coco_id is None else {"id": i, "coco_id": coco_id} for i, coco_id in pairs]
        return ids_are_confirmed(map(evidence_of, entries))

    assert confirm((9, 9), (25, None)) and confirm((9, 9), (25, 25), (3, 30))
    assert not confirm((1, None), (2, None))  # no entry has a COCO id
    # sequential ids, as in MDETR's files: not more than half of the entries agree
    assert not confirm((1, 9), (2, 25)) and not confirm((9, 9), (2, 25), (3, 30))


@pytest.mark.parametrize(
    ("entry", "number"),
    [
        ({"file_name": "COCO_val2014_000000000009.jpg"}, 9),
        ({"file_name": "street_0002.png"}, None),
        ({"file_name": "9.jpg"}, None),
        ({"file_name": "missing.jpg", "coco_id": 9}, None),
        ({}, 5),
        ({"file_name": ""}, 5),
        ({"file_name": None}, 5),
        ({"coco_url": "http://x/000000000009.jpg"}, None),
        ({"coco_url": "http://x/000000000005.jpg"}, 5),
        ({"coco_id": None}, None),
        ({"coco_id": 9}, None),
        ({"url": "http://x/VG_100K/7.jpg"}, None),
        ({"regions": []}, None),  # an entry of Visual Genome
    ],
)
def test_the_number_that_training_looks_up_is_always_audited(entry: dict[str, Any], number: int | None) -> None:
    assert lookup_number({"id": 5, **entry}, 5) == number
    assert number is None or number in evidence_of_image({"id": 5, **entry}, 5).coco_ids


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
def test_an_id_of_visual_genome_is_not_a_coco_id(root: Path, tmp_path: Path, entry: dict[str, Any]) -> None:
    assert numbers_of({"id": 2, **entry}, 2) == frozenset()
    assert numbers_of({"id": 2, **entry, "coco_id": 3}, 2) == {3}
    found = audit(write(tmp_path / "f.json", {"images": [{"id": 2, **entry}, {"id": 9, "coco_id": 9}]}), root)
    assert (found.leaked, found.unidentified, found.unknown) == ([], 1, [2])
    source = tmp_path / "list.json"
    source.write_text(json.dumps([{"image_id": 2, **entry}]))
    with pytest.raises(InputError, match="its 1 entry has no COCO image id"):
        audit(source, root)


def test_coco_numbers_in_other_keys_are_audited(root: Path, tmp_path: Path) -> None:
    for key, value in (("file_name", "2.jpg"), ("cocoid", 2), ("image_url", "http://x/000000000002.jpg")):
        assert audit(write(tmp_path / "f.json", {"images": [{"id": 70, key: value}]}), root).leaked == [70]
    lxmert = tmp_path / "lxmert.json"
    lxmert.write_text('[{"img_id": "COCO_train2014_000000000002"}, {"img_id": "COCO_train2014_000000000009"}]')
    assert audit(lxmert, root).leaked == [2]


def test_unconfirmed_ids_are_unknown_unless_they_leak(root: Path, tmp_path: Path) -> None:
    def unknown(images: list[dict[str, Any]]) -> list[int | str]:
        found = audit(write(tmp_path / "f.json", {"images": images}), root)
        noted = any("confirms that its ids are COCO's" in n or " no COCO image id" in n for n in found.notes)
        assert noted == bool(found.unknown)
        return found.unknown

    assert unknown([{"id": 1}]) == [1]
    assert unknown([{"id": 1, "file_name": "1.jpg"}, {"id": 9, "file_name": "a.jpg"}]) == [9]
    assert unknown([{"id": 1}, {"id": 9, "file_name": "000000000009.jpg"}]) == []
    assert unknown([{"id": 1, "coco_id": 1}]) == unknown([{"id": 1, "coco_url": "http://mscoco.org/images/1"}]) == []
    # the id of a held-out image counts as a leak without confirmation
    assert audit(write(tmp_path / "f.json", {"images": [{"id": 2}]}), root).leaked == [2]


@pytest.mark.parametrize(
    "line",
    ["train/000000000002.jpg,1,2 a/b", "2,1,2", "2\ta dog", "2.jpg a dog", "http://x/y?f=000000000002.jpg",
     "COCO_train2014_000000000002/image.jpg"],
)  # fmt: skip
def test_an_image_name_anywhere_in_a_row_of_text_leaks(root: Path, tmp_path: Path, line: str) -> None:
    source = tmp_path / "rows.csv"
    source.write_text(f"image,x\n{line}\n9,1\n")
    found = audit(source, root)
    assert found.leaked == [2] and found.unknown[0] == "image,x"
    out = build_split(source, root, tmp_path / "out.csv").out
    assert out.read_text() == "image,x\n9,1\n"


def test_pipes_and_devices_are_refused(root: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match="pipe.json: not a regular file"):
        audit(tmp_path / "pipe.json", root)
    with pytest.raises(InputError, match="pipe.json: not a regular file"):
        CocoIndex.load(tmp_path / "pipe.json")
    with pytest.raises(InputError, match="/dev/zero: not a regular file"):
        audit("/dev/zero", root)
