"""Step: compare every op that has a CUDA kernel with the CPU, with a second run, and with a run on a side stream.

A rehearsal compares the CPU kernels with their plain PyTorch fallbacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from results import Step, run
from torch import Tensor

from refdet.ops.epilogue import bias_relu, bias_relu_plain
from refdet.ops.masks import mask_coverage, masks_to_rle
from refdet.ops.matching import match_boxes, match_boxes_plain
from refdet.ops.nms import nms, nms_padded, nms_padded_plain, nms_plain
from refdet.ops.pooling import pyramid_roi_align, roi_align, roi_align_mean, roi_crop, roi_crop_mean
from refdet.ops.pooling_plain import pool_plain

ODD = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -3e38, 1e-40, 0.0])
POOLS: dict[str, Callable[..., Tensor]] = {
    "roi_align": roi_align,
    "roi_align, adaptive": lambda *a: roi_align(*a, 0),
    "roi_align_mean": roi_align_mean,
    "roi_crop": roi_crop,
    "roi_crop_mean": roi_crop_mean,
}
PLAIN = {  # samples per side of a cell, crop, mean
    "roi_align": (2, False, False),
    "roi_align, adaptive": (0, False, False),
    "roi_align_mean": (2, False, True),
    "roi_crop": (1, True, False),
    "roi_crop_mean": (1, True, True),
}
# name, inputs, op, op to compare with in a rehearsal, maximum difference relative to the largest value
Case = tuple[str, tuple[Tensor, ...], Callable[..., object], Callable[..., object], float]


def some_boxes(count: int, random: torch.Generator, odd: bool) -> Tensor:
    """Clustered boxes (count, 4), some of them empty; with `odd`, some coordinates are NaN, infinite, huge or tiny."""
    center = torch.rand(count // 5 + 1, 2, generator=random).repeat(5, 1)[:count] * 600
    size = torch.rand(count, 2, generator=random) * 120
    size *= torch.rand(count, 1, generator=random) > 0.02
    boxes = torch.cat((center - size / 2, center + size / 2), 1)
    return with_odd(boxes, random) if odd else boxes


def with_odd(values: Tensor, random: torch.Generator) -> Tensor:
    chosen = ODD[torch.randint(len(ODD), values.shape, generator=random)]
    return torch.where(torch.rand(values.shape, generator=random) < 0.03, chosen, values)


def some_rois(count: int, images: int, random: torch.Generator, odd: bool) -> Tensor:
    return torch.cat((torch.randint(images, (count, 1), generator=random), some_boxes(count, random, odd)), 1)


def nms_cases(step: Step) -> Iterator[Case]:
    counts = (0, 1, 63, 64, 65, 1000) if step.small else (0, 1, 63, 64, 65, 511, 2049, 12000)
    for count in counts:
        for odd in (False, True):
            random = torch.Generator().manual_seed(count)
            boxes, scores = some_boxes(count, random, odd), torch.rand(count, generator=random)
            scores = (with_odd(scores, random) if odd else scores).round(decimals=2)  # ties
            groups, images = (torch.randint(n, (count,), generator=random) for n in (80, 3))
            for keep, threshold in ((-1, 0.3), (100, 0.7)):
                name = f"nms of {count}{', odd' if odd else ''}, {keep} kept at {threshold}"

                def alone(
                    b: Tensor, s: Tensor, *_: Tensor, of: Callable, t: float = threshold, k: int = keep
                ) -> Tensor:
                    return of(b, s, t, k)

                def grouped(b: Tensor, s: Tensor, g: Tensor, i: Tensor, of: Callable, t: float = threshold,
                            k: int = keep) -> Tensor:  # fmt: skip
                    return of(b, s, t, k, groups=g, images=i)

                for kind, function in (("", alone), (", in groups and images", grouped)):
                    yield (
                        name + kind,
                        (boxes, scores, groups, images),
                        lambda *a, f=function: f(*a, of=nms),
                        lambda *a, f=function: f(*a, of=nms_plain),
                        0.0,
                    )


def padded_nms_cases(step: Step) -> Iterator[Case]:
    for count in (0, 65, 1000) if step.small else (0, 65, 2049, 96000):
        random = torch.Generator().manual_seed(count)
        boxes, scores = some_boxes(count, random, True), torch.rand(count, generator=random).round(decimals=2)
        groups, images = (torch.randint(-1, n, (count,), generator=random) for n in (5, 16))

        def padded(b: Tensor, s: Tensor, g: Tensor, i: Tensor, of: Callable) -> list[Tensor]:
            return list(of(b, s, 0.7, 300, i, 16, groups=g))

        yield (
            f"nms_padded of {count}, 300 kept in each of 16 images",
            (boxes, scores, groups, images),
            lambda *a, f=padded: f(*a, of=nms_padded),
            lambda *a, f=padded: f(*a, of=nms_padded_plain),
            0.0,
        )


def epilogue_cases(step: Step) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((1, 64, 1, 1), (3, 40, 17, 23), (2, 256, 50, 68)):
            random = torch.Generator().manual_seed(shape[1])
            x, shortcut = (
                torch.randn(shape, generator=random).to(dtype).contiguous(memory_format=torch.channels_last)
                for _ in range(2)
            )
            bias = torch.randn(shape[1], generator=random)

            def fused(x: Tensor, bias: Tensor, shortcut: Tensor) -> Tensor:
                return bias_relu(x.clone(memory_format=torch.channels_last), bias, shortcut)

            def plain(x: Tensor, bias: Tensor, shortcut: Tensor) -> Tensor:
                return bias_relu_plain(x, bias, shortcut, torch.empty_like(x))

            yield f"bias_relu of {shape}, {dtype}", (x, bias, shortcut), fused, plain, 0.0


def pooling_cases(step: Step) -> Iterator[Case]:
    channels = 20 if step.small else 256
    shapes = ((0, (7, 9)), (1, (1, 1)), (65, (38, 50)), (257, (13, 67)))
    for count, (height, width) in shapes[: 3 if step.small else 4]:
        for dtype in (torch.float32, torch.bfloat16):
            for odd in (False, True):
                random = torch.Generator().manual_seed(count)
                x = torch.randn(2, channels, height, width, generator=random).to(dtype)
                x = x.contiguous(memory_format=torch.channels_last)
                rois = some_rois(count, 2, random, odd)
                limit = 1e-5 if dtype == torch.float32 else 1e-2
                for name, pool in POOLS.items():
                    samples, crop, mean = PLAIN[name]

                    def plain(x: Tensor, rois: Tensor, options: tuple = (samples, crop, mean)) -> Tensor:
                        pooled = pool_plain(x, rois, 7, 16, *options)
                        return pooled.flatten(1) if options[2] else pooled

                    kind = str(dtype).removeprefix("torch.") + (", odd" if odd else "")
                    shape = f"{count} of 2x{channels}x{height}x{width}, {kind}"
                    yield f"{name} of {shape}", (x, rois), lambda *a, p=pool: p(*a, 7, 16), plain, limit
                    if not odd:
                        yield (
                            f"{name} of {shape}, backward",
                            (x, rois),
                            lambda *a, p=pool: gradient(partial(at_stride_16, p), *a),
                            lambda *a, p=plain: gradient(p, *a),
                            limit * 4,
                        )


def at_stride_16(pool: Callable[..., Tensor], x: Tensor, rois: Tensor) -> Tensor:
    return pool(x, rois, 7, 16)


def gradient(pool: Callable[[Tensor, Tensor], Tensor], x: Tensor, rois: Tensor) -> Tensor:
    """Gradient of a weighted sum of the cells with respect to the map."""
    x = x.detach().requires_grad_()
    pooled = pool(x, rois)
    weight = torch.linspace(-1, 1, max(pooled.numel(), 1)).to(pooled)[: pooled.numel()].reshape(pooled.shape)
    return torch.autograd.grad((pooled * weight).sum(), x)[0]


def matching_cases(step: Step) -> Iterator[Case]:
    for count, objects in ((0, 3), (5, 0), (1, 1), (257, 33), (5000 if step.small else 100440, 300)):
        for odd in (False, True):
            random = torch.Generator().manual_seed(count)
            inputs = some_boxes(count, random, odd), some_boxes(objects, random, odd)
            yield (
                f"match_boxes {count} x {objects}{', odd' if odd else ''}",
                inputs,
                match_boxes,
                match_boxes_plain,
                0.0,
            )
    random = torch.Generator().manual_seed(1)
    count = 500 if step.small else 20000
    batch = some_boxes(count, random, True), some_boxes(16 * 7, random, True).reshape(16, 7, 4)
    yield f"match_boxes of a batch, {count} x 16 x 7", batch, match_boxes, match_boxes_plain, 0.0


def other_cases(step: Step) -> Iterator[Case]:
    random = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 64, 64 >> i, 48 >> i, generator=random) for i in range(4)]
    maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]
    rois = some_rois(129, 2, random, odd=True)

    def pyramid(rois: Tensor, *maps: Tensor) -> Tensor:
        return pyramid_roi_align(maps, rois, 7, (4, 8, 16, 32))

    yield "pyramid_roi_align of 129", (rois, *maps), pyramid, pyramid, 1e-5
    masks, boxes = torch.rand(50, 28, 28, generator=random), some_boxes(50, random, odd=True)

    def to_rle(masks: Tensor, boxes: Tensor) -> list[bytes]:
        return masks_to_rle(masks, boxes, 480, 640)

    yield "masks_to_rle of 50", (masks, boxes), to_rle, to_rle, 0.0
    known = [{"size": [480, 640], "counts": counts} for counts in to_rle(masks.round(), some_boxes(50, random, False))]
    objects = torch.arange(50)

    def coverage(objects: Tensor, boxes: Tensor) -> Tensor:
        return mask_coverage(known, objects, boxes, 28)

    yield "mask_coverage of 50", (objects, some_boxes(50, random, False)), coverage, coverage, 1e-6


def difference(found: object, expected: object) -> float:
    """Largest difference relative to the largest value; inf for different shapes, NaNs, integers or bytes."""
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        a, b = found.detach().cpu(), expected.detach().cpu()
        if a.shape != b.shape:
            return math.inf
        if not a.is_floating_point():
            return 0.0 if torch.equal(a, b) else math.inf
        a, b = a.double(), b.double()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return math.inf
        a, b = a.nan_to_num(), b.nan_to_num()
        return float((a - b).abs().max() / b.abs().max().clamp(min=1)) if a.numel() else 0.0
    if isinstance(found, Sequence) and isinstance(expected, Sequence) and not isinstance(found, bytes):
        return max((difference(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
    return 0.0 if found == expected else math.inf


def on_side_stream(op: Callable[..., object], inputs: tuple[Tensor, ...]) -> object:
    """Run the op on a side stream on which its inputs arrive late."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2_000_000)  # cycles, about a millisecond
        late = tuple(given.cuda(non_blocking=True).clone() for given in inputs)
        found = op(*late)
    stream.synchronize()
    return found


def work(step: Step) -> None:
    groups = {
        "nms": nms_cases,
        "padded nms": padded_nms_cases,
        "epilogues": epilogue_cases,
        "pooling": pooling_cases,
        "matching": matching_cases,
        "others": other_cases,
    }
    for group, cases in groups.items():
        count, wrong = 0, []
        for name, inputs, op, plain, limit in cases(step):
            count += 1
            there = tuple(given.to(step.device) for given in inputs)
            first, again = op(*there), op(*there)
            found = {
                "differs": difference(first, (plain if step.small else op)(*inputs)),
                "differs from run to run": difference(first, again) if group != "pooling" else 0.0,
            }
            if group == "pooling":  # sums must be bit-identical from run to run
                found["differs from run to run"] = 0.0 if same_bits(first, again) else math.inf
            if not step.small:
                found["differs on a side stream"] = difference(on_side_stream(op, inputs), first)
            wrong += [f"{name}: {what} by {by:.1e}" for what, by in found.items() if not by <= limit]
        step.check(f"{group}: {count} cases agree", not wrong, wrong=len(wrong), first=wrong[:5])


def same_bits(a: object, b: object) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a.nan_to_num(), b.nan_to_num())


if __name__ == "__main__":
    run(work, "tests")
