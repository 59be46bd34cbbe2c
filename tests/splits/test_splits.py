"""build-split and audit: no held-out image remains, and nothing else changes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from split_examples import coco, write, write_refs

from refdet.cli import audit as audit_command
from refdet.cli import build_split as build_command
from refdet.data.coco import CocoIndex
from refdet.data.instances_provenance import provenance_of_instances
from refdet.errors import InputError
from refdet.splits.build import build_split
from refdet.splits.held_out import held_out
from refdet.splits.leak_audit import audit
from refdet.splits.list_reading import read_image_list
from refdet.structures.provenance import Provenance, file_sha256, image_ids_sha256
from refer import ReferError

SPLITS = ["train", "val", "testA", "testB", "test"]
PAIRS = [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "google")]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_held_out_images_are_removed_and_all_else_is_verbatim(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tmp_path = tmp_path_factory.mktemp("split")
    ids = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=15, unique=True))
    owners = data.draw(st.lists(st.sampled_from(ids), max_size=20))
    entry = st.tuples(st.integers(1, 40), st.sampled_from(SPLITS))
    refs = {pair: data.draw(st.lists(entry, max_size=8)) for pair in PAIRS}
    refs["refcoco", "unc"].append((40, "val"))  # so that there is always a held-out image
    forbidden = {image for pairs in refs.values() for image, split in pairs if split != "train"}
    root = write_refs(tmp_path / "refer", refs)
    before = coco(ids, owners)
    source, out = write(tmp_path / "all.json", before), tmp_path / "out.json"
    leaking = audit(source, root)
    assert leaking.leaked == sorted(forbidden & set(ids))
    if set(ids) <= forbidden:
        with pytest.raises(InputError, match="no images left"):
            build_split(source, root, out)
        assert not out.exists()
        return

    report = build_split(source, root, out).report
    after = json.loads(out.read_text())
    provenance = Provenance.from_json(after["info"].pop("refdet"))
    assert list(after) == list(before)
    assert after == before | {
        "images": [image for image in before["images"] if image["id"] not in forbidden],
        "annotations": [a for a in before["annotations"] if a["image_id"] not in forbidden],
    }
    assert report == json.loads((tmp_path / "out.report.json").read_text())
    assert report["removed_image_ids"] == sorted(forbidden & set(ids))
    assert report["images_before"] - report["images_removed"] == report["images_after"] == len(after["images"])
    assert report["annotations_after"] == provenance.annotations == len(after["annotations"])
    for pair, pairs in refs.items():
        for split in {split for _, split in pairs} - {"train"}:
            images = {image for image, name in pairs if name == split}
            expected = {"images": len(images), "found": len(images & set(ids))}
            assert report["excluded"]["/".join((*pair, split))] == expected
    assert provenance.excluded == report["excluded"] and provenance.source_sha256 == file_sha256(source)
    assert provenance.image_ids_sha256 == image_ids_sha256(i for i in ids if i not in forbidden)
    assert audit(out, root).leaked == [] and CocoIndex.load(out).images


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[Path, Path]:
    """An instances file of images 1..6 and a REFER root."""
    root = write_refs(
        tmp_path / "refer",
        {
            ("refcoco", "unc"): [(1, "train"), (2, "val"), (3, "testA")],
            ("refcocog", "google"): [(4, "train"), (4, "val"), (5, "val")],
            ("refclef", "unc"): [(6, "test")],
        },
    )
    return write(tmp_path / "all.json", coco([6, 5, 4, 3, 2, 1], [1, 2, 2, 3, 6])), root


def test_all_val_and_test_splits_are_excluded_by_default(dataset: tuple[Path, Path], tmp_path: Path) -> None:
    source, root = dataset
    everything = build_split(source, root, tmp_path / "a.json")
    assert everything.report["removed_image_ids"] == [2, 3, 4, 5]
    # RefClef's images are not COCO's, so its image 6 is not held out.
    assert any("refclef" in text for text in everything.notes)
    assert any("refcocog/google/val: 1 of 2 images also has train refs" in text for text in everything.notes)
    some = build_split(source, root, tmp_path / "b.json", exclude=["refcoco:unc:testA", "refcocog:google"])
    assert some.report["removed_image_ids"] == [3, 4, 5]
    assert list(some.report["excluded"]) == ["refcoco/unc/testA", "refcocog/google/val"]
    assert audit(some.out, root).leaked == [2]


@pytest.mark.parametrize(
    ("exclude", "text"),
    [
        ("refcoco:umd", "choose from refcoco:unc, refcocog:google"),
        ("refclef:unc", "choose from refcoco:unc"),
        ("refcoco:unc:testC", "choose from testA, train, val"),
        ("refcoco", "DATASET:SPLIT_BY"),
        ("refcoco:unc:", "DATASET:SPLIT_BY"),
    ],
)
def test_unknown_exclude_lists_the_choices(dataset: tuple[Path, Path], tmp_path: Path, exclude: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        build_split(*dataset, tmp_path / "o.json", exclude=[exclude])
    assert text in str(caught.value) and exclude.split(":")[0] in str(caught.value)
    assert not list(tmp_path.glob("*o*.json"))


def test_a_second_build_keeps_what_the_first_excluded(dataset: tuple[Path, Path], tmp_path: Path) -> None:
    source, root = dataset
    first = build_split(source, root, tmp_path / "a.json", exclude=["refcoco:unc:val"])
    second = build_split(first.out, root, tmp_path / "b.json", exclude=["refcoco:unc:testA"])
    provenance = provenance_of_instances(CocoIndex.load(second.out))
    assert set(provenance.excluded) == {"refcoco/unc/val", "refcoco/unc/testA"}
    assert provenance.source == "a.json" and provenance.images == 4


def test_existing_outputs_are_refused(dataset: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("o.json", "o.report.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(InputError, match="exists; choose another `out` or remove it"):
            build_split(*dataset, tmp_path / "o.json")
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name", ["o.json", "o.report.json"])
def test_a_file_that_another_process_writes_meanwhile_is_kept(
    dataset: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source, root = dataset

    def read(*args: Any) -> Any:
        (tmp_path / name).write_text("another split")
        return read_image_list(*args)

    monkeypatch.setattr("refdet.splits.build.read_image_list", read)
    with pytest.raises(InputError, match=f"{name} exists"):
        build_split(source, root, tmp_path / "o.json")
    assert [path.name for path in tmp_path.iterdir() if path.is_file() and path != source] == [name]
    assert (tmp_path / name).read_text() == "another split"


def test_roots_without_readable_held_out_refs_are_refused(dataset: tuple[Path, Path], tmp_path: Path) -> None:
    source, root = dataset
    other = write(tmp_path / "other.json", coco([100], [100]))
    assert any("none of its images" in text for text in build_split(other, root, tmp_path / "o.json").notes)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no DATASET"):
        held_out(tmp_path / "empty")
    with pytest.raises(InputError, match="nothing to hold out"):
        held_out(write_refs(tmp_path / "t", {("refcoco", "unc"): [(1, "train")]}))
    with pytest.raises(ReferError, match="nowhere"):
        held_out(tmp_path / "nowhere")
    (root / "refcoco" / "refs(unc).p").write_bytes(b"\x80\x02")
    with pytest.raises(ReferError, match=r"refs\(unc\).p"):  # a split that cannot be read must never count as clean
        audit(source, root)


def test_misnamed_refs_files_are_reported(dataset: tuple[Path, Path], tmp_path: Path) -> None:
    from refdet.cli.main import main

    source, root = dataset
    others = ("refcoco/refs(unc).pkl", "refcoco/Refs(UNC).p", "refcoco/refs(unc) (1).p", "data/refcocog/refs(umd).p")
    for name in others:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    (root / "refcoco" / "refseg.json").write_bytes(b"")
    renames = [text for text in held_out(root)[1] if ": not read; rename it to " in text]
    assert len(renames) == len(others) and all(any(str(root / name) in text for text in renames) for name in others)
    arguments = ["build-split", "--instances", str(source), "--refer-root", str(root)]
    arguments += ["--out", str(tmp_path / "o.json")]
    assert ": not read; rename it to " in CliRunner().invoke(main, arguments).stderr
    with pytest.raises(InputError, match=r"Refs\(UNC\).p', which is not read"):
        held_out(root / "refcoco")


@pytest.mark.parametrize(
    "name", ["refcocog", "grefcoco", "my_refs", "RefCOCOg", "refcoco/refs(google).p", "refcoco/grefs(unc).json"]
)
def test_refs_behind_a_broken_link_never_count_as_clean(dataset: tuple[Path, Path], name: str) -> None:
    source, root = dataset
    if (root / name).exists():
        (root / name).rename(root / "moved")
    (root / name).symlink_to("nowhere")
    with pytest.raises(InputError, match="a broken link; repair it, or remove it"):
        audit(source, root)
    (root / name).unlink()
    (root / name).mkdir()
    if name.startswith("refcoco/"):
        with pytest.raises(InputError, match="not a file; repair it, or remove it"):
            audit(source, root)
    else:
        assert audit(source, root).leaked


def test_the_folder_above_the_root_is_refused_with_the_root(dataset: tuple[Path, Path]) -> None:
    source, root = dataset
    with pytest.raises(InputError) as caught:
        audit(source, root.parent)
    assert str(caught.value).endswith(f"; give the folder below it: {root}")


def test_earlier_exclusions_are_dropped_if_names_contradict_ids(dataset: tuple[Path, Path], tmp_path: Path) -> None:
    source, root = dataset
    first = build_split(source, root, tmp_path / "a.json", exclude=["refcoco:unc:val"])
    data = json.loads(first.out.read_text())
    data["images"][0]["file_name"] = "COCO_train2014_000000000002.jpg"
    second = build_split(
        write(tmp_path / "edited.json", data), root, tmp_path / "b.json", exclude=["refcoco:unc:testA"]
    )
    assert set(json.loads(second.out.read_text())["info"]["refdet"]["excluded"]) == {"refcoco/unc/testA"}


def test_renumbered_images_are_identified_by_name(dataset: tuple[Path, Path], tmp_path: Path) -> None:
    _, root = dataset
    names = {70: "COCO_train2014_000000000002.jpg", 71: "000000000077.jpg", 72: "dir/000000000003.jpg"}
    source = write(tmp_path / "re.json", coco([70, 71, 72], [70, 71]))
    assert audit(source, root).leaked == []
    source = write(tmp_path / "re.json", coco([70, 71, 72], [70, 71], names))
    found = audit(source, root)
    assert found.leaked == [70, 72] and any(
        "3 images have an id that differs from the number in the name (70: 2)" in text for text in found.notes
    )
    assert build_split(source, root, tmp_path / "o.json").report["removed_image_ids"] == [70, 72]


def test_annotations_of_removed_images_are_a_leak(dataset: tuple[Path, Path], tmp_path: Path) -> None:
    source, root = dataset
    data = coco([1, 6], [1, 2, 2])
    found = audit(write(tmp_path / "seed.json", data), root)
    assert found.leaked == [2] and found.to_json()["splits"]["refcoco/unc/val"]["annotations"] == 2


@pytest.mark.parametrize(
    ("info", "text"), [("my notes", '"my notes"'), ([1], "[1]"), (None, ""), ({}, ""), ({"a": 1}, "")]
)
def test_an_info_that_is_lost_is_noted(dataset: tuple[Path, Path], tmp_path: Path, info: Any, text: str) -> None:
    _, root = dataset
    result = build_split(write(tmp_path / "i.json", coco([1, 2], []) | {"info": info}), root, tmp_path / "o.json")
    notes = [note for note in result.notes if "'info' is not an object" in note]
    assert [note.endswith(f": {text}") for note in notes] == [True] * bool(text)


def test_annotations_of_removed_images_are_removed(dataset: tuple[Path, Path], tmp_path: Path) -> None:
    _, root = dataset
    data = coco([1, 6], [1, 2, 2, 6])
    data["annotations"][1]["segmentation"] = {"size": [5, 7], "counts": [35]}
    source = write(tmp_path / "seed.json", data)
    result = build_split(source, root, tmp_path / "o.json")
    assert json.loads(result.out.read_text())["annotations"] == [data["annotations"][0], data["annotations"][3]]
    assert any("removed 2 annotations of held-out images that are not in it" in note for note in result.notes)
    assert result.report["annotations_before"] == 4 and result.report["annotations_after"] == 2
    assert audit(result.out, root).leaked == []
    with pytest.raises(InputError, match="refers to image 2, which is not in the file"):
        build_split(source, root, tmp_path / "k.json", keep_only=["refcoco:unc:train"])
    with pytest.raises(InputError, match="refers to image 8, which is not in the file"):
        build_split(write(tmp_path / "lost.json", coco([1, 6], [2, 8])), root, tmp_path / "l.json")
    data["images"][1]["file_name"] = "000000000007.jpg"  # so its ids are not COCO's
    with pytest.raises(InputError, match="refers to image 2, which is not in the file"):
        build_split(write(tmp_path / "renumbered.json", data), root, tmp_path / "r.json")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"images": [3]}', '{"images": [], "annotations": [{}]}'])
def test_audit_refuses_invalid_files(dataset: tuple[Path, Path], tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match="bad.json"):
        audit(tmp_path / "bad.json", dataset[1])


def test_build_split_and_audit_commands(dataset: tuple[Path, Path], tmp_path: Path) -> None:
    from refdet.cli.main import main

    source, root = dataset
    common = ["--refer-root", str(root)]
    out = str(tmp_path / "o.json")
    run = CliRunner().invoke
    done = run(main, ["build-split", "--instances", str(source), "--out", out, *common, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["removed_image_ids"] == [2, 3, 4, 5]
    again = run(main, ["build-split", "--instances", str(source), "--out", out, *common])
    assert again.exit_code == 2 and "exists" in again.stderr
    clean = run(main, ["audit", "--instances", out, *common])
    assert clean.exit_code == 0 and "clean: 2 images checked against 4 val/test images of 3 splits" in clean.stdout
    assert image_ids_sha256([1, 6]) in clean.stdout
    leaking = run(main, ["audit", "--instances", str(source), *common])
    assert leaking.exit_code == 1 and "contains 4 held-out images" in leaking.stderr
    as_json = run(main, ["audit", "--instances", str(source), *common, "--json"])
    assert as_json.exit_code == 1 and json.loads(as_json.stdout)["leaked_image_ids"] == [2, 3, 4, 5]
    assert build_command.command.name == "build-split" and audit_command.command.name == "audit"


def test_real_files(shared: Path, tmp_path: Path) -> None:
    mini = shared / "data/coco_mini"
    source = mini / "annotations/instances_train2017.json"
    leaking = [100667, 212679, 322517, 370162, 379349]
    assert audit(source, mini / "refer").leaked == leaking
    result = build_split(source, mini / "refer", tmp_path / "clean.json")
    report = result.report
    assert report["removed_image_ids"] == leaking and report["images_after"] == 75
    assert (report["annotations_before"], report["annotations_after"]) == (739, 653)
    assert audit(result.out, mini / "refer").leaked == []
    assert audit(mini / "annotations/instances_val2017.json", mini / "refer").leaked == []


def test_the_synthetic_dataset(shapes_root: Path, tmp_path: Path) -> None:
    source = shapes_root / "annotations/instances_train2014.json"
    found = audit(source, shapes_root / "refer")
    assert 0 < len(found.leaked) < found.images
    result = build_split(source, shapes_root / "refer", tmp_path / "clean.json")
    assert result.report["images_removed"] == len(found.leaked)
    assert audit(result.out, shapes_root / "refer").leaked == []


# List, invalid fields of its first entry, and the error.
INVALID_ENTRIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "annotation twice": ("annotations", {"id": 1}, "duplicate annotation id 1"),
    "category": ("annotations", {"category_id": 7}, "annotation 0 has category 7"),
    "image": ("annotations", {"image_id": 99}, "image 99, which is not in the file"),
    "box": ("annotations", {"bbox": [1, 2, "3", 4]}, "annotation 0: 'bbox'"),
    "polygon": ("annotations", {"segmentation": [[1, 2, 3]]}, "annotation 0: a polygon"),
    "size of a mask": ("annotations", {"segmentation": {"size": [4, 4], "counts": [16]}}, "its image is [9, 9]"),
    "damaged mask": ("annotations", {"segmentation": {"size": [9, 9], "counts": "@"}}, "its RLE is damaged"),
    "no mask": ("annotations", {"segmentation": {"size": [9], "counts": []}}, "must be [height, width]"),
    "crowd": ("annotations", {"iscrowd": 2}, "'iscrowd' is 2"),
    "area": ("annotations", {"area": "big"}, "'area' is 'big'"),
    "height": ("images", {"height": 0}, "its size is 9x0"),
    "name": ("images", {"file_name": 3}, "'file_name' is a int"),
    "category name": ("categories", {"name": None}, "category 1 has no name"),
}


@pytest.mark.parametrize("first", ["annotations", "categories", "images"])
@pytest.mark.parametrize("kind", INVALID_ENTRIES)
def test_entries_that_training_refuses_are_refused_in_any_order_of_keys(
    dataset: tuple[Path, Path], tmp_path: Path, kind: str, first: str
) -> None:
    where, change, message = INVALID_ENTRIES[kind]
    data = coco([6, 1], [1, 6])
    data[where][0].update(change)
    source = write(tmp_path / "bad.json", {first: data[first]} | data)
    for work in (lambda: build_split(source, dataset[1], tmp_path / "o.json"), lambda: CocoIndex.load(source)):
        with pytest.raises(InputError) as caught:
            work()
        assert "bad.json" in str(caught.value)
    with pytest.raises(InputError) as caught:
        build_split(source, dataset[1], tmp_path / "o.json")
    assert message in str(caught.value)
    assert not (tmp_path / "o.json").exists()


@pytest.mark.parametrize(
    ("image_id", "file_name", "held", "note"),
    [
        (9, "COCO_train2014_000000000009_4.jpg", {9}, ""),
        (9, "9.jpg", {9}, ""),
        (9, "", {9}, ""),
        (1, "COCO_train2014_000000000009_4.jpg", {1, 9}, "image_id of 1 of 1 ref is not the COCO number"),
        (1, "street_9.jpg", {1}, "file_name of 1 of 1 ref has no COCO number (first: street_9.jpg)"),
        (1, "9.jpg", {1}, "file_name of 1 of 1 ref has no COCO number"),
    ],
)
def test_refs_are_identified_by_file_name_like_training_images(
    tmp_path: Path, image_id: int, file_name: str, held: set[int], note: str
) -> None:
    """Refs may use other image ids; then the number in the file name is the COCO id."""
    root = write_refs(tmp_path / "refer", {("refcoco", "unc"): [(image_id, "val")]})
    path = root / "refcoco/refs(unc).p"
    refs = [ref | {"file_name": file_name} for ref in pickle.loads(path.read_bytes())]
    path.write_bytes(pickle.dumps(refs, protocol=2))
    splits, notes = held_out(root)
    assert splits[0].image_ids == held
    assert any(note in text for text in notes) if note else not any("COCO number" in text for text in notes)
    leaked = audit(write(tmp_path / "f.json", coco([9, 25], [])), root).leaked
    assert leaked == ([9] if 9 in held else [])
