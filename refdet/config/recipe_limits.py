"""Range of every number in a recipe.

The upper limits are far above practical values. They bound the resources that an untrusted recipe can request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from refdet.errors import InputError
from refdet.files.short_text import short_repr


@dataclass(frozen=True)
class Range:
    """Allowed range of a number, or of each item in a list.

    Attributes:
        low: minimum.
        high: maximum.
        exclusive: whether the minimum itself is not allowed.
        min_items: minimum number of items, if the value is a list.
        max_items: maximum number of items, if the value is a list.
    """

    low: float
    high: float
    exclusive: bool = False
    min_items: int = 0
    max_items: int = 0

    def check(self, key: str, value: Any) -> None:
        """Check a number, or each item of a tuple.

        Args:
            key: the recipe key, for error messages.
            value: value of the key.

        Raises:
            InputError: a number is out of range, or a tuple has too few or too many items.
        """
        if not isinstance(value, tuple):
            self._check_number(key, value)
            return
        if not self.min_items <= len(value) <= self.max_items:
            needs = "at least one value" if not value else f"{self.min_items} to {self.max_items} values"
            raise InputError(f"{key}: must have {needs}, not {len(value)}")
        for item in value:
            self._check_number(key, item)

    def _check_number(self, key: str, value: float) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key}: must be finite, not {value}")
        if self.low <= value <= self.high and not (self.exclusive and value == self.low):
            return
        minimum = "greater than" if self.exclusive else "at least"
        needs = "from 0 to 1" if self == FRACTION else f"{minimum} {self.low:,} and at most {self.high:,}"
        raise InputError(f"{key}: must be {needs}, not {short_repr(value)}")


def _count(high: int) -> Range:
    """Range of an integer from 1 to ``high``."""
    return Range(0, high, exclusive=True)  # "greater than 0" in messages


FRACTION = Range(0, 1)

LIMITS: dict[str, Range] = {
    "model.depth": _count(152),
    "model.width": _count(512),
    "model.stride": _count(16),
    "model.fpn_channels": _count(4096),
    "model.fc_dim": _count(16384),
    "model.pooler_resolution": _count(14),
    "model.box_fcs": _count(2),
    "model.sampling_ratio": Range(0, 16),
    "model.box_convs": Range(0, 8),
    "model.rpn_convs": Range(1, 8),
    "model.rpn_channels": _count(8192),
    "model.mask_channels": _count(4096),
    "model.anchor_sizes": Range(1, 8192, min_items=1, max_items=16),
    "model.anchor_ratios": Range(0.001, 1000, min_items=1, max_items=16),
    "model.anchor_offset": FRACTION,
    "input.min_sizes": Range(0, 4096, exclusive=True, min_items=1, max_items=100),
    "input.max_size": _count(8192),
    "input.crop_size": Range(0, 8192),
    "input.scale_range": Range(0.01, 10, min_items=2, max_items=2),
    "input.mean": Range(-(10**6), 10**6, min_items=3, max_items=3),
    "input.size_divisibility": Range(0, 1024),
    "input.std": Range(1e-6, 10**6, min_items=3, max_items=3),
    "proposals.positive_iou": FRACTION,
    "proposals.negative_iou": FRACTION,
    "proposals.batch_size_per_image": _count(100_000),
    "proposals.positive_fraction": FRACTION,
    "proposals.nms_threshold": FRACTION,
    "proposals.smooth_l1_beta": Range(0, 100),
    "proposals.pre_nms_top_n_train": _count(100_000),
    "proposals.post_nms_top_n_train": _count(20_000),
    "proposals.pre_nms_top_n_test": _count(100_000),
    "proposals.post_nms_top_n_test": _count(20_000),
    "head.positive_iou": FRACTION,
    "head.batch_size_per_image": _count(20_000),
    "head.positive_fraction": FRACTION,
    "head.smooth_l1_beta": Range(0, 100),
    "train.steps": _count(10**8 - 1),  # state file names have 8 digits
    "train.batch_size": _count(10_000),
    "train.accumulate": _count(10_000),
    "train.lr": Range(0, 1000, exclusive=True),
    "train.momentum": FRACTION,
    "train.weight_decay": Range(0, 1000),
    "train.warmup_steps": Range(0, 10**8),
    "train.lr_milestones": Range(0, 1, max_items=100),
    "train.max_grad_norm": Range(0, 10**9),
    "train.workers": Range(0, 256),
    "train.seed": Range(0, 2**32 - 1),
    "train.checkpoint_interval": _count(10**9),
    "train.keep": Range(0, 10**9),
    "train.eval_every": Range(0, 10**9),
    "train.ema": Range(0, 0.9999999),  # 1 would never change the average
    "train.log_every": _count(10**9),
    "train.pretrained_lr_mult": Range(0, 1000),
    "train.bias_lr_mult": Range(0, 1000),
}

MAX_NAME_LENGTH = 200  # characters


def check_limits(recipe: object) -> None:
    """Check the numbers of a recipe; raises InputError with the key of a number that is out of range."""
    for key, limits in LIMITS.items():
        part, option = key.split(".")
        limits.check(key, getattr(getattr(recipe, part), option))
