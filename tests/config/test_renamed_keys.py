"""Keys and names of older recipes: read as what they are called now, with a line each where a user wrote them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from refdet.config import recipe
from refdet.config.renamed_keys import KEYS, VALUES, deprecation_message, rename_old_keys
from refdet.errors import InputError

CHANGED: dict[str, Any] = {
    "input.short_sides": [400, 500], "input.long_side": 900, "model.inclusive": True, "model.seed_ranking": True,
    "model.rounded_anchors": True, "proposals.samples": 30, "proposals.train_candidates": 31,
    "proposals.test_candidates": 32, "proposals.train_proposals": 33, "proposals.test_proposals": 34,
    "head.samples": 35, "head.add_truth": False, "head.refill": True, "train.lr_drops": [0.5], "train.clip_norm": 2.5,
    "train.loaded_rate": 0.5, "train.save_every": 7,
}  # fmt: skip


def at(tree: dict[str, Any], key: str) -> Any:
    part, _, name = key.partition(".")
    return tree[part][name]


def test_every_new_name_is_a_key_of_today_and_no_old_one_is() -> None:
    today = recipe.Recipe().to_dict()
    assert set(CHANGED) == set(KEYS)
    for old, new in KEYS.items():
        part, _, name = old.partition(".")
        assert new in today[part] and name not in today[part]
    assert all(key in today[part] for part, key in VALUES)


@pytest.mark.parametrize("old", KEYS)
def test_an_old_key_works_in_each_place(old: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    part, _, name = old.partition(".")
    new, value = f"{part}.{KEYS[old]}", CHANGED[old]
    assert at(recipe.from_dict({part: {name: value}}).to_dict(), new) == value
    assert not caplog.text  # of a run directory, which nobody would correct
    (tmp_path / "mine.yaml").write_text(f"{part}:\n  {name}: {str(value).lower()}\n")
    written = recipe.load(str(tmp_path / "mine.yaml"))
    changed = recipe.load("c4-res50").with_changes([f"{old}={str(value).lower()}"])
    assert at(written.to_dict(), new) == at(changed.to_dict(), new) == value
    assert [record.getMessage() for record in caplog.records] == [f"note: {deprecation_message(old)}"] * 2
    assert f"{old} was renamed to {new};" in caplog.text


def test_old_values_and_names(caplog: pytest.LogCaptureFixture) -> None:
    assert recipe.from_dict({"model": {"pooling": "crop"}}).model.pooling == "crop_and_resize"
    assert recipe.load("c4-res50").with_changes(["model.pooling=crop"]).model.pooling == "crop_and_resize"
    assert "model.pooling=crop was renamed to model.pooling=crop_and_resize;" in caplog.text
    assert recipe.load("seed-c4-res101") == recipe.load("reference-c4-res101")
    assert "recipe seed-c4-res101 was renamed to reference-c4-res101;" in caplog.text
    with pytest.raises(InputError, match="seed-c4-res7: no such recipe"):
        recipe.load("seed-c4-res7")


def test_an_old_name_as_base_is_followed_with_the_same_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: seed-c4-res101\ntrain: {steps: 3}\n")
    expected = recipe.load("reference-c4-res101").with_changes(["name=mine", "train.steps=3"])
    assert recipe.load(str(path)) == expected
    assert [record.getMessage() for record in caplog.records] == [
        "note: recipe seed-c4-res101 was renamed to reference-c4-res101; the old name works until the next version"
    ]
    path.write_text("base: seed-c4-res7\n")
    with pytest.raises(InputError, match="mine.yaml: base: must be one of .*, not 'seed-c4-res7'"):
        recipe.load(str(path))


def test_both_names_at_once_are_refused() -> None:
    with pytest.raises(InputError, match="train.save_every: also given under its new name train.checkpoint_interval"):
        recipe.from_dict({"train": {"save_every": 1, "checkpoint_interval": 2}})


@pytest.mark.parametrize("tree", [None, 3, [], "x", {"train": 3}, {"train": None, "name": "a"}, {3: {"samples": 1}}])
def test_what_is_no_recipe_is_left_as_it_is(tree: Any) -> None:
    assert rename_old_keys(tree) == (tree, [])


@pytest.mark.parametrize("name", recipe.names())
def test_shipped_recipes_are_in_the_words_of_today(name: str) -> None:
    tree = recipe.load(name).to_dict()
    assert rename_old_keys(tree) == (tree, []) and dataclasses.asdict(recipe.from_dict(tree)) == dataclasses.asdict(
        recipe.load(name)
    )
