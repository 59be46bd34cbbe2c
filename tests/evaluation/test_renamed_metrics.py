"""Old names of metrics: written beside the new ones, and read if a file has only the old ones."""

from __future__ import annotations

from typing import Any

import pytest

from refdet.evaluation.renamed_metrics import add_old_names, rename_old_names

NEW = {
    "dataset": "toy",
    "splits": {
        "val": {"images": 3, "recall@k": {"1": 0.5}, "recall@k_with_category": {"1": 0.25},
                "comprehension": {"accuracy@0.5": 0.75, "random_baseline@0.5": 0.125}},
        "test": {"images": 2, "recall@k": {"1": 1.0}, "recall@k_with_category": {"1": 1.0}},
    },
}  # fmt: skip


def test_a_file_has_both_names_and_is_read_under_the_new_ones() -> None:
    written = add_old_names(NEW)
    val = written["splits"]["val"]
    assert val["recall_by_regions"] == val["recall@k"] and val["recall_by_regions_with_category"] == {"1": 0.25}
    assert val["comprehension"]["guessing@0.5"] == 0.125 == val["comprehension"]["random_baseline@0.5"]
    assert rename_old_names(written) == rename_old_names(NEW) == NEW


def test_a_file_of_an_older_refdet_is_read_under_the_new_names() -> None:
    old = add_old_names(NEW)
    for values in old["splits"].values():
        del values["recall@k"], values["recall@k_with_category"]
        values.get("comprehension", {}).pop("random_baseline@0.5", None)
    assert rename_old_names(old) == NEW


@pytest.mark.parametrize("metrics", [None, 3, [], {}, {"splits": 3}, {"splits": {"val": None}}])
def test_values_that_are_not_metrics_are_unchanged(metrics: Any) -> None:
    assert rename_old_names(metrics) == metrics
