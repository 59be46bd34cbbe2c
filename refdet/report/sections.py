"""The sections of the report: functions that render values as HTML. They read only templates, and need no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refdet.evaluation.detection_errors import BINS, DetectionErrors
from refdet.files.short_text import format_count
from refdet.report.charts import Axes, Chart, Series, line_chart
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
MARK_POINTS_BELOW = 10  # number of logged steps below which each point of the curves is marked
MAX_ROWS = 25  # rows of the tables of missed referents and of confusions
SIZES = (("small", 32**2), ("medium", 96**2), ("large", float("inf")))  # COCO's, with their maximum area in pixels


def steps_section(steps: Sequence[PipelineStep]) -> Markup:
    """The commands in order, with bars of their time."""
    longest = max((step.seconds for step in steps), default=0.0) or 1.0  # no division by 0 if no step took time
    rows = [
        {
            "name": step.name,
            "about": step.about,
            "commands": step.commands,
            "time": _seconds(step.seconds),
            "percent": f"{100 * step.seconds / longest:.1f}",  # of the longest step
        }
        for step in steps
    ]
    return render("steps.html", steps=rows, total=_seconds(sum(step.seconds for step in steps)))


def leak_section(
    provenance: Provenance,
    audit: AuditResult | None,
    original_audit: AuditResult | None,
    validated: bool = False,
    unproven: Sequence[str] = (),
    others: Sequence[str] = (),
) -> Markup:
    """The training data of the detector, and the audit for REFER's val and test images.

    Args:
        provenance: of the detector.
        audit: audit of the training file.
        original_audit: audit of the original file that build-split made the training file from.
        validated: whether the run was validated, so that a validation may have chosen the weights.
        unproven: why the audit does not prove that the detector has seen no held-out image.
        others: stores and metrics of the report that are not of this detector.
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
        others=", ".join(others),
    )


def detection_section(detection: Mapping[str, Any]) -> Markup:
    """COCO AP of boxes and masks."""
    rows = [
        [name, *(number(detection[kind][ap]) for ap in AP_NAMES)]
        for kind, name in (("bbox", "boxes"), ("segm", "masks"))
        if detection.get(kind)
    ]
    return render("detection.html", header=["", *AP_NAMES], rows=rows)


def errors_section(
    errors: DetectionErrors,
    ap_by_category: Mapping[int, Mapping[str, float | None]],
    names: Mapping[int, str],
    file_name: str,
    n_annotated: int,
) -> Markup:
    """AP by category and size, calibration of the scores, and confused categories.

    Args:
        errors: counts of the regions.
        ap_by_category: category id -> AP by name, from `refdet.evaluation.average_precision.ap_by_category`.
        names: category id -> name.
        file_name: name of the instances file.
        n_annotated: number of annotated images of the store; ``errors`` may be of a sample of them.
    """
    bins = [i for i in range(BINS) if errors.regions[i]]
    precision = {i: float(errors.correct[i] / errors.regions[i]) for i in bins}
    confusions = [(pair, n) for pair, n in errors.confusions.most_common() if pair[0] != pair[1]]
    ap_rows = _ap_rows(errors, ap_by_category, names)
    return render(
        "errors.html",
        images=errors.images,
        annotated=n_annotated,
        objects=errors.objects,
        missed=errors.missed,
        file_name=file_name,
        categories=ap_rows,
        left_out=len(ap_by_category) - len(ap_rows),
        n_outside=errors.outside,
        n_regions=int(errors.regions.sum()),
        calibration=_calibration_chart(errors, precision),
        bins=[[f"{i / BINS:.1f} to {(i + 1) / BINS:.1f}", int(errors.regions[i]), number(precision[i])] for i in bins],
        confusion_map=confusion_map(errors, names),
        confusions=[
            [_name(true, names), _name(predicted, names), n, f"{100 * n / errors.objects_by_category[true]:.0f}%"]
            for (true, predicted), n in confusions[:MAX_ROWS]
        ],
    )


