"""Step: compare whole networks on the GPU with the CPU: features, detections, losses and gradients.

Features, losses and detections in float32 (and features in bfloat16) are compared with float32 on the CPU. The rounding
errors of maps and gradients in float32 are close to the limits: maps pass through a hundred layers, and in the backward
pass rounding can switch a ReLU on or off. So the errors of both devices are measured against float64, each within the
limit. Float64 is computed on the GPU in plain PyTorch, as the CPU would take minutes; float32 on the CPU, which shares
no kernels with it, validates it.

A rehearsal compares the layers optimized for inference with the original network, both on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from differences import largest, row_difference
from results import Step, run
from torch import Tensor
from work import (
    detector,
    draw_results,
    extract_options,
    image_list,
    images_of_one_size,
    recipe_of,
    relative_difference,
    run_folder,
)

from refdet.data.coco import ImageRecord
from refdet.data.segmentations import to_rle
from refdet.data.transforms import input_size, network_inputs
from refdet.detector import loading
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.predictor import detect_batch
from refdet.device import exact_float32
from refdet.structures.boxes import iou
from refdet.structures.ground_truth import GroundTruth
from refdet.structures.regions import Regions

MAPS, FEATURES, LOSSES, GRADIENTS = 1e-5, 1e-4, 1e-4, 1e-3  # maximum relative errors
ALIKE, COSINE = 0.99, 0.999  # minimum share of equal detections, minimum similarity of features in bfloat16


def reference(step: Step, network: str) -> MaskRCNN:
    """The network on the CPU that the one on the device is compared with."""
    return loading.load(run_folder(step, network), "cpu", for_inference=not step.small).model


def check_float32(step: Step, name: str, there: float, here: float, limit: float, **details: object) -> None:
    """Check the relative errors of float32 against float64, `there` on the device and `here` on the CPU."""
    step.at_most(f"{name} of the CPU, relative error", here, limit)
    step.check(f"{name}, relative error", there <= limit, value=there, limit=limit, **details)


@torch.inference_mode()
def inference(step: Step, network: str) -> None:
    """Compare feature maps, features of given boxes and detections of two images."""
    records, pixels = images_of_one_size(step, network, 2)
    there, here = detector(step, network), reference(step, network)
    sizes = [input_size(*image.shape[:2], here.recipe.input) for image in pixels]
    bfloat16 = detector(step, network, "bfloat16")
    corners = torch.rand(50, 2, 2, generator=torch.Generator().manual_seed(0)).sort(dim=1).values.flatten(1)
    boxes = [corners * torch.tensor([s.image_width, s.image_height] * 2) for s in sizes]
    found: dict[str, dict[str, Tensor]] = {}
    regions: dict[str, list[Regions]] = {}
    with exact_float32():
        for name, model in {"here": here, "there": there.model, "bfloat16": bfloat16.model}.items():
            weight = next(model.parameters())
            x = network_inputs(pixels, sizes, here.recipe.input, weight.device)
            x = x.to(weight.dtype, memory_format=torch.channels_last)
            maps = model.extract_feature_maps(x)
            given = model.extract_features(x, sizes, [box.to(weight.device) for box in boxes])
            found[name] = {f"map {i}": level.float().cpu() for i, level in enumerate(maps)}
            found[name] |= {key: values.float().cpu() for key, values in given.features.items()}
            options = extract_options(step, network)
            regions[name] = detect_batch(model, pixels, records, there.meta.category_ids, options)
    exact = loading.load(run_folder(step, network), step.device).model.double()
    x = network_inputs(pixels, sizes, here.recipe.input, torch.device(step.device)).double()
    expected = exact.extract_feature_maps(x.contiguous(memory_format=torch.channels_last))
    maps = [f"map {i}" for i in range(len(expected))]
    errors = {
        name: largest(relative_difference(found[name][key], level) for key, level in zip(maps, expected, strict=True))
        for name in ("here", "there")
    }
    check_float32(step, f"{network}: maps", errors["there"], errors["here"], MAPS)
    worst = largest(relative_difference(found["there"][key], found["here"][key]) for key in maps)
    step.put(f"{network}_maps_difference_to_cpu", worst)
    for key in found["here"].keys() - set(maps):
        a, b = found["there"][key], found["here"][key]
        step.at_most(f"{network}: {key} of given boxes, relative difference", row_difference(a, b), FEATURES)
        cosine = float(torch.cosine_similarity(found["bfloat16"][key], b, dim=1).min())
        step.check(f"{network}: {key} in bfloat16, cosine", cosine >= COSINE, value=cosine, limit=COSINE)
    step.put(f"{network}_detections", [len(r) for r in regions["here"]])
    share = alike(regions["there"], regions["here"])
    step.check(f"{network}: share of equal detections", share >= ALIKE, value=share, limit=ALIKE)
    step.put(f"{network}_detections_alike_bf16", alike(regions["bfloat16"], regions["here"]))


def alike(found: list[Regions], expected: list[Regions]) -> float:
    """Share of the expected detections that were found: same category, IoU above 0.99, score within 1e-3."""
    same = total = 0
    for a, b in zip(found, expected, strict=True):
        total += len(b)
        if len(a) and len(b):
            close = iou(torch.from_numpy(b.boxes), torch.from_numpy(a.boxes)).numpy() > 0.99
            close &= b.category_ids[:, None] == a.category_ids
            close &= abs(b.scores[:, None] - a.scores) < 1e-3
            same += int(close.any(1).sum())
    return same / max(total, 1)


def targets_of(step: Step, network: str, records: list[ImageRecord]) -> list[GroundTruth]:
    """The annotated objects of images, in pixels of the network's input."""
    index = image_list(step, 512).index
    annotations, label_of = index.annotations, {id_: label for label, id_ in enumerate(index.categories, start=1)}
    found = []
    for record in records:
        size = input_size(record.height, record.width, recipe_of(step, network).input)
        boxes = torch.tensor([a.box for a in annotations[record.id]], dtype=torch.float32).reshape(-1, 4)
        boxes *= torch.tensor([size.scale_x, size.scale_y] * 2)
        labels = torch.tensor([label_of[a.category_id] for a in annotations[record.id]])
        masks = [to_rle(a.segmentation, record.height, record.width) for a in annotations[record.id]]
        found.append(GroundTruth(boxes, labels, masks, torch.zeros(0, 4), size.scale))
    return found


