"""Networks and images of the steps: of full size on a GPU, small in a rehearsal."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Step

from refdet.config import recipe as recipes
from refdet.config.recipe import Recipe
from refdet.data.coco import ImageRecord
from refdet.data.image_source import ImageSource
from refdet.data.training_batches import group_by_input_size
from refdet.data.transforms import input_size
from refdet.detector import loading
from refdet.detector.loading import TrainedDetector
from refdet.device import exact_float32
from refdet.extraction.image_list import ImageList
from refdet.extraction.options import ExtractOptions

NETWORKS = {"c4": "c4-res101", "fpn": "fpn-res50"}
NMS = 0.3
SMALL = [
    "model.depth=18", "model.rpn_channels=32", "model.mask_channels=32", "input.min_sizes=[96]", "input.max_size=160",
    "proposals.pre_nms_top_n_test=200", "proposals.post_nms_top_n_test=12", "proposals.pre_nms_top_n_train=200",
    "proposals.post_nms_top_n_train=50", "head.batch_size_per_image=8", "train.workers=0",
]  # fmt: skip
SMALL_OF = {
    "c4": ["model.anchor_sizes=[16,32,64]"],
    "fpn": ["model.anchor_sizes=[8,16,32,64,128]", "model.fpn_channels=32", "model.fc_dim=64"],
}


def recipe_of(step: Step, network: str) -> Recipe:
    """The recipe of a network, "c4" or "fpn", with frozen norms."""
    small = [*SMALL, *SMALL_OF[network]] if step.small else []
    return recipes.load(NETWORKS[network]).with_changes(["model.norm=frozen", *small])


def images_folder(step: Step) -> Path:
    return step.work / "images"


def instances_file(step: Step) -> Path:
    return step.work / "instances.json"


def run_folder(step: Step, network: str) -> Path:
    """The run directory of a network with random weights."""
    return step.work / network


def draw_results(step: Step) -> dict[str, Any]:
    """The results of the step `draw`, such as the score thresholds of the networks."""
    return json.loads((step.work / "drawn.json").read_text())


def image_list(step: Step, count: int) -> ImageList:
    """The first images."""
    images = ImageList.of_instances(instances_file(step))
    return ImageList(images.records[:count], images.index, images.name)


def images_of_one_size(step: Step, network: str, count: int) -> tuple[list[ImageRecord], list[np.ndarray]]:
    """Images of the most frequent input size, and their pixels; repeated if there are too few."""
    return _repeated(step, max(_groups(step, network), key=len), count)


def largest(step: Step, network: str, count: int) -> tuple[list[ImageRecord], list[np.ndarray]]:
    """Images of the largest input size, and their pixels; repeated if there are too few."""

    def area(records: list[ImageRecord]) -> int:
        size = input_size(records[0].height, records[0].width, recipe_of(step, network).input)
        return size.height * size.width

    return _repeated(step, max(_groups(step, network), key=area), count)


def _groups(step: Step, network: str) -> list[list[ImageRecord]]:
    records = image_list(step, 512).records
    return group_by_input_size(records, recipe_of(step, network).input, len(records))


def _repeated(step: Step, records: list[ImageRecord], count: int) -> tuple[list[ImageRecord], list[np.ndarray]]:
    chosen = [records[i % len(records)] for i in range(count)]
    source = ImageSource.open(images_folder(step))
    return chosen, [source.read(record) for record in chosen]


def detector(step: Step, network: str, precision: str = "float32", device: str | None = None) -> TrainedDetector:
    """Load a detector with random weights, optimized for inference."""
    where = device or step.device
    return loading.load(run_folder(step, network), where, for_inference=True, precision=precision)


def max_regions(step: Step) -> int:
    return 6 if step.small else 100


def extract_options(step: Step, network: str, **changes: Any) -> ExtractOptions:
    """Options with which random weights give about as many detections as trained ones."""
    given = {
        "score_threshold": draw_results(step)["threshold"][network],
        "nms_threshold": NMS,
        "max_regions": max_regions(step),
    }
    return ExtractOptions(**{**given, **changes})


def synchronize(step: Step) -> None:
    if not step.small:
        torch.cuda.synchronize()


@contextmanager
def arithmetic(mode: str, device: str) -> Iterator[None]:
    """Compute in "ieee" float32, "tf32", or bfloat16 by "autocast" as people use it (with TF32 for the rest)."""
    if mode == "ieee":
        with exact_float32():
            yield
        return
    with exact_float32(), warnings.catch_warnings():  # exact_float32 restores the settings
        warnings.filterwarnings("ignore", message="Please use the new API settings")
        torch.backends.cudnn.allow_tf32 = True  # these set the newer settings too
        torch.set_float32_matmul_precision("high")
        with torch.autocast(device, torch.bfloat16, enabled=mode == "autocast"):
            yield


def refdet_command(*arguments: object) -> list[str]:
    """The command line of refdet in this Python."""
    return [sys.executable, "-m", "refdet", *map(str, arguments)]


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of two tensors, relative to the largest expected value."""
    expected = expected.double().cpu()
    return float((actual.double().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def median(values: Sequence[float]) -> float:
    return float(np.median(values)) if len(values) else float("nan")
