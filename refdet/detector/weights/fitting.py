"""Fit the tensors of another program to a network of refdet, and the other way round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from refdet.config.recipe import Recipe
from refdet.detector.finite import MAX_WEIGHT, find_unusable
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.errors import InputError
from refdet.files.short_text import shorten


@dataclass(frozen=True)
class ConvertedWeights:
    """Weights under refdet's names.

    Attributes:
        kind: human-readable description.
        recipe: the network.
        classes: number of object classes, None for a network without detection heads.
        tensors: name -> float32 tensor, for all parameters and buffers except `untrained`.
        untrained: prefixes of the names that the file does not have.
        coco_ids: whether the label of a class is its COCO category id, 1..90, as in torchvision.
    """

    kind: str
    recipe: Recipe
    classes: int | None
    tensors: dict[str, Tensor]
    untrained: tuple[str, ...]
    coco_ids: bool = False


class Layout(Protocol):
    """How another program orders the rows of a tensor."""

    def rows(self, own: int) -> int:
        """Number of rows of the other program's tensor, if refdet's has `own`."""

    def to_own(self, value: Tensor) -> Tensor:
        """The other program's tensor in refdet's order."""

    def to_foreign(self, value: Tensor) -> Tensor:
        """The inverse of `to_own`, where refdet's tensor determines the other one."""


@dataclass(frozen=True)
class Same:
    """Equal rows."""

    def rows(self, own: int) -> int:
        """Number of rows of the other program's tensor."""
        return own

    def to_own(self, value: Tensor) -> Tensor:
        """The tensor."""
        return value

    def to_foreign(self, value: Tensor) -> Tensor:
        """The tensor."""
        return value


@dataclass(frozen=True)
class Pairs(Same):
    """Two logits per anchor, all backgrounds first; a softmax over the pair is the sigmoid of the difference."""

    def rows(self, own: int) -> int:
        """Number of rows of the other program's tensor."""
        return 2 * own

    def to_own(self, value: Tensor) -> Tensor:
        """Object minus background."""
        background, objects = value.chunk(2)
        return objects - background


@dataclass(frozen=True)
class BackgroundLast(Same):
    """The background is the last class instead of the first."""

    def to_own(self, value: Tensor) -> Tensor:
        """The last row first."""
        return value.roll(1, 0)

    def to_foreign(self, value: Tensor) -> Tensor:
        """The first row last."""
        return value.roll(-1, 0)


@dataclass(frozen=True)
class NoBackground(Same):
    """No rows for the background, which has neither boxes nor masks.

    Attributes:
        size: rows of each class.
    """

    size: int

    def rows(self, own: int) -> int:
        """Number of rows of the other program's tensor."""
        return own - self.size

    def to_own(self, value: Tensor) -> Tensor:
        """Rows of zeros first."""
        return torch.cat((torch.zeros_like(value[:1]).repeat_interleave(self.size, 0), value))

    def to_foreign(self, value: Tensor) -> Tensor:
        """Without the first rows."""
        return value[self.size :]


@dataclass(frozen=True)
class SizesOuter(Same):
    """Anchors with sizes outer and ratios inner; here ratios are outer.

    Attributes:
        sizes: number of anchor sizes.
        ratios: number of ratios.
    """

    sizes: int
    ratios: int

    def to_own(self, value: Tensor) -> Tensor:
        """Ratios outer."""
        return self._swap(value, self.sizes, self.ratios)

    def to_foreign(self, value: Tensor) -> Tensor:
        """Sizes outer."""
        return self._swap(value, self.ratios, self.sizes)

    @staticmethod
    def _swap(value: Tensor, outer: int, inner: int) -> Tensor:
        return value.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True)
class Naming:
    """The names of a program for a network of refdet.

    Attributes:
        parts: refdet's prefix -> the other program's, the longer ones first.
        layouts: refdet's prefix -> layout of the tensors under it, if it is not the same.
        within: changes the rest of a name after a prefix of `parts`.
    """

    parts: Mapping[str, str]
    layouts: Mapping[str, Layout]
    within: Callable[[str], str] = str

    def foreign(self, name: str) -> str:
        """The other program's name of a parameter."""
        prefix = next(part for part in self.parts if name.startswith(part))
        return self.parts[prefix] + self.within(name[len(prefix) :])

    def layout(self, name: str) -> Layout:
        """The layout of a parameter, by refdet's name."""
        return next((layout for part, layout in self.layouts.items() if name.startswith(part)), Same())

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The other program's tensors from refdet's."""
        return {self.foreign(name): self.layout(name).to_foreign(value) for name, value in tensors.items()}


def fit(
    recipe: Recipe,
    classes: int,
    given: Mapping[str, Tensor],
    naming: Naming,
    ignored: Iterable[str] = (),
    untrained: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The tensors of a model of `recipe`.

    Args:
        recipe: the network.
        classes: number of object classes.
        given: the other program's tensors.
        naming: its names.
        ignored: names in `given` that a detector does not use; counters of batches are ignored too.
        untrained: prefixes of refdet's names that `given` does not have.

    Raises:
        InputError: missing, unexpected, misshapen or unusable tensors; the message lists them.
    """
    with torch.device("meta"):
        model = MaskRCNN(recipe, classes)
    wanted = {
        name: value for name, value in model.state_dict().items() if not (untrained and name.startswith(untrained))
    }
    found, missing, wrong, used = {}, [], [], set(ignored)
    for name, own in wanted.items():
        source, layout = naming.foreign(name), naming.layout(name)
        if source not in given:
            missing.append(source)
            continue
        used.add(source)
        shape = (layout.rows(own.shape[0]), *own.shape[1:])
        if given[source].shape != shape:
            wrong.append(f"{source} is {tuple(given[source].shape)}, not {shape}")
            continue
        value = given[source].detach().float()
        if find_unusable({name: value}):
            wrong.append(f"{source} contains NaN, inf, values beyond {MAX_WEIGHT:g} or a negative variance")
        found[name] = layout.to_own(value).contiguous()
    left = [n for n in given if n not in used and not n.endswith("num_batches_tracked")]
    if missing or left or wrong:
        raise InputError(
            f"looks like the weights of {recipe.name}, but "
            + "; ".join(filter(None, (differences(missing, left), ", ".join(wrong[:5]))))
        )
    return found


def differences(missing: Iterable[str], left: Iterable[str]) -> str:
    """Missing and unexpected tensors, the first names of each."""
    listed = []
    for what, names in (("missing", sorted(missing)), ("left over", sorted(left))):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            listed.append(f"{what}: {', '.join(map(shorten, names[:8]))}{more}")
    return "; ".join(listed)


def count(given: Iterable[str], prefix: str) -> int:
    """Number of different indices that follow a prefix in the names, as blocks of a stage."""
    indices = {name[len(prefix) :].partition(".")[0] for name in given if name.startswith(prefix)}
    return len([index for index in indices if index.isdigit()])


def rows(given: Mapping[str, Tensor], name: str, usual: int) -> int:
    """Length of the first axis of a tensor; `usual` if it is missing."""
    shape = given[name].shape if name in given else (usual,)
    return shape[0] if shape else 0
