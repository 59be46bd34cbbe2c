"""The recipe: everything that defines a training run, as a typed value; YAML on disk, JSON in a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from refdet.config.recipe_limits import LONGEST_NAME, check_limits
from refdet.config.renamed_keys import current, current_name, deprecation
from refdet.config.safe_yaml import parse_yaml
from refdet.errors import InputError
from refdet.files.short_text import cut, shown
from refdet.files.small_files import read_small

log = logging.getLogger(__name__)

LARGEST_FILE = 2**18  # bytes of a recipe


@dataclass(frozen=True)
class ModelOptions:
    """The network."""

    depth: int = 50  # of the ResNet: 18, 34, 50, 101 or 152
    width: int = 64  # channels of its first stage; 64 is the published network
    neck: str = "c4"  # c4: conv5 runs on the RoIs; fpn: a feature pyramid and a two-layer head
    stride: int = 16  # of the C4 map, 16 or 8 pixels; a pyramid has 4 to 64 whatever this says
    norm: str = "auto"  # frozen, batch, or auto: that of the weights given, batch from scratch
    masks: bool = True  # without the mask branch it is a Faster R-CNN
    stride_in_1x1: bool = False  # a bottleneck's stride: on its first 1x1 as in Caffe, or on its 3x3
    legacy_plus_one: bool = (
        False  # the reference's box arithmetic: widths of x2 - x1 + 1; see refdet.structures.box_convention
    )
    pooling: str = "align"  # of a C4 network: align (RoIAlign), or the reference's crop_and_resize and crop_align
    fpn_channels: int = 256
    fpn_hidden: int = 1024  # width of the two-layer head of the pyramid, and of its fc7
    rpn_channels: int = 512
    mask_channels: int = 256
    legacy_tie_order: bool = False  # which of equal scores comes first; see refdet.detector.postprocess
    # sides of square anchors in pixels of the network's input; with a pyramid one for each level
    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height over width
    legacy_rounded_anchors: bool = False  # sides in whole multiples as in the reference; needs sizes in multiples of 16


@dataclass(frozen=True)
class InputOptions:
    """How an image becomes the network's input: 0..255, minus mean, over std."""

    min_sizes: tuple[int, ...] = (600,)  # one is drawn for each training step; the last serves at test
    max_size: int = 1000  # an image that would be longer is made smaller
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    order: str = "rgb"  # of the channels, mean and std: rgb or bgr
    resize: str = "antialias"  # or opencv: plain bilinear, sampled at the scale itself
    exif: str = "ignore"  # or apply: training images are turned upright as their EXIF orientation says


@dataclass(frozen=True)
class ProposalOptions:
    """The region proposal network: how anchors are labelled and proposals chosen."""

    positive_iou: float = 0.7
    negative_iou: float = 0.3
    batch_size_per_image: int = 256  # anchors an image that enter the loss
    positive_fraction: float = 0.5
    nms_threshold: float = 0.7
    pre_nms_top_n_train: int = 2000  # best scores (of each level) before NMS
    post_nms_top_n_train: int = 1000  # an image, after NMS
    pre_nms_top_n_test: int = 1000
    post_nms_top_n_test: int = 300
    inside_only: bool = False  # anchors that stick out of the image are not trained


@dataclass(frozen=True)
class HeadOptions:
    """The second stage: how RoIs are sampled in training."""

    positive_iou: float = 0.5
    batch_size_per_image: int = 256  # RoIs an image that enter the loss
    positive_fraction: float = 0.25
    append_gt_boxes: bool = True  # the annotated boxes are RoIs too; if not, only where no proposal is positive
    sample_with_replacement: bool = False  # where there are too few RoIs, some are drawn twice


