"""Recipe keys that were added later, so that recipes in older run directories lack them, and their defaults."""

from __future__ import annotations

# part, key and default; `Recipe.to_dict` omits a key with this value
OMITTED_DEFAULTS = (
    ("train", "accumulate", 1),
    ("train", "bias_lr_mult", 1.0),
    ("train", "empty_images", False),
    ("train", "schedule", "step"),
    ("train", "keep", 1),
    ("train", "eval_every", 0),
    ("train", "ema", 0.0),
    ("train", "tf32", True),
    ("input", "crop_size", 0),
    ("input", "scale_range", [0.1, 2.0]),
    ("input", "exif", "ignore"),
    ("input", "short_side_per", "step"),
    ("input", "size_divisibility", 0),
    ("model", "backbone", "resnet"),
    ("model", "zero_init_residual", True),
    ("model", "pooler_resolution", 7),
    ("model", "sampling_ratio", 2),
    ("model", "mask_pasting", "clamped"),
    ("model", "box_convs", 0),
    ("model", "box_fcs", 2),
    ("model", "rpn_convs", 1),
    ("model", "torchvision_anchors", False),
    ("model", "anchor_offset", 0.5),
    ("proposals", "smooth_l1_beta", 1 / 9),
    ("head", "smooth_l1_beta", 1.0),
)

# part -> key -> default in YAML files; older run directories without these keys keep the defaults of the dataclasses
YAML_DEFAULTS = {
    "input": {"short_side_per": "image", "size_divisibility": 32},
    "model": {"zero_init_residual": False},
}
