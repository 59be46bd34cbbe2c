"""REFER: the results of its API, and the files that it refuses."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refer_examples import GREFS, REFS, write

from refer import REFER, ReferDataError, ReferError, ReferIdError, ReferNotFoundError, available, read_refs
from refer.statistics import COUNTS


def test_queries_by_id_return_ids_and_records(tmp_path: Path) -> None:
    r = REFER(write(tmp_path, REFS), "refcoco", "unc")
    assert r.getRefIds() == [0, 1, 2, 3]
    assert r.getRefIds(split="test") == [1, 2] and r.getRefIds(split="testA") == [1]
    assert r.getRefIds(split="train") == [0] and r.getRefIds(split="testC") == []
    assert r.getRefIds(image_ids=[4, 5], cat_ids=1) == [2, 3] and r.getRefIds(ref_ids=[3, 0]) == [0, 3]
    assert r.getRefIds(image_ids=[4, 3, 4, 99]) == [2, 3, 0, 1] and r.getRefIds(cat_ids=[9]) == []
    assert r.getRefIds(split=["train", "val"]) == [0, 3] and r.getRefIds(image_ids=np.array([3])) == [0, 1]
    assert r.getAnnIds(image_ids=[4, 3], ref_ids=[0, 3]) == [6, 7] and r.getAnnIds(np.int64(4)) == [6, 9]
    assert r.getAnnIds() == [6, 7, 8, 9, 11] and r.getAnnIds(image_ids=3) == [7, 8]
    assert r.getAnnIds(ref_ids=[1, 2]) == [8, 9] and r.getAnnIds(cat_ids=[2]) == [8]
    assert r.getImgIds() == [3, 4, 5] and r.getImgIds([2, 3]) == [4] and r.getCatIds() == [1, 2]
    assert r.loadRefs(2) == [REFS[2]] and r.loadCats([2, 1]) == ["cat", "dog"]
    assert [a["id"] for a in r.loadAnns([9, 6])] == [9, 6] and r.loadImgs(5)[0]["width"] == 8
    assert r.refToAnn[1]["id"] == 8 and r.annToRef[9]["ref_id"] == 2 and r.sentToTokens[10] == ["red", "dog"]
    assert [x["ref_id"] for x in r.imgToRefs[3]] == [0, 1] and [x["ref_id"] for x in r.catToRefs[2]] == [1]
    assert r.Sents[20]["raw"] == "Red dog" and r.sentToRef[20]["ref_id"] == 2 and len(r.imgToAnns[4]) == 2
    with pytest.raises(ReferDataError, match="no split 'tset'; choose from testA, testB, train, val"):
        r.getRefIds(split="tset")
    with pytest.raises(ReferDataError, match="no ref with id 99"):
        r.loadRefs([0, 99])


@pytest.mark.parametrize("dataset", ["refcoco", "grefcoco"])
def test_unknown_ids_are_key_errors_with_a_plain_message(tmp_path: Path, dataset: str) -> None:
    """Code written for the original catches KeyError, whose str() would put quotes around the message."""
    generalized = dataset == "grefcoco"
    refs, name = (GREFS, "grefs(unc).json") if generalized else (REFS, "refs(unc).p")
    r = REFER(write(tmp_path, refs, name, dataset), dataset, "unc")
    foreign = refs[0] | {"ref_id": 99}
    calls = [
        (lambda: r.loadRefs(99), "no ref with id 99"),
        (lambda: r.loadRefs([0, -1]), "no ref with id -1"),
        (lambda: r.loadAnns([7, 99]), "no annotation with id 99"),
        (lambda: r.loadImgs(0), "no image with id 0"),
        (lambda: r.loadCats([1, 99]), "no category with id 99"),
        (lambda: r.getRefBox(99), "no ref with id 99"),
        (lambda: r.getAnnIds(ref_ids=[99]), "no ref with id 99"),
        (lambda: r.getImgIds(ref_ids=[99]), "no ref with id 99"),
        (lambda: r.getMask(foreign), "no ref with id 99"),
        (lambda: r.getMask(refs[0] | {"image_id": 99}), "no image with id 99"),
        (lambda: r.getMaskByRef(ref_id=99), "no ref with id 99"),
    ]
    for call, message in calls:
        for kind in (KeyError, LookupError, ReferIdError, ReferDataError, ReferError, ValueError):
            with pytest.raises(kind) as raised:
                call()
            assert str(raised.value) == message and str(pickle.loads(pickle.dumps(raised.value))) == message


@pytest.mark.parametrize("ids", ["12", [1, "2"], 1.5, None, [[1]]])
def test_values_that_are_not_ids_are_refused(tmp_path: Path, ids: Any) -> None:
    r = REFER(write(tmp_path))
    for call in (r.getRefIds, r.getAnnIds, r.getImgIds, r.loadRefs, r.loadAnns, r.loadImgs, r.loadCats):
        with pytest.raises(ReferDataError, match="ids must be integers or lists of integers"):
            call(ids)


def test_a_dataset_is_a_sequence_of_refs_with_the_original_attributes(tmp_path: Path) -> None:
    r = REFER(write(tmp_path), "refcoco", "unc")
    assert len(r) == 4 and list(r) == REFS and "refs=4, sentences=4, images=3" in repr(r)
    assert r.data["dataset"] == "refcoco" and [image["id"] for image in r.data["images"]] == [3, 4, 5]
    assert str(tmp_path / "refcoco") == r.DATA_DIR and (Path(r.ROOT_DIR) / "api.py").is_file()
    assert str(tmp_path / "images/mscoco/images/train2014") == r.IMAGE_DIR
    (tmp_path / "images/train2014").mkdir(parents=True)
    assert str(tmp_path / "images/train2014") == REFER(tmp_path).IMAGE_DIR
    r.data["refs"] = r.data["refs"][:1]
    r.createIndex()
    assert list(r.Refs) == [0] and list(r.sentToRef) == [0] and list(r.annToRef) == [7] and list(r.imgToRefs) == [3]


def test_to_dataframe_has_a_row_per_sentence(tmp_path: Path) -> None:
    refs = [
        *REFS[:2],
        REFS[2] | {"sentences": [REFS[2]["sentences"][0], {"sent_id": 99, "sent": "b", "tokens": ["b"]}]},
    ]
    table = REFER(write(tmp_path, refs)).to_dataframe()
    assert table["sent_id"].tolist() == [0, 10, 20, 99] and table["sent"].tolist() == ["red dog"] * 3 + ["b"]
    assert table["category"].tolist() == ["dog", "cat", "dog", "dog"] and table["targets"].tolist() == [1] * 4
    assert table["tokens"][0] == ["red", "dog"] and table["file_name"].tolist() == ["3.jpg", "3.jpg", "4.jpg", "4.jpg"]
    assert table[["x", "y", "width", "height"]].iloc[1].tolist() == [2, 0, 4, 2]
    counts = table.groupby("split")["sent_id"].count()
    assert counts.to_dict() == {"train": 1, "testA": 1, "testB": 2}
    assert len(REFER(write(tmp_path, [])).to_dataframe()) == 0


def test_errors_say_where_to_get_a_missing_dataset(tmp_path: Path) -> None:
    with pytest.raises(ReferNotFoundError) as caught:
        REFER(tmp_path / "data", "refcoco", "unc")
    message = str(caught.value)
    assert "no such folder" in message and "refcoco.zip" in message and str(tmp_path / "data" / "refcoco") in message
    assert "train 42404 refs on 16994 images" in message and "testB 1810 refs on 750 images" in message
    with pytest.raises(ReferNotFoundError, match=r"give the REFER data folder; .*refcoco\+\.zip.*val 3805 refs"):
        REFER(tmp_path, "refcoco+", "unc")
    write(tmp_path)
    with pytest.raises(ReferNotFoundError, match=r"choose split_by unc; unpack refcoco\.zip.*test 5000 refs on 4527"):
        REFER(tmp_path, "refcoco", "google")
    with pytest.raises(ReferNotFoundError, match=r"choose from refcoco; unpack refcocog\.zip.*test 5023 refs on 2600"):
        REFER(tmp_path, "refcocog", "umd")
    with pytest.raises(ReferNotFoundError, match=r"refs\(google\)\.p, refs\(umd\)\.p are.*by google and by umd"):
        REFER(tmp_path, "refcocog", "unc")
    with pytest.raises(ReferNotFoundError, match=r"refclef\.zip.*saiapr_tc-12\.zip"):
        REFER(tmp_path, "refclef", "berkeley")
    with pytest.raises(ReferNotFoundError, match=r"grefs\(unc\)\.json.*278232 sentences"):
        REFER(tmp_path, "grefcoco", "unc")


def test_the_published_counts_are_those_of_the_real_splits(shared: Path) -> None:
    real = json.loads((shared / "data/refer_split_images.json").read_text())
    assert len(real) == 7
    for name, split in real.items():
        dataset, split_by, which = name.split("/")
        counts = COUNTS[dataset, split_by][which]
        assert counts == (split["num_refs"], len(split["images"]), split["num_sentences"])


def test_available_lists_datasets_and_errors_list_them(tmp_path: Path) -> None:
    write(tmp_path, REFS)
    write(tmp_path, REFS, "refs(umd).p", "refcocog")
    write(tmp_path, REFS, "refs(google).p", "refcocog")
    (tmp_path / "images").mkdir()
    assert available(tmp_path) == [("refcoco", "unc"), ("refcocog", "google"), ("refcocog", "umd")]
    with pytest.raises(ReferNotFoundError, match="'flowers'; choose from refcoco, refcocog"):
        REFER(tmp_path, "flowers")
    with pytest.raises(ReferNotFoundError, match="split_by google, umd"):
        REFER(tmp_path, "refcocog", "unc")
    with pytest.raises(ReferNotFoundError, match="folder above"):
        REFER(tmp_path / "refcoco")
    with pytest.raises(ReferNotFoundError, match="no such folder"):
        available(tmp_path / "nowhere")
    undecodable = tmp_path / os.fsdecode(b"\xff") / "refs(unc).p"  # a name that is not valid UTF-8
    undecodable.parent.mkdir()
    undecodable.write_bytes(b"")
    assert len(available(tmp_path)) == 3
    (tmp_path / "refcoco" / "instances.json").unlink()
    with pytest.raises(ReferNotFoundError, match="instances.json"):
        REFER(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ann_id": 99}, "ref 3 has annotation 99, which is not in"),
        ({"image_id": 5}, "ref 3 has image 5, but its annotation 6 has image 4"),
        ({"image_id": 77}, "image 77"),
        ({"ref_id": 0}, "ref_id 0 is a duplicate"),
        ({"ref_id": "3"}, "'ref_id' is '3'"),
        ({"split": None}, "'split'"),
        ({"sentences": [{"sent_id": 1}]}, "'sent' is missing"),
        ({"sentences": ["red"]}, "sentence of ref 3"),
    ],
)
def test_an_invalid_ref_is_named(tmp_path: Path, change: dict, text: str) -> None:
    write(tmp_path, [*REFS[:3], REFS[3] | change])
    with pytest.raises(ReferDataError) as caught:
        REFER(tmp_path)
    assert text in str(caught.value) and "refcoco" in str(caught.value)


class Hostile:
    """Unpickling this runs a command."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch hostile-was-here",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_pickles_are_refused_by_name(tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, [Hostile()], protocol=protocol)
    with pytest.raises(ReferDataError, match=r"refs\(unc\).p: asks for (posix|nt)\.system"):
        read_refs(tmp_path, "refcoco", "unc")
    assert not (tmp_path / "hostile-was-here").exists()


