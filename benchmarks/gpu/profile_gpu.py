"""Step: profile three batches of an extraction and two training steps.

The most important results are the share of element-wise kernels, and the cost of cuDNN's planning for a new input
shape. Writes ``trace.json.gz``, in which both parts are marked.
"""

from __future__ import annotations

import functools
import gzip
import re
import shutil
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from results import Step, run
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from work import detector, extract_options, images_folder, images_of_one_size, instances_file, median, recipe_of

from work import run_folder, synchronize  # isort: skip

from refdet.data.coco import CocoIndex
from refdet.data.image_source import ImageSource
from refdet.data.training_batches import Batch, TrainingBatches
from refdet.detector import loading
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.optimize import optimize_for_inference
from refdet.detector.predictor import start_detecting
from refdet.device import exact_float32
from refdet.ops.epilogue import Epilogue
from refdet.training.optim import build_optimizer
from refdet.training.step import start_step

LR = 1e-4  # low, so that training from random weights stays finite
# kind -> pattern of the names of its CUDA kernels and CPU ops; the first match counts
KINDS = {
    "bias and ReLU": r"bias_relu",  # refdet's element-wise kernel
    "refdet": r"refdet|\b(key|greedy|group_greedy|tap|pool|pool_backward|group|mean|match|best|bias_relu)_kernel\b",
    "copies between host and device": r"Memcpy (HtoD|DtoH)",
    "element-wise": r"elementwise|triton_poi|bn_fw|bn_bw|Memset"
    r"|aten::(add|mul|div|sub|relu|clamp|clamp_min|copy|where|sigmoid|exp|fill|zero|threshold_backward)_?\b",
    "changes of layout": r"nchwToNhwc|nhwcToNchw|transpose",
    "convolutions and products": r"conv|gemm|xmma|cutlass|cudnn|wgrad|dgrad|nvjet|winograd|addmm|aten::mm|matmul"
    "|splitK",
    "reductions and norms": r"reduce|softmax|norm|aten::(sum|mean|max|min|amax|any|all)\b",
    "sorting, indexing and joins": r"sort|topk|index|gather|scatter|[Cc]at|[Ss]can|radix|select|nonzero|unique"
    "|Memcpy DtoD",
    "resizing": r"upsample|interpolat",
}
# name prefixes of ranges, which the profiler lists among the kernels
RANGES = ("ProfilerStep", "part:", "Optimizer.")


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def by_kind(prof: profile, step: Step, window: tuple[float, float]) -> dict[str, Any]:
    """GPU time (in a rehearsal, CPU time) by kind of kernel, of the events that start in a window in microseconds."""
    where = DeviceType.CPU if step.small else DeviceType.CUDA
    spent: dict[str, float] = defaultdict(float)
    each: dict[str, list[float]] = defaultdict(list)
    for event in prof.events():
        own = event.self_cpu_time_total if step.small else event.time_range.elapsed_us()
        inside = window[0] <= event.time_range.start <= window[1]
        if event.device_type != where or not inside or event.name.startswith(RANGES):
            continue
        spent[kind_of(event.name)] += own / 1000
        each[event.name].append(own / 1000)
    total = sum(spent.values())
    longest = sorted(each, key=lambda name: -sum(each[name]))[:25]
    return {
        "milliseconds": total,
        "wall_milliseconds": (window[1] - window[0]) / 1000,
        "launches": sum(map(len, each.values())),
        "milliseconds_by_kind": dict(sorted(spent.items(), key=lambda pair: -pair[1])),
        "share_elementwise": (spent["element-wise"] + spent["bias and ReLU"]) / total if total else float("nan"),
        "longest": [{"name": n[:120], "ms": sum(each[n]), "calls": len(each[n])} for n in longest],
    }


def window_of(prof: profile, name: str) -> tuple[float, float]:
    """Start and end of a part in microseconds."""
    ranges = [e.time_range for e in prof.events() if e.name == name and e.device_type == DeviceType.CPU]
    return min(r.start for r in ranges), max(r.end for r in ranges)


