"""The sections of the report, each a function from values to HTML. No files, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from refdet.evaluation.detection_errors import BINS, DetectionErrors
from refdet.files.short_text import format_count
from refdet.report.charts import Axes, Series, line_chart
from refdet.report.confusions import confusion_map
from refdet.report.fields import GENERALIZED
from refdet.report.inputs import LOSS_LABELS, PipelineStep
from refdet.report.recall_charts import THRESHOLDS, charts_by_iou, charts_by_regions, split_names
from refdet.report.samples import Referent
from refdet.report.templates import Markup, number, render
from refdet.report.validations import validation_chart
from refdet.splits.leak_audit import AuditResult
from refdet.structures.provenance import Provenance

AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MARK_POINTS_BELOW = 10  # rows of the log below which each point of the curves is marked
MAX_ROWS = 25  # of a table of categories
SIZES = (("small", 32**2), ("medium", 96**2), ("large", float("inf")))  # COCO's, by the area in pixels


def steps_section(steps: Sequence[PipelineStep]) -> Markup:
    """The commands in order, with bars of their time."""
    longest = max((step.seconds for step in steps), default=0.0) or 1.0
    shown = [
        {
            "name": step.name,
            "about": step.about,
            "commands": step.commands,
            "time": _seconds(step.seconds),
            "share": f"{100 * step.seconds / longest:.1f}",
        }
        for step in steps
    ]
    return render("steps.html", steps=shown, total=_seconds(sum(step.seconds for step in steps)))


def leak_section(
    provenance: Provenance,
    audit: AuditResult | None,
    original_audit: AuditResult | None,
    validated: bool = False,
    unproven: Sequence[str] = (),
) -> Markup:
    """The training data of the detector, and the audit for REFER's val and test images.

    Args:
        provenance: of the detector.
        audit: audit of the training file.
        original_audit: audit of the original file that build-split made the training file from.
        validated: whether the run has a validation, which may have chosen the weights.
        unproven: why the audit does not prove that the detector has seen no held-out image.
    """
    header, rows = ["held-out split", "images"], []
    if original_audit is not None:
        header.append("in the original file")
    header.append("in the training file")
    in_original = {leak.name: len(leak.image_ids) for leak in original_audit.splits} if original_audit else {}
    for leak in audit.splits if audit else ():
        before = [in_original[leak.name]] if original_audit else []
        rows.append([leak.name, leak.images, *before, len(leak.image_ids)])
    return render(
        "leak.html",
        provenance=provenance,
        audit=audit,
        original_audit=original_audit,
        validated=validated,
        header=header,
        rows=rows,
        excluded=", ".join(provenance.excluded),
        unproven=unproven,
    )


def detection_section(detection: Mapping[str, Any]) -> Markup:
    """COCO AP of boxes and masks."""
    kinds = (("bbox", "boxes"), ("segm", "masks"))
    rows = [[name, *(number(detection[k][ap]) for ap in AP_NAMES)] for k, name in kinds if detection.get(k)]
    return render("detection.html", header=["", *AP_NAMES], rows=rows)


def errors_section(
    errors: DetectionErrors,
    by_category: Mapping[int, Mapping[str, float | None]],
    names: Mapping[int, str],
    file: str,
    of_images: int | None = None,
) -> Markup:
    """AP by category and size, calibration of the scores, and confused categories.

    Args:
        errors: counts of the regions.
        by_category: category id -> rates, from `ap_by_category`.
        names: category id -> name.
        file: name of the instances file.
        of_images: number of images that the counted ones are a sample of; None if all were counted.
    """
    rated = {i: rates for i, rates in by_category.items() if rates["AP"] is not None}
    worst = sorted(rated, key=lambda i: (rated[i]["AP"] or 0.0, names.get(i, "")))
    shown = ("AP", "AP50", "APs", "APm", "APl")
    objects = errors.objects_by_category
    categories = [[names.get(i, str(i)), objects[i], *(number(rated[i][name]) for name in shown)] for i in worst]
    used_bins = [i for i in range(BINS) if errors.regions[i]]
    precision = {i: float(errors.correct[i] / errors.regions[i]) for i in used_bins}
    rates = [(float(errors.score_sums[i] / errors.regions[i]), precision[i]) for i in used_bins]
    axes = Axes("score", "share that is correct", [i / 5 for i in range(6)], (0.0, 1.0), width=400, height=280)
    description = "; ".join(f"score {score:.2f}: {rate:.2f} correct" for score, rate in rates)
    lines = [Series("regions", rates, 1), Series("a score is a probability", [(0.0, 0.0), (1.0, 1.0)], 0, dashed=True)]
    wrong = [(pair, n) for pair, n in errors.confusions.most_common() if pair[0] != pair[1]]
    return render(
        "errors.html",
        images=errors.images,
        of_images=errors.images if of_images is None else of_images,
        objects=errors.objects,
        missed=errors.missed,
        file=file,
        categories=categories,
        left_out=len(by_category) - len(rated),
        calibration=line_chart("Calibration of the scores", description, lines, axes, dots=True),
        bins=[
            [f"{i / BINS:.1f} to {(i + 1) / BINS:.1f}", int(errors.regions[i]), number(precision[i])] for i in used_bins
        ],
        confusion_map=confusion_map(errors, names),
        confusions=[
            [names.get(true, str(true)), names.get(predicted, str(predicted)), n, f"{100 * n / objects[true]:.0f}%"]
            for (true, predicted), n in wrong[:MAX_ROWS]
        ],
    )


def refer_section(metrics: Sequence[Mapping[str, Any]]) -> Markup:
    """Metrics of each split of each dataset, and recall by IoU threshold and number of regions."""
    rows, unusable = [], []
    for part in metrics:
        for split in split_names(part):
            values = part["splits"][split]
            if values.get("unusable"):
                unusable.append((_split_label(part, split), values["unusable"], values["images"]))
            box, mask = values["detection"]["bbox"], values["detection"]["segm"]
            recall = values["referent_recall"]
            rows.append(
                [_split_label(part, split)]
                + [values[name] for name in ("images", "refs", "sentences")]
                + [number(box["AP50"]), number(mask["AP50"] if mask else None)]
                + [number(recall[name]) for name in (*THRESHOLDS, "mean_best_iou")]
            )
    return render(
        "refer.html",
        header=["split", "images", "refs", "sentences", "box", "mask", *THRESHOLDS, "mean best IoU"],
        groups=[(3, "count"), (2, "AP50"), (5, "referent recall at IoU"), (1, "")],
        rows=rows,
        unusable=unusable,
        by_iou=charts_by_iou(metrics),
        by_regions=charts_by_regions(metrics),
    )


def _split_label(part: Mapping[str, Any], split: str) -> str:
    """Name of a split, with the protocol of its metrics if it is not the standard one."""
    protocol = part.get("protocol", "standard")
    return f"{part['dataset']} {part['split_by']} {split}" + (f" ({protocol})" if protocol != "standard" else "")


def ceiling_section(referred: Sequence[Referent]) -> Markup:
    """The referred objects without a region, by size and category."""

    def size(obj: Referent) -> str:
        area = float(np.prod(obj.box[2:] - obj.box[:2]))
        return next(name for name, max_area in SIZES if area <= max_area)

    sizes = _count_misses(referred, size)
    categories = _count_misses(referred, lambda obj: obj.category)
    ranked = sorted(categories.items(), key=lambda item: (-item[1][1], item[0]))
    rows = [[name, *_rates(values)] for name, values in ranked if values[1]][:MAX_ROWS]
    return render(
        "ceiling.html",
        objects=len(referred),
        missed=sum(not obj.found for obj in referred),
        sizes=[[name, *_rates(sizes[name])] for name, _ in SIZES if name in sizes],
        categories=rows,
        left_out=len(categories) - len(rows),
    )


def _count_misses(referred: Sequence[Referent], group: Callable[[Referent], str]) -> dict[str, tuple[int, int, float]]:
    """Group of objects -> their number, the number of missed ones, and the sum of their best IoUs."""
    counts: dict[str, tuple[int, int, float]] = {}
    for obj in referred:
        objects, missed, ious = counts.get(group(obj), (0, 0, 0.0))
        counts[group(obj)] = (objects + 1, missed + (not obj.found), ious + obj.iou)
    return counts


def _rates(values: tuple[int, int, float]) -> list[Any]:
    objects, missed, ious = values
    return [objects, missed, number(missed / objects), number(ious / objects)]


def listener_section(metrics: Sequence[Mapping[str, Any]], **answers: Any) -> Markup:
    """Comprehension accuracy of a model.

    Args:
        metrics: metrics with predictions.
        answers: the template's values about wrong answers: pictures, answers, wrong, unanswerable.
    """
    rows = []
    for part in metrics:
        for split in split_names(part):
            values = part["splits"][split]
            if "comprehension" not in values:
                continue
            boxes, masks = values["comprehension"], values["segmentation"]
            rows.append(
                [_split_label(part, split), values["sentences"]]
                + [number(boxes["random_baseline@0.5"]), number(boxes["accuracy@0.5"])]
                + [number(values["referent_recall"]["0.5"]), number(masks["overall_iou"] if masks else None)]
            )
    mdetr = any(part.get("protocol") == "mdetr" for part in metrics)
    return render("listener.html", rows=rows, mdetr=mdetr, **answers)


def generalized_section(metrics: Sequence[Mapping[str, Any]]) -> Markup:
    """Metrics of a model's answers to gRefCOCO."""
    rows = []
    for part in metrics:
        for split in split_names(part):
            values = part["splits"][split]
            if "generalized" in values:
                scores = values["generalized"]
                counts = [values["sentences"], scores["no_target"], scores["missing"]]
                rows.append([_split_label(part, split), *counts, *(number(scores[name]) for name in GENERALIZED)])
    header = ["split", "sentences", "without target", "missing", *GENERALIZED]
    return render("generalized.html", header=header, rows=rows)


def loss_section(
    log: Sequence[Mapping[str, float]], validations: Sequence[Mapping[str, Any]] = (), on_other_data: int = 0
) -> Markup:
    """The curves of the loss and of AP.

    Args:
        log: the rows of metrics.jsonl.
        validations: its rows of validations, all on the same data.
        on_other_data: number of validations on other data, which are left out.
    """
    values: dict[str, Any] = {
        "validation": validation_chart(validations) if validations else None,
        "left_out": format_count(on_other_data, "validation") if on_other_data else "",
    }
    if not log:
        return render("loss.html", chart=None, **values)
    series = [
        Series(name, [(line["step"], line[key]) for line in log if key in line], style)
        for style, (key, name) in enumerate(LOSS_LABELS)
        if any(key in line for line in log)
    ]
    axes = Axes("training step", "loss (log scale)", log_y=True)
    first, last = log[0], log[-1]
    description = (
        f"The total was {first['loss']:.2f} at step {first['step']} and {last['loss']:.2f} at step {last['step']}."
    )
    chart = line_chart("Training loss by step", description, series, axes, dots=len(log) < MARK_POINTS_BELOW)
    return render("loss.html", chart=chart, **values)


def _seconds(seconds: float) -> str:
    if seconds < 0.05:
        return "under 0.1 s"
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{int(seconds + 0.5) // 60} min {int(seconds + 0.5) % 60:02d} s"
