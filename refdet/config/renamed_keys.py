"""Recipe keys, values, names and losses renamed since refdet 0.1; the old names work for one more version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refdet.errors import InputError

KEYS_BEFORE_VALIDATION = {
    "model.inclusive": "legacy_plus_one",
    "model.rounded_anchors": "legacy_rounded_anchors",
    "model.seed_ranking": "legacy_tie_order",
    "input.short_sides": "min_sizes",
    "input.long_side": "max_size",
    "proposals.samples": "batch_size_per_image",
    "proposals.train_candidates": "pre_nms_top_n_train",
    "proposals.test_candidates": "pre_nms_top_n_test",
    "proposals.train_proposals": "post_nms_top_n_train",
    "proposals.test_proposals": "post_nms_top_n_test",
    "head.samples": "batch_size_per_image",
    "head.add_truth": "append_gt_boxes",
    "head.refill": "sample_with_replacement",
    "train.lr_drops": "lr_milestones",
    "train.clip_norm": "max_grad_norm",
    "train.loaded_rate": "pretrained_lr_mult",
    "train.save_every": "checkpoint_interval",
}
"""Old ``part.key`` -> new key in the same part, of keys that were renamed before `train` could validate."""

KEYS = {**KEYS_BEFORE_VALIDATION, "model.fpn_hidden": "fc_dim"}
"""Old ``part.key`` -> new key in the same part, of all renamed keys."""

VALUES: dict[tuple[str, str], dict[str, str]] = {("model", "pooling"): {"crop": "crop_and_resize"}}
"""(part, new key) -> old value -> new value."""


LOSSES = {
    "loss_classifier": "score",
    "loss_box_reg": "box",
    "loss_mask": "mask",
    "loss_objectness": "rpn_score",
    "loss_rpn_box_reg": "rpn_box",
}
"""New -> old names of the losses in metrics.jsonl, which has both."""


def current_name(name: str) -> str:
    """Current name of a shipped recipe; the reference networks used to have the prefix "seed"."""
    return "reference" + name.removeprefix("seed") if name.startswith("seed-") else name


def rename_old_keys(tree: Any) -> tuple[Any, list[str]]:
    """Rename the old keys and values of a recipe.

    Args:
        tree: part -> option -> value; anything else is returned unchanged.

    Returns:
        The tree with current names, and what was renamed: old keys such as "train.save_every", and old values such as
        "model.pooling=crop".

    Raises:
        InputError: a key is given under both its old and its new name.
    """
    if not isinstance(tree, Mapping):
        return tree, []
    updated, renamed = {}, []
    for part, options in tree.items():
        if not isinstance(options, Mapping):
            updated[part] = options
            continue
        updated[part] = {}
        for key, value in options.items():
            new_key: Any = KEYS.get(f"{part}.{key}", key)
            if new_key != key:
                renamed.append(f"{part}.{key}")
                if new_key in options:
                    raise InputError(f"{part}.{key}: also given under its new name {part}.{new_key}; remove one")
            new_values = VALUES.get((str(part), new_key), {})
            if isinstance(value, str) and value in new_values:
                renamed.append(f"{part}.{new_key}={value}")
                value = new_values[value]
            updated[part][new_key] = value
    return updated, renamed


def deprecation_message(renamed: str) -> str:
    """Deprecation message for an old key or value, in the form that `rename_old_keys` returns."""
    part, _, rest = renamed.partition(".")
    key, _, value = rest.partition("=")
    new = f"{key}={VALUES[part, key][value]}" if value else KEYS[renamed]
    return f"{renamed} was renamed to {part}.{new}; the old name works until the next version"
