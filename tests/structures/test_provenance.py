"""Provenance: the record of exclusions in an instances file, and why an edited file is not believed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from refdet.data.coco import CocoIndex
from refdet.data.instances_provenance import EDITED, RENAMED, provenance_of_instances
from refdet.errors import InputError
from refdet.structures.provenance import NAMES_DIFFER, UNKNOWN, Provenance, image_ids_sha256

BUILT = Provenance(
    "all.json", "ab" * 32, 2, 0, image_ids_sha256([5, 10]), {"refcoco/unc/val": {"images": 3, "found": 1}}
)


def write(path: Path, ids: list[int], info: dict[str, Any]) -> CocoIndex:
    images = [{"id": i, "height": 4, "width": 4} for i in ids]
    path.write_text(json.dumps({"info": info, "images": images, "annotations": [], "categories": []}))
    return CocoIndex.load(path)


def test_hash_of_image_ids_equals_sha256sum_of_the_sorted_ids() -> None:
    """As printed by ``sort -n ids.txt | sha256sum``."""
    assert image_ids_sha256([10, 9]) == hashlib.sha256(b"9\n10\n").hexdigest()
    assert image_ids_sha256([9, 10]) != image_ids_sha256([910])


def test_round_trip_through_json() -> None:
    value = BUILT.with_weights("imagenet")
    assert Provenance.from_json(json.loads(json.dumps(value.to_json()))) == value
    assert value.weights == "imagenet" and BUILT.weights is None
    line = value.one_line()
    assert "\n" not in line and "refcoco/unc/val" in line and "imagenet" in line


def test_a_file_without_a_record_has_unknown_provenance(tmp_path: Path) -> None:
    index = write(tmp_path / "f.json", [10, 5], {})
    found = provenance_of_instances(index)
    assert found.excluded == {} and found.note == UNKNOWN and found.source == "f.json" and found.images == 2
    assert found.source_sha256 == hashlib.sha256((tmp_path / "f.json").read_bytes()).hexdigest()


def test_a_record_is_believed_only_with_the_images_it_was_made_for(tmp_path: Path) -> None:
    info = {"refdet": BUILT.to_json()}
    assert provenance_of_instances(write(tmp_path / "f.json", [10, 5], info)) == BUILT
    edited = provenance_of_instances(write(tmp_path / "f.json", [10, 5, 6], info))
    assert edited.excluded == {} and edited.note == EDITED


@pytest.mark.parametrize(
    ("change", "believed"),
    [
        ({"file_name": "COCO_train2014_000000000010.jpg"}, True),
        ({"file_name": "10.jpg"}, True),
        ({"file_name": "COCO_train2014_000000000002.jpg"}, False),
        ({"file_name": "2.jpg"}, False),
        ({"file_name": "kitchen.jpg"}, False),
        ({"coco_id": 2}, False),
    ],
)
def test_a_record_is_not_believed_if_names_have_other_numbers(tmp_path: Path, change: dict, believed: bool) -> None:
    path = write(tmp_path / "f.json", [10, 5], {"refdet": BUILT.to_json()}).path
    data = json.loads(path.read_text())
    data["images"][0] |= change
    path.write_text(json.dumps(data))
    found = provenance_of_instances(CocoIndex.load(path))
    assert (found == BUILT) == believed and found.note == ("" if believed else RENAMED)


@pytest.mark.parametrize("info", [{}, {"refdet": BUILT.to_json()}])
def test_a_name_without_the_number_of_its_id_is_noted_in_any_file(tmp_path: Path, info: dict[str, Any]) -> None:
    """Otherwise the hash of the ids would suggest training on images that the file does not list."""
    path = write(tmp_path / "f.json", [10, 5, 6], info).path
    data = json.loads(path.read_text())
    before = provenance_of_instances(CocoIndex.load(path)).note
    data["images"][0]["file_name"] = "kitchen.jpg"
    path.write_text(json.dumps(data))
    assert provenance_of_instances(CocoIndex.load(path)).note == f"{before}; {NAMES_DIFFER}"


@pytest.mark.parametrize(
    "change",
    [{"images": "2"}, {"extra": 1}, {"excluded": []}, {"excluded": {"a": {"b": "c"}}}, {"weights": 3}],
)
def test_invalid_fields_are_refused(tmp_path: Path, change: dict) -> None:
    with pytest.raises(InputError, match="provenance"):
        Provenance.from_json(BUILT.to_json() | change)
    with pytest.raises(InputError, match="f.json: info.refdet"):
        provenance_of_instances(write(tmp_path / "f.json", [10, 5], {"refdet": BUILT.to_json() | change}))
    with pytest.raises(InputError, match="images"):
        Provenance.from_json({"source": "x"})


def test_provenance_of_imported_weights_is_unknown() -> None:
    found = Provenance.imported("res101.pth", "ab" * 32)
    assert found.is_unknown and Provenance.from_json(found.to_json()) == found
    assert found.one_line() == f"imported: res101.pth, sha256 {'ab' * 32}, training data unknown"
