"""Runs every kernel on small inputs, forward and backward; started by `sanitizer.py` under compute-sanitizer."""

from __future__ import annotations

import sys

import torch

from refdet.ops.epilogue import bias_relu
from refdet.ops.matching import match_boxes
from refdet.ops.nms import nms, nms_padded
from refdet.ops.pooling import pyramid_roi_align, roi_align, roi_align_mean, roi_crop, roi_crop_mean


def main(device: str) -> None:
    random = torch.Generator().manual_seed(0)
    corner, sides = torch.rand(200, 2, generator=random) * 200, torch.rand(200, 2, generator=random) * 80
    boxes = torch.cat((corner, corner + sides), 1)
    scores, ids = torch.rand(200, generator=random).to(device), torch.randint(3, (200,), generator=random).to(device)
    on_device = boxes.to(device)
    for keep in (-1, 20):
        nms(on_device, scores, 0.5, keep)
        nms(on_device, scores, 0.5, keep, groups=ids, images=ids)
    nms(on_device[:0], scores[:0], 0.5)
    match_boxes(on_device, on_device[:37])
    nms_padded(on_device, scores, 0.5, 20, ids, 3, groups=ids)
    match_boxes(on_device, on_device[:0])
    match_boxes(on_device, on_device[:21].reshape(3, 7, 4))
    rois = torch.cat((torch.randint(2, (200, 1), generator=random), boxes), 1)[:70].to(device)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 40, 17, 23, generator=random).to(device, dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        bias_relu(x.clone(memory_format=torch.channels_last), torch.ones(40, device=device), x)
        x.requires_grad_()
        for pool in (roi_align, roi_align_mean, roi_crop, roi_crop_mean):
            torch.autograd.grad(pool(x, rois, 7, 16).float().sum(), x)
        for samples in (0, 3):
            torch.autograd.grad(roi_align(x, rois, 7, 16, samples).float().sum(), x)
        pyramid_roi_align([x, x], rois, 7, (4, 8))
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main(sys.argv[1])
