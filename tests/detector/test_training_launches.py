"""Kernel launches and memory traffic of a full-size training step with frozen norms, counted with fake tensors.

The expected numbers were counted in the same way, and are those of docs/performance.md. Losses, sampling, pooling and
the optimizer are left out.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from fake_gpu import Launches, fake_image, on_fake_cpu
from torch import Tensor

from refdet.config import recipe as recipes
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.roi_heads import POOL_SIZE
from refdet.ops import epilogue, training_epilogue
from refdet.ops._library import DEVICES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("cpu" not in DEVICES, reason="the kernels are not built here"),
]
IMAGES, POSITIVE = 16, 512


def fake_bias_relu(x: Tensor, bias: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """`epilogue.bias_relu` as it launches on a GPU."""
    assert bias.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    torch.ops.refdet.bias_relu(x, bias, shortcut, x)
    return x


def outputs(model: MaskRCNN) -> list[Tensor]:
    """Outputs of the backbone, the RPN, and the second stage on cells that are already pooled."""
    model.zero_grad()
    maps = model.extract_feature_maps(fake_image((IMAGES, 3, 600, 800), torch.float32, "cpu"))
    rpn, head, channels = model.rpn(maps), model.head, maps[0].shape[1]
    c4 = model.recipe.model.neck == "c4"
    size, rois = POOL_SIZE, IMAGES * model.recipe.head.batch_size_per_image
    cells = fake_image((rois, channels, size, size), torch.bfloat16, "cpu").requires_grad_()
    if c4:
        spatial = head.get_submodule("conv5")(cells)
        fc7, of_positive = spatial.mean((2, 3), dtype=torch.float32), spatial[:POSITIVE]
    else:
        with patch.object(head, "_pool", return_value=cells):
            fc7 = head.features(maps, torch.empty(rois, 5)).fc7
        of_positive = fake_image((POSITIVE, channels, 2 * size, 2 * size), torch.bfloat16, "cpu").requires_grad_()
    masks = head.get_submodule("mask")(of_positive, torch.empty(POSITIVE, dtype=torch.int64))
    return [*maps, rpn.logits, rpn.deltas, fc7, masks]


def count_launches(recipe: str, dtype: torch.dtype) -> Launches:
    """Launches of the second step; the first also folds the frozen weights."""
    with torch.device("meta"):
        model = MaskRCNN(recipes.load(recipe).with_changes(["model.norm=frozen"]), 80).train()
    with on_fake_cpu(model):
        for _ in range(2):
            with Launches() as found:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    results = outputs(model)
                torch.autograd.backward(results, [torch.empty_like(y) for y in results])
    return found


PASSES = ("bias", "add_", "relu_", "relu", "bias_relu", "_to_copy", "mul")


@pytest.mark.parametrize(
    ("recipe", "fused", "launches", "gigabytes", "passes"),
    [
        ("c4-res101", False, 1117, 94.7, (108, 33, 101, 1, 0, 327, 188)),
        ("c4-res101", True, 679, 64.6, (2, 0, 0, 0, 102, 22, 188)),
        ("fpn-res50", False, 825, 40.0, (81, 16, 54, 7, 0, 245, 94)),
        ("fpn-res50", True, 600, 28.3, (18, 0, 0, 2, 59, 85, 94)),
    ],
)
def test_launches_and_bytes_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    fused: bool,
    launches: int,
    gigabytes: float,
    passes: tuple[int, ...],
) -> None:
    monkeypatch.setattr(training_epilogue, "FUSED", frozenset(["cpu"] if fused else []))
    monkeypatch.setattr(epilogue, "bias_relu", fake_bias_relu)
    found = count_launches(recipe, torch.bfloat16)
    assert tuple(found.calls[name] for name in PASSES) == passes
    assert (sum(found.calls.values()), round(found.bytes_of_passes / 1e9, 1)) == (launches, gigabytes)
