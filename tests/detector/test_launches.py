"""Kernel launches, memory traffic and memory of a full-size network on a batch, counted on a fake GPU.

The expected numbers were counted in the same way, and are those of docs/performance.md.
"""

from __future__ import annotations

import pytest
import torch
from fake_gpu import Launches, fake_image, on_fake_gpu

from refdet.config import recipe as recipes
from refdet.detector import mask_rcnn, optimize, roi_chunks, roi_heads
from refdet.ops import epilogue as epilogues
from refdet.ops import pooling
from refdet.ops._library import DEVICES
from refdet.ops.epilogue import Epilogue

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("cpu" not in DEVICES, reason="the kernels are not built here"),
]
IMAGES, PROPOSALS, DETECTIONS = 16, 300, 100


def count_launches(epilogue: Epilogue, dtype: torch.dtype, images: int = IMAGES) -> Launches:
    """Launches of ResNet-101-C4 on images of 600x800: backbone, RPN, and conv5 of proposals and detections."""
    with torch.device("meta"):
        model = mask_rcnn.MaskRCNN(recipes.load("c4-res101"), 80).eval()
    optimize.optimize_for_inference(model, bf16=dtype == torch.bfloat16, epilogue=epilogue)
    with on_fake_gpu(model) as found:
        maps = model.extract_feature_maps(fake_image((images, 3, 600, 800), dtype))
        model.rpn.forward(maps)
        precomputed = model.head.precompute(maps, images * PROPOSALS)
        proposals, detections = (torch.empty((images * n, 5), device="cuda") for n in (PROPOSALS, DETECTIONS))
        model.head.box_features(precomputed, proposals)
        model.head.forward_inference(precomputed, detections, None, spatial=False)
    return found


@pytest.mark.parametrize(
    ("epilogue", "dtype", "unchunked", "launches", "gigabytes"),
    [
        (Epilogue.PLAIN, torch.bfloat16, True, 394, 64.7),
        (Epilogue.PLAIN, torch.bfloat16, False, 398, 67.0),
        (Epilogue.KERNEL, torch.bfloat16, False, 250, 31.3),
        (Epilogue.LIBRARY, torch.bfloat16, False, 182, 17.6),
        (Epilogue.PLAIN, torch.float32, True, 392, 129.4),
        (Epilogue.KERNEL, torch.float32, False, 268, 61.5),
    ],
)
def test_launches_and_bytes_of_a_batch(
    monkeypatch: pytest.MonkeyPatch,
    epilogue: Epilogue,
    dtype: torch.dtype,
    unchunked: bool,
    launches: int,
    gigabytes: float,
) -> None:
    """If `unchunked`, conv5 gets all proposals or detections at once, without padding."""
    if unchunked:
        monkeypatch.setattr(roi_chunks, "PADDED_DEVICES", frozenset())
        monkeypatch.setattr(roi_heads, "CPU_CHUNK_BYTES", 2**40)
    for module in (epilogues, pooling):
        monkeypatch.setattr(module, "DEVICES", frozenset(("cpu", "cuda")))
    found = count_launches(epilogue, dtype)
    assert (sum(found.calls.values()), round(found.bytes_of_passes / 1e9, 1)) == (launches, gigabytes)


@pytest.mark.parametrize(
    ("epilogue", "dtype", "gibibytes"),
    [
        (Epilogue.LIBRARY, torch.bfloat16, [0.18, 1.42, 2.84, 3.04]),
        (Epilogue.KERNEL, torch.float32, [0.35, 2.83, 3.04, 3.48]),
    ],
)
def test_peak_memory_of_a_batch(
    monkeypatch: pytest.MonkeyPatch, epilogue: Epilogue, dtype: torch.dtype, gibibytes: list[float]
) -> None:
    """For 1, 8, 16 and 32 images, without weights, images and the workspace of libraries."""
    for module in (epilogues, pooling):
        monkeypatch.setattr(module, "DEVICES", frozenset(("cpu", "cuda")))
    peaks = [count_launches(epilogue, dtype, images).peak_bytes for images in (1, 8, 16, 32)]
    assert [round(peak / 2**30, 2) for peak in peaks] == gibibytes