def extraction_work(step: Step) -> Callable[[], object]:
    """A function that runs detection on one batch and waits for the result."""
    batch = 2 if step.small else 16
    loaded, options = detector(step, "c4", "bfloat16"), extract_options(step, "c4")
    records, pixels = images_of_one_size(step, "c4", batch)

    def compute() -> object:
        with torch.inference_mode(), exact_float32():
            return start_detecting(loaded.model, pixels, records, loaded.meta.category_ids, options)()

    return compute


def training_work(step: Step) -> Callable[..., object]:
    """A function that runs one training step on the batch of the given number."""
    changes = ["train.bf16=true", f"train.batch_size={2 if step.small else 16}", f"train.lr={LR}"]
    recipe = recipe_of(step, "c4").with_changes(changes)
    index = CocoIndex.load(instances_file(step), need_segmentation=True)
    batches = TrainingBatches(index, ImageSource.open(images_folder(step)), recipe)
    loaded = loading.load(run_folder(step, "c4"), step.device).model
    model = MaskRCNN(recipe, loaded.classes).to(step.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.load_state_dict(loaded.state_dict())
    model.train()
    sgd, generator = build_optimizer(model, recipe.train), torch.Generator()

    def compute(number: int = 0) -> object:
        return start_step(model, sgd, batch_of(number), LR, max_grad_norm=10.0, generator=generator).losses()

    @functools.cache
    def batch_of(number: int) -> Batch:
        batch = batches[number]
        if not isinstance(batch, Batch):
            raise batch  # TrainingBatches returns the error of an unreadable image in place of its batch
        return batch

    compute.batch_of = batch_of  # type: ignore[attr-defined]
    return compute


def backbone_of(step: Step, model: MaskRCNN, size: tuple[int, int]) -> Callable[[], object]:
    """A function that computes the feature maps of images of a size (height, width)."""
    x = torch.randn((1 if step.small else 8, 3, *size), device=step.device)
    x = x.to(next(model.parameters()).dtype, memory_format=torch.channels_last)
    return lambda: model.extract_feature_maps(x)


@torch.inference_mode()
def costs_without_fusion(step: Step) -> None:
    """Measure new portrait sizes with cuDNN's fused convolutions, and with matrix products instead."""
    height, width = (64, 96) if step.small else (600, 800)
    for name, epilogue in (("", Epilogue.LIBRARY), ("_with_products", Epilogue.PRODUCTS)):
        model = loading.load(run_folder(step, "c4"), step.device).model
        optimize_for_inference(model, bf16=True, epilogue=epilogue)
        more = 0 if epilogue is Epilogue.LIBRARY else 16 * 5  # other sizes, as plans are cached across models
        sizes = [(width - 16 * turn, height + 16 * turn + more) for turn in range(5)]
        extra, later = first_and_later(step, [backbone_of(step, model, size) for size in sizes])
        step.put(f"new_portrait_size{name}_ms", 1000 * median(extra[1:]))  # the first loads libraries
        step.put(f"known_portrait_size{name}_ms", 1000 * median(later[1:]))


def first_and_later(step: Step, computations: Iterable[Callable[[], object]]) -> tuple[list[float], list[float]]:
    """For each computation, the extra seconds of the first call, and the median seconds of later calls."""
    extra, later = [], []
    for compute in computations:
        first, *others = [seconds(step, compute) for _ in range(4)]
        extra.append(first - median(others))
        later.append(median(others))
    return extra, later


@torch.inference_mode()
def plan_costs(step: Step) -> dict[str, float]:
    """Measure how much longer the first call with a new shape takes than later calls, in milliseconds.

    The new shapes are input sizes of the backbone, and numbers of RoIs of conv5.
    """
    model = detector(step, "c4", "bfloat16").model
    weight = next(model.parameters())
    height, width = (64, 96) if step.small else (600, 800)

    def backbone(turn: int) -> Callable[[], object]:
        return backbone_of(step, model, (height + 16 * turn, width - 16 * turn))

    maps = model.extract_feature_maps(
        torch.randn(2, 3, height, width, device=step.device).to(weight.dtype, memory_format=torch.channels_last)
    )

    def head(turn: int) -> Callable[[], object]:
        count = (5 if step.small else 701) + 3 * turn
        corners = torch.rand(count, 2, 2, device=step.device).sort(dim=1).values.flatten(1)
        boxes = corners * torch.tensor([width, height] * 2, device=step.device)
        rois = torch.cat((torch.arange(count, device=step.device)[:, None] % 2, boxes), 1)
        given = model.head.precompute(maps, count)
        return lambda: model.head.box_features(given, rois)

    found = {}
    for name, make in (("input_size", backbone), ("number_of_rois", head)):
        for turn in range(2):  # a warm-up with other shapes, which loads libraries
            make((100 if name == "number_of_rois" else 3 if step.small else 20) + turn)()
        extra, later = first_and_later(step, map(make, range(3 if step.small else 8)))
        found[f"new_{name}_ms"] = 1000 * median(extra)
        found[f"known_{name}_ms"] = 1000 * median(later)
    return found


def seconds(step: Step, compute: Callable[[], object]) -> float:
    synchronize(step)
    start = time.perf_counter()
    compute()
    synchronize(step)
    return time.perf_counter() - start


def plan_cost_of_training(step: Step, compute: Callable[..., object]) -> float:
    """Median extra milliseconds of the first training step on a batch with new shapes."""
    numbers = range(1, 3 if step.small else 5)
    for number in numbers:
        compute.batch_of(number)  # type: ignore[attr-defined]
    pairs = [[seconds(step, functools.partial(compute, number)) for _ in range(2)] for number in numbers]
    return 1000 * median([first - again for first, again in pairs])


@contextmanager
def counting_waits(step: Step) -> Iterator[list[int]]:
    """Count how often the host waits for the GPU; the yielded list has the count after the block."""
    found = [0]
    if step.small:
        yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # not PyTorch's warning, once per process, that this mode does not detect all synchronizing operations
    found[0] = sum("called a synchronizing" in str(warning.message) for warning in caught)


def work(step: Step) -> None:
    for name, value in (step.attempt("costs of plans", plan_costs, step) or {}).items():
        step.put(name, value)
    step.attempt("costs without fusion", costs_without_fusion, step)
    made = {"extraction": (extraction_work, 3), "training": (training_work, 2)}
    parts = {name: (step.attempt(name, make, step), rounds) for name, (make, rounds) in made.items()}
    parts = {name: part for name, part in parts.items() if part[0] is not None}
    for name, (compute, rounds) in parts.items():
        for _ in range(2):
            compute()
        synchronize(step)
        step.put(f"{name}_ms", 1000 * median([seconds(step, compute) for _ in range(rounds)]))
        with counting_waits(step) as waits:
            compute()
        step.put(f"{name}_host_waits", waits[0])
        if name == "training":
            step.put("new_training_batch_ms", step.attempt("cost of a new batch", plan_cost_of_training, step, compute))
    activities = [ProfilerActivity.CPU] + ([] if step.small else [ProfilerActivity.CUDA])
    with profile(activities=activities) as prof:
        for name, (compute, rounds) in parts.items():
            with record_function(f"part: {name}"):
                for _ in range(1 if step.small else rounds):
                    compute()
                synchronize(step)
    for name, (_, rounds) in parts.items():
        found = by_kind(prof, step, window_of(prof, f"part: {name}"))
        step.put(f"{name}_share_elementwise", found["share_elementwise"])
        step.put(f"{name}_gpu_busy", found["milliseconds"] / found["wall_milliseconds"])
        step.put(f"{name}_launches", found["launches"] / (1 if step.small else rounds))
        step.put(name, found)
        for kind, value in found["milliseconds_by_kind"].items():
            step.say(f"{name}: {kind}: {value:.3g} ms")
    step.attempt("trace", save_trace, step, prof)


def save_trace(step: Step, prof: profile) -> None:
    """Write the compressed trace to the results if it is smaller than 15 MiB."""
    plain = step.work / "trace.json"
    prof.export_chrome_trace(str(plain))
    packed = step.work / "trace.json.gz"
    with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
        shutil.copyfileobj(source, target)
    size = packed.stat().st_size
    step.put("trace_mib", size / 2**20)
    if size < 15 << 20:
        shutil.move(packed, step.out / "trace.json.gz")
    plain.unlink()


if __name__ == "__main__":
    run(work, "extraction")
