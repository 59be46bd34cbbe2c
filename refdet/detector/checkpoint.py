"""Checkpoints: the run directory that `train` writes and the other commands read.

``model.safetensors`` holds the weights, ``model.json`` their metadata (recipe, categories, provenance, step) and
``state/`` what resuming needs. Files are replaced atomically. Metadata is read without torch.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors import SafetensorError, safe_open

from refdet.config.recipe import Recipe, from_dict
from refdet.errors import InputError
from refdet.files.atomic import atomic_write, write_json
from refdet.files.file_kinds import is_url
from refdet.files.json_files import read_bytes
from refdet.files.short_text import short_repr, shorten
from refdet.files.strict_json import strict_json
from refdet.files.weight_files import check_safetensors, describe_file
from refdet.structures.known_weights import LEAKS
from refdet.structures.provenance import UNKNOWN_DATA, Provenance

if TYPE_CHECKING:
    from torch import Tensor

MODEL, META, STATE = "model.safetensors", "model.json", "state"
BEST, VALIDATION = "best", "validation.json"  # folder of the weights with the highest AP, and the file with that AP
MAX_META_BYTES = 2**23  # limit of model.json
MAX_CATEGORIES = 50_000  # more than any published detector has
HEAD_PREFIXES = ("rpn.", "head.box.", "head.mask.")  # of the names of parameters that an ImageNet network lacks


@dataclass(frozen=True)
class CheckpointMetadata:
    """Metadata of weights: the contents of ``model.json``."""

    recipe: Recipe
    categories: tuple[tuple[int, str], ...]  # (COCO id, name) of label 1, 2, ...
    provenance: Provenance
    step: int
    untrained: tuple[str, ...] = ()  # prefixes of the names of untrained parameters

    @property
    def category_ids(self) -> list[int]:
        """COCO ids of the labels 1, 2, ..."""
        return [category for category, _ in self.categories]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``model.json``."""
        return {
            "recipe": self.recipe.to_dict(),
            "categories": [{"id": id_, "name": name} for id_, name in self.categories],
            "provenance": self.provenance.to_json(),
            "step": self.step,
            "untrained": list(self.untrained),
        }

    @classmethod
    def from_json(cls, tree: Any) -> CheckpointMetadata:
        """The inverse of `to_json`. Raises InputError that names a missing or invalid field."""
        if not isinstance(tree, dict):
            raise InputError(f"an object is needed, not {short_repr(tree)}")
        missing = [name for name in ("recipe", "categories", "provenance", "step") if name not in tree]
        if missing:
            raise InputError(f"{missing[0]!r} is missing")
        step, untrained = tree["step"], tree.get("untrained", [])
        if type(step) is not int or not 0 <= step < 2**63:
            raise InputError(f"step: a number of steps is needed, not {short_repr(step)}")
        if not isinstance(untrained, list) or not all(
            isinstance(part, str) and part in HEAD_PREFIXES for part in untrained
        ):
            raise InputError(f"untrained: a list of {', '.join(HEAD_PREFIXES)} is needed, not {short_repr(untrained)}")
        provenance = Provenance.from_json(tree["provenance"])
        categories = _parse_categories(tree["categories"])
        return cls(from_dict(tree["recipe"]), categories, provenance, step, tuple(untrained))

    @classmethod
    def parse(cls, text: str | bytes) -> CheckpointMetadata:
        """Parse the text of ``model.json``; the InputError it raises has no file name."""
        return cls.from_json(strict_json(text))

    def warnings(self) -> list[str]:
        """Warnings for users of these weights, one line each."""
        lines = []
        if self.provenance.is_unknown:
            lines.append(f"detector: {self.provenance.note}")
        elif any(text in (self.provenance.weights or "") for text in (UNKNOWN_DATA, LEAKS)):
            lines.append(f"detector: started from {self.provenance.weights}")
        if self.untrained:
            parts = ", ".join(part.rstrip(".") for part in self.untrained)
            lines.append(f"detector: {parts} are not trained; only features of given boxes are meaningful")
        return lines


def _parse_categories(tree: Any) -> tuple[tuple[int, str], ...]:
    """(COCO id, name) of each category in ``model.json``."""
    if not isinstance(tree, list) or not 0 < len(tree) <= MAX_CATEGORIES:
        raise InputError(f"categories: a list of 1 to {MAX_CATEGORIES} is needed, not {short_repr(tree)}")
    for category in tree:
        is_valid = (
            isinstance(category, dict) and type(category.get("id")) is int and isinstance(category.get("name"), str)
        )
        if not is_valid or not -(2**63) <= category["id"] < 2**63:
            raise InputError(
                f"categories: an object with a 64-bit 'id' and a 'name' is needed, not {short_repr(category)}"
            )
    counts = Counter(category["id"] for category in tree)
    if len(counts) < len(tree):
        raise InputError(f"categories: duplicate category id {counts.most_common(1)[0][0]}")
    return tuple((category["id"], category["name"]) for category in tree)


