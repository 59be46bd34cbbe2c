"""Convert tensors between the state dicts of refdet and of another program: names, layouts and checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from refdet.config.recipe import Recipe
from refdet.detector.finite import MAX_WEIGHT, find_unusable
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.resnet import BLOCKS
from refdet.errors import InputError
from refdet.files.short_text import shorten

LabelOrder = Literal["file", "ascending_ids", "ids"]
"""Category of label i: the i-th of the instances file, the i-th by ascending id, or the category with id i."""


@dataclass(frozen=True)
class ConvertedWeights:
    """Weights under refdet's names.

    Attributes:
        kind: human-readable description.
        recipe: the network.
        classes: number of object classes, None for a network without detection heads.
        tensors: name -> float32 tensor, for all parameters and buffers except those with `missing_prefixes`.
        missing_prefixes: prefixes of the parameters that the file does not have.
        label_order: how the program that trained the detector numbers the categories.
    """

    kind: str
    recipe: Recipe
    classes: int | None
    tensors: dict[str, Tensor]
    missing_prefixes: tuple[str, ...]
    label_order: LabelOrder = "file"


class Layout(Protocol):
    """How the rows (the first axis) of another program's tensor, the *foreign* one, correspond to those of refdet's."""

    def foreign_rows(self, rows: int) -> int:
        """Number of rows of the foreign tensor if refdet's has `rows`."""

    def to_refdet(self, value: Tensor) -> Tensor:
        """Convert a foreign tensor to refdet's layout."""

    def to_foreign(self, value: Tensor) -> Tensor:
        """The inverse of `to_refdet`; see `LogitPairs` for the layout that has none."""


@dataclass(frozen=True)
class SameLayout:
    """The same rows in the same order."""

    def foreign_rows(self, rows: int) -> int:
        """Number of rows of the other program's tensor."""
        return rows

    def to_refdet(self, value: Tensor) -> Tensor:
        """The tensor itself."""
        return value

    def to_foreign(self, value: Tensor) -> Tensor:
        """The tensor itself."""
        return value


@dataclass(frozen=True)
class LogitPairs(SameLayout):
    """Two logits per anchor, all background logits first; a softmax over two is the sigmoid of their difference.

    Import only: the two logits cannot be recovered from their difference.
    """

    def foreign_rows(self, rows: int) -> int:
        """Number of rows of the other program's tensor."""
        return 2 * rows

    def to_refdet(self, value: Tensor) -> Tensor:
        """Object logits minus background logits."""
        background, objects = value.chunk(2)
        return objects - background


@dataclass(frozen=True)
class BackgroundLast(SameLayout):
    """The background is the last class instead of the first."""

    def to_refdet(self, value: Tensor) -> Tensor:
        """Move the last row to the front."""
        return value.roll(1, 0)

    def to_foreign(self, value: Tensor) -> Tensor:
        """Move the first row to the end."""
        return value.roll(-1, 0)


@dataclass(frozen=True)
class NoBackground(SameLayout):
    """No rows for the background, unlike refdet's box deltas and mask logits.

    Attributes:
        rows_per_class: number of rows of each class.
    """

    rows_per_class: int

    def foreign_rows(self, rows: int) -> int:
        """Number of rows of the other program's tensor."""
        return rows - self.rows_per_class

    def to_refdet(self, value: Tensor) -> Tensor:
        """Prepend rows of zeros."""
        return torch.cat((torch.zeros_like(value[:1]).repeat_interleave(self.rows_per_class, 0), value))

    def to_foreign(self, value: Tensor) -> Tensor:
        """Drop the rows of the background."""
        return value[self.rows_per_class :]


@dataclass(frozen=True)
class AnchorsBySize(SameLayout):
    """Anchors ordered by size, then ratio; refdet orders them by ratio, then size.

    Attributes:
        sizes: number of anchor sizes.
        ratios: number of ratios.
    """

    sizes: int
    ratios: int

    def to_refdet(self, value: Tensor) -> Tensor:
        """Order by ratio, then size."""
        return self._swap(value, self.sizes, self.ratios)

    def to_foreign(self, value: Tensor) -> Tensor:
        """Order by size, then ratio."""
        return self._swap(value, self.ratios, self.sizes)

    @staticmethod
    def _swap(value: Tensor, outer: int, inner: int) -> Tensor:
        return value.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True)
