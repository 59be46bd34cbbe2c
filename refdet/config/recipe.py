"""Recipe: typed configuration of a training run, stored as YAML on disk and as JSON in a checkpoint."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from refdet.config.newer_keys import OMITTED_DEFAULTS, YAML_DEFAULTS
from refdet.config.recipe_limits import MAX_NAME_LENGTH, check_limits
from refdet.config.recipe_values import build, check_choice, unknown_key_message
from refdet.config.renamed_keys import current_name, deprecation_message, rename_old_keys
from refdet.config.safe_yaml import parse_yaml
from refdet.errors import InputError
from refdet.files.json_files import read_bytes
from refdet.files.short_text import short_repr, shorten

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 2**18  # limit of a YAML file


@dataclass(frozen=True)
class ModelOptions:
    """The network."""

    backbone: str = "resnet"  # resnet, or vgg16 or mobilenet_v1 with the neck c4
    depth: int = 50  # of the ResNet: 18, 34, 50, 101 or 152
    width: int = 64  # channels of the backbone's first stage; 64 in the published networks, 32 in MobileNet v1
    # c4: conv5 on the RoIs (in a VGG, linear layers); fpn: a feature pyramid, then linear layers on the RoIs; dc5: a
    # dilated conv5 on the image, then linear layers on the RoIs
    neck: str = "c4"
    stride: int = 16  # of the C4 map, 16 or 8 pixels; ignored with a pyramid, which has 4 to 64
    norm: str = "auto"  # frozen, batch, or auto: as in the initial weights, batch from scratch
    # from scratch with trained norms, start the last norm of each residual block at 0; false if YAML lacks this key
    zero_init_residual: bool = True
    masks: bool = True  # predict masks; false for a Faster R-CNN
    stride_in_1x1: bool = False  # stride of a bottleneck in its first 1x1 convolution, as in Caffe, not in its 3x3
    legacy_plus_one: bool = False  # box widths of x2 - x1 + 1, as in the reference (refdet.structures.box_convention)
    # align (RoIAlign), align_legacy (not aligned); in a C4 network also crop_and_resize, crop_max, crop_align
    pooling: str = "align"
    pooler_resolution: int = 7  # bins per side of a RoI in a C4 network; 14 if conv5 has stride 2
    sampling_ratio: int = 2  # samples per side of a bin in RoIAlign; 0 for adaptive sampling
    fpn_channels: int = 256  # of each level of the pyramid
    fc_dim: int = 1024  # width of the linear layers on the RoIs (with fpn, dc5 or a VGG), and so of fc7
    box_convs: int = 0  # 3x3 convolutions before these linear layers
    box_fcs: int = 2  # number of these linear layers, 1 or 2
    rpn_convs: int = 1  # hidden 3x3 convolutions of the RPN
    rpn_channels: int = 512  # of these convolutions
    mask_channels: int = 256  # of the convolutions of the mask branch
    mask_pasting: str = "clamped"  # clamped, padded (detectron2's) or torchvision (refdet.detector.mask_pasting)
    legacy_tie_order: bool = False  # equal scores ordered as in the reference (refdet.detector.postprocess)
    # sides of square anchors in pixels of the network input; with a pyramid one per level
    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height over width
    legacy_rounded_anchors: bool = False  # sides rounded as in the reference; sizes must be multiples of 16
    torchvision_anchors: bool = False  # rounded corners, and strides of input size // map size
    anchor_offset: float = 0.5  # center of the first anchor in strides; 0 in detectron2 and torchvision


@dataclass(frozen=True)
class InputOptions:
    """Preprocessing of images: resized, then (0..255 - mean) / std."""

    min_sizes: tuple[int, ...] = (600,)  # of the shorter side; one is drawn in training, the last is used at test time
    # image: one of min_sizes is drawn for each image, as in detectron2 and torchvision; step: one for all images of a
    # step, which then need less padding. image if YAML lacks this key, step in older runs
    short_side_per: str = "step"
    max_size: int = 1000  # limit of the longer side
    # large-scale jitter: side of the square that a training image is resized to fit into, times a random scale, and
    # then cropped or padded to; 0 for none: training uses min_sizes and max_size
    crop_size: int = 0
    scale_range: tuple[float, float] = (0.1, 2.0)  # of the random scale with crop_size
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # of each channel, 0..255
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)  # of each channel
    order: str = "rgb"  # order of the channels, mean and std: rgb or bgr
    # antialias; opencv: plain bilinear, sampled at the exact scale; pillow: to whole gray levels, as in detectron2;
    # torchvision: plain bilinear, sizes rounded down
    resize: str = "antialias"
    exif: str = "ignore"  # ignore, or apply: rotate training images by their EXIF orientation
    # height and width of the inputs are padded to multiples of this; 0, like 1, for no such padding. 32 if YAML lacks
    # this key, 0 in older runs
    size_divisibility: int = 0


@dataclass(frozen=True)
class ProposalOptions:
    """Region proposal network: labeling of anchors and selection of proposals."""

    positive_iou: float = 0.7  # minimum IoU with an object for an anchor to be positive
    negative_iou: float = 0.3  # anchors with a lower IoU are negative; those between the thresholds are ignored
    batch_size_per_image: int = 256  # anchors per image in the loss
    positive_fraction: float = 0.5  # maximum fraction of these anchors that is positive
    nms_threshold: float = 0.7  # IoU above which the lower-scoring proposal is removed
    pre_nms_top_n_train: int = 2000  # in training: number of proposals per image and level before NMS, by score
    post_nms_top_n_train: int = 1000  # in training: number of proposals per image after NMS
    pre_nms_top_n_test: int = 1000  # at test time: number of proposals per image and level before NMS, by score
    post_nms_top_n_test: int = 300  # at test time: number of proposals per image after NMS
    inside_only: bool = False  # ignore anchors that cross the image border
    smooth_l1_beta: float = 1 / 9  # of the box loss: quadratic below, linear above; 0 for L1


@dataclass(frozen=True)
class HeadOptions:
    """Second stage: sampling of RoIs in training."""

    positive_iou: float = 0.5  # minimum IoU with an object for a RoI to be positive
    batch_size_per_image: int = 256  # RoIs per image in the loss
    positive_fraction: float = 0.25  # maximum fraction of these RoIs that is positive
    append_gt_boxes: bool = True  # also sample annotated boxes; otherwise only if no proposal is positive
    sample_with_replacement: bool = False  # repeat RoIs if there are too few
    smooth_l1_beta: float = 1.0  # of the box loss: quadratic below, linear above; 0 for L1


@dataclass(frozen=True)
class TrainOptions:
    """Optimization."""

    steps: int = 90000  # of the whole run
    batch_size: int = 8  # images per step, in all processes together
    accumulate: int = 1  # passes per step, each over a part of a process's images, to save memory
    lr: float = 0.01  # peak learning rate; scale it with batch_size
    momentum: float = 0.9  # of SGD
    weight_decay: float = 0.0001  # for the weights of convolutions and linear layers, not for norms and biases
    warmup_steps: int = 500  # steps in which the learning rate rises from a tenth; a fifth of the run if that is less
    schedule: str = "step"  # of the learning rate after the warm-up: step (lr_milestones), or cosine to 0 at the end
    lr_milestones: tuple[float, ...] = (0.67, 0.89)  # fractions of the run at which the learning rate is divided by 10
    max_grad_norm: float = 10.0  # limit of the norm of all gradients together; 0 for no clipping
    flip: bool = True  # mirror half of the images
    bf16: bool = False  # autocast: convolutions and matrix products in bfloat16
    tf32: bool = True  # on a GPU, float32 convolutions and matrix products in TF32; false for IEEE float32
    workers: int = 2  # processes that read images; 0 to read them in the training process
    seed: int = 0  # random seed for new layers, batches, flips, sizes and samples
    checkpoint_interval: int = 1000  # steps between saved states
    keep: int = 1  # number of the newest saved states to keep; 0 for all
    eval_every: int = 0  # steps between validations, with --val-instances; 0 for only one at the end
    ema: float = 0.0  # decay of an average of the weights, which is validated and saved; 0 for none
    log_every: int = 20  # steps between rows of metrics.jsonl
    pretrained_lr_mult: float = 1.0  # with --weights: learning rate factor of the layers loaded from these weights
    bias_lr_mult: float = 1.0  # learning rate factor of biases; 2 in Caffe's detectors
    reset_predictors: bool = False  # with --weights of other classes: reinitialize the predictors
    empty_images: bool = False  # also train on images without objects, as negatives


@dataclass(frozen=True)
class Recipe:
    """Complete configuration of a training run. `load` reads one, `with_changes` applies ``--set``."""

    name: str = "custom"
    model: ModelOptions = field(default_factory=ModelOptions)
    input: InputOptions = field(default_factory=InputOptions)
    proposals: ProposalOptions = field(default_factory=ProposalOptions)
    head: HeadOptions = field(default_factory=HeadOptions)
    train: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        model = self.model
        if not self.name.strip() or len(self.name) > MAX_NAME_LENGTH:
            raise InputError(f"name: must have 1 to {MAX_NAME_LENGTH} characters, not {short_repr(self.name)}")
        check_choice("model.depth", model.depth, (18, 34, 50, 101, 152))
        check_choice("model.backbone", model.backbone, ("resnet", "vgg16", "mobilenet_v1"))
        check_choice("model.neck", model.neck, ("c4", "fpn", "dc5"))
        check_choice("model.stride", model.stride, (8, 16))
        check_choice("model.norm", model.norm, ("auto", "frozen", "batch"))
        check_choice(
            "model.pooling", model.pooling, ("align", "align_legacy", "crop_and_resize", "crop_max", "crop_align")
        )
        check_choice("model.pooler_resolution", model.pooler_resolution, (7, 14))
        check_choice("model.box_fcs", model.box_fcs, (1, 2))
        check_choice("model.mask_pasting", model.mask_pasting, ("clamped", "padded", "torchvision"))
        check_choice("train.schedule", self.train.schedule, ("step", "cosine"))
        check_choice("input.order", self.input.order, ("rgb", "bgr"))
        check_choice("input.exif", self.input.exif, ("ignore", "apply"))
        check_choice("input.short_side_per", self.input.short_side_per, ("image", "step"))
        check_choice("input.resize", self.input.resize, ("antialias", "opencv", "pillow", "torchvision"))
        if model.neck != "c4" and model.pooling not in ("align", "align_legacy"):
            raise InputError(f"model.pooling: must be align or align_legacy with model.neck={model.neck}")
        if model.neck == "dc5" and (model.depth < 50 or model.stride != 16):
            raise InputError("model.neck: dc5 needs a model.depth of 50 or more and model.stride=16")
        if model.backbone != "resnet" and (model.neck, model.stride, model.pooler_resolution) != ("c4", 16, 7):
            raise InputError(
                "model.backbone: vgg16 and mobilenet_v1 need model.neck=c4, stride=16, pooler_resolution=7"
            )
        if model.backbone == "vgg16" and model.masks:
            raise InputError("model.masks: must be false with model.backbone=vgg16, a Faster R-CNN")
        if model.legacy_rounded_anchors and any(size % 16 for size in model.anchor_sizes):
            raise InputError("model.legacy_rounded_anchors: needs model.anchor_sizes in multiples of 16")
        if model.neck == "fpn" and len(model.anchor_sizes) != 5:
            raise InputError("model.anchor_sizes: must have 5 values with model.neck=fpn, one per level")
        check_limits(self)
        if self.train.batch_size % self.train.accumulate:
            raise InputError(
                f"train.accumulate: must divide train.batch_size={self.train.batch_size}, not {self.train.accumulate}"
            )
        if self.input.scale_range[0] > self.input.scale_range[1]:
            raise InputError("input.scale_range: must be a smaller and a larger scale, such as [0.1, 2.0]")
        if self.proposals.negative_iou > self.proposals.positive_iou:
            raise InputError("proposals.negative_iou: must not exceed proposals.positive_iou")

    def with_changes(self, assignments: Sequence[str]) -> Recipe:
        """Return the recipe with assignments applied.

        Args:
            assignments: ``key=value`` strings such as ``train.steps=50``, with YAML values.

        Returns:
            A new recipe.

        Raises:
            InputError: an assignment without ``=``, an unknown key, or an invalid value.
        """
        tree = self.to_dict()
        for assignment in assignments:
            key, separator, text = assignment.partition("=")
            if not separator or not key.strip():
                missing = "no key" if separator else "no '='"
                raise InputError(
                    f"`changes` {shorten(assignment)}: {missing}; write key=value, such as train.steps=500"
                )
            try:
                value = parse_yaml(text)
            except InputError as error:
                raise InputError(f"`changes` {shorten(assignment)}: {error}") from None
            part, _, option = key.strip().rpartition(".")
            options = tree.get(part) if part else tree
            if not isinstance(options, dict) or isinstance(options.get(option), dict):
                raise InputError(unknown_key_message(key.strip(), Recipe))
            change, renamed = rename_old_keys({part: {option: value}} if part else {option: value})
            _warn_renamed(renamed)
            options.update(change[part] if part else change)
        return from_dict(tree)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain dicts, lists and numbers for YAML and JSON.

        Newer keys are omitted if they have their default value, so that the outputs of an older recipe, such as a
        store, stay the same byte for byte.
        """
        tree = dataclasses.asdict(self)
        for options in tree.values():
            if isinstance(options, dict):
                options.update({key: list(value) for key, value in options.items() if isinstance(value, tuple)})
        for part, key, default in OMITTED_DEFAULTS:
            if tree[part][key] == default:
                del tree[part][key]
        return tree


