"""Recipes for people: a line of each, and all keys of one with their meanings, as YAML that can be given back."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from refdet.config import recipe as recipes
from refdet.config.recipe import MAX_FILE_BYTES, Recipe
from refdet.config.renamed_keys import current_name
from refdet.files.json_files import read_bytes

_WIDTH = 120  # characters of a line
_PUBLISHED = "published: "
_NECKS = {"c4": "C4", "fpn": "FPN", "dc5": "DC5"}
_WITHOUT_NECK = {"vgg16": "VGG-16", "mobilenet_v1": "MobileNet v1"}


@dataclass(frozen=True)
class RecipeLine:
    """One line about a shipped recipe.

    Attributes:
        name: of the recipe.
        network: "ResNet-101 C4".
        steps: of its training.
        batch_size: images per step.
        published: AP that was published of the recipe that it follows, "" if none was.
        about: the first line of its comment.
    """

    name: str
    network: str
    steps: int
    batch_size: int
    published: str
    about: str


def recipe_lines() -> list[RecipeLine]:
    """A line for each shipped recipe, by name."""
    lines = []
    for name in recipes.names():
        recipe, comment = recipes.load(name), _comment(name)
        published = next((line.removeprefix(_PUBLISHED) for line in comment if line.startswith(_PUBLISHED)), "")
        model, options = recipe.model, recipe.train
        network = _WITHOUT_NECK.get(model.backbone) or f"ResNet-{model.depth} {_NECKS[model.neck]}"
        lines.append(RecipeLine(name, network, options.steps, options.batch_size, published, comment[0]))
    return lines


def complete_yaml(recipe: Recipe, source: str | None = None) -> str:
    """Every key of a recipe with its value and its meaning.

    Args:
        recipe: the recipe.
        source: name or YAML file that it was loaded from, whose first comment is repeated.

    Returns:
        YAML of the same recipe.
    """
    lines = [f"# {line}".rstrip() for line in ([] if source is None else _comment(source))]
    lines.append(f"name: {_to_yaml(recipe.name)}")
    kinds: dict[str, Any] = {
        name: kind for name, kind in get_type_hints(Recipe).items() if dataclasses.is_dataclass(kind)
    }
    for part, kind in kinds.items():
        options = getattr(recipe, part)
        lines += ["", f"# {inspect.getdoc(kind)}", f"{part}:"]
        for option in dataclasses.fields(kind):
            text = f"  {option.name}: {_to_yaml(getattr(options, option.name))}"
            lines += _with_meaning(text, meanings(kind)[option.name])
    return "\n".join(lines) + "\n"


@functools.cache
def meanings(kind: type) -> dict[str, str]:
    """Option -> its comment in the source of a class of options: the lines above it, and the rest of its own line."""
    source = inspect.getsource(kind)
    comments = {
        token.start[0]: token.string.lstrip("# ").rstrip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    found, taken = {}, body.lineno
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above = [comments[line] for line in range(taken + 1, node.lineno) if line in comments]
            found[node.target.id] = "; ".join(filter(None, (" ".join(above), comments.get(node.end_lineno or 0, ""))))
        taken = node.end_lineno or taken
    return found


def _with_meaning(text: str, meaning: str) -> Iterator[str]:
    if len(text) + len(meaning) + 4 <= _WIDTH:
        yield f"{text}  # {meaning}" if meaning else text
        return
    line = "  #"
    for word in meaning.split():
        if len(line) + len(word) + 1 > _WIDTH:
            yield line
            line = "  #"
        line += f" {word}"
    yield line
    yield text


def _to_yaml(value: Any) -> str:
    """A value as YAML in one line."""
    value = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _comment(source: str) -> list[str]:
    """The lines of the comment at the beginning of a recipe."""
    if Path(source).suffix in (".yaml", ".yml"):
        text = read_bytes(Path(source), MAX_FILE_BYTES).decode("utf-8", "replace")
    else:
        file = resources.files("refdet.config.recipes") / f"{current_name(source)}.yaml"
        text = file.read_text(encoding="utf-8")
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines
