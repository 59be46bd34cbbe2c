"""Step: whole networks on the GPU and on the CPU in exact float32, bfloat16 beside them, and losses with gradients.

A rehearsal compares the layers packed for inference with the network as it is trained, both on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from results import Step, run
from torch import Tensor
from work import detector, drawn, extract_options, image_list, one_size, recipe_of, relative, run_folder

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

MAPS, FEATURES, ALIKE, COSINE, LOSSES, GRADIENTS = 1e-5, 1e-4, 0.99, 0.999, 1e-4, 1e-3


def reference(step: Step, network: str) -> MaskRCNN:
    """The network that the other is compared with, on the CPU."""
    return loading.load(run_folder(step, network), "cpu", for_inference=not step.small).model


@torch.inference_mode()
def inference(step: Step, network: str) -> None:
    """Maps, features of given boxes and detections of two images."""
    records, pixels = one_size(step, network, 2)
    there, here = detector(step, network), reference(step, network)
    sizes = [input_size(*image.shape[:2], here.recipe.input) for image in pixels]
    half = detector(step, network, "bfloat16")
    corners = torch.rand(50, 2, 2, generator=torch.Generator().manual_seed(0)).sort(dim=1).values.flatten(1)
    boxes = [corners * torch.tensor([s.image_width, s.image_height] * 2) for s in sizes]
    found: dict[str, dict[str, Tensor]] = {}
    regions: dict[str, list[Regions]] = {}
    with exact_float32():
        for name, model in {"here": here, "there": there.model, "half": half.model}.items():
            weight = next(model.parameters())
            x = network_inputs(pixels, sizes, here.recipe.input, weight.device)
            x = x.to(weight.dtype, memory_format=torch.channels_last)
            maps = model.extract_feature_maps(x)
            given = model.extract_features(x, sizes, [box.to(weight.device) for box in boxes])
            found[name] = {f"map {i}": level.float().cpu() for i, level in enumerate(maps)}
            found[name] |= {key: values.float().cpu() for key, values in given.features.items()}
            options = extract_options(step, network)
            regions[name] = detect_batch(model, pixels, records, there.meta.category_ids, options)
    maps = [key for key in found["here"] if key.startswith("map")]
    worst = max(relative(found["there"][key], found["here"][key]) for key in maps)
    step.at_most(f"{network}: maps, relative difference", worst, MAPS)
    for key in found["here"].keys() - maps:
        a, b = found["there"][key], found["here"][key]
        worst = float(((a - b).norm(dim=1) / b.norm(dim=1)).max())
        step.at_most(f"{network}: {key} of given boxes, relative difference", worst, FEATURES)
        cosine = float(torch.cosine_similarity(found["half"][key], b, dim=1).min())
        step.check(f"{network}: {key} in bfloat16, cosine", cosine >= COSINE, value=cosine, limit=COSINE)
    step.put(f"{network}_detections", [len(r) for r in regions["here"]])
    share = alike(regions["there"], regions["here"])
    step.check(f"{network}: share of equal detections", share >= ALIKE, value=share, limit=ALIKE)
    step.put(f"{network}_detections_alike_bf16", alike(regions["half"], regions["here"]))


def alike(found: list[Regions], wanted: list[Regions]) -> float:
    """The share of wanted detections that have a counterpart: same category, IoU above 0.99, score within 1e-3."""
    same = total = 0
    for a, b in zip(found, wanted, strict=True):
        total += len(b)
        if len(a) and len(b):
            close = iou(torch.from_numpy(b.boxes), torch.from_numpy(a.boxes)).numpy() > 0.99
            close &= b.category_ids[:, None] == a.category_ids
            close &= abs(b.scores[:, None] - a.scores) < 1e-3
            same += int(close.any(1).sum())
    return same / max(total, 1)


def targets_of(step: Step, network: str, records: list[ImageRecord]) -> list[GroundTruth]:
    """The annotated objects of images in their network inputs."""
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
    """Have the network propose these boxes, or if None note those that it proposes.

    The rounding of another device could otherwise change which boxes are proposed, and with them every loss.
    """
    own, noted = model.rpn.filter_proposals, []

    def propose(*arguments: object) -> list[Tensor]:
        boxes = own(*arguments) if proposals is None else [b.to(next(model.parameters()).device) for b in proposals]  # type: ignore[arg-type]
        noted.append(boxes)
        return boxes

    model.rpn.filter_proposals = propose  # type: ignore[method-assign]
    try:
        yield noted
    finally:
        del model.rpn.filter_proposals


def losses(step: Step, network: str) -> None:
    """Losses and gradients of two images of one size, of all RoIs, and of all anchors or the most that a recipe allows.

    A pyramid has more of them, and so has a rehearsal, so both sides have the same seeds, which give the same samples.
    """
    records, pixels = one_size(step, network, 2)
    everything = [
        f"proposals.batch_size_per_image={200 if step.small else 100_000}",
        "proposals.positive_fraction=1",
        "head.batch_size_per_image=20000",
        "head.positive_fraction=1",
        "proposals.pre_nms_top_n_train=500",
        f"proposals.post_nms_top_n_train={30 if step.small else 100}",
    ]
    recipe = recipe_of(step, network).with_changes(everything)
    sizes = [input_size(*image.shape[:2], recipe.input) for image in pixels]
    targets = targets_of(step, network, records)
    results, proposals = {}, None
    for device in ("cpu", step.device):
        loaded = loading.load(run_folder(step, network), device).model
        model = MaskRCNN(recipe, loaded.classes).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.load_state_dict(loaded.state_dict())
        model.train()
        x = network_inputs(pixels, sizes, recipe.input, torch.device(device))
        with exact_float32(), fixed_proposals(model, proposals) as noted:
            terms = model.compute_losses(
                x.contiguous(memory_format=torch.channels_last),
                [(s.height, s.width) for s in sizes],
                targets,
                torch.Generator().manual_seed(0),
            )
            torch.stack(list(terms.values())).sum().backward()
        proposals = [boxes.detach().cpu() for boxes in noted[0]]
        gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        results[device] = ({name: value.item() for name, value in terms.items()}, gradients)
    (wanted, gradients), (found, gradients_there) = results["cpu"], results[step.device]
    step.put(f"{network}_losses", wanted)
    worst = max(abs(found[name] - wanted[name]) / max(abs(wanted[name]), 1e-12) for name in wanted)
    step.at_most(f"{network}: losses, relative difference", worst, LOSSES)
    least = 1e-3 * max(float(g.norm()) for g in gradients.values())  # below it a sum has cancelled out
    norms = {n: float((gradients_there[n] - g).norm() / g.norm().clamp(min=least)) for n, g in gradients.items()}
    name = max(norms, key=lambda n: norms[n])
    passed = norms[name] <= GRADIENTS
    step.check(
        f"{network}: gradients, relative difference", passed, value=norms[name], limit=GRADIENTS, greatest_of=name
    )


def work(step: Step) -> None:
    torch.manual_seed(0)
    step.put("thresholds", drawn(step)["threshold"])
    for network in ("c4", "fpn"):
        step.attempt(f"{network}: inference", inference, step, network)
        step.attempt(f"{network}: losses", losses, step, network)


if __name__ == "__main__":
    run(work, "parity")