def _ap_rows(
    errors: DetectionErrors, ap_by_category: Mapping[int, Mapping[str, float | None]], names: Mapping[int, str]
) -> list[list[Any]]:
    """Rows of the table of categories, without those that have no objects; lowest AP first."""
    defined = {i: ap for i, ap in ap_by_category.items() if ap["AP"] is not None}
    ascending = sorted(defined, key=lambda i: (defined[i]["AP"] or 0.0, names.get(i, "")))
    columns = ("AP", "AP50", "APs", "APm", "APl")
    return [
        [_name(i, names), errors.objects_by_category[i], *(number(defined[i][column]) for column in columns)]
        for i in ascending
    ]


def _calibration_chart(errors: DetectionErrors, precision: Mapping[int, float]) -> Chart:
    """Share of correct regions by mean score, a point per bin; ``precision`` is bin -> share, for bins with regions."""
    points = [(float(errors.score_sums[i] / errors.regions[i]), share) for i, share in precision.items()]
    series = [
        Series("regions", points, 1),
        Series("a score is a probability", [(0.0, 0.0), (1.0, 1.0)], 0, dashed=True),
    ]
    axes = Axes("score", "share that is correct", [i / 5 for i in range(6)], (0.0, 1.0), width=400, height=280)
    description = "; ".join(f"score {score:.2f}: {share:.2f} correct" for score, share in points)
    return line_chart("Calibration of the scores", description, series, axes, dots=True)


def _name(category: int, names: Mapping[int, str]) -> str:
    """The name of a category, or else its id."""
    return names.get(category, str(category))


def refer_section(metrics: Sequence[Mapping[str, Any]]) -> Markup:
    """Metrics of each split of each dataset, and recall by IoU threshold and number of regions."""
    rows, unusable = [], []
    for entry in metrics:
        for split in split_names(entry):
            values = entry["splits"][split]
            if values.get("unusable"):
                unusable.append((_split_label(entry, split), values["unusable"], values["images"]))
            box, mask = values["detection"]["bbox"], values["detection"]["segm"]
            recall = values["referent_recall"]
            rows.append(
                [_split_label(entry, split)]
                + [values[name] for name in ("images", "refs", "sentences")]
                + [number(box["AP50"]), number(mask["AP50"] if mask else None)]
                + [number(recall[name]) for name in (*THRESHOLDS, "mean_best_iou")]
            )
    return render(
        "refer.html",
        header=["split", "images", "refs", "sentences", "box", "mask", *THRESHOLDS, "mean best IoU"],
        groups=[(3, "count"), (2, "AP50"), (len(THRESHOLDS), "referent recall at IoU"), (1, "")],  # (columns, name)
        rows=rows,
        unusable=unusable,
        by_iou=charts_by_iou(metrics),
        by_regions=charts_by_regions(metrics),
    )


def _split_label(metrics: Mapping[str, Any], split: str) -> str:
    """Name of a split, with the protocol of its metrics if it is not the standard one."""
    protocol = metrics.get("protocol", "standard")
    return f"{metrics['dataset']} {metrics['split_by']} {split}" + (f" ({protocol})" if protocol != "standard" else "")


def ceiling_section(referents: Sequence[Referent], n_stores: int = 1, n_uncounted: int = 0) -> Markup:
    """The referents that no region covers, by size and category.

    Args:
        referents: the referents on the usable images of all stores.
        n_stores: number of these stores.
        n_uncounted: number of referents on other images.
    """
    by_size, by_category = defaultdict[str, list[Referent]](list), defaultdict[str, list[Referent]](list)
    for referent in referents:
        by_size[_size(referent)].append(referent)
        by_category[referent.category].append(referent)
    category_rows = [_coverage_row(name, group) for name, group in by_category.items()]
    category_rows.sort(key=lambda row: (-row[2], row[0]))
    listed = [row for row in category_rows if row[2]][:MAX_ROWS]
    return render(
        "ceiling.html",
        objects=len(referents),
        missed=sum(not referent.is_covered for referent in referents),
        stores=n_stores,
        uncounted=n_uncounted,
        sizes=[_coverage_row(name, by_size[name]) for name, _ in SIZES if name in by_size],
        categories=listed,
        left_out=len(by_category) - len(listed),
    )


