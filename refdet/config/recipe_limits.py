"""The range of every number of a recipe.

The upper ends are far above what anyone trains with. They are there since a recipe may be a stranger's: what passes
can be built, and what it needs has an end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refdet.errors import InputError
from refdet.files.short_text import shown


@dataclass(frozen=True)
class Range:
    """From `low` (without it if `above`) to `high`; of a list each item, of which there are `fewest` to `most`."""

    low: float
    high: float
    above: bool = False
    fewest: int = 0
    most: int = 0

    def check(self, key: str, value: Any) -> None:
        """InputError if a number, or an item of a tuple, is outside."""
        if not isinstance(value, tuple):
            self._check_one(key, value)
            return
        if not self.fewest <= len(value) <= self.most:
            needs = "at least one value is needed" if not value else f"{self.fewest} to {self.most} values are needed"
            raise InputError(f"{key}: {needs}, not {len(value)}")
        for item in value:
            self._check_one(key, item)

    def _check_one(self, key: str, value: float) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key}: a finite number is needed, not {value}")
        if self.low <= value <= self.high and not (self.above and value == self.low):
            return
        least = f"more than {self.low:g}" if self.above else f"{self.low:g} or more"
        needs = f"{self.low:g} to {self.high:g}" if self.high == 1 else f"{least}, at most {self.high:,g}"
        raise InputError(f"{key}: {needs} is needed, not {shown(value)}")


def _count(high: int) -> Range:
    return Range(0, high, above=True)


FRACTION = Range(0, 1)

LIMITS: dict[str, Range] = {
    "model.depth": _count(152),
    "model.width": _count(512),
    "model.stride": _count(16),
    "model.fpn_channels": _count(4096),
    "model.fpn_hidden": _count(16384),
    "model.rpn_channels": _count(8192),
    "model.mask_channels": _count(4096),
    "model.anchor_sizes": Range(1, 8192, fewest=1, most=16),
    "model.anchor_ratios": Range(0.001, 1000, fewest=1, most=16),
    "input.min_sizes": Range(0, 4096, above=True, fewest=1, most=100),
    "input.max_size": _count(8192),
    "input.mean": Range(-1e6, 1e6, fewest=3, most=3),
    "input.std": Range(1e-6, 1e6, fewest=3, most=3),
    "proposals.positive_iou": FRACTION,
    "proposals.negative_iou": FRACTION,
    "proposals.batch_size_per_image": _count(100_000),
    "proposals.positive_fraction": FRACTION,
    "proposals.nms_threshold": FRACTION,
    "proposals.pre_nms_top_n_train": _count(100_000),
    "proposals.post_nms_top_n_train": _count(20_000),
    "proposals.pre_nms_top_n_test": _count(100_000),
    "proposals.post_nms_top_n_test": _count(20_000),
    "head.positive_iou": FRACTION,
    "head.batch_size_per_image": _count(20_000),
    "head.positive_fraction": FRACTION,
    "train.steps": _count(10**8 - 1),  # the names of the states have 8 digits
    "train.batch_size": _count(10_000),
    "train.lr": Range(0, 1000, above=True),
    "train.momentum": FRACTION,
    "train.weight_decay": Range(0, 1000),
    "train.warmup_steps": Range(0, 10**8),
    "train.lr_milestones": Range(0, 1, most=100),
    "train.max_grad_norm": Range(0, 1e9),
    "train.workers": Range(0, 256),
    "train.seed": Range(0, 2**32 - 1),
    "train.checkpoint_interval": _count(10**9),
    "train.log_every": _count(10**9),
    "train.pretrained_lr_mult": Range(0, 1000),
}

LONGEST_NAME = 200  # characters of the recipe's name


def check_limits(tree: Mapping[str, Any]) -> None:
    """Check the numbers of a recipe, part -> option -> value.

    Raises:
        InputError: one is outside of its range; the key is named.
    """
    for part, options in tree.items():
        for option, value in options.items():
            limits = LIMITS.get(f"{part}.{option}")
            if limits is not None:
                limits.check(f"{part}.{option}", value)
