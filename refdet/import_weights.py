"""Import: a checkpoint of another program becomes a run directory."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refdet import checkpoint
from refdet.checkpoint import Meta
from refdet.data.coco import CocoIndex
from refdet.data.coco_categories import coco_categories
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.weights import Recognised, recognise
from refdet.errors import InputError
from refdet.provenance import Provenance, file_sha256

WRAPPERS = ("state_dict", "model")  # names under which programs put the weights beside other things


@dataclass(frozen=True)
class Imported:
    """What was imported: `kind` for people, the name of the recipe, counts, and what the file knows of itself."""

    kind: str
    recipe: str
    classes: int
    numbers: int
    untrained: tuple[str, ...]
    provenance: Provenance


def import_weights(source: Path, out: Path, trained_on: Path | None = None, style: str | None = None) -> Imported:
    """Write the run directory of foreign weights.

    Arguments:
        source: a ``.pth`` that torch.save wrote, or safetensors.
        out: the run directory, new.
        trained_on: the split the weights were trained on, where the user knows it.
        style: see `refdet.detector.weights.recognise`.

    Raises:
        InputError: the file cannot be read, holds something else than tensors, or is no network known here;
            `out` exists; or the classes are not those of `trained_on`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} exists; choose another or remove it")
    try:
        found = recognise(read_foreign(source), style)
    except InputError as error:
        raise InputError(str(error) if str(source) in str(error) else f"{source}: {error}") from error
    index = None if trained_on is None else CocoIndex.load(trained_on)
    categories = _categories(found, source, index)
    provenance = _provenance(source, index)
    meta = Meta(found.recipe, categories, provenance, 0, found.untrained)
    torch.manual_seed(found.recipe.train.seed)  # what the file lacks starts as it would in training
    model = MaskRCNN(found.recipe, len(categories))
    model.load_state_dict({**model.state_dict(), **found.tensors})
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(out, model, meta)
    numbers = sum(value.numel() for value in found.tensors.values())
    return Imported(found.kind, found.recipe.name, len(categories), numbers, found.untrained, provenance)


def read_foreign(path: Path) -> dict[str, Tensor]:
    """The tensors of a foreign checkpoint, read without running anything that it may hold.

    Raises:
        InputError: no such file, damaged, or it holds something else than named, dense tensors of real numbers.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'a folder; give the file in it' if path.is_dir() else 'no such file'}")
    if path.suffix == ".safetensors":
        return _named_tensors(checkpoint.read_tensors(path)[0], path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about the age and the make of the file
            tree: Any = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # what a damaged file makes of torch.load is anything
        raise InputError(f"{path}: {_refusal(error)}") from error
    for wrapper in WRAPPERS:
        if isinstance(tree, Mapping) and isinstance(tree.get(wrapper), Mapping):
            tree = tree[wrapper]
    if not isinstance(tree, Mapping):
        raise InputError(f"{path}: a {type(tree).__name__} where named tensors are needed; save the state_dict")
    return _named_tensors(tree, path)


def _named_tensors(tree: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The same, once every name is seen to be text and every value a tensor that holds its numbers."""
    strange = [
        name
        for name, value in tree.items()
        if not (isinstance(name, str) and name.isprintable() and isinstance(value, Tensor) and _is_plain(value))
    ]
    if strange or not tree:
        what = f"{strange[0]!r} is no named tensor of real numbers" if strange else "nothing in it"
        raise InputError(f"{path}: {what}; save the model's state_dict alone")
    return dict(tree)


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor is what trained weights are: not sparse, quantised, complex, or without memory."""
    real = value.dtype.is_floating_point or value.dtype in (torch.uint8, torch.int8, torch.int32, torch.int64)
    return real and value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested


def _refusal(error: Exception) -> str:
    """Why torch would not load a file, without its advice to read it unsafely."""
    text = str(error)
    if "TorchScript archives" in text or "legacy .tar format" in text:
        kind = "a TorchScript archive" if "TorchScript" in text else "a tar archive of PyTorch before 0.2"
        return f"{kind}, which cannot be read without running what is in it; save the model's state_dict"
    if not isinstance(error, pickle.UnpicklingError):
        reason = ": ".join(filter(None, (type(error).__name__, text.partition(". ")[0])))
        return f"damaged, or not a file of torch.save ({reason})"
    for start in ("Unsupported global: GLOBAL ", "Trying to load unsupported GLOBAL ", "Unsupported class "):
        if start in text:
            name = text.split(start, 1)[1].split()[0].rstrip(".,")
            return f"it wants to load {name!r}, which is no tensor; refused, since loading it could run any program"
    return "not a file of torch.save that holds tensors alone; save the model's state_dict"


def _categories(found: Recognised, source: Path, index: CocoIndex | None) -> tuple[tuple[int, str], ...]:
    """(id, name) of the classes 1, 2, ..., in the order of the instances file, as the seed has them."""
    if found.classes is None:
        return coco_categories()
    if index is not None:
        categories = tuple(index.categories.items())
        if len(categories) != found.classes:
            raise InputError(f"--trained-on {index.path}: {len(categories)} categories, {source} has {found.classes}")
        return categories
    if found.classes != len(coco_categories()):
        raise InputError(f"{source}: {found.classes} classes, which are not COCO's 80; name them by --trained-on")
    return coco_categories()


def _provenance(source: Path, index: CocoIndex | None) -> Provenance:
    digest = file_sha256(source)
    if index is None:
        return Provenance.imported(source.name, digest)
    return Provenance.of_instances(index).with_weights(
        f"{source.name} (sha256 {digest}), imported; that it was trained on these images is the user's word"
    )
