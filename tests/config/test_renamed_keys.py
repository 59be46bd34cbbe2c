"""Renamed recipe keys, values and recipes: the old names still work, with a note where a user wrote them."""

from __future__ import annotations

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from refdet.config import recipe, recipes
from refdet.config.renamed_keys import KEYS, VALUES, deprecation_message, rename_old_keys
from refdet.errors import InputError

# a value other than the default for each old key
CHANGED: dict[str, Any] = {
    "input.short_sides": [400, 500], "input.long_side": 900, "model.inclusive": True, "model.seed_ranking": True,
    "model.rounded_anchors": True, "proposals.samples": 30, "proposals.train_candidates": 31,
    "proposals.test_candidates": 32, "proposals.train_proposals": 33, "proposals.test_proposals": 34,
    "head.samples": 35, "head.add_truth": False, "head.refill": True, "train.lr_drops": [0.5], "train.clip_norm": 2.5,
    "train.loaded_rate": 0.5, "train.save_every": 7, "model.fpn_hidden": 77,
}  # fmt: skip


def value_at(tree: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return tree[section][name]


def test_new_names_are_recipe_keys_and_old_names_are_not() -> None:
    current = recipe.Recipe().to_dict()
    assert set(CHANGED) == set(KEYS)
    for old, new in KEYS.items():
        section, _, name = old.partition(".")
        assert new in current[section] and name not in current[section]
    assert all(key in current[section] for section, key in VALUES)


@pytest.mark.parametrize("old", KEYS)
def test_an_old_key_works_in_runs_files_and_changes(old: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    section, _, name = old.partition(".")
    new, value = f"{section}.{KEYS[old]}", CHANGED[old]
    assert value_at(recipe.from_dict({section: {name: value}}).to_dict(), new) == value
    assert not caplog.text  # users do not edit the recipe in a run directory, so it needs no note
    (tmp_path / "mine.yaml").write_text(f"{section}:\n  {name}: {str(value).lower()}\n")
    written = recipe.load(str(tmp_path / "mine.yaml"))
    changed = recipe.load("c4-res50").with_changes([f"{old}={str(value).lower()}"])
    assert value_at(written.to_dict(), new) == value_at(changed.to_dict(), new) == value
    assert [record.getMessage() for record in caplog.records] == [f"note: {deprecation_message(old)}"] * 2
    assert f"{old} was renamed to {new};" in caplog.text


def test_old_values_and_recipe_names_work(caplog: pytest.LogCaptureFixture) -> None:
    assert recipe.from_dict({"model": {"pooling": "crop"}}).model.pooling == "crop_and_resize"
    assert recipe.load("c4-res50").with_changes(["model.pooling=crop"]).model.pooling == "crop_and_resize"
    assert "model.pooling=crop was renamed to model.pooling=crop_and_resize;" in caplog.text
    assert recipe.load("seed-c4-res101") == recipe.load("reference-c4-res101")
    assert "recipe seed-c4-res101 was renamed to reference-c4-res101;" in caplog.text
    with pytest.raises(InputError, match="seed-c4-res7: no such recipe"):
        recipe.load("seed-c4-res7")


def test_an_old_recipe_name_works_as_base_with_the_same_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_key_under_both_names_is_refused() -> None:
    with pytest.raises(InputError, match="train.save_every: also given under its new name train.checkpoint_interval"):
        recipe.from_dict({"train": {"save_every": 1, "checkpoint_interval": 2}})


@pytest.mark.parametrize("tree", [None, 3, [], "x", {"train": 3}, {"train": None, "name": "a"}, {3: {"samples": 1}}])
def test_a_tree_that_is_not_a_recipe_is_returned_unchanged(tree: Any) -> None:
    assert rename_old_keys(tree) == (tree, [])


@pytest.mark.parametrize("name", recipe.names())
def test_shipped_recipes_use_current_names(name: str) -> None:
    tree = yaml.safe_load((resources.files(recipes) / f"{name}.yaml").read_text(encoding="utf-8"))
    assert rename_old_keys(tree) == (tree, [])
    assert tree.get("base") in (None, *recipe.names())


@pytest.mark.parametrize("name", recipe.names())
def test_recipes_are_stored_under_current_names(name: str) -> None:
    loaded = recipe.load(name)
    tree = loaded.to_dict()
    assert rename_old_keys(tree) == (tree, [])
    assert dataclasses.asdict(recipe.from_dict(tree)) == dataclasses.asdict(loaded)
