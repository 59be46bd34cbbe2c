"""What a network of full size starts on a GPU for a batch, and moves there beside its convolutions; counted, not timed.

The numbers of docs/performance.md.
"""

from __future__ import annotations

import pytest
import torch
from fake_gpu import Launches, fake_image, on_fake_gpu

from refdet.config import recipe as recipes
from refdet.detector import mask_rcnn, optimize, roi_chunks
from refdet.ops import epilogue as epilogues
from refdet.ops import pooling
from refdet.ops._library import DEVICES
from refdet.ops.epilogue import Epilogue

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("cpu" not in DEVICES, reason="the kernels are not built here"),
]
IMAGES, PROPOSALS, DETECTIONS = 8, 300, 100


def launched(epilogue: Epilogue, dtype: torch.dtype) -> Launches:
    """Of res101-C4 on 8 images of 600x800: backbone, proposals' scores, and conv5 of proposals and detections."""
    with torch.device("meta"):
        model = mask_rcnn.MaskRCNN(recipes.load("c4-res101"), 80).eval()
    optimize.optimize_for_inference(model, bf16=dtype == torch.bfloat16, epilogue=epilogue)
    with on_fake_gpu(model) as found:
        maps = model.extract_feature_maps(fake_image((IMAGES, 3, 600, 800), dtype))
        model.rpn.forward(maps)
        entered = model.head.precompute(maps, IMAGES * PROPOSALS)
        for count in (PROPOSALS, DETECTIONS):
            rois = torch.empty((IMAGES * count, 5), device="cuda")
            model.head.forward_inference(entered, rois, None, spatial=False)
    return found


@pytest.mark.parametrize(
    ("epilogue", "dtype", "whole", "launches", "gigabytes"),
    [
        (Epilogue.PLAIN, torch.bfloat16, True, 396, 32.4),
        (Epilogue.PLAIN, torch.bfloat16, False, 644, 33.0),
        (Epilogue.KERNEL, torch.bfloat16, False, 400, 15.8),
        (Epilogue.LIBRARY, torch.bfloat16, False, 300, 9.1),
        (Epilogue.PLAIN, torch.float32, True, 394, 64.7),
        (Epilogue.KERNEL, torch.float32, False, 398, 31.5),
    ],
)
def test_launches_and_bytes_of_a_batch(
    monkeypatch: pytest.MonkeyPatch,
    epilogue: Epilogue,
    dtype: torch.dtype,
    whole: bool,
    launches: int,
    gigabytes: float,
) -> None:
    """`whole`: conv5 has all proposals or detections at once, without chunks."""
    if whole:
        monkeypatch.setitem(roi_chunks.SIZES, "cuda", (IMAGES * PROPOSALS, IMAGES * DETECTIONS))
    for module in (epilogues, pooling):
        monkeypatch.setattr(module, "DEVICES", frozenset(("cpu", "cuda")))
    found = launched(epilogue, dtype)
    assert (sum(found.calls.values()), round(found.bytes_of_passes / 1e9, 1)) == (launches, gigabytes)