def _size(referent: Referent) -> str:
    """The size of a referent by the area of its box, one of the names in `SIZES`."""
    area = float(np.prod(referent.box[2:] - referent.box[:2]))
    return next(name for name, max_area in SIZES if area <= max_area)


def _coverage_row(name: str, referents: Sequence[Referent]) -> list[Any]:
    """A row: name of a group, number of referents, number and share of those missed, and mean best IoU."""
    missed = sum(not referent.is_covered for referent in referents)
    mean_iou = sum(referent.iou for referent in referents) / len(referents)
    return [name, len(referents), missed, number(missed / len(referents)), number(mean_iou)]


def listener_section(metrics: Sequence[Mapping[str, Any]], **answers: Any) -> Markup:
    """Comprehension accuracy of a model.

    Args:
        metrics: metrics of evaluate-on-refer with predictions.
        answers: the values about wrong answers, from `refdet.report.pictures.wrong_answers`.
    """
    rows = []
    for entry in metrics:
        for split in split_names(entry):
            values = entry["splits"][split]
            if "comprehension" not in values:
                continue
            boxes, masks = values["comprehension"], values["segmentation"]
            rows.append(
                [_split_label(entry, split), values["sentences"]]
                + [number(boxes["random_baseline@0.5"]), number(boxes["accuracy@0.5"])]
                + [number(values["referent_recall"]["0.5"]), number(masks["overall_iou"] if masks else None)]
            )
    uses_mdetr = any(entry.get("protocol") == "mdetr" for entry in metrics)
    return render("listener.html", rows=rows, mdetr=uses_mdetr, **answers)


def generalized_section(metrics: Sequence[Mapping[str, Any]]) -> Markup:
    """Metrics of a model's answers to gRefCOCO."""
    rows = []
    for entry in metrics:
        for split in split_names(entry):
            values = entry["splits"][split]
            if "generalized" in values:
                scores = values["generalized"]
                counts = [values["sentences"], scores["no_target"], scores["missing"]]
                rows.append([_split_label(entry, split), *counts, *(number(scores[name]) for name in GENERALIZED)])
    header = ["split", "sentences", "without target", "missing", *GENERALIZED]
    return render("generalized.html", header=header, rows=rows)


def loss_section(
    log: Sequence[Mapping[str, float]], validations: Sequence[Mapping[str, Any]] = (), on_other_data: int = 0
) -> Markup:
    """The curves of the loss and of the validation AP.

    Args:
        log: the training steps in metrics.jsonl, from `read_log`.
        validations: the validations in metrics.jsonl, from `read_validations`.
        on_other_data: number of validations on other data, which are left out.
    """
    values: dict[str, Any] = {
        "validation": validation_chart(validations) if validations else None,
        "left_out": format_count(on_other_data, "validation") if on_other_data else "",
    }
    if not log:
        return render("loss.html", chart=None, **values)
    series = [
        Series(name, [(row["step"], row[key]) for row in log if key in row], style)
        for style, (key, name) in enumerate(LOSS_LABELS)
        if any(key in row for row in log)
    ]
    axes = Axes("training step", "loss (log scale)", log_y=True)
    first, last = log[0], log[-1]
    description = (
        f"The total was {first['loss']:.2f} at step {first['step']} and {last['loss']:.2f} at step {last['step']}."
    )
    chart = line_chart("Training loss by step", description, series, axes, dots=len(log) < MARK_POINTS_BELOW)
    return render("loss.html", chart=chart, **values)


def _seconds(seconds: float) -> str:
    """A time in words, such as "9.9 s", "99 s" or "2 min 05 s"."""
    if seconds < 0.05:
        return "under 0.1 s"
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{int(seconds + 0.5) // 60} min {int(seconds + 0.5) % 60:02d} s"
