"""Floating-point operations of a network per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from results import Step
from torch.utils.flop_counter import FlopCounterMode
from work import extract_options

from refdet.data.coco import ImageRecord
from refdet.detector.loading import TrainedDetector
from refdet.detector.predictor import detect_batch


def _of_convolution(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _of_addmm(bias: Sequence[int], a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


FUSED = {
    torch.ops.aten.cudnn_convolution_relu: _of_convolution,
    torch.ops.aten.cudnn_convolution_add_relu: _of_convolution,
    torch.ops.aten._addmm_activation: _of_addmm,
}


def flops_of_image(
    step: Step, loaded: TrainedDetector, records: Sequence[ImageRecord], pixels: Sequence[np.ndarray]
) -> float:
    """Count the floating-point operations per image in convolutions and matrix products of a batch.

    In a rehearsal most are missed, as PyTorch cannot count those of refdet's CPU kernels.
    """
    options = extract_options(step, "c4")
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        detect_batch(loaded.model, pixels, records, loaded.meta.category_ids, options)
    return counter.get_total_flops() / len(records)
