"""The model card: AP on different validation data is never compared, and its audit command names the right files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from training_examples import tiny

from refdet.detector.checkpoint import CheckpointMetadata
from refdet.structures.provenance import Provenance, Selection
from refdet.training.metrics_rows import DATA_HASH_KEY
from refdet.training.run_card import CARD, write_card

META = CheckpointMetadata(tiny(), ((3, "a"),), Provenance("split.json", "ab", 4, 8, "cd"), 6)


@pytest.mark.parametrize("first", ["ab", None])
def test_the_best_ap_is_among_validations_on_the_same_data_as_the_last(tmp_path: Path, first: str | None) -> None:
    """`first` is the hash of the first row's data; rows of older versions have none."""
    other = {} if first is None else {DATA_HASH_KEY: first}
    rows = [
        {"step": 2, "val_bbox_AP": 0.9, **other},
        {"step": 4, "val_bbox_AP": 0.5, DATA_HASH_KEY: "cd"},
        {"step": 6, "val_bbox_AP": 0.4, DATA_HASH_KEY: "cd"},
    ]
    write_card(tmp_path, META, rows, "3 images of second.json")
    card = (tmp_path / CARD).read_text()
    assert "| boxes, last, step 6 | 0.400 |" in card and "| boxes, best, step 4 | 0.500 |" in card
    assert "0.900" not in card


def test_the_learning_curve_shows_ap_on_the_same_data_as_the_last_validation(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 2.0} for step in (2, 4)]
    validated = [
        {"step": 2, "val_bbox_AP": 0.9, DATA_HASH_KEY: "ab"},
        {"step": 4, "val_bbox_AP": 0.5, DATA_HASH_KEY: "cd"},
    ]
    write_card(tmp_path, META, [*rows, *validated], "3 images of second.json")
    card = (tmp_path / CARD).read_text()
    curve = card[card.index("## Learning curve") : card.index("## How to use it")]
    assert "0.500" in curve and "0.900" not in curve


@pytest.mark.parametrize("validated", ["not", "on a split", "on another file"])
@pytest.mark.parametrize("held_out", [True, False])
def test_the_audit_command_names_no_file_that_still_has_the_held_out_images(
    tmp_path: Path, held_out: bool, validated: str
) -> None:
    """The record in a file of build-split names the original, which an audit would find to leak."""
    excluded = {"refcoco/unc/val": {"images": 1, "found": 1}}
    trained_on = Provenance("original.json", "ab", 4, 8, "cd", excluded if held_out else {})
    if validated != "not":
        chosen_on = Provenance("val.json", "ef", 2, 3, "01", excluded if validated == "on a split" else {})
        trained_on = replace(trained_on, selection=Selection(by_validation=True, validated_on=(chosen_on,)))
    write_card(tmp_path, replace(META, provenance=trained_on))
    card = (tmp_path / CARD).read_text()
    command = card[card.index("refdet audit") : card.index(" --refer-root DIR`")]
    if not held_out:
        assert command == "refdet audit --instances original.json"
    else:
        chosen = {"not": "", "on a split": " --val-instances VAL.json", "on another file": " --val-instances val.json"}
        assert command == f"refdet audit --checkpoint RUN --instances SPLIT.json{chosen[validated]}"
