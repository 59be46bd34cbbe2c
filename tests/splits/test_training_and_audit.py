"""Every held-out image that training would read is found by audit and removed by build-split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from split_examples import write_refs

from refdet.data.coco import CocoIndex
from refdet.data.image_source import ImageSource
from refdet.errors import InputError
from refdet.splits.build import build_split
from refdet.splits.leak_audit import audit

# The files in the image folder, with their COCO ids; None for images that are not COCO's.
FILES = {
    "train2014/COCO_train2014_000000000002.jpg": 2, "train2014/COCO_train2014_000000000009.jpg": 9,
    "val2017/000000000003.jpg": 3, "000000001234.jpg": 1234, "own/kitchen.jpg": None, "own/0002.jpg": None,
    "000000000005_crop.jpg": 5, "000000000003/000000000009.png": 9,
}  # fmt: skip
HELD_OUT = {2, 3, 1234, 5}
IDS = st.sampled_from([1, 2, 3, 5, 9, 1234])
NAMES = st.sampled_from(
    [*FILES, "COCO_val2014_000000000002.jpg", "000000000002.jpg", "COCO_train2014_000000001234.jpg", "2.jpg",
     "0002.jpg",
     "missing.jpg", "a/../000000000003.jpg", r"x\000000000003.jpg", "000000000003_7.jpg", "VG_100K/2.jpg",
     "000000000002.jpg?x=000000000009", "000000000009/missing.jpg", "COCO_train2014_000000000005_crop.png", "", "9"]
)  # fmt: skip
ENTRIES = st.fixed_dictionaries(
    {"height": st.just(9), "width": st.just(9)},
    optional={"file_name": NAMES | st.none(), "filename": NAMES, "coco_url": NAMES, "url": NAMES, "image": NAMES,
              "coco_id": IDS | st.none(), "cocoid": IDS, "image_id": IDS, "regions": st.just([]),
              "meta": st.fixed_dictionaries({"image_id": IDS, "path": NAMES})},
)  # fmt: skip


@settings(max_examples=500, deadline=None, derandomize=True)
@given(entries=st.lists(st.tuples(IDS, ENTRIES), min_size=1, max_size=4, unique_by=lambda pair: pair[0]))
def test_images_that_training_reads_are_audited(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[int, dict[str, Any]]]
) -> None:
    folder = tmp_path_factory.mktemp("world")
    for name in FILES:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(b"")
    root = write_refs(folder / "refer", {("refcoco", "unc"): [(number, "val") for number in HELD_OUT]})
    images = [{"id": image_id, **entry} for image_id, entry in entries]
    source = folder / "f.json"
    source.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    found = audit(source, root)
    opened = read_by_training(source, folder / "images")
    assert {image_id for image_id, number in opened.items() if number in HELD_OUT} <= set(found.leaked)
    try:
        split = build_split(source, root, folder / "split.json").out
    except InputError as error:
        assert "no images left" in str(error)
        return
    assert HELD_OUT.isdisjoint(read_by_training(split, folder / "images").values())
    assert audit(split, root).leaked == []


def read_by_training(instances: Path, images: Path) -> dict[int, int | None]:
    """{image id: COCO id of the file that training reads for it, None if it is not COCO's}."""
    source, records = ImageSource.open(images), [*CocoIndex.load(instances).images.values()]
    source.locate(records)
    files = {record.id: source.find(record) for record in records}
    return {image_id: FILES[name] for image_id, name in files.items() if name is not None}


def test_training_reads_some_of_these_files(tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"")
    images: list[dict[str, Any]] = [
        {"id": 1, "file_name": "COCO_val2014_000000000002.jpg"}, {"id": 3}, {"id": 5, "file_name": "missing.jpg"},
        {"id": 1234, "coco_id": None}, {"id": 9, "file_name": "own/0002.jpg"},
    ]  # fmt: skip
    sizes = {"height": 9, "width": 9}
    tree = {"images": [image | sizes for image in images], "annotations": [], "categories": []}
    (tmp_path / "f.json").write_text(json.dumps(tree))
    assert read_by_training(tmp_path / "f.json", tmp_path / "images") == {1: 2, 3: 3, 9: None}
