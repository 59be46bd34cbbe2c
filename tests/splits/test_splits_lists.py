"""build-split and audit of other lists of images: LVIS, COCO captions, Visual Genome, plain lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from split_examples import coco, write, write_refs

from refdet.errors import InputError
from refdet.splits.build import build_split
from refdet.splits.image_list import INSTANCES, JSON_LIST, JSON_OBJECT, LINES
from refdet.splits.leak_audit import audit
from refdet.splits.list_reading import read_image_list
from refdet.structures.provenance import Provenance, image_ids_sha256


@pytest.fixture
def refer_root(tmp_path: Path) -> Path:
    """A REFER root that holds out images 2, 3 and 1234."""
    refs = [(1, "train"), (2, "val"), (3, "testA"), (1234, "testB")]
    return write_refs(tmp_path / "refer", {("refcoco", "unc"): refs, ("refcocog", "umd"): [(3, "val")]})


def lvis() -> dict[str, Any]:
    """With the key order of the real file, where annotations precede images."""
    return {
        "info": {"year": 2019},
        "annotations": [
            {"id": n, "image_id": image, "category_id": 4, "bbox": [1, 1, 2, 2], "area": 4.0,
             "segmentation": [[1.25, 1, 3, 1, 3, 3]]}
            for n, image in enumerate([2, 9, 3, 9])
        ],
        "images": [
            {"id": image, "height": 9, "width": 9, "coco_url": f"http://images.cocodataset.org/train2017/{image:012d}.jpg",
             "neg_category_ids": [3], "not_exhaustive_category_ids": [4]}
            for image in (2, 3, 9)
        ],
        "licenses": [],
        "categories": [{"id": 4, "name": "cup", "synset": "cup.n.01", "frequency": "f", "instance_count": 4}],
    }  # fmt: skip


def test_lvis_keeps_its_key_order(refer_root: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "lvis.json", lvis())
    result = build_split(source, refer_root, tmp_path / "out.json")
    after = json.loads(result.out.read_text())
    assert after["images"] == lvis()["images"][2:] and after["categories"] == lvis()["categories"]
    assert after["annotations"] == [lvis()["annotations"][1], lvis()["annotations"][3]]
    assert list(after) == list(lvis()) and audit(result.out, refer_root).leaked == []
    assert audit(source, refer_root).leaked == [2, 3]


@pytest.mark.parametrize("kind", ["captions", "panoptic", "keypoints"])
def test_other_annotation_files_of_coco(refer_root: Path, tmp_path: Path, kind: str) -> None:
    data = coco([1, 2, 9], [])
    fields: dict[str, dict] = {
        "captions": {"caption": "a dog"},
        "panoptic": {"segments_info": [{"id": 1, "category_id": 1}], "file_name": "000000000002.png"},
        "keypoints": {"keypoints": [1, 1, 2], "num_keypoints": 1, "category_id": 1, "bbox": [0, 0, 4, 4]},
    }
    data["annotations"] = [
        {"image_id": image, **({} if kind == "panoptic" else {"id": image}), **fields[kind]} for image in (2, 9)
    ]
    if kind == "captions":
        del data["categories"], data["info"]
    result = build_split(write(tmp_path / "f.json", data), refer_root, tmp_path / "out.json")
    after = json.loads(result.out.read_text())
    assert [image["id"] for image in after["images"]] == [1, 9] and after["annotations"] == data["annotations"][1:]
    assert Provenance.from_json(after["info"]["refdet"]).annotations == 1


def test_minival_loses_no_images(refer_root: Path, tmp_path: Path) -> None:
    names = {42: "COCO_val2014_000000000042.jpg"}
    result = build_split(write(tmp_path / "minival.json", coco([42], [42], names)), refer_root, tmp_path / "out.json")
    assert result.report["images_removed"] == 0 and result.report["refer_images_missing"] == 3
    assert any("none of its images is in a held-out split" in note for note in result.notes)


GENOME = [
    {"width": 8, "height": 6, "url": f"https://x/VG_100K_2/{n}.jpg", "image_id": n, "coco_id": coco_id}
    for n, coco_id in [(1, None), (2, None), (3, 77), (4, 2), (5, 1234)]
]  # fmt: skip


def test_visual_genome_is_matched_by_coco_id_alone(refer_root: Path, tmp_path: Path) -> None:
    source = tmp_path / "image_data.json"
    source.write_text(json.dumps(GENOME, indent=1))
    found = audit(source, refer_root)
    assert (found.form, found.leaked, found.images, found.unidentified) == (JSON_LIST, [4, 5], 5, 0)
    result = build_split(source, refer_root, tmp_path / "vg.json")
    assert json.loads(result.out.read_text()) == GENOME[:3]
    assert result.report["removed_image_ids"] == [4, 5] and result.report_path.name == "vg.report.json"
    assert any("2 images are not from COCO according to the file" in note for note in result.notes)
    assert audit(result.out, refer_root).leaked == []
    assert Provenance.from_json(result.report["provenance"]).image_ids_sha256 == image_ids_sha256([1, 2, 3])


@pytest.mark.parametrize(
    ("text", "list_format", "kept"),
    [
        ("[1, 2, 3, 9]", JSON_LIST, [1, 9]),
        ('["1", "2.jpg", "COCO_train2014_000000001234.jpg"]', JSON_LIST, ["1"]),
        ('[{"file_name": "a/000000000002.jpg"}, {"id": 9}, {"image_id": "3"}]', JSON_LIST, [{"id": 9}]),
        ('[{"coco_id": 3, "id": 70}, {"coco_id": 4, "id": 3}]', JSON_LIST, [{"coco_id": 4, "id": 3}]),
        ("1\n2\n\n# three\n3\n9", LINES, ["1", "9"]),
        ("\ufefftrain/000000000002.jpg\r\nnot a number.jpg\r\n000000000009\r\n", LINES,
         ["not a number.jpg", "000000000009"]),
    ],
)  # fmt: skip
def test_plain_lists_keep_their_format(
    refer_root: Path, tmp_path: Path, text: str, list_format: str, kept: list
) -> None:
    source = tmp_path / ("ids.txt" if list_format == LINES else "ids.json")
    source.write_bytes(text.encode())
    assert audit(source, refer_root).leaked and read_image_list(source).format == list_format
    result = build_split(source, refer_root, tmp_path / f"out{source.suffix}")
    written = result.out.read_text()
    assert (written.splitlines() if list_format == LINES else json.loads(written)) == kept
    assert result.report["images_after"] == len(kept) and result.report_path.name == "out.report.json"
    assert audit(result.out, refer_root).leaked == []


def test_entries_without_coco_ids_are_counted(refer_root: Path, tmp_path: Path) -> None:
    source = tmp_path / "names.txt"
    source.write_text("kitchen.jpg\nVG_100K/2.jpg\n9.jpg\n")
    found = audit(source, refer_root)
    assert found.leaked == [] and found.unidentified == 2
    assert any("2 entries have no COCO image id (1 is Visual Genome's" in note for note in found.notes)
    assert any("1 numeric name" in note for note in found.notes)
    source.write_text("VG_100K/2.jpg\nVG_100K/3.jpg\n")
    with pytest.raises(InputError, match=r"its 2 entries have no COCO image id.*image_data.json"):
        audit(source, refer_root)


@pytest.mark.parametrize("folder", ["gqa/images", "flickr30k", "flickr30k-images", "saiapr_tc-12/31/images", "VG_100K"])
def test_numbers_in_folders_of_other_datasets_are_not_coco_ids(refer_root: Path, tmp_path: Path, folder: str) -> None:
    source = tmp_path / "mix.json"
    entries = [{"id": str(n), "image": f"{folder}/{n}.jpg", "conversations": []} for n in (2, 9)]
    source.write_text(json.dumps([*entries, {"id": "9", "image": "coco/train2017/000000000009.jpg"}]))
    found = audit(source, refer_root)
    assert found.leaked == [] and found.unidentified == 2
    result = build_split(source, refer_root, tmp_path / "out.json")
    assert result.report["images_removed"] == 0


def test_keep_only_keeps_the_images_of_the_given_splits(refer_root: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "all.json", coco([1, 2, 3, 9, 1234], [1, 2, 3, 9, 3]))
    train = build_split(source, refer_root, tmp_path / "train.json", keep_only=["refcoco:unc:train"])
    after = json.loads(train.out.read_text())
    assert [image["id"] for image in after["images"]] == [1] and len(after["annotations"]) == 1
    assert train.report["kept"] == {"refcoco/unc/train": {"images": 1, "found": 1}}
    assert set(train.report["excluded"]) == {f"refcoco/unc/{s}" for s in ("val", "testA", "testB")} | {
        "refcocog/umd/val"
    }
    test = build_split(source, refer_root, tmp_path / "test.json", keep_only=["refcoco:unc:testA,testB"])
    provenance = Provenance.from_json(json.loads(test.out.read_text())["info"]["refdet"])
    assert test.report["removed_image_ids"] == [1, 2, 9] and provenance.note.startswith(
        "only images of refcoco/unc/testA"
    )
    # Image 3 is also in RefCOCOg's val, so that split is not excluded, which a note says.
    assert set(provenance.excluded) == {"refcoco/unc/val"} and any("refcocog/umd/val" in note for note in test.notes)
    every = build_split(source, refer_root, tmp_path / "every.json", keep_only=["refcoco:unc"])
    assert every.report["images_after"] == 4
    # Names outside of "images" are kept, so the split of image 2 (val) is not excluded either.
    videos = write(tmp_path / "videos.json", coco([1, 3], []) | {"videos": ["COCO_train2014_000000000002.jpg"]})
    part = build_split(videos, refer_root, tmp_path / "part.json", keep_only=["refcoco:unc:testA,testB"])
    assert "refcoco/unc/val" in [leak.name for leak in audit(part.out, refer_root).splits if leak.image_ids]
    assert set(part.report["excluded"]) == {"refcoco/unc/testB"}
    assert any("include some of refcoco/unc/val" in note for note in part.notes)
    with pytest.raises(InputError, match="`exclude` and `keep_only`"):
        build_split(source, refer_root, tmp_path / "x.json", exclude=["refcoco:unc"], keep_only=["refcoco:unc"])
    with pytest.raises(InputError, match="`keep_only` refcoco:unc: no split 'dev'"):
        build_split(source, refer_root, tmp_path / "x.json", keep_only=["refcoco:unc:dev"])


def test_remaining_entries_are_verbatim(refer_root: Path, tmp_path: Path) -> None:
    entry = '{"id":9 ,"height":9,"width":9, "x": [1.10, 1e5, "\\u00e9\\ud800", NaN, true]}'
    text = (
        f'{{\n"images" :[ {{"id": 2, "height": 9, "width": 9}}\n , {entry}\t] , "annotations": [], "categories": []}}\n'
    )
    (tmp_path / "f.json").write_text(text)
    assert entry in build_split(tmp_path / "f.json", refer_root, tmp_path / "out.json").out.read_text()
    (tmp_path / "wide.json").write_bytes(text.replace("true", '"\u732b"').encode("utf-16"))
    written = build_split(tmp_path / "wide.json", refer_root, tmp_path / "wide.out.json").out.read_text(
        encoding="utf-8"
    )
    assert "\u732b" in written and json.loads(written)["images"][0]["id"] == 9


INVALID_LISTS: dict[str, str] = {
    "true ids": '[true, 2]',
    "null": "[null]",
    "half an id": "[1.5]",
    "NaN": "[NaN]",
    "infinite": '{"images": [{"id": Infinity}]}',
    "nothing to know it by": '[{"name": "x"}]',
    "a coco_id of words": '[{"coco_id": "nine", "id": 1}]',
    "a coco_id of words below a name": '{"kitchen.jpg": {"coco_id": "nine"}, "garden.jpg": {"coco_id": null}}',
    "half an id below a name": '{"9.jpg": {"image_id": 9.5}}',
    "a float among names": '{"val": ["9.jpg", 12.0]}',
    "a null among names": '{"val": ["9.jpg", null]}',
    "ids as pandas writes them": '{"train": [9.0, 12.0], "val": ["9.jpg"], "mean": [0.5, 0.25]}',
    "empty list": "[]",
    "a word": '"images"',
    "a number": "12",
    "two lists": '{"images": [{"id": 1}], "images": [{"id": 2}]}',
    "images no list": '{"images": {"1": {}}}',
    "images null": '{"images": null}',
    "annotations no list": '{"images": [{"id": 1}], "annotations": 3}',
    "image twice": '{"images": [{"id": 1}, {"id": 1}]}',
    "id of words": '{"images": [{"id": "1"}]}',
    "image null": '{"images": [null]}',
    "annotation without image": '{"images": [{"id": 1}], "annotations": [{"id": 1}]}',
    "cut short": '{"images": [{"id": 1}, {"id"',
    "cut after a comma": '{"images": [{"id": 1},',
    "more after the end": '{"images": [{"id": 1}]} {}',
    "no key": '{3: 4}',
    "no colon": '{"images" [1]}',
    "comma at the end": '{"images": [{"id": 1},]}',
    "a very long number": '[' + "9" * 5000 + "]",
    "very deep": '{"images": ' + "[" * 100_000,
    "deep list": "[" * 100_000,
    "empty object": "{}",
    "only space": "  \n",
    "nul bytes": "\0\0\0\0",
}  # fmt: skip


@pytest.mark.parametrize("kind", INVALID_LISTS)
def test_errors_of_invalid_lists_are_one_line(refer_root: Path, tmp_path: Path, kind: str) -> None:
    source = tmp_path / "bad.json"
    source.write_text(INVALID_LISTS[kind])
    for read in (lambda: audit(source, refer_root), lambda: build_split(source, refer_root, tmp_path / "out.json")):
        with pytest.raises(InputError) as caught:
            read()
        assert "bad.json" in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "refer"]


def test_only_ids_that_match_names_count_as_known_by_id(refer_root: Path, tmp_path: Path) -> None:
    entries = [{"filename": "kitchen.jpg"}, {"id": 9}, {"id": 25, "file_name": "000000000025.jpg"}, "000000000009.jpg"]
    assert audit(write(tmp_path / "names.json", entries), refer_root).not_known_by_id == 1


def test_invalid_text_lists_are_refused(refer_root: Path, tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff\xff9.jpg")
    for name, content in (
        ("empty.txt", b""),
        ("words.txt", b"a\nb"),
        ("latin.txt", b"caf\xe9.jpg"),
        ("bytes.txt", None),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            audit(tmp_path / name, refer_root)
    with pytest.raises(InputError, match="not a regular file"):
        audit(tmp_path, refer_root)


KEYS = st.sampled_from(
    ["id", "image_id", "coco_id", "file_name", "coco_url", "bbox", "height", "name", "category_id", "segmentation"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2000) | st.floats() | st.text(max_size=14) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=8,
)
IDS = st.integers(1, 6)
NAMES = st.sampled_from(["000000000002.jpg", "COCO_train2014_000000001234.jpg", "9.jpg", "x", "VG_100K/2.jpg"])
IMAGES = st.fixed_dictionaries(
    {"id": IDS}, optional={"file_name": NAMES, "coco_url": NAMES, "coco_id": st.none() | IDS, "x": VALUES}
)
ANNOTATIONS = st.fixed_dictionaries({"image_id": IDS}, optional={"id": IDS, "x": VALUES})
FILES = st.fixed_dictionaries(
    {"images": st.lists(IMAGES | VALUES, max_size=4, unique_by=repr)},
    optional={"annotations": st.lists(ANNOTATIONS, max_size=4) | VALUES, "categories": VALUES, "info": VALUES},
)
LISTS = st.lists(IMAGES | IDS | NAMES | VALUES, max_size=5) | st.lists(IMAGES | IDS | NAMES, max_size=5)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(value=VALUES | FILES | LISTS, cut=st.none() | st.integers(0, 200), indent=st.sampled_from([None, 1]))
def test_any_json_is_refused_or_read_like_json_loads(
    tmp_path_factory: pytest.TempPathFactory, value: Any, cut: int | None, indent: int | None
) -> None:
    folder = tmp_path_factory.mktemp("any")
    refer_root = write_refs(folder / "refer", {("refcoco", "unc"): [(2, "val"), (1234, "testA")]})
    source, out = folder / "any.json", folder / "out.json"
    source.write_text(json.dumps(value, indent=indent)[:cut])
    try:
        listed = read_image_list(source)
        found = audit(source, refer_root)
    except InputError as error:
        assert "any.json" in str(error) and "\n" not in str(error)
        return
    whole = json.loads(source.read_text())
    if listed.format == JSON_OBJECT:
        assert listed.tree is not None
        assert repr(json.loads(listed.tree.render(listed.text, [True] * len(listed.images)))) == repr(whole)
        return
    entries = whole["images"] if listed.format == INSTANCES else whole
    parsed = [json.loads(listed.text[image.start : image.end]) for image in listed.images]
    assert repr(parsed) == repr(entries)  # repr, as NaN != NaN
    try:
        result = build_split(source, refer_root, out)
    except InputError as error:
        assert "any.json" in str(error) and "\n" not in str(error)
        return
    assert result.report["images_removed"] <= len(entries)
    # If no remaining image can be identified, audit refuses the file.
    if result.report["images_after"] > found.unidentified:
        assert audit(out, refer_root).leaked == []
    assert result.report["images_removed"] == 0 or found.leaked


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    numbers=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    list_format=st.sampled_from(["ids", "names", "lines", "line ids", "objects", "genome"]),
    name=st.sampled_from(["COCO_train2014_{:012d}.jpg", "train2017/{:012d}.jpg", "{:012d}"]),
)
def test_every_format_removes_the_same_images(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], list_format: str, name: str
) -> None:
    folder = tmp_path_factory.mktemp("forms")
    held = {2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37}
    refer_root = write_refs(folder / "refer", {("refcoco", "unc"): [(number, "val") for number in held]})
    entries: list[Any] = {
        "ids": numbers,
        "line ids": numbers,
        "names": [name.format(n) for n in numbers],
        "lines": [name.format(n) for n in numbers],
        "objects": [{"file_name": name.format(n), "height": 3} for n in numbers],
        "genome": [{"image_id": 1000 - k, "coco_id": n} for k, n in enumerate(numbers)],
    }[list_format]
    lines = list_format in ("lines", "line ids")
    source = folder / ("list.txt" if lines else "list.json")
    source.write_text("".join(f"{entry}\n" for entry in entries) if lines else json.dumps(entries))
    kept = [entry for entry, number in zip(entries, numbers, strict=True) if number not in held]
    if not kept:
        with pytest.raises(InputError, match="no images left"):
            build_split(source, refer_root, folder / "out.json")
        return
    result = build_split(source, refer_root, folder / f"out{source.suffix}")
    text = result.out.read_text()
    assert (text.splitlines() == [str(entry) for entry in kept]) if lines else (json.loads(text) == kept)
    assert result.report["refer_images_found"] == len(held & set(numbers))
    assert result.report["excluded"]["refcoco/unc/val"]["found"] == len(held & set(numbers))
