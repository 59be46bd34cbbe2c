"""MAttNet's data.json and data.h5, with the vocabulary and numbering of its prepro.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import h5py
import pytest
from export_examples import write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from refer_examples import GREFS, INSTANCES, write

from refdet.errors import InputError
from refdet.store.export.mattnet_prepro import Prepro, PreproOptions, build_vocabulary, prepare
from refer import ReferError, read_refs

WORDS = st.sampled_from(["red", "dog", "cat", "left", "big", "teddy"])


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.dictionaries(st.integers(0, 50), st.lists(WORDS, max_size=6), max_size=12), st.integers(0, 4))
def test_the_vocabulary_agrees_with_brute_force(sentences: dict[int, list[str]], threshold: int) -> None:
    word_to_ix, final = build_vocabulary(sentences, ["dog", "teddy bear"], threshold)
    every = [word for words in sentences.values() for word in words]
    frequent = [word for i, word in enumerate(every) if every.count(word) > threshold and word not in every[:i]]
    added = [word for word in ("dog", "teddy", "bear", "__background__") if word not in frequent]
    rare = ["<UNK>"] if any(every.count(word) <= threshold for word in every) else []
    assert list(word_to_ix) == ["<PAD>", *frequent, *added, *rare, "<BOS>", "<EOS>"]
    assert list(word_to_ix.values()) == list(range(len(word_to_ix)))
    known = {*frequent, *added}
    assert final == {i: [word if word in known else "<UNK>" for word in words] for i, words in sentences.items()}


def test_images_and_annotations_are_numbered_in_the_order_of_the_input_files(tmp_path: Path) -> None:
    prepro = prepare(write_dataset(tmp_path), "refcoco", "unc", PreproOptions(word_count_threshold=5))
    prepro.write(tmp_path)
    data: dict[str, Any] = json.loads((tmp_path / "data.json").read_text())
    assert [(i["image_id"], i["h5_id"], i["ref_ids"], i["ann_ids"]) for i in data["images"]] == [
        (3, 0, [0, 1], [7, 8]), (4, 1, [2, 3], [6, 12, 9]), (5, 2, [4], [11]),
    ]  # fmt: skip
    assert [(a["ann_id"], a["h5_id"], a["image_id"]) for a in data["anns"]] == [
        (7, 0, 3), (8, 1, 3), (6, 2, 4), (12, 3, 4), (9, 4, 4), (11, 5, 5),
    ]  # fmt: skip
    assert data["refs"][1] == {"ref_id": 1, "split": "train", "category_id": 2, "ann_id": 8, "sent_ids": [10],
                               "box": [2, 0, 4, 2], "image_id": 3, "att_wds": []}  # fmt: skip
    # five sentences "red dog": red is not more frequent than 5, but dog is a category
    assert data["sentences"][0] == {"sent_id": 0, "tokens": ["<UNK>", "dog"], "h5_id": 0}
    assert list(data["word_to_ix"]) == ["<PAD>", "dog", "cat", "__background__", "<UNK>", "<BOS>", "<EOS>"]
    assert data["cat_to_ix"] == {"dog": 1, "cat": 2} and data["label_length"] == 10
    with h5py.File(tmp_path / "data.h5") as file:
        assert file["labels"].dtype == "int32" and file["labels"].shape == (5, 10)
        assert file["labels"][4].tolist() == [4, 1] + 8 * [0]


def test_labels_are_truncated_at_the_maximum_length(tmp_path: Path) -> None:
    prepro = prepare(write_dataset(tmp_path), "refcoco", "unc", PreproOptions(0, max_length=1))
    assert prepro.labels is not None and prepro.labels.tolist() == 5 * [[1]]
    assert prepro.data["sentences"][0]["tokens"] == ["red", "dog"] and "<UNK>" not in prepro.data["word_to_ix"]


def test_attribute_words_are_counted_once_per_ref(tmp_path: Path) -> None:
    words = {0: (["dog"], ["red", "red"], ["big"]), 10: (["none"], ["red"], ["old"]), 20: ([], ["red"], ["big", "up"])}
    sents = [{"sent_id": i, "atts": dict(zip(("r1", "r2", "r7"), w, strict=True))} for i, w in words.items()]
    path = tmp_path / "sents.json"
    path.write_text(json.dumps(sents))
    root = write_dataset(tmp_path)
    data = prepare(root, "refcoco", "unc", PreproOptions(0, attributes=path, top_attributes=3)).data
    assert data["att_to_cnt"] == {"red": 3, "big": 2, "old": 1} and data["att_to_ix"] == {"red": 0, "big": 1, "old": 2}
    assert [ref["att_wds"] for ref in data["refs"]] == [["red", "big"], ["red", "old"], ["red", "big"], [], []]
    for sent_id in (999, "x" * 5000):
        path.write_text(json.dumps([{"sent_id": sent_id, "atts": {}}]))
        with pytest.raises(InputError, match="not refer-parser2's sents.json of this dataset") as caught:
            prepare(root, "refcoco", "unc", PreproOptions(attributes=path))
        assert len(str(caught.value)) < 500


def test_grefcoco_is_refused(tmp_path: Path) -> None:
    write(tmp_path, GREFS, "grefs(unc).json", "grefcoco")
    with pytest.raises(InputError, match="give `max_length`"):
        prepare(tmp_path, "grefcoco", "unc", PreproOptions())
    with pytest.raises(InputError, match="any number of targets"):
        prepare(tmp_path, "grefcoco", "unc", PreproOptions(max_length=5))


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("annotations", "bbox", None, "annotation 7 has no bbox"),
        ("annotations", "bbox", [1, 1, 10**400, 4], "bbox of annotation 7 is not finite"),
        ("annotations", "category_id", "1", "annotation number 0: 'category_id' is '1'; it must be of type int"),
        ("images", "height", 6.5, "image number 0: 'height' is 6.5; it must be of type int"),
        ("images", "file_name", None, "image number 0: 'file_name' is None; it must be of type str"),
    ],
)
def test_invalid_instances_are_refused(tmp_path: Path, part: str, key: str, value: Any, message: str) -> None:
    first, second, *others = INSTANCES[part]
    entries = [{**second, key: value}, first, *others]
    write(tmp_path, instances={**INSTANCES, part: entries})
    with pytest.raises(ReferError, match=f"{re.escape(str(tmp_path))}.*: .*{re.escape(message)}"):
        prepare(tmp_path, "refcoco", "unc", PreproOptions())


def test_a_written_data_json_is_read_and_an_invalid_one_is_refused(tmp_path: Path) -> None:
    prepare(write_dataset(tmp_path), "refcoco", "unc", PreproOptions()).write(tmp_path)
    path = tmp_path / "data.json"
    assert [ann["h5_id"] for ann in Prepro.read(path).data["anns"]] == list(range(6))
    image, annotation = {"image_id": 1}, {"ann_id": 1, "h5_id": 0}
    invalid: list[Any] = [
        [],
        {"images": []},  # no anns
        {"images": [], "anns": [{"ann_id": 1, "h5_id": 1}]},  # h5_id 0 is missing
        {"images": [], "anns": [], "cat_to_ix": {"dog": "a\nb"}},
        {"images": [image, image], "anns": []},
        {"images": [image], "anns": [annotation, {"ann_id": 1, "h5_id": 1}]},
        {"images": [image], "anns": [{"ann_id": "1", "h5_id": 0}]},
        {"images": [{"image_id": 1.0}], "anns": []},
    ]
    for tree in invalid:
        path.write_text(json.dumps(tree))
        with pytest.raises(InputError, match="`data_json`"):
            Prepro.read(path)


@pytest.mark.parametrize(("dataset", "split_by"), [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")])
def test_labels_of_real_sentences_spell_their_words(shared: Path, dataset: str, split_by: str) -> None:
    root = shared / "data" / "coco_mini" / "refer"
    prepro = prepare(root, dataset, split_by, PreproOptions(word_count_threshold=0))
    assert prepro.labels is not None
    words, length = list(prepro.data["word_to_ix"]), prepro.data["label_length"]
    assert length == (20 if dataset == "refcocog" else 10) and words[0] == "<PAD>"
    tokens = {s["sent_id"]: s["tokens"] for ref in read_refs(root, dataset, split_by) for s in ref["sentences"]}
    assert len(tokens) == len(prepro.data["sentences"]) > 10
    for sentence in prepro.data["sentences"]:
        row = prepro.labels[sentence["h5_id"]]
        assert [words[i] for i in row if i] == tokens[sentence["sent_id"]][:length]
    assert {word for name in prepro.data["cat_to_ix"] for word in name.split()} < set(words)