@contextmanager
def fixed_proposals(model: MaskRCNN, proposals: list[Tensor] | None) -> Iterator[list[list[Tensor]]]:
    """Replace the proposals of a network by the given boxes, if any; yields the list of those used in each call.

    Otherwise, rounding differences between devices could change the proposals, and with them all losses.
    """
    original, used_proposals = model.rpn.filter_proposals, []

    def propose(*arguments: object) -> list[Tensor]:
        if proposals is None:
            boxes = original(*arguments)  # type: ignore[arg-type]
        else:
            boxes = [proposal.to(next(model.parameters()).device) for proposal in proposals]
        used_proposals.append(boxes)
        return boxes

    model.rpn.filter_proposals = propose  # type: ignore[method-assign]
    try:
        yield used_proposals
    finally:
        del model.rpn.filter_proposals


def losses(step: Step, network: str) -> None:
    """Compare losses and gradients of two images of the same size.

    All RoIs are sampled, and as many anchors as a recipe allows, which can be less than all; both sides have the same
    seeds, and so the same samples.
    """
    records, pixels = images_of_one_size(step, network, 2)
    everything = [
        f"proposals.batch_size_per_image={200 if step.small else 100_000}",
        "proposals.positive_fraction=1",
        "head.batch_size_per_image=20000",
        "head.positive_fraction=1",
        "proposals.pre_nms_top_n_train=500",
        f"proposals.post_nms_top_n_train={12 if step.small else 100}",
    ]
    recipe = recipe_of(step, network).with_changes(everything)
    sizes = [input_size(*image.shape[:2], recipe.input) for image in pixels]
    targets = targets_of(step, network, records)
    results: dict[str, tuple[dict[str, float], dict[str, Tensor]]] = {}
    proposals = None
    for name, device, dtype in (
        ("here", "cpu", torch.float32),
        ("there", step.device, torch.float32),
        ("exact", step.device, torch.float64),
    ):
        loaded = loading.load(run_folder(step, network), device).model
        model = MaskRCNN(recipe, loaded.classes).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.load_state_dict(loaded.state_dict())
        model.train().to(dtype)
        x = network_inputs(pixels, sizes, recipe.input, torch.device(device)).to(dtype)
        with exact_float32(), fixed_proposals(model, proposals) as used_proposals:
            terms = model.compute_losses(
                x.contiguous(memory_format=torch.channels_last),
                [(s.height, s.width) for s in sizes],
                targets,
                torch.Generator().manual_seed(0),
            )
            torch.stack([term.to(dtype) for term in terms.values()]).sum().backward()
        proposals = [boxes.detach().cpu() for boxes in used_proposals[0]]
        gradients = {n: p.grad.cpu().double() for n, p in model.named_parameters() if p.grad is not None}
        results[name] = ({key: value.item() for key, value in terms.items()}, gradients)
        del model, loaded, terms, x
    (expected, of_cpu), (found, of_device), (_, exact) = (results[name] for name in ("here", "there", "exact"))
    step.put(f"{network}_losses", expected)
    worst = largest(abs(found[name] - expected[name]) / max(abs(expected[name]), 1e-12) for name in expected)
    step.at_most(f"{network}: losses, relative difference", worst, LOSSES)
    here, there = gradient_errors(of_cpu, exact), gradient_errors(of_device, exact)
    name = max(there, key=lambda n: (math.isnan(there[n]), there[n]))
    check_float32(
        step, f"{network}: gradients", there[name], largest(here.values()), GRADIENTS,
        greatest_of=name, its_norm=float(exact[name].norm()),
    )  # fmt: skip
    difference = largest(gradient_errors(of_device, of_cpu).values())
    step.put(f"{network}_gradients_difference_to_cpu", difference)


def gradient_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """L2 distance of each parameter's gradient from the expected gradient, relative to the norm of the expected one.

    The norm counts as at least a thousandth of the largest gradient's: in smaller gradients, most terms have canceled.
    """
    min_norm = 1e-3 * max(float(g.norm()) for g in expected.values())
    return {n: float((found[n] - g).norm() / g.norm().clamp(min=min_norm)) for n, g in expected.items()}


def work(step: Step) -> None:
    torch.manual_seed(0)
    step.put("thresholds", draw_results(step)["threshold"])
    for network in ("c4", "fpn"):
        step.attempt(f"{network}: inference", inference, step, network)
        step.attempt(f"{network}: losses", losses, step, network)


if __name__ == "__main__":
    run(work, "parity")