@dataclass(frozen=True)
class TrainOptions:
    """The optimisation."""

    steps: int = 90000
    batch_size: int = 8  # images a step
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0001
    warmup_steps: int = 500  # a fifth of the run at most
    lr_milestones: tuple[float, ...] = (0.67, 0.89)  # fractions of the run at which the rate falls to a tenth
    max_grad_norm: float = 10.0  # of the whole gradient; 0 leaves it alone
    flip: bool = True
    bf16: bool = False
    workers: int = 2
    seed: int = 0
    checkpoint_interval: int = 1000  # steps
    log_every: int = 20
    pretrained_lr_mult: float = 1.0  # with --weights: what the rate of the layers that they hold is multiplied by
    reset_predictors: bool = False  # with --weights of other classes: train the last layers anew
    empty_images: bool = False  # train on images without an object too, as negatives


@dataclass(frozen=True)
class Recipe:
    """A training run in full. `load` reads one, `with_changes` applies ``--set``."""

    name: str = "custom"
    model: ModelOptions = field(default_factory=ModelOptions)
    input: InputOptions = field(default_factory=InputOptions)
    proposals: ProposalOptions = field(default_factory=ProposalOptions)
    head: HeadOptions = field(default_factory=HeadOptions)
    train: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        model = self.model
        if not self.name.strip() or len(self.name) > LONGEST_NAME:
            raise InputError(f"name: 1 to {LONGEST_NAME} characters are needed, not {shown(self.name)}")
        _one_of("model.depth", model.depth, (18, 34, 50, 101, 152))
        _one_of("model.neck", model.neck, ("c4", "fpn"))
        _one_of("model.stride", model.stride, (8, 16))
        _one_of("model.norm", model.norm, ("auto", "frozen", "batch"))
        _one_of("model.pooling", model.pooling, ("align", "crop_and_resize", "crop_align"))
        _one_of("input.order", self.input.order, ("rgb", "bgr"))
        _one_of("input.exif", self.input.exif, ("ignore", "apply"))
        _one_of("input.resize", self.input.resize, ("antialias", "opencv"))
        if model.neck == "fpn" and model.pooling != "align":
            raise InputError("model.pooling: a pyramid has align alone")
        if model.legacy_rounded_anchors and any(size % 16 for size in model.anchor_sizes):
            raise InputError("model.legacy_rounded_anchors: model.anchor_sizes must be multiples of 16")
        if model.neck == "fpn" and len(model.anchor_sizes) != 5:
            raise InputError("model.anchor_sizes: a pyramid has 5 levels and takes one size for each")
        check_limits(dataclasses.asdict(self) | {"name": {}})
        if self.proposals.negative_iou > self.proposals.positive_iou:
            raise InputError("proposals.negative_iou: must not exceed proposals.positive_iou")

    def with_changes(self, assignments: Sequence[str]) -> Recipe:
        """The recipe after ``key=value`` assignments such as ``train.steps=50`` (values are YAML).

        Raises:
            InputError: an assignment without ``=``, an unknown key, a value of the wrong type.
        """
        tree = self.to_dict()
        for assignment in assignments:
            key, separator, text = assignment.partition("=")
            if not separator:
                raise InputError(f"--set {cut(assignment)}: write key=value, such as train.steps=500")
            try:
                value = parse_yaml(text)
            except InputError as error:
                raise InputError(f"--set {cut(assignment)}: {error}") from None
            *parents, leaf = key.strip().split(".")
            place: Any = tree
            for parent in parents:
                place = place.get(parent) if isinstance(place, dict) else None
            if not isinstance(place, dict) or isinstance(place.get(leaf), dict):
                raise InputError(_unknown(key))
            changed, renamed = current({parents[0]: {leaf: value}}) if len(parents) == 1 else ({}, [])
            _deprecate(renamed)
            place.update(changed[parents[0]] if parents and changed else {leaf: value})
        return from_dict(tree)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as YAML and JSON take them.

        Keys that older recipes do not have are there only where they are set, so that what is made of an old recipe,
        a store for one, stays the same to the byte.
        """
        tree = {
            k: {n: list(v) if isinstance(v, tuple) else v for n, v in part.items()} if isinstance(part, dict) else part
            for k, part in dataclasses.asdict(self).items()
        }
        for part, key, default in _ONLY_WHERE_SET:
            if tree[part][key] == default:
                del tree[part][key]
        return tree


_ONLY_WHERE_SET = (("train", "empty_images", False), ("input", "exif", "ignore"))


def from_dict(tree: Mapping[str, Any]) -> Recipe:
    """The recipe that a tree of plain values describes; what is absent has its default.

    Keys that have another name now are read without a word: a run directory is no text that anyone would correct.

    Raises:
        InputError: an unknown key or a value of the wrong type, with its name.
    """
    return _build(Recipe, current(tree)[0], "")


def load(name_or_path: str) -> Recipe:
    """A recipe shipped with refdet, by name, or one in a YAML file.

    A file holds what differs from the defaults, or from the shipped recipe that its key ``base`` names.

    Raises:
        InputError: no such recipe or file, or not a recipe.
    """
    if (newer := current_name(name_or_path)) != name_or_path and newer in names():
        log.warning("note: recipe %s was renamed to %s; the old name works until the next version", name_or_path, newer)
        name_or_path = newer
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.exists():
            raise InputError(f"--recipe {name_or_path}: no such file")
        text: str | bytes = read_small(path, LARGEST_FILE)
        default_name = path.stem
    elif name_or_path in names():
        text = (resources.files("refdet.config.recipes") / f"{name_or_path}.yaml").read_text(encoding="utf-8")
        default_name = name_or_path
    else:
        raise InputError(f"--recipe {name_or_path}: neither a .yaml file nor one of {', '.join(names())}")
    try:
        tree = parse_yaml(text)
    except InputError as error:
        raise InputError(f"{name_or_path}: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise InputError(f"{name_or_path}: a recipe is a YAML mapping, not {shown(tree)}")
    base = tree.pop("base", None)
    if isinstance(base, str):
        base = current_name(base)
    if base is not None and base not in names():
        raise InputError(f"{name_or_path}: base: one of {', '.join(names())}, not {shown(base)}")
    try:
        tree, renamed = current(tree)
        _deprecate(renamed)
        whole = _over(load(base).to_dict(), tree) if base else tree
        return from_dict({**whole, "name": tree.get("name", default_name)})
    except InputError as error:
        raise InputError(f"{name_or_path}: {error}") from error


def _deprecate(renamed: Sequence[str]) -> None:
    for name in renamed:
        log.warning("note: %s", deprecation(name))


def _over(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The tree `base` with the values of `changes` in their places."""
    parts = {k: {**base[k], **v} if isinstance(base.get(k), dict) and isinstance(v, dict) else v
             for k, v in changes.items()}  # fmt: skip
    return {**base, **parts}