def run_directory(path: str | Path) -> Path:
    """The run directory at a path, which may also be its ``model.safetensors`` or ``model.json``.

    Raises:
        InputError: there is no checkpoint; the message says what was found and which folder to give instead.
    """
    path = Path(path)
    folder = path.parent if path.name in (MODEL, META) else path
    for name in (META, MODEL):
        if not (folder / name).is_file():
            raise InputError(f"{path}: {_why_not_a_run(path, folder, name)}")
    return folder


def _why_not_a_run(path: Path, folder: Path, missing: str) -> str:
    """Why a path is not a run directory, as `folder` lacks the file `missing`; and the fix."""
    if not path.exists() and not path.is_symlink() and not folder.is_dir():
        if is_url(path):
            return "a URL; download the run directory and give its folder"
        return "no such file or folder; give a run directory that `refdet train` wrote"
    enclosing = next((parent for parent in (path.parent, path.parent.parent) if _is_run(parent)), None)
    if enclosing is not None:
        return f"not a run directory, but in one; give {enclosing}"
    if path.name in (MODEL, META) and path.is_file():
        return f"there is no {missing} next to it; give a run directory that has both"
    if path.is_file():
        return f"{describe_file(path) or 'a file'}, not a run directory"
    if not path.is_dir():
        return "not a run directory"
    if any((folder / STATE).glob("step-*.safetensors")):
        return "a run that has saved a training state but no model yet; continue it with `refdet train --resume`"
    if (folder / META).is_file() or (folder / MODEL).is_file():
        return f"no {missing} there, only the other half of a run directory; copy both"
    inner = sorted(entry for entry in path.iterdir() if _is_run(entry))
    if inner:
        if len(inner) > 1:
            return f"no {missing} there; give one of its {len(inner)} run directories, such as {inner[0]}"
        return f"no {missing} there; give {inner[0]}, which is a run directory"
    return f"no {missing} there; give a run directory that `refdet train` wrote"


def was_validated(folder: Path) -> bool:
    """Whether a run was validated; `folder` is its run directory or the folder of its best weights."""
    return (folder / VALIDATION).exists() or (folder / BEST).exists()


def _is_run(folder: Path) -> bool:
    """Whether a folder has both files of a run directory."""
    return (folder / META).is_file() and (folder / MODEL).is_file()


def load_meta(path: str | Path) -> CheckpointMetadata:
    """Read the metadata of a run directory.

    Raises:
        InputError: there is no checkpoint, or ``model.json`` is damaged.
    """
    file = run_directory(path) / META
    data = read_bytes(file, MAX_META_BYTES)
    try:
        return CheckpointMetadata.parse(data)
    except InputError as error:
        raise InputError(f"{file}: not a checkpoint's model.json ({error}); give another run directory") from None


class HasStateDict(Protocol):
    """Something with weights by name: a network, or an average of its weights."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Name -> tensor."""
        ...


def save(folder: Path, model: HasStateDict, meta: CheckpointMetadata) -> None:
    """Write ``model.safetensors`` and then ``model.json``; both have the step, by which `read_weights` pairs them."""
    write_tensors(folder / MODEL, model.state_dict(), {"step": str(meta.step)})
    write_json(folder / META, meta.to_json())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically."""
    from safetensors.torch import save_file  # imports torch

    host_tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_write(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes its files readable by the owner only
        save_file(host_tensors, temporary, metadata=dict(metadata))
        temporary.chmod(stat.S_IMODE(mode))


def read_weights(folder: Path, meta: CheckpointMetadata) -> dict[str, Tensor]:
    """Read the weights of a run directory, memory-mapped.

    Args:
        folder: the run directory.
        meta: the metadata in it, read before the weights.

    Raises:
        InputError: the file cannot be read, or has the weights of another step than the metadata.
    """
    tensors, file_metadata = read_tensors(folder / MODEL)
    step = file_metadata.get("step", str(meta.step))  # not recorded in files that refdet did not write
    if step != str(meta.step):
        raise InputError(
            f"{folder / MODEL}: has the weights of step {shorten(step)}, but {META} is of step {meta.step}: the run is "
            "being saved or was killed while saving; try again, or continue the training with `resume=True`"
        )
    return tensors


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a safetensors file, memory-mapped, and its metadata.

    Raises:
        InputError: it cannot be read, or has too many tensors.
    """
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({shorten(error, 200)})") from error