class NameMapping:
    """Another program's names and layouts for the tensors of a network.

    Attributes:
        prefixes: refdet's prefix -> the other program's; the first match applies, so longer prefixes come first.
        layouts: refdet's prefix -> layout of its tensors, where it differs.
        rename_rest: converts the rest of a name, after the prefix.
    """

    prefixes: Mapping[str, str]
    layouts: Mapping[str, Layout]
    rename_rest: Callable[[str], str] = str

    def foreign_name(self, name: str) -> str:
        """The other program's name for a tensor of refdet."""
        prefix = next(prefix for prefix in self.prefixes if name.startswith(prefix))
        return self.prefixes[prefix] + self.rename_rest(name[len(prefix) :])

    def layout(self, name: str) -> Layout:
        """The layout of a tensor, by refdet's name."""
        return next((layout for prefix, layout in self.layouts.items() if name.startswith(prefix)), SameLayout())

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert refdet's tensors to the other program's."""
        return {self.foreign_name(name): self.layout(name).to_foreign(value) for name, value in tensors.items()}


def rename_tensors(state_dict: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Rename the tensors of a state dict; raises InputError if two of them would get the same name."""
    old_names: dict[str, str] = {}
    for name in state_dict:
        new_name = rename(name)
        if new_name in old_names:
            raise InputError(
                f"{shorten(old_names[new_name])} and {shorten(name)} are the same tensor of the network; "
                "save the state_dict of one model alone"
            )
        old_names[new_name] = name
    return {new_name: state_dict[name] for new_name, name in old_names.items()}


def convert_tensors(
    recipe: Recipe,
    classes: int,
    state_dict: Mapping[str, Tensor],
    mapping: NameMapping,
    ignored: Iterable[str] = (),
    missing_prefixes: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Convert another program's state dict to refdet's.

    Args:
        recipe: the network.
        classes: number of object classes.
        state_dict: the other program's tensors.
        mapping: that program's names and layouts.
        ignored: names in `state_dict` that a detector does not use; batch counters are ignored too.
        missing_prefixes: prefixes of refdet's names that `state_dict` need not have.

    Raises:
        InputError: tensors that are missing, unexpected, unusable or of the wrong shape; the message lists them.
    """
    with torch.device("meta"):
        model_state = MaskRCNN(recipe, classes).state_dict()
    expected = {name: value for name, value in model_state.items() if not name.startswith(missing_prefixes)}
    converted, missing, problems, used = {}, [], [], set(ignored)
    for name, model_value in expected.items():
        key, layout = mapping.foreign_name(name), mapping.layout(name)
        if key not in state_dict:
            missing.append(key)
            continue
        used.add(key)
        shape = (layout.foreign_rows(model_value.shape[0]), *model_value.shape[1:])
        if state_dict[key].shape != shape:
            problems.append(f"{key} is {tuple(state_dict[key].shape)}, not {shape}")
            continue
        if model_value.is_floating_point() and not state_dict[key].is_floating_point():
            dtype = str(state_dict[key].dtype).removeprefix("torch.")
            problems.append(f"{key} holds {dtype}, not floating-point numbers (a quantized network?)")
            continue
        value = state_dict[key].detach().float()
        if find_unusable({name: value}):
            problems.append(f"{key} contains NaN, inf, values beyond {MAX_WEIGHT:g} or a negative variance")
        converted[name] = layout.to_refdet(value).contiguous()
    unexpected = [key for key in state_dict if key not in used and not key.endswith("num_batches_tracked")]
    if missing or unexpected or problems:
        raise InputError(
            f"looks like the weights of {recipe.name}, but "
            + "; ".join(filter(None, (describe_mismatch(missing, unexpected), _list_first(problems, 5))))
        )
    return converted


def describe_mismatch(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """List the first missing and the first unexpected keys."""
    parts = []
    for label, keys in (("missing", sorted(missing)), ("unexpected", sorted(unexpected))):
        if keys:
            parts.append(f"{label}: {_list_first([shorten(key) for key in keys], 8)}")
    return "; ".join(parts)


def _list_first(texts: Sequence[str], limit: int) -> str:
    """The first texts, separated by commas, and how many more there are."""
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def count_blocks(keys: Iterable[str], prefix: str) -> int:
    """Number of distinct indices after a prefix of the keys, such as the blocks of a ResNet stage."""
    indices = {key[len(prefix) :].partition(".")[0] for key in keys if key.startswith(prefix)}
    return sum(index.isdigit() for index in indices)


def find_resnet_depth(state_dict: Mapping[str, Tensor], prefix: str) -> int | None:
    """Depth of a ResNet with torchvision's names, even if some of its tensors are missing; None if it is no ResNet."""
    blocks = tuple(count_blocks(state_dict, f"{prefix}layer{stage}.") for stage in (1, 2, 3, 4))
    bottleneck = any(name.startswith(f"{prefix}layer") and ".conv3." in name for name in state_dict)
    for depth, blocks_of_depth in BLOCKS.items():
        if blocks == blocks_of_depth and bottleneck == (depth >= 50):
            return depth
    return None


def num_rows(state_dict: Mapping[str, Tensor], key: str, default: int) -> int:
    """Size of the first axis of a tensor, 0 for a scalar; `default` if the tensor is missing.

    Callers give the usual size as the default, as `convert_tensors` reports missing tensors.
    """
    shape = state_dict[key].shape if key in state_dict else (default,)
    return shape[0] if shape else 0
