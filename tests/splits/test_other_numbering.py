"""Images in folders of other datasets, whose numbers are not COCO's: unknown, and never left out of the count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from split_examples import write_refs

from refdet.splits.build import build_split
from refdet.splits.leak_audit import audit


@pytest.fixture
def refer_root(tmp_path: Path) -> Path:
    """A REFER root whose only val image is image 2."""
    return write_refs(tmp_path / "refer", {("refcoco", "unc"): [(1, "train"), (2, "val")]})


FOLDERS = [
    *("gqa", "gqa/images", "gqa/allImages/images", "data/GQA/raw/val", "VG_100K"),
    *("flickr30k", "flickr30k-images", "flickr30k/train", "flickr30k_entities"),
    *("saiapr_tc-12/31/images", "saiapr_tc-12/0/segmented_images"),
]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("value", ["a dog", 7, [0.5, 1.5], [1, 2, 30, 40], {"box": [1, 2, 30, 40]}, {"image_id": 2}])
def test_keys_are_entries_whatever_their_values(refer_root: Path, tmp_path: Path, folder: str, value: Any) -> None:
    source = tmp_path / "a.json"
    source.write_text(json.dumps({f"{folder}/2": value, "000000000009": "b"}))
    found = audit(source, refer_root)
    assert (found.images, found.leaked, found.unidentified) == (2, [], 1)
    result = build_split(source, refer_root, tmp_path / "out.json")
    assert result.out.read_text().rstrip("\n") == source.read_text() and any(
        "no COCO image id" in note for note in result.notes
    )


@pytest.mark.parametrize("name", ["gqa/coco/2.jpg", "gqa/train2014/2.jpg", "flickr30k_coco/2.jpg", "my_gqa/2.jpg"])
def test_other_folders_below_or_beside_them_may_hold_coco_images(refer_root: Path, tmp_path: Path, name: str) -> None:
    source = tmp_path / "a.json"
    source.write_text(json.dumps([{"image": name}, {"image": "9.jpg"}]))
    assert audit(source, refer_root).leaked == [2]
