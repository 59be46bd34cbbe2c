"""Checkpoints: the run directory that `train` writes and every other command takes.

``model.safetensors`` holds the weights, ``model.json`` what they mean (recipe, categories, provenance, step),
``state/`` what resuming needs. Each file is replaced whole or not at all. What a run directory is can be read without
torch; only its tensors need it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from refdet.atomic import atomic_path, write_json
from refdet.errors import InputError
from refdet.provenance import UNKNOWN_DATA, Provenance
from refdet.recipe import Recipe, from_dict

if TYPE_CHECKING:
    from torch import Tensor, nn

MODEL, META, STATE = "model.safetensors", "model.json", "state"


@dataclass(frozen=True)
class Meta:
    """What weights mean: ``model.json``."""

    recipe: Recipe
    categories: tuple[tuple[int, str], ...]  # (COCO id, name) of label 1, 2, ...
    provenance: Provenance
    step: int
    untrained: tuple[str, ...] = ()  # beginnings of the names of parameters that nobody trained

    @property
    def category_ids(self) -> list[int]:
        """COCO ids of the labels 1, 2, ..."""
        return [category for category, _ in self.categories]

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {
            "recipe": self.recipe.to_dict(),
            "categories": [{"id": id_, "name": name} for id_, name in self.categories],
            "provenance": self.provenance.to_json(),
            "step": self.step,
            "untrained": list(self.untrained),
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Meta:
        """The inverse of `to_json`. Raises KeyError, TypeError or InputError where something is wrong."""
        categories = tuple((int(c["id"]), str(c["name"])) for c in tree["categories"])
        untrained = tuple(str(part) for part in tree.get("untrained", ()))
        provenance = Provenance.from_json(tree["provenance"])
        return cls(from_dict(tree["recipe"]), categories, provenance, int(tree["step"]), untrained)

    def warnings(self) -> list[str]:
        """What everyone who uses these weights should be told, a line each."""
        lines = []
        if self.provenance.is_unknown:
            lines.append(f"detector: {self.provenance.note}")
        elif UNKNOWN_DATA in (self.provenance.weights or ""):
            lines.append(f"detector: started from {self.provenance.weights}")
        if self.untrained:
            parts = ", ".join(part.rstrip(".") for part in self.untrained)
            lines.append(f"detector: its {parts} are not trained; only features of given boxes mean something")
        return lines


def run_directory(path: str | Path) -> Path:
    """The run directory that a path names: itself, or the folder of its model file.

    Raises:
        InputError: there is no checkpoint.
    """
    path = Path(path)
    folder = path.parent if path.name in (MODEL, META) else path
    for name in (META, MODEL):
        if not (folder / name).is_file():
            if path.is_file():
                raise InputError(f"{path}: not a run directory; refdet import-weights makes one of foreign weights")
            raise InputError(f"{path}: no {name} there; give a run directory that `refdet train` wrote")
    return folder


def load_meta(path: str | Path) -> Meta:
    """What the weights of a run directory mean.

    Raises:
        InputError: no checkpoint, or a damaged ``model.json``.
    """
    file = run_directory(path) / META
    try:
        return Meta.from_json(json.loads(file.read_text(encoding="utf-8")))
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not a checkpoint's model.json; give another run directory") from error


def save(folder: Path, model: nn.Module, meta: Meta) -> None:
    """Write ``model.safetensors`` and ``model.json``."""
    write_tensors(folder / MODEL, model.state_dict(), {"step": str(meta.step)})
    write_json(folder / META, meta.to_json())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors.torch import save_file  # brings torch

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata=dict(metadata))
        umask = os.umask(0)  # safetensors makes files that only their owner reads
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
