"""Make the function with which an extraction computes the regions of a batch of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from refdet.data.coco import ImageRecord
from refdet.detector.loading import TrainedDetector
from refdet.detector.predictor import start_describing, start_detecting
from refdet.extraction.batch_size import split_on_oom
from refdet.extraction.options import ExtractOptions
from refdet.extraction.steps import Compute, Finish
from refdet.structures.detection_options import DetectionOptions
from refdet.structures.regions import Regions


def make_compute(
    detector: TrainedDetector, options: ExtractOptions, given_regions: Callable[[ImageRecord], Regions] | None
) -> Compute:
    """Make the function that an extraction calls with each batch of images of one input size.

    Args:
        detector: loaded with ``for_inference=True``.
        options: what to compute.
        given_regions: returns the regions of an image (annotated or from a file), without features; None to detect
            regions.

    Returns:
        The function, which splits batches that do not fit into the memory of the GPU.
    """
    if given_regions is None:
        return split_on_oom(make_detect(detector, options, options.features, options.dtype))
    return split_on_oom(_make_describe(detector, given_regions, options))


def make_detect(
    detector: TrainedDetector, options: DetectionOptions, features: Sequence[str], dtype: str = "float32"
) -> Compute:
    """Make a function that detects regions in a batch of images of one input size, and computes their features.

    Args:
        detector: loaded with ``for_inference=True``.
        options: thresholds and limits of the detection.
        features: names of the features to compute.
        dtype: name of their dtype, "float32" or "float16".

    Returns:
        The function.
    """
    category_ids, feature_dtype = detector.meta.category_ids, getattr(torch, dtype)

    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        return start_detecting(
            detector.model, images, batch, category_ids, options, features=features, dtype=feature_dtype
        )

    return compute


def _make_describe(
    detector: TrainedDetector, given_regions: Callable[[ImageRecord], Regions], options: ExtractOptions
) -> Compute:
    """Make a function that computes the features of given regions in a batch of images of one input size.

    The function predicts the masks too if ``options.masks`` is "predicted"; else the regions keep theirs.
    """
    dtype = getattr(torch, options.dtype)
    label_of = {category: label for label, category in enumerate(detector.meta.category_ids, start=1)}  # 0: background
    predict_masks = options.masks == "predicted"

    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        regions = [given_regions(record) for record in batch]
        labels = None  # no masks are to be predicted
        if predict_masks:
            labels = [
                np.array([label_of[category] for category in given.category_ids.tolist()], np.int64)
                for given in regions
            ]
        boxes = [given.boxes for given in regions]
        finish = start_describing(detector.model, images, boxes, features=options.features, labels=labels, dtype=dtype)
        return lambda: [
            replace(
                given,
                features=computed.features,
                masks=given.masks if computed.masks is None else computed.masks,
                maps=computed.maps,
                im_info=computed.im_info,
            )
            for given, computed in zip(regions, finish(), strict=True)
        ]

    return compute
