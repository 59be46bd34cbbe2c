"""Step: compare each op on the GPU with the CPU, with a second run, and with a run on a side stream.

A rehearsal on the CPU compares each op with its plain PyTorch fallback, except for the last three ops, whose fallback
cannot be called on its own, and with a second run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from differences import largest
from results import Step, run
from torch import Tensor

from refdet.ops.epilogue import bias_relu, bias_relu_plain
from refdet.ops.masks import mask_coverage, masks_to_rle
from refdet.ops.matching import match_boxes, match_boxes_plain
from refdet.ops.nms import nms, nms_padded, nms_padded_plain, nms_plain
from refdet.ops.pooling import pyramid_roi_align, roi_align, roi_align_mean, roi_crop, roi_crop_mean
from refdet.ops.pooling_plain import pool_plain

ODD = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -3e38, 1e-40, 0.0])
BINS, STRIDE = 7, 16  # of the pooling ops: bins on a side of a RoI, and stride of the map
POOLS: dict[str, Callable[..., Tensor]] = {
    "roi_align": roi_align,
    "roi_align, adaptive": lambda *a: roi_align(*a, 0),
    "roi_align_mean": roi_align_mean,
    "roi_crop": roi_crop,
    "roi_crop_mean": roi_crop_mean,
}
PLAIN_OPTIONS = {  # of the same op by `pool_plain`: samples on a side of a bin (0: adaptive), crop, mean
    "roi_align": (2, False, False),
    "roi_align, adaptive": (0, False, False),
    "roi_align_mean": (2, False, True),
    "roi_crop": (1, True, False),
    "roi_crop_mean": (1, True, True),
}
# Name, inputs, op, its fallback (for the last three ops, the op itself), and the maximum `difference`.
Case = tuple[str, tuple[Tensor, ...], Callable[..., object], Callable[..., object], float]


def some_boxes(count: int, random: torch.Generator, odd: bool) -> Tensor:
    """Clustered boxes (count, 4), some of them empty; with `odd`, some coordinates are NaN, infinite, huge or tiny."""
    center = torch.rand(count // 5 + 1, 2, generator=random).repeat(5, 1)[:count] * 600
    size = torch.rand(count, 2, generator=random) * 120
    size *= torch.rand(count, 1, generator=random) > 0.02
    boxes = torch.cat((center - size / 2, center + size / 2), 1)
    return with_odd(boxes, random) if odd else boxes


def with_odd(values: Tensor, random: torch.Generator) -> Tensor:
    """The values, with 3% of them replaced by values of `ODD`."""
    chosen = ODD[torch.randint(len(ODD), values.shape, generator=random)]
    return torch.where(torch.rand(values.shape, generator=random) < 0.03, chosen, values)


def some_rois(count: int, images: int, random: torch.Generator, odd: bool) -> Tensor:
    """RoIs (count, 5): the index of one of the images, and a box as by `some_boxes`."""
    return torch.cat((torch.randint(images, (count, 1), generator=random), some_boxes(count, random, odd)), 1)


def nms_cases(step: Step) -> Iterator[Case]:
    counts = (0, 1, 63, 64, 65, 1000) if step.small else (0, 1, 63, 64, 65, 511, 2049, 12000)
    for count in counts:
        for odd in (False, True):
            random = torch.Generator().manual_seed(count)
            boxes, scores = some_boxes(count, random, odd), torch.rand(count, generator=random)
            scores = (with_odd(scores, random) if odd else scores).round(decimals=2)  # ties
            groups, images = (torch.randint(n, (count,), generator=random) for n in (80, 3))  # of each box
            for max_keep, threshold in ((-1, 0.3), (100, 0.7)):
                limit = "no limit" if max_keep < 0 else f"at most {max_keep} kept"
                name = f"nms of {count}{', odd' if odd else ''}, {limit}, threshold {threshold}"

                # The defaults of t and k bind the current values of the loop variables.
                def alone(
                    op: Callable, b: Tensor, s: Tensor, *_: Tensor, t: float = threshold, k: int = max_keep
                ) -> Tensor:
                    return op(b, s, t, k)

                def grouped(op: Callable, b: Tensor, s: Tensor, g: Tensor, i: Tensor, t: float = threshold,
                            k: int = max_keep) -> Tensor:  # fmt: skip
                    return op(b, s, t, k, groups=g, images=i)

                inputs = boxes, scores, groups, images
                functions: dict[str, Callable[..., Tensor]] = {"": alone, ", in groups and images": grouped}
                for kind, function in functions.items():
                    yield name + kind, inputs, partial(function, nms), partial(function, nms_plain), 0.0


def padded_nms_cases(step: Step) -> Iterator[Case]:
    for count in (0, 65, 1000) if step.small else (0, 65, 2049, 96000):
        random = torch.Generator().manual_seed(count)
        boxes, scores = some_boxes(count, random, True), torch.rand(count, generator=random).round(decimals=2)
        # Boxes of image -1 are left out; group -1 is a group like any other.
        groups, images = (torch.randint(-1, n, (count,), generator=random) for n in (5, 16))

        def padded(op: Callable, b: Tensor, s: Tensor, g: Tensor, i: Tensor) -> list[Tensor]:
            return list(op(b, s, 0.7, 300, i, 16, groups=g))

        yield (
            f"nms_padded of {count}, at most 300 kept in each of 16 images",
            (boxes, scores, groups, images),
            partial(padded, nms_padded),
            partial(padded, nms_padded_plain),
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

            def fused(x: Tensor, bias: Tensor, shortcut: Tensor) -> Tensor:  # `bias_relu` overwrites its input
                return bias_relu(x.clone(memory_format=torch.channels_last), bias, shortcut)

            def plain(x: Tensor, bias: Tensor, shortcut: Tensor) -> Tensor:
                return bias_relu_plain(x, bias, shortcut, torch.empty_like(x))

            yield f"bias_relu of {shape}, {dtype}", (x, bias, shortcut), fused, plain, 0.0


def pooling_cases(step: Step) -> Iterator[Case]:
    channels = 20 if step.small else 256
    shapes = ((0, (7, 9)), (1, (1, 1)), (65, (38, 50)), (257, (13, 67)))  # number of RoIs, and size of the map
    for count, (height, width) in shapes[: 3 if step.small else 4]:
        for dtype in (torch.float32, torch.bfloat16):
            for odd in (False, True):
                random = torch.Generator().manual_seed(count)
                x = torch.randn(2, channels, height, width, generator=random).to(dtype)
                x = x.contiguous(memory_format=torch.channels_last)
                rois = some_rois(count, 2, random, odd)
                limit = 1e-5 if dtype == torch.float32 else 1e-2
                for name, pool in POOLS.items():
                    plain_options = PLAIN_OPTIONS[name]

                    def plain(x: Tensor, rois: Tensor, options: tuple[int, bool, bool] = plain_options) -> Tensor:
                        pooled = pool_plain(x, rois, BINS, STRIDE, *options)
                        _, _, mean = options
                        return pooled.flatten(1) if mean else pooled

                    kind = str(dtype).removeprefix("torch.") + (", odd" if odd else "")
                    shape = f"{count} of 2x{channels}x{height}x{width}, {kind}"
                    pool_bins = partial(pool_into_bins, pool)
                    yield f"{name} of {shape}", (x, rois), pool_bins, plain, limit
                    if not odd:
                        yield (
                            f"{name} of {shape}, backward",
                            (x, rois),
                            partial(gradient, pool_bins),
                            partial(gradient, plain),
                            limit * 4,  # the gradient at a position is a sum over many bins
                        )


def pool_into_bins(pool: Callable[..., Tensor], x: Tensor, rois: Tensor) -> Tensor:
    """Pool with the number of bins and the stride of all pooling cases."""
    return pool(x, rois, BINS, STRIDE)


def gradient(pool: Callable[[Tensor, Tensor], Tensor], x: Tensor, rois: Tensor) -> Tensor:
    """Gradient of a weighted sum of the bins with respect to the map."""
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
    # Annotations of 50 objects. `mask_coverage` itself runs on the CPU; inputs on the GPU are copied to it.
    rles = [{"size": [480, 640], "counts": counts} for counts in to_rle(masks.round(), some_boxes(50, random, False))]
    objects = torch.arange(50)  # of each box, as an index into `rles`

    def coverage(objects: Tensor, boxes: Tensor) -> Tensor:
        return mask_coverage(rles, objects, boxes, 28)

    yield "mask_coverage of 50", (objects, some_boxes(50, random, False)), coverage, coverage, 1e-6


def difference(found: object, expected: object) -> float:
    """Largest difference relative to the largest expected value, or to 1 if all are smaller.

    inf if shapes, integers or bytes differ, or if other values are NaN or infinite.
    """
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
        return largest(difference(a, b) for a, b in zip(found, expected, strict=True))
    return 0.0 if found == expected else math.inf


def on_side_stream(op: Callable[..., object], inputs: tuple[Tensor, ...]) -> object:
    """Run the op on a side stream on which its inputs arrive late; a kernel on another stream would read too early."""
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
            on_device = tuple(given.to(step.device) for given in inputs)
            first, again = op(*on_device), op(*on_device)
            expected = (plain if step.small else op)(*inputs)  # the inputs are on the CPU
            found = {"differs": difference(first, expected), "differs from run to run": difference(first, again)}
            if group == "pooling":  # not even within the limit may its sums differ from run to run
                found["differs from run to run"] = 0.0 if same_values(first, again) else math.inf
            if not step.small:
                found["differs on a side stream"] = difference(on_side_stream(op, inputs), first)
            wrong += [f"{name}: {what} by {by:.1e}" for what, by in found.items() if not by <= limit]
        step.check(f"{group}: {count} cases agree", not wrong, wrong=len(wrong), first=wrong[:5])


def same_values(a: object, b: object) -> bool:
    """Whether two results are tensors with exactly the same values, where NaN equals NaN."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


if __name__ == "__main__":
    run(work, "tests")