@pytest.mark.parametrize("data", [np.int64(3), np.float32(1), np.zeros(3), REFER, len, Path("x")])
def test_pickles_of_other_types_are_refused(tmp_path: Path, data: Any) -> None:
    write(tmp_path, [REFS[0] | {"ref_id": data}])
    with pytest.raises(ReferDataError, match="asks for"):
        read_refs(tmp_path, "refcoco", "unc")


@pytest.mark.parametrize("data", [b"", b"no pickle", b"\x80\x04\x95", b"cos\nsystem\n(S'true'\ntR.", b"}.", b"K\x01."])
def test_invalid_pickles_are_refused(tmp_path: Path, data: bytes) -> None:
    write(tmp_path, data)
    with pytest.raises(ReferDataError, match=r"refs\(unc\).p"):
        read_refs(tmp_path, "refcoco", "unc")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    cut=st.integers(0, 10**6),
    flip=st.integers(0, 10**6),
    byte=st.integers(0, 255),
    protocol=st.sampled_from([0, 2]),
)
def test_damaged_pickles_load_or_are_refer_errors(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int, byte: int, protocol: int
) -> None:
    whole = pickle.dumps(REFS, protocol=protocol)
    with pytest.raises(ReferDataError):
        read_refs(write(tmp_path_factory.mktemp("cut"), whole[: cut % len(whole)]), "refcoco", "unc")
    changed = bytearray(whole)
    changed[flip % len(whole)] = byte
    try:
        read_refs(write(tmp_path_factory.mktemp("flip"), bytes(changed)), "refcoco", "unc")
    except ReferError as error:
        assert "\n" not in str(error) and "refs(unc).p" in str(error)


