"""File names of exports: derived from image names, which may be hostile, and never outside the folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_examples import DETECTIONS, HEIGHT, WIDTH, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from refdet.errors import InputError
from refdet.store.export import npz as npz_module
from refdet.store.export.file_names import file_names
from refdet.store.export.mattnet import export_mattnet
from refdet.store.export.npz import export_npz
from refdet.structures.regions import Regions

HOSTILE = st.text(st.sampled_from("a.é/\\\0\n\x1b\u202e\u2028\ud800 ") | st.characters(), max_size=12)

NAMES = HOSTILE | HOSTILE.map(lambda text: f"{text}.jpg") | st.just("x" * 252)


def store_of(names: list[str]) -> Any:
    """A stand-in for a store: image ids from 0 and file names."""

    class Names(dict[int, str]):
        file_names = names
        path = Path("a.h5")

    return Names(enumerate(names))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.lists(NAMES, max_size=4),
    st.sampled_from(["stem", "file", "id"]),
)
def test_any_image_names_become_files_of_one_folder_or_are_refused(names: list[str], kind: str) -> None:
    try:
        found = file_names(store_of(names), kind, ".npz")
    except InputError as error:
        text = str(error)
        assert text.isprintable() and "export with `names='id'`" in text and kind != "id"
        return
    assert list(found) == list(range(len(names))) and len(set(found.values())) == len(names)
    for name in found.values():
        assert not set(name) & set("/\\\0\n\x1b") and name.strip(".")
        assert len(f"{name}.npz".encode()) <= 255


REFUSALS = ("has no name", "control characters", "longer than 255 bytes")
# an image name, and its file name for `stem` and `file`, or why it is refused
CASES = [
    ("a/b.jpg", "b", "b.jpg"),
    ("a\\b.jpg", "b", "b.jpg"),
    ("../../etc/b.jpg", "b", "b.jpg"),
    ("/etc/b.jpg", "b", "b.jpg"),
    ("b.rf.0a.jpg", "b.rf.0a", "b.rf.0a.jpg"),
    (".hidden", ".hidden", ".hidden"),
    ("b", "b", "b"),
    ("", "has no name", "has no name"),
    ("..", "has no name", "has no name"),
    ("a/..", "has no name", "has no name"),
    ("/", "has no name", "has no name"),
    (" .jpg", "has no name", " .jpg"),
    ("a\nb.jpg", "control characters", "control characters"),
    ("a\x1b[2J.jpg", "control characters", "control characters"),
    ("a\0.jpg", "control characters", "control characters"),
    ("\ud800.jpg", "control characters", "control characters"),
    ("x" * 251 + ".jpg", "x" * 251, "longer than 255 bytes"),
    ("x" * 252 + ".jpg", "longer than 255 bytes", "longer than 255 bytes"),
    ("é" * 126 + ".jpg", "longer than 255 bytes", "longer than 255 bytes"),
]


@pytest.mark.parametrize(("name", "stem", "file"), CASES, ids=lambda text: ascii(text)[:20])
def test_an_image_name_becomes_a_file_name_or_is_refused(name: str, stem: str, file: str) -> None:
    for kind, expected in (("stem", stem), ("file", file)):
        if expected in REFUSALS:
            with pytest.raises(InputError, match=expected):
                file_names(store_of([name]), kind, ".npz")
        else:
            assert file_names(store_of([name]), kind, ".npz") == {0: expected}
    assert file_names(store_of([name]), "id", ".npz") == {0: "0"}


@pytest.mark.parametrize("names", [("a.jpg", "a.png"), ("1/a.jpg", "2/a.jpg"), ("1\\a.jpg", "a.jpg"), ("a.jpg", "a")])
def test_two_images_with_the_same_file_name_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    images = [replace(r, file_name=name) for r, name in zip(DETECTIONS[:2], names, strict=True)]
    path = write_store(tmp_path / "a.h5", images)
    with pytest.raises(InputError, match=r"images 4 and 3 are both named 'a'\); export with `names='id'`"):
        export_npz(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export_npz(path, tmp_path / "out", names="id").images == 2


def test_names_that_a_case_insensitive_disk_confuses_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second file would replace the first."""
    write = npz_module.write_npz
    monkeypatch.setattr(npz_module, "write_npz", lambda path, values: write(path.with_name(path.name.lower()), values))
    images = [replace(r, file_name=name) for r, name in zip(DETECTIONS[:2], ("a.jpg", "A.jpg"), strict=True)]
    with pytest.raises(InputError, match=r"mistakes 'A' of image 3 for another name\); export with `names='id'`"):
        export_npz(write_store(tmp_path / "a.h5", images), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


@pytest.mark.parametrize(
    ("consumer", "names", "message"),
    [
        ("openvqa", ("cat.jpg", "COCO_3.jpg"), "no image id in 'cat' of image 4"),
        ("mcan", ("COCO_3x.jpg", "COCO_3.jpg"), "no image id in 'COCO_3x' of image 4"),
        ("openvqa", ("a_3.jpg", "b_03.jpg"), "images 4 and 3 are both read as '3'"),
        ("openvqa-gqa", ("1.a.jpg", "1.b.jpg"), "images 4 and 3 are both read as '1'"),
    ],
)
def test_names_from_which_the_consumer_gets_no_or_the_same_id_are_refused(
    tmp_path: Path, consumer: str, names: tuple[str, str], message: str
) -> None:
    images = [replace(r, file_name=name) for r, name in zip(DETECTIONS[:2], names, strict=True)]
    path = write_store(tmp_path / "a.h5", images)
    with pytest.raises(InputError, match=rf"{message}\); export with `names='id'`"):
        export_npz(path, tmp_path / "out", consumer=consumer)
    assert not (tmp_path / "out").exists()
    done = export_npz(path, tmp_path / "out", names="id", consumer=consumer)
    assert not any("read with another id" in note for note in done.notes)


def test_other_ids_that_the_consumer_gets_from_names_are_noted(tmp_path: Path) -> None:
    images = [replace(r, file_name=f"COCO_{r.image_id + (r.image_id == 4)}.jpg") for r in DETECTIONS[:2]]
    done = export_npz(write_store(tmp_path / "a.h5", images), tmp_path / "out", consumer="openvqa")
    assert any("1 image is read with another id than in the store (image 4 as '5')" in note for note in done.notes)


HOSTILE_CATEGORIES = ['"', "\\", "</script>", "a\nb", "\x1b[31m", "\u2028", "é" * 300, "'; --", "\x7f"]


def test_hostile_category_names_give_valid_json(tmp_path: Path) -> None:
    classes = [{"id": i, "name": name} for i, name in enumerate(HOSTILE_CATEGORIES, start=1)]
    n = len(classes)
    regions = Regions(
        1, 'a".jpg', HEIGHT, WIDTH, np.tile(np.array([[1, 1, 4, 4]], np.float32), (n, 1)),
        np.linspace(0.1, 0.9, n, dtype=np.float32), np.arange(1, n + 1),
        features={"fc7": np.zeros((n, 2048), np.float32)},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export_examples.CLASSES", classes)
        store = write_store(tmp_path / "a.h5", [regions])
    export_mattnet(store, tmp_path / "out", None, None, {})
    text = (tmp_path / "out" / "dets.json").read_text()
    assert text.isascii() and [det["category_name"] for det in json.loads(text)] == HOSTILE_CATEGORIES
    json.loads((tmp_path / "out" / "provenance.json").read_text())


@pytest.mark.parametrize("field", ["boxes", "scores"])
def test_boxes_and_scores_that_are_not_finite_are_refused(tmp_path: Path, field: str) -> None:
    values = np.array(getattr(DETECTIONS[0], field))
    values[1] = np.nan if field == "scores" else [np.inf, 0, 0, 0]
    path = write_store(tmp_path / "a.h5", [replace(DETECTIONS[0], **{field: values})])
    with pytest.raises(InputError, match="image 4: a box or score is not finite"):
        export_mattnet(path, tmp_path / "out", None, None, {})
    with pytest.raises(InputError, match="image 4: a box or score is not finite"):
        export_npz(path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]
