"""Random weights with realistically spread outputs, for benchmarks that need many distinct detections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from refdet.config.recipe import Recipe
from refdet.data.transforms import input_size, network_input
from refdet.detector import checkpoint
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.structures.coco_categories import coco_categories
from refdet.structures.provenance import Provenance

CANDIDATES = 1000  # (box, class) pairs per image above the score threshold: as many as a trained network has above 0.05


@torch.inference_mode()
def make_weights(folder: Path, recipe: Recipe, pixels: Sequence[np.ndarray]) -> float:
    """Write a run directory of random weights, scaled so that the outputs on some images are spread out.

    Args:
        folder: the run directory, new.
        recipe: the network, with ``model.norm`` frozen.
        pixels: images (H, W, 3) uint8 RGB.

    Returns:
        The score threshold that about `CANDIDATES` (box, class) pairs per image reach.
    """
    torch.manual_seed(0)
    model = MaskRCNN(recipe, len(coco_categories())).eval()
    last = "bn3" if recipe.model.depth >= 50 else "bn2"
    for name, norm in model.named_modules():
        if name.endswith(last):  # the last norm of a residual block: keeps the sum over up to 33 blocks bounded
            norm.weight.fill_(0.2)
    inputs = []
    for image in pixels:
        size = input_size(*image.shape[:2], recipe.input)
        inputs.append((size, network_input(image, size, recipe.input)[None].to(memory_format=torch.channels_last)))
    maps = [model.extract_feature_maps(x) for _, x in inputs]
    levels = [level for of_image in maps for level in of_image]
    hidden = torch.cat([torch.relu(model.rpn.conv(m)).permute(0, 2, 3, 1).flatten(0, 2) for m in levels])
    _spread(model.rpn.score, hidden, 2.0)
    _spread(model.rpn.delta, hidden, 0.3)
    fc7 = []
    for (size, _), m in zip(inputs, maps, strict=True):
        (boxes,) = model.rpn.filter_proposals(model.rpn(m), [(size.height, size.width)])
        if len(boxes) < recipe.proposals.post_nms_top_n_test:
            raise SystemExit(f"the random weights propose only {len(boxes)} boxes per image")
        fc7.append(model.head.features(m, torch.cat((torch.zeros(len(boxes), 1), boxes), 1)).fc7)
    _spread(model.head.box.score, torch.cat(fc7), 2.0)
    scores = model.head.predict_boxes(torch.cat(fc7))[0].softmax(1)[:, 1:].flatten()
    folder.mkdir()
    provenance = Provenance.imported("drawn weights", "0" * 64)
    checkpoint.save(folder, model, checkpoint.CheckpointMetadata(recipe, coco_categories(), provenance, 0))
    return float(scores.topk(min(CANDIDATES * len(pixels), len(scores) // 2)).values[-1])


def _spread(layer: nn.Conv2d | nn.Linear, inputs: Tensor, deviation: float) -> None:
    """Scale a layer so that its outputs for inputs (N, C) have mean 0 and the given standard deviation."""
    weight = layer.weight.flatten(1)
    scale = deviation / (inputs @ weight.T).std(dim=0)
    layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    layer.bias.copy_(-(layer.weight.flatten(1) @ inputs.mean(0)))
