"""Human-readable recipes: one line for each, and all keys of one with their meanings, as YAML that can be loaded."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from refdet.config import recipe as recipes
from refdet.config.recipe import MAX_FILE_BYTES, Recipe
from refdet.config.renamed_keys import current_name
from refdet.files.json_files import read_bytes

_WIDTH = 120  # maximum number of characters of a line
_PUBLISHED = "published: "  # start of the line with the published AP in the comment of a shipped recipe
_NECKS = {"c4": "C4", "fpn": "FPN", "dc5": "DC5"}
_OTHER_BACKBONES = {"vgg16": "VGG-16", "mobilenet_v1": "MobileNet v1"}


@dataclass(frozen=True)
class RecipeSummary:
    """Summary of a shipped recipe.

    Attributes:
        name: name of the recipe.
        network: such as "ResNet-101 C4".
        steps: number of training steps.
        batch_size: images per step.
        published: AP that was published for the training that the recipe follows, "" if there is none.
        about: the first line of the recipe's comment.
    """

    name: str
    network: str
    steps: int
    batch_size: int
    published: str
    about: str


def recipe_summaries() -> list[RecipeSummary]:
    """Summaries of the shipped recipes, sorted by name."""
    summaries = []
    for name in recipes.names():
        recipe, comment = recipes.load(name), _leading_comment(name)
        published = next((line.removeprefix(_PUBLISHED) for line in comment if line.startswith(_PUBLISHED)), "")
        model, options = recipe.model, recipe.train
        network = _OTHER_BACKBONES.get(model.backbone) or f"ResNet-{model.depth} {_NECKS[model.neck]}"
        summaries.append(RecipeSummary(name, network, options.steps, options.batch_size, published, comment[0]))
    return summaries


def complete_yaml(recipe: Recipe, source: str | None = None) -> str:
    """Every key of a recipe with its value and a comment.

    Args:
        recipe: the recipe.
        source: name or YAML file that the recipe was loaded from, whose leading comment is repeated; None for none.

    Returns:
        YAML that loads as the same recipe.
    """
    lines = [f"# {line}".rstrip() for line in ([] if source is None else _leading_comment(source))]
    lines.append(f"name: {_to_yaml(recipe.name)}")
    for part in dataclasses.fields(recipe)[1:]:  # after the name
        options = getattr(recipe, part.name)
        lines += ["", f"# {inspect.getdoc(options)}", f"{part.name}:"]
        for option, comment in option_comments(type(options)).items():
            lines += _with_comment(f"  {option}: {_to_yaml(getattr(options, option))}", comment)
    return "\n".join(lines) + "\n"


def option_comments(options_class: type) -> dict[str, str]:
    """Option -> its comment in the source of an options class: the lines above the option, and the end of its line."""
    source = inspect.getsource(options_class)
    comment_at = {  # line -> comment
        token.start[0]: token.string.lstrip("# ").rstrip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    by_option, previous_line = {}, body.lineno
    for node in body.body:
        last_line = node.end_lineno or node.lineno
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above = [comment_at[line] for line in range(previous_line + 1, node.lineno) if line in comment_at]
            by_option[node.target.id] = "; ".join(filter(None, (" ".join(above), comment_at.get(last_line, ""))))
        previous_line = last_line
    return by_option


def _with_comment(text: str, comment: str) -> Iterator[str]:
    """The lines of an option: ``text`` with the comment at its end if that fits, otherwise on lines above."""
    line = f"{text}  # {comment}" if comment else text
    if len(line) <= _WIDTH:
        yield line
        return
    line = "  #"
    for word in comment.split():
        if len(line) + len(word) + 1 > _WIDTH:
            yield line
            line = "  #"
        line += f" {word}"
    yield line
    yield text


def _to_yaml(value: Any) -> str:
    """A value as YAML on one line."""
    value = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _leading_comment(source: str) -> list[str]:
    """Lines of the comment at the beginning of a recipe, which is a shipped one or a YAML file."""
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
