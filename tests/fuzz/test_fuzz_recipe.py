"""Untrusted recipes: limits on YAML, and damaged recipes, which load or end in a short one-line error."""

import os
import random
import time
from pathlib import Path

import pytest
import yaml
from foreign_weights import call, refused
from fuzz_damage import damage
from fuzzing import fuzz
from hypothesis import given, settings
from hypothesis import strategies as st

from refdet.config import recipe, safe_yaml
from refdet.config.safe_yaml import parse_yaml
from refdet.errors import InputError
from refdet.files.short_text import short_repr, shorten

pytestmark = pytest.mark.slow


def billion_laughs(levels: int) -> str:
    """YAML whose aliases expand to 10 to the power of ``levels`` values."""
    text = "&a0 [lol, lol]"
    for level in range(1, levels):
        text = f"&a{level} [{text}" + f", *a{level - 1}" * 9 + "]"
    return f"model: {text}\n"


# an invalid recipe, and text of the error
INVALID = {
    "laughs": (billion_laughs(9), "alias *a0 is not supported; write out the value, line 1"),
    "merge": ("a: &x {b: 1}\nmodel:\n  <<: *x\n", "alias *x is not supported"),
    "inline merge": ("model: {<<: {width: 8}}", "key '<<' is not text"),
    "deep list": ("[" * 10_000, "nested more than 16 levels deep"),
    "deep mapping": ("{a: " * 10_000, "nested more than 16 levels deep"),
    "deep block": ("".join(f"{' ' * i}a:\n" for i in range(400)), "nested more than 16 levels deep"),
    "long": ("name: " + "x" * 1001, "value longer than 1000 characters"),
    "sexagesimal": ("train: {steps: 1" + ":1" * 600 + "}", "value longer than 1000 characters"),
    "many": ("a: [" + "1, " * 10_001 + "1]", "more than 10000 values"),
    "twice": ("train: {steps: 5, lr: 1, steps: 6}", "duplicate key 'steps', line 1"),
    "twice on top": ("name: a\nname: b\n", "duplicate key 'name', line 2"),
    "number as key": ("1: 2", "key '1' is not text; put it in quotes"),
    "truth as key": ("train: {on: 2}", "key 'on' is not text"),
    "list as key": ("? [a]\n: 2", "is not text"),
    "python": ("model: !!python/object/apply:os.system [true]", "tag tag:yaml.org,2002:python/object/apply:os.sy"),
    "binary": ("model: !!binary aGk=", "tag tag:yaml.org,2002:binary is not supported"),
    "set": ("model: !!set {a, b}", "tag tag:yaml.org,2002:set is not supported"),
    "local tag": ("model: !include x", "tag !include is not supported"),
    "date": ("model: {width: 2001-99-99}", "invalid or unsupported YAML (month must be in 1..12)"),
    "digits": ("model: {width: " + "9" * 900 + "}", "at most 512, not an integer of"),
    "two documents": ("a: 1\n---\nb: 2\n", "invalid or unsupported YAML"),
    "control": ("name: \x01", "invalid or unsupported YAML"),
    "list": ("- 1", "must be a YAML mapping, not [1]"),
    "zero": ("0", "must be a YAML mapping, not 0"),
    "text key": ('"' + "k" * 900 + '": 1', "no such recipe key"),
    "nan": ("input: {mean: [.nan, 1, 1]}", "input.mean: must be finite, not nan"),
    "inf": ("input: {std: [1, -.inf, 1]}", "input.std: must be finite, not -inf"),
    "text inf": ("train: {lr: infinity}", "train.lr: must be finite, not inf"),
    "fraction": ("model: {width: 8.5}", "model.width: must be int, not 8.5"),
    "wide": ("model: {width: 3000}", "model.width: must be greater than 0 and at most 512, not 3000"),
    "seed": ("train: {seed: 4294967296}", "train.seed: must be at least 0 and at most 4,294,967,295, not 4294967296"),
    "list for a number": ("model: {width: [" + "[1], " * 50 + "1]}", "model.width: must be int, not [[1], [1]"),
    "base": ("base: [demo]", "base: must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("kind", INVALID)
def test_an_invalid_recipe_is_a_short_one_line_error(tmp_path: Path, kind: str) -> None:
    text, expected = INVALID[kind]
    path = tmp_path / "odd.yaml"
    path.write_text(text, encoding="utf-8")
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        recipe.load(str(path))
    message = str(caught.value)
    assert time.process_time() - started < 5
    assert message.startswith(f"{path}: ") and expected in message and "\n" not in message and len(message) < 600


@pytest.mark.parametrize("kind", ["laughs", "deep list", "twice", "python", "date", "control"])
def test_an_invalid_value_of_set_is_a_short_one_line_error(kind: str) -> None:
    text = INVALID[kind][0].replace("train: ", "").replace("\n", " ")
    with pytest.raises(InputError, match=r"^`changes` train=") as caught:
        recipe.load("demo").with_changes([f"train={text}"])
    assert len(str(caught.value)) < 600


def test_large_and_special_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_bytes(b"#" * (recipe.MAX_FILE_BYTES + 1))
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, message in (("large", "larger than 262144 bytes"), ("folder", "not a regular file"),
                       ("pipe", "not a regular file")):  # fmt: skip
        with pytest.raises(InputError, match=f"{name}.yaml: {message}"):
            recipe.load(str(tmp_path / f"{name}.yaml"))
    (tmp_path / "comments.yaml").write_bytes(b"#" * (recipe.MAX_FILE_BYTES - 1) + b"\n")
    assert recipe.load(str(tmp_path / "comments.yaml")).name == "comments"


def test_train_prints_the_error_of_a_recipe_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(billion_laughs(9))
    options = ("--instances", tmp_path / "x.json", "--images", tmp_path, "--out", tmp_path / "run")
    done = call("train", "--recipe", path, *options)
    refused(done, f"{path}: invalid or unsupported YAML (alias *a0")
    assert len(done.stderr) < 600


def test_shipped_recipes_pass_the_limits_on_yaml() -> None:
    for name in recipe.names():
        tree = recipe.load(name).to_dict()
        assert parse_yaml(yaml.safe_dump(tree)) == tree


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=2000) | st.binary(),
                    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(), inner, max_size=9)
                    | st.tuples(inner, inner), max_leaves=40))  # fmt: skip
def test_any_value_is_shortened_to_one_line(value: object) -> None:
    text = short_repr(value)
    assert text and len(text) <= 160 and "\n" not in text
    assert len(shorten(value)) <= 80 and "\n" not in shorten(value)


# pieces of YAML that damage inserts
WORDS = (
    *(b"&a ", b"*a", b"<<: ", b"!!python/name:os.system ", b"{", b"[", b"? ", b": ", b"- ", b"|\n", b"---\n", b".inf"),
    *(b".nan", b"1e999", b"0x", b"1:1:1", b"2001-01-01", b"true", b"null", b"~", b"'", b'"', b"\t", b"\xc3", b"\x00"),
    *(b"9" * 40, b"[" * 40, b"base: demo\n", b"model: ", b"width: ", b"-1", b"\xf0\x9f\x92\xa9", b"%YAML 9.9\n"),
)


def test_damaged_recipes(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    recipes = [
        yaml.safe_dump(recipe.load(name).to_dict()).encode() for name in ("demo", "reference-c4-res101", "fpn-res50")
    ]

    def change(rng: random.Random) -> None:
        undamaged = rng.choice(recipes)
        path.write_bytes(damage(undamaged, rng, WORDS) if rng.random() < 0.95 else undamaged)

    fuzz(change, lambda: recipe.load(str(path)), tmp_path, 100)


def test_damaged_assignments(tmp_path: Path) -> None:
    text = ""

    def change(rng: random.Random) -> None:
        nonlocal text
        text = damage(b"input.min_sizes=[600, 700]", rng, WORDS).decode("utf-8", "surrogateescape")

    fuzz(change, lambda: recipe.load("demo").with_changes([text]), tmp_path, 100)


def test_the_limits_are_those_of_the_invalid_recipes() -> None:
    assert (safe_yaml.MAX_DEPTH, safe_yaml.MAX_NODES, safe_yaml.MAX_SCALAR_LENGTH) == (16, 10_000, 1_000)
