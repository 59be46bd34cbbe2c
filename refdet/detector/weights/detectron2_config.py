"""Configuration of a network for detectron2, written next to its exported weights."""

from __future__ import annotations

from typing import Any

from refdet.config.recipe import Recipe
from refdet.detector.roi_heads import POOL_SIZE


def detectron2_config(recipe: Recipe, classes: int) -> dict[str, Any]:
    """Make the configuration of a network for detectron2, to be merged into detectron2's defaults.

    Args:
        recipe: the network and its inputs.
        classes: number of object classes.
    """
    model, proposals, input_options = recipe.model, recipe.proposals, recipe.input
    pyramid, c4 = model.neck == "fpn", model.neck == "c4"
    maps = {"fpn": ["p2", "p3", "p4", "p5", "p6"], "c4": ["res4"], "dc5": ["res5"]}[model.neck]
    pooler = {
        "POOLER_RESOLUTION": model.pooler_resolution if c4 else POOL_SIZE,
        "POOLER_SAMPLING_RATIO": model.sampling_ratio,
        "POOLER_TYPE": "ROIAlignV2" if model.pooling == "align" else "ROIAlign",
    }
    box = {**pooler, "NAME": "" if c4 else "FastRCNNConvFCHead", "NUM_FC": 0 if c4 else model.box_fcs}
    mask = {**pooler, "POOLER_RESOLUTION": 14, "NUM_CONV": 0 if c4 else 4, "NAME": "MaskRCNNConvUpsampleHead"}
    sizes = [[size] for size in model.anchor_sizes] if pyramid else [list(model.anchor_sizes)]
    stages = ["res2", "res3", "res4", "res5"]
    resnets = {
        "DEPTH": model.depth,
        "STRIDE_IN_1X1": model.stride_in_1x1,
        "NORM": "FrozenBN",
        "OUT_FEATURES": stages if pyramid else maps,
        "RES5_DILATION": 2 if model.neck == "dc5" else 1,
    }
    if model.depth < 50:
        resnets["RES2_OUT_CHANNELS"] = 64  # detectron2's default, 256, is for bottleneck blocks
    model_config: dict[str, Any] = {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "MASK_ON": model.masks,
        "PIXEL_MEAN": list(input_options.mean),
        "PIXEL_STD": list(input_options.std),
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone" if pyramid else "build_resnet_backbone"},
        "RESNETS": resnets,
        "ANCHOR_GENERATOR": {
            "SIZES": sizes,
            "ASPECT_RATIOS": [list(model.anchor_ratios)],
            "OFFSET": model.anchor_offset,
        },
        "RPN": {
            "IN_FEATURES": maps,
            "CONV_DIMS": [model.rpn_channels] * model.rpn_convs,
            "NMS_THRESH": proposals.nms_threshold,
            "PRE_NMS_TOPK_TRAIN": proposals.pre_nms_top_n_train,
            "PRE_NMS_TOPK_TEST": proposals.pre_nms_top_n_test,
            "POST_NMS_TOPK_TRAIN": proposals.post_nms_top_n_train,
            "POST_NMS_TOPK_TEST": proposals.post_nms_top_n_test,
        },
        "ROI_HEADS": {
            "NAME": "Res5ROIHeads" if c4 else "StandardROIHeads",
            "NUM_CLASSES": classes,
            "IN_FEATURES": maps[:4],
        },
        "ROI_BOX_HEAD": {**box, "FC_DIM": model.fc_dim},
        "ROI_MASK_HEAD": {**mask, "CONV_DIM": model.mask_channels},
    }
    if pyramid:
        model_config["FPN"] = {"IN_FEATURES": stages, "OUT_CHANNELS": model.fpn_channels}
    input_config = {
        "FORMAT": input_options.order.upper(),
        "MIN_SIZE_TRAIN": list(input_options.min_sizes),
        "MIN_SIZE_TEST": input_options.min_sizes[-1],
        "MAX_SIZE_TRAIN": input_options.max_size,
        "MAX_SIZE_TEST": input_options.max_size,
    }
    return {"VERSION": 2, "MODEL": model_config, "INPUT": input_config}