def from_dict(tree: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain values.

    Renamed keys are accepted without a note, as files in run directories are not edited by hand.

    Args:
        tree: part -> option -> value; missing options get the defaults of the classes in this module.

    Returns:
        The recipe.

    Raises:
        InputError: an unknown key or an invalid value.
    """
    recipe: Recipe = build(Recipe, rename_old_keys(tree)[0])
    return recipe


def load(name_or_path: str) -> Recipe:
    """Load a recipe.

    Args:
        name_or_path: name of a recipe shipped with refdet, or a YAML file. A file holds the differences from the
            defaults (with those of `YAML_DEFAULTS`), or from the shipped recipe named by its key ``base``.

    Returns:
        The recipe.

    Raises:
        InputError: no such recipe or file, or an invalid recipe.
    """
    name_or_path = _resolve_old_name(name_or_path)
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.exists():
            raise InputError(f"`recipe` {name_or_path}: no such file")
        text: str | bytes = read_bytes(path, MAX_FILE_BYTES)
        default_name = path.stem
    elif name_or_path in names():
        text = (resources.files("refdet.config.recipes") / f"{name_or_path}.yaml").read_text(encoding="utf-8")
        default_name = name_or_path
    else:
        raise InputError(f"`recipe` {name_or_path}: no such recipe; give a .yaml file or one of {', '.join(names())}")
    try:
        tree = parse_yaml(text)
    except InputError as error:
        raise InputError(f"{name_or_path}: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise InputError(f"{name_or_path}: must be a YAML mapping, not {short_repr(tree)}")
    base = tree.pop("base", None)
    if isinstance(base, str):
        base = _resolve_old_name(base)
    if base is not None and base not in names():
        raise InputError(f"{name_or_path}: base: must be one of {', '.join(names())}, not {short_repr(base)}")
    try:
        tree, renamed = rename_old_keys(tree)
        _warn_renamed(renamed)
        merged = _merge(load(base).to_dict() if base else YAML_DEFAULTS, tree)
        return from_dict({**merged, "name": tree.get("name", default_name)})
    except InputError as error:
        raise InputError(f"{name_or_path}: {error}") from error


def _resolve_old_name(name: str) -> str:
    """The current name of a shipped recipe, with a note if ``name`` is an old one; other names are unchanged."""
    newer = current_name(name)
    if newer == name or newer not in names():
        return name
    log.warning("note: recipe %s was renamed to %s; the old name works until the next version", name, newer)
    return newer


def _warn_renamed(renamed: Sequence[str]) -> None:
    """Log a note for each old name that was used."""
    for name in renamed:
        log.warning("note: %s", deprecation_message(name))


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the tree ``base`` with ``changes`` applied."""
    merged = dict(base)
    for part, options in changes.items():
        is_mapping = isinstance(base.get(part), dict) and isinstance(options, dict)
        merged[part] = {**base[part], **options} if is_mapping else options
    return merged


def names() -> list[str]:
    """Sorted names of the recipes shipped with refdet."""
    files = resources.files("refdet.config.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))
