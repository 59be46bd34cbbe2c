"""A training step synchronizes with the GPU as often for many images as for few (see helpers/host_waits.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detector_examples import VARIANTS, ground_truth, small_model
from host_waits import counted, waits

from refdet.config.recipe import InputOptions
from refdet.data.packed_images import PackedImages
from refdet.data.training_batches import Batch
from refdet.data.transforms import input_size
from refdet.detector import mask_rcnn
from refdet.structures.ground_truth import GroundTruth
from refdet.training import step
from refdet.training.optim import build_optimizer

pytestmark = pytest.mark.slow


def truth(image: int) -> GroundTruth:
    """No, one or two objects by the number of the image, and a crowd in every second image."""
    boxes = [(10 + image, 10, 60 + image, 60), (50, 8, 120, 50)][: image % 3]
    return ground_truth(boxes, [2, 1][: len(boxes)], [[0, 0, 9, 9]][image % 2 :])


def batch_of(count: int, options: InputOptions) -> Batch:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 96, 128, 3), dtype=np.uint8)
    sizes = [input_size(96, 128, options)] * count
    flips = [bool(image % 2) for image in range(count)]
    return Batch(
        PackedImages.from_images(list(pixels)), sizes, flips, (96, 128), [*map(truth, range(count))], [*range(count)]
    )


REFERENCE = ["head.append_gt_boxes=false", "head.sample_with_replacement=true", "proposals.inside_only=true"]


@pytest.mark.parametrize("changes", [*(VARIANTS[name] for name in ("c4", "fpn", "frozen")), REFERENCE])
def test_a_step_synchronizes_no_more_often_for_more_images(changes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # which runs on the CPU while a GPU computes, from tensors that were fetched
    monkeypatch.setattr(mask_rcnn, "compute_mask_targets", lambda rois, objects, truth, size, _: torch.zeros(
        len(rois), size, size))  # fmt: skip
    found = []
    for count in (2, 8):
        model = small_model(*changes).train()
        options = model.recipe.train
        sgd, generator = build_optimizer(model, options), torch.Generator().manual_seed(0)
        batch = batch_of(count, model.recipe.input)
        fetches = []
        monkeypatch.setattr(step, "to_cpu_async", lambda values, fetches=fetches: fetches.append(values))
        with counted() as (python, aten):
            step.start_step(model, sgd, batch, 0.01, 1.0, generator)
        assert len(fetches) == 1  # of the losses and the gradient norm, asynchronously
        found.append(waits(python, aten))
    few, many = found
    assert few == many, (few, many)
    assert few.get("nms", 0) == 0 and few.get("python item", 0) == 0


def test_all_images_of_a_batch_are_copied_at_once() -> None:
    options = InputOptions(min_sizes=(96,))
    copies = []
    for count in (2, 8):
        with counted() as (python, _):
            batch_of(count, options).inputs(options, torch.device("cpu"))
        copies.append(python.calls["to"])
    assert copies[0] == copies[1]
