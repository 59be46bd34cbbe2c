"""Import a checkpoint of another program as a run directory."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refdet.data.coco import CocoIndex
from refdet.data.instances_provenance import provenance_of_instances
from refdet.detector import checkpoint
from refdet.detector.checkpoint import CheckpointMetadata
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.weights.conversion import ConvertedWeights
from refdet.detector.weights.identify import identify_checkpoint
from refdet.detector.weights.numpy_pickles import UnsafeGlobal, has_arrays, read_pickle
from refdet.detector.weights.torch_files import DAMAGED, OLD_TAR, TORCHSCRIPT, read_contents
from refdet.detector.weights.torchvision import EPS, convert_eps
from refdet.errors import InputError
from refdet.files.file_kinds import is_safetensors, is_url
from refdet.files.short_text import format_count, short_repr, shorten
from refdet.files.weight_files import MAX_TENSORS, describe_file
from refdet.files.weight_programs import IMPORTABLE, REFDET, TRAINING_STATE, describe_checkpoint, has_all
from refdet.structures.coco_categories import coco_categories, unused_label_name
from refdet.structures.known_weights import KnownFile, identify_known_file
from refdet.structures.provenance import Provenance, file_sha256

WRAPPERS = ("state_dict", "model", "blobs")  # keys of the weights in checkpoints that hold other data too
REAL_DTYPES = (  # dtypes that tensors may have
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
)
NUM_COCO_LABELS = 90  # classes of a detector whose labels are COCO's category ids
MAX_SHARED_NUMBERS = 2**27  # of tensors with more numbers than the file has bytes; the largest network has half as many


@dataclass(frozen=True)
class ImportedWeights:
    """Result of an import.

    Attributes:
        kind: human-readable description of the network and its format.
        recipe: name of the recipe.
        classes: number of object classes.
        numbers: how many numbers the imported parameters and buffers have together.
        untrained: prefixes of the parameters that the file does not have.
        provenance: the training data, if known.
    """

    kind: str
    recipe: str
    classes: int
    numbers: int
    untrained: tuple[str, ...]
    provenance: Provenance


def import_weights(
    source: Path, out: Path, trained_on: Path | None = None, weight_format: str | None = None
) -> ImportedWeights:
    """Import another program's weights as a run directory.

    Args:
        source: a ``.pth`` written by torch.save, a ``.pkl`` of detectron2, or safetensors.
        out: the run directory to create.
        trained_on: instances file of the images that the weights were trained on, if known.
        weight_format: "caffe" or "torchvision" for an ImageNet network, "tf-faster-rcnn" or "pytorch-faster-rcnn" for a
            detector with the reference's names; None to detect it.

    Raises:
        InputError: the file cannot be read, is not a state dict, or is an unknown network; `out` exists and is
            not an empty folder; or the number of classes does not fit the categories of `trained_on`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"`out` {out} exists; choose another or remove it")
    try:
        tensors = read_foreign(source)
        sha256 = file_sha256(source)
        known = identify_known_file(source, sha256)
        if known is not None and known.norm_eps != EPS:
            tensors = convert_eps(tensors, known.norm_eps)
        known_format = None if known is None else known.weight_format
        converted = identify_checkpoint(tensors, weight_format or known_format)
    except InputError as error:
        raise InputError(str(error) if str(source) in str(error) else f"{source}: {error}") from error
    index = None if trained_on is None else CocoIndex.load(trained_on)
    categories = label_categories(converted, source, index)
    provenance = _provenance(source, sha256, known, index)
    meta = CheckpointMetadata(converted.recipe, categories, provenance, 0, converted.missing_prefixes)
    torch.manual_seed(converted.recipe.train.seed)  # missing tensors get the values that training would start with
    model = MaskRCNN(converted.recipe, len(categories))
    model.load_state_dict({**model.state_dict(), **converted.tensors})
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(out, model, meta)
    numbers = sum(value.numel() for value in converted.tensors.values())
    return ImportedWeights(
        converted.kind, converted.recipe.name, len(categories), numbers, converted.missing_prefixes, provenance
    )