def names() -> list[str]:
    """The recipes shipped with refdet."""
    files = resources.files("refdet.config.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def _keys(cls: Any = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key that ``--set`` takes."""
    keys: list[str] = []
    for name, kind in typing.get_type_hints(cls).items():
        keys += _keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
    return keys


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, _keys(), n=1, cutoff=0.5)
    return f"{cut(key)}: no such recipe key" + (f"; did you mean {near[0]}?" if near else "")


def _build(cls: Any, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise InputError(f"{prefix.rstrip('.')}: a mapping of options is needed, not {shown(tree)}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise InputError(_unknown(key))
        kind = hints[name]
        values[name] = _build(kind, value, key + ".") if dataclasses.is_dataclass(kind) else _typed(key, value, kind)
    return cls(**values)


def _typed(key: str, value: Any, kind: Any) -> Any:
    """The value as the field's type, or an error that says which type is wanted."""
    if typing.get_origin(kind) is tuple:
        wanted = typing.get_args(kind)
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if wanted[-1] is types.EllipsisType or wanted[-1] is Ellipsis:
            wanted = (wanted[0],) * len(items)
        if len(items) != len(wanted):
            raise InputError(f"{key}: {len(wanted)} values are needed, not {shown(value)}")
        return tuple(_typed(key, item, of) for item, of in zip(items, wanted, strict=True))
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML 1.1 reads 1e-4 as text
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key}: a finite number is needed, not {value}")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{key}: {kind.__name__} expected, not {shown(value)}")
    return value


def _one_of(key: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise InputError(f"{key}: one of {', '.join(map(str, choices))}, not {shown(value)}")