def test_python_2_pickle_with_byte_strings_and_sets(tmp_path: Path) -> None:
    # [{'ref_id': 1, ..., 'split': 'caf\xe9', 'x': set([1])}] as Python 2 writes it, protocol 0
    text = (b"(lp0\n(dp1\nS'ref_id'\nI1\nsS'ann_id'\nI7\nsS'category_id'\nL1L\nsS'image_id'\nI3\n"
            b"sS'split'\nS'caf\\xe9'\nsS'sentences'\n(lsS'x'\nc__builtin__\nset\n((lI1\natRsa.")  # fmt: skip
    [one] = read_refs(write(tmp_path, text), "refcoco", "unc")
    assert one["split"] == "caf\xe9" and one["category_id"] == 1 and one["x"] == {1}  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    "text", ["{\n,}", "[]", "{}", '{"images": [{"id": "3"}], "annotations": [], "categories": []}']
)
def test_invalid_instances_are_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path, REFS)
    (tmp_path / "refcoco" / "instances.json").write_text(text)
    with pytest.raises(ReferDataError, match="instances.json"):
        REFER(tmp_path)


def test_real_refs_have_masks_of_the_annotated_area(shared: Path) -> None:
    root = shared / "data/coco_mini/refer"
    assert available(root) == [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")]
    counts = {name: len(REFER(root, name, by).getRefIds()) for name, by in available(root)}
    assert counts == {"refcoco": 12, "refcoco+": 12, "refcocog": 6}
    r = REFER(root, "refcoco", "unc")
    for one in r.loadRefs(r.getRefIds()):
        assert r.getMask(one)["area"] == pytest.approx(r.refToAnn[one["ref_id"]]["area"], rel=0.05, abs=30)


def test_the_synthetic_dataset_loads(shapes_root: Path) -> None:
    pairs = available(shapes_root / "refer")
    assert ("refcoco", "unc") in pairs and ("refcocog", "umd") in pairs
    for dataset, split_by in pairs:
        r = REFER(shapes_root / "refer", dataset, split_by)
        assert r.getRefIds(split="train") and r.getRefIds(split="val")
        assert r.getMask(r.loadRefs(r.getRefIds()[0])[0])["area"] > 0


def test_importing_refer_imports_no_heavy_packages() -> None:
    code = "import refer, sys; sys.exit(bool({'torch', 'refdet', 'pandas', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
