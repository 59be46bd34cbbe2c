"""A step of training keeps a GPU waiting as seldom for many images as for few; see helpers/host_waits.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detector_examples import VARIANTS, small_model
from host_waits import counted, waits
from pycocotools import mask as coco_mask

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
    """One or two objects, or none, and a crowd or none."""
    boxes = [(10 + image, 10, 60 + image, 60), (50, 8, 120, 50)][: image % 3]
    masks = []
    for x1, y1, x2, y2 in boxes:
        mask = np.zeros((96, 128), np.uint8, order="F")
        mask[y1:y2, x1:x2] = 1
        masks.append(coco_mask.encode(mask))
    return GroundTruth(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor([2, 1])[: len(boxes)], masks,
        torch.tensor([[0.0, 0, 9, 9]])[image % 2 :], (1.0, 1.0),
    )  # fmt: skip


def batch_of(count: int, options: InputOptions) -> Batch:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 96, 128, 3), dtype=np.uint8)
    sizes = [input_size(96, 128, options)] * count
    flips = [bool(image % 2) for image in range(count)]
    return Batch(
        PackedImages.from_images(list(pixels)), sizes, flips, (96, 128), [*map(truth, range(count))], [*range(count)]
    )


REFERENCE = ["head.append_gt_boxes=false", "head.sample_with_replacement=true", "proposals.inside_only=true"]


@pytest.mark.parametrize("changes", [*(VARIANTS[name] for name in ("c4", "fpn", "frozen")), REFERENCE])
def test_a_step_waits_no_oftener_for_more_images(changes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # on the host, from what was fetched: while a GPU computes
    monkeypatch.setattr(mask_rcnn, "compute_mask_targets", lambda rois, objects, truth, size, _: torch.zeros(
        len(rois), size, size))  # fmt: skip
    found = []
    for count in (2, 8):
        model = small_model(*changes).train()
        options = model.recipe.train
        sgd, generator, batch = (
            build_optimizer(model, options),
            torch.Generator().manual_seed(0),
            batch_of(count, model.recipe.input),
        )
        fetches = []
        monkeypatch.setattr(step, "to_cpu_async", lambda values, fetches=fetches: fetches.append(values))
        with counted() as (python, aten):
            step.start_step(model, sgd, batch, 0.01, 1.0, generator)
        assert len(fetches) == 1  # of the losses and the norm; nothing waits for it
        found.append(waits(python, aten))
    few, many = found
    assert few == many, (few, many)
    assert few.get("nms", 0) == 0 and few.get("python item", 0) == 0


def test_the_images_of_a_batch_are_one_copy() -> None:
    options = InputOptions(min_sizes=(96,))
    copies = []
    for count in (2, 8):
        with counted() as (python, _):
            batch_of(count, options).inputs(options, torch.device("cpu"))
        copies.append(python.calls["to"])
    assert copies[0] == copies[1]
