"""Names of datasets and splits in other formats of REFER, and REFER's own names for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from refdet.data.refer_formats.split_names import dataset_in, match_split_names, split_by_in, split_in
from refdet.errors import InputError
from refer.statistics import COUNTS, Counts


@pytest.mark.parametrize(
    ("text", "dataset", "split_by"),
    [
        ("REC_refcoco+_unc_val", "refcoco+", "unc"),
        ("RefCOCOplus", "refcoco+", ""),
        ("refcocog_umd_test", "refcocog", "umd"),
        ("RefCOCO", "refcoco", ""),
        ("refcocop", "refcoco+", ""),
        ("RefCOCO-plus_google", "refcoco+", "google"),
        ("refcoco_g_umd", "refcocog", "umd"),
        ("RefCOCO-g", "refcocog", ""),
        ("refcoco_google", "refcoco", "google"),
        ("gRefCOCO_unc", "", "unc"),
        ("shapes", "", ""),
    ],
)
def test_dataset_and_split_by_are_parsed_from_names(text: str, dataset: str, split_by: str) -> None:
    assert (dataset_in(text), split_by_in(text)) == (dataset, split_by)


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("finetune_refcoco+_testA.json", "testA"),
        ("test-00000-of-00001-b85.parquet", "test"),
        ("validation-00000-of-00001.parquet", "val"),
        ("default/testB/0000.parquet", "testB"),
        ("refcoco/train2014.json", "train"),
        ("refcoco_dev.json", "val"),
        ("refcoco_test-dev.json", "test"),
        ("refcoco_train_dev.json", "train"),
        ("dev/refcoco.json", ""),
        ("dev/test/refcoco.json", "test"),
        ("refcocog_val_train2014.json", "val"),
        ("train2014_testB/refcoco.json", "testB"),
        ("constrained.json", ""),
    ],
)
def test_splits_are_parsed_from_paths(path: str, split: str) -> None:
    assert split_in(Path(path)) == split


@pytest.mark.parametrize("pair", sorted(COUNTS))
def test_splits_are_recognized_by_their_published_size(pair: tuple[str, str]) -> None:
    sizes = {f"part{number}": counts for number, counts in enumerate(COUNTS[pair].values())}
    assert match_split_names(*pair, sizes) == dict(zip(sizes, COUNTS[pair], strict=True))


def test_a_split_called_test_is_test_a_if_there_is_a_test_b() -> None:
    few = Counts(3, 2)
    assert match_split_names("refcoco", "unc", {"test": few, "testB": few, "validation": few}) == {
        "test": "testA",
        "testB": "testB",
        "validation": "val",
    }
    assert match_split_names("refcoco", "unc", {"test": Counts(1810, 750)}) == {"test": "testB"}


def test_split_names_are_recognized_in_any_case() -> None:
    few = Counts(3, 2)
    names = match_split_names("refcoco", "unc", {"Train": few, "VAL": few, "TestA": few, "Testb": few})
    assert names == {"Train": "train", "VAL": "val", "TestA": "testA", "Testb": "testB"}
    assert match_split_names("refcoco", "unc", {"Test": few, "testB": few}) == {"Test": "testA", "testB": "testB"}


def test_a_split_of_another_size_and_name_is_an_error() -> None:
    few = Counts(3, 2)
    with pytest.raises(InputError, match="its 3 refs on 2 images are not the size of any split of refcoco/unc"):
        match_split_names("refcoco", "unc", {"test": few})
    with pytest.raises(InputError, match="are both val"):
        match_split_names("refcoco", "unc", {"val": few, "validation": few})