def read_foreign(path: Path) -> dict[str, Tensor]:
    """Read the tensors of another program's checkpoint, without running code from it.

    Raises:
        InputError: the file is missing or damaged, holds anything but named, dense tensors of real numbers, or is of
            an unsupported program.
    """
    if not path.is_file():
        raise InputError(f"{path}: {_why_not_a_file(path)}")
    with path.open("rb") as file:
        start = file.read(4096)
    if is_safetensors(start):
        tensors = checkpoint.read_tensors(path)[0]
        reject_unsupported(path, tensors)
        return _check_tensors(tensors, path)
    is_zip = start[:2] == b"PK"
    # The contents of a zip, which are checked below, say more than its first bytes. A pickle is described as PyTorch's.
    description = None if is_zip else describe_file(path)
    if description is not None and "PyTorch" not in description:
        raise InputError(f"{path}: {description}, not weights of another program")
    if start[257:262] == b"ustar":  # the magic of a tar header
        raise InputError(f"{path}: {OLD_TAR}")
    try:
        contents = read_contents(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    # the strings include the names of the tensors
    reject_unsupported(path, contents.strings, [used.name for used in contents.globals if not used.guessed])
    if has_arrays(used.name for used in contents.globals) and not is_zip:
        tree = _read_arrays(path)
    elif contents.unsafe_global is not None:
        raise InputError(f"{path}: {_unsafe_message(contents.unsafe_global)}")
    else:
        tree = _torch_load(path)
    return _check_tensors(_find_weights(tree, path), path)


def _torch_load(path: Path) -> Any:
    """Read a file of torch.save whose pickle imports only what torch.load itself checks."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about old file formats
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch.load can raise anything on a damaged file
        raise InputError(f"{path}: {_load_failure(error)}") from error


def _read_arrays(path: Path) -> Any:
    """Read a pickle of NumPy arrays, such as detectron2's."""
    try:
        return read_pickle(path)
    except MemoryError:
        raise
    except UnsafeGlobal as error:
        raise InputError(f"{path}: {_unsafe_message(str(error))}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # an unpickler can raise anything on a damaged file
        raise InputError(f"{path}: damaged, or not a pickle of arrays ({shorten(error, 200)})") from None


def _find_weights(tree: Any, path: Path) -> Mapping[Any, Any]:
    """The named tensors of a checkpoint, which may also hold other data."""
    for wrapper in WRAPPERS:
        if isinstance(tree, Mapping) and isinstance(tree.get(wrapper), Mapping):
            tree = tree[wrapper]
    if not isinstance(tree, Mapping):
        raise InputError(f"{path}: holds a {type(tree).__name__} instead of named tensors; save the state_dict")
    return tree


def _why_not_a_file(path: Path) -> str:
    """Why a path is not a file, and what to do about it."""
    if is_url(path):
        return "a URL; download the file and give its path"
    if not path.is_dir():
        return "not a regular file" if path.exists() else "no such file"
    if (path / checkpoint.META).is_file():
        return "a run directory already; give it to `weights` or `checkpoint` as it is"
    return "a folder; give a file"


def reject_unsupported(path: Path, names: Iterable[str], global_names: Iterable[str] = ()) -> None:
    """Raise InputError if a checkpoint is of a known program or network that cannot be imported.

    Args:
        path: the file.
        names: names of its tensors, possibly among other strings.
        global_names: dotted names of the classes and functions that its pickle imports.
    """
    names = list(names)
    if has_all(names, TRAINING_STATE) or has_all(names, REFDET):
        raise InputError(f"{path}: {describe_file(path)}; it needs no import")
    description = describe_checkpoint(names, global_names)
    if description is not None and description not in IMPORTABLE:
        raise InputError(
            f"{path}: {description}, which cannot be imported yet; the detectors of lichengunc/mask-faster-rcnn and "
            "Mask and Faster R-CNN of detectron2 and torchvision, and ResNets, VGG-16 and MobileNet v1 of ImageNet can "
            "(the weights alone, as a state_dict)"
        )


def _check_tensors(tree: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Check that every name is printable text and every value a dense tensor of real numbers on the CPU."""
    invalid = [
        name
        for name, value in tree.items()
        if not (isinstance(name, str) and name.isprintable() and isinstance(value, Tensor) and _is_dense_real(value))
    ]
    if invalid or not tree:
        problem = f"{short_repr(invalid[0])} is not a named tensor of real numbers" if invalid else "empty"
        raise InputError(f"{path}: {problem}; save the model's state_dict alone")
    if len(tree) > MAX_TENSORS:
        raise InputError(f"{path}: {len(tree)} tensors, more than the {MAX_TENSORS} allowed")
    numbers = sum(value.numel() for value in tree.values())
    if numbers > max(MAX_SHARED_NUMBERS, path.stat().st_size):
        raise InputError(
            f"{path}: {numbers} numbers in a file of {path.stat().st_size} bytes: its tensors are views "
            "of each other or of few numbers; save contiguous copies"
        )
    return dict(tree)


def _is_dense_real(value: Tensor) -> bool:
    """Whether a tensor is a plain array of real numbers in this process's memory."""
    return (
        value.dtype in REAL_DTYPES
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
    )


def _load_failure(error: Exception) -> str:
    """Why torch.load failed, without its advice to load the file unsafely."""
    text = str(error)
    if "TorchScript archives" in text:
        return TORCHSCRIPT
    if "legacy .tar format" in text:
        return OLD_TAR
    if not isinstance(error, pickle.UnpicklingError):
        reason = ": ".join(filter(None, (type(error).__name__, text.partition(". ")[0])))
        return f"{DAMAGED} ({shorten(reason, 200)})"
    for start in ("Unsupported global: GLOBAL ", "Trying to load unsupported GLOBAL ", "Unsupported class "):
        if start in text:
            return _unsafe_message(text.split(start, 1)[1].split()[0].rstrip(".,"))
    return "not a torch.save file of tensors alone; save the model's state_dict"


def _unsafe_message(name: str) -> str:
    """The error of a file that imports an unsafe global."""
    return (
        f"refused to load {short_repr(name)}, which is not a tensor and could run any code; save the model's state_dict"
    )


def label_categories(converted: ConvertedWeights, source: Path, index: CocoIndex | None) -> tuple[tuple[int, str], ...]:
    """The category (id, name) of each label 1, 2, ..., in order.

    Args:
        converted: the weights, whose ``label_order`` says how labels and categories correspond.
        source: file of the weights, for error messages.
        index: the instances file that the detector was trained on; None for COCO's categories.

    Raises:
        InputError: the number of classes does not fit the categories.
    """
    if converted.classes is None:  # a network without a detector's classes, such as ImageNet's
        return coco_categories()
    names, classes = dict(coco_categories()) if index is None else index.categories, converted.classes
    if converted.label_order == "ids" and _are_labels(names, classes):
        return tuple((label, names.get(label, unused_label_name(label))) for label in range(1, classes + 1))
    if len(names) == classes:
        return tuple(sorted(names.items()) if converted.label_order == "ascending_ids" else names.items())
    if index is None:
        raise InputError(
            f"{source}: {format_count(classes, 'class')} instead of COCO's 80; give `trained_on` to name them"
        )
    raise InputError(f"`trained_on` {index.path}: {format_count(len(names), 'category')}, {source} has {classes}")


def _are_labels(ids: Iterable[int], classes: int) -> bool:
    """Whether category ids can be the labels of a detector with this number of classes.

    They must lie in 1..classes. The highest must be `classes`, except in COCO's numbering: a file with some of COCO's
    categories may lack the last.
    """
    lowest, highest = min(ids, default=0), max(ids, default=0)
    return lowest >= 1 and (highest == classes or highest <= classes == NUM_COCO_LABELS)


def _provenance(source: Path, sha256: str, known: KnownFile | None, index: CocoIndex | None) -> Provenance:
    """Provenance of the weights: the user's instances file if given, else what is known about a published file.

    If the published file was trained on images of REFER, this is noted beside the user's file.
    """
    if index is None:
        return Provenance.imported(source.name, sha256, known)
    weights = f"{source.name} (sha256 {sha256}), imported; that it was trained on these images is the user's word"
    if known is not None and known.trained_on.refer_overlap != "none":
        weights += f", but the file is {known.model}, {known.trained_on.leak_note()}"
    return provenance_of_instances(index).with_weights(weights)
