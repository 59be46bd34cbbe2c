"""Every network trains on, detects in and describes images of extreme shape, down to one pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detector_examples import CATEGORY_IDS, VARIANTS, records_of, small_model, small_recipe

from refdet.data.segmentations import to_rle
from refdet.data.transforms import input_size, network_inputs
from refdet.detector.predictor import detect_batch, start_describing
from refdet.structures.box_convention import BoxConvention
from refdet.structures.detection_options import DetectionOptions
from refdet.structures.ground_truth import GroundTruth

SHAPES = [(1, 1), (2, 2), (1, 300), (300, 1), (2, 4000), (4000, 3)]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "frozen"])
def test_training_and_detection_on_images_of_extreme_shape(variant: str) -> None:
    changes = VARIANTS[variant]
    model, options = small_model(*changes), small_recipe(*changes).input
    convention = BoxConvention(small_recipe(*changes).model.legacy_plus_one)
    for height, width in SHAPES:
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        with torch.inference_mode():
            [found] = detect_batch(
                model, [pixels], records_of([pixels]), CATEGORY_IDS, DetectionOptions(score_threshold=0.0)
            )
            box = np.array([[0, 0, 1, 1], [0, 0, width, height]], np.float32)
            [described] = start_describing(model, [pixels], [box])()
        assert (
            np.isfinite(found.boxes).all() and (found.boxes >= 0).all() and (found.boxes <= [width, height] * 2).all()
        )
        assert all(np.isfinite(values).all() for values in described.features.values())
        size = input_size(height, width, options)
        inputs = network_inputs([pixels[:, ::-1]], [size], options)
        whole = convention.scale(torch.tensor([[0.0, 0.0, width, height]]), size.scale)
        masks = [to_rle({"size": [height, width], "counts": [0, height * width]}, height, width)]
        truth = GroundTruth(whole, torch.tensor([1]), masks, torch.zeros(0, 4), size.scale, float(width))
        model.train()
        losses = model.compute_losses(inputs, [(size.height, size.width)], [truth], torch.Generator().manual_seed(0))
        model.eval()
        total = sum(losses.values())
        total.backward()  # type: ignore[union-attr]
        assert all(torch.isfinite(loss) for loss in losses.values()), (height, width, losses)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)
