"""The HTML report of a run, a store and a model's answers, in one self-contained file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from refdet.data.coco import CocoIndex
from refdet.detector.checkpoint import was_validated
from refdet.errors import InputError
from refdet.evaluation.average_precision import ap_by_category
from refdet.evaluation.detection_errors import detection_errors
from refdet.evaluation.store_check import check_images, read_regions, warn_about_categories
from refdet.files.atomic import atomic_write
from refdet.files.short_text import format_count
from refdet.files.version import __version__
from refdet.report import sections
from refdet.report.fields import optional_number
from refdet.report.inputs import ReportInputs, read_log, read_meta
from refdet.report.pictures import Pictures, all_scenes, pictures_section, wrong_answers
from refdet.report.refer_parts import OpenPart, open_part
from refdet.report.samples import sample_evenly
from refdet.report.stores import stores_section
from refdet.report.templates import Markup, number, render
from refdet.report.validations import read_validations
from refdet.splits.detector_audit import why_unproven
from refdet.splits.leak_audit import AuditResult, audit

MAX_EVALUATED_IMAGES = 3000  # images whose regions are compared with annotations; 100 regions each take 1 GB
TITLE = "refdet: regions for referring expressions"


def write(out: Path, inputs: ReportInputs, title: str = TITLE) -> None:
    """Write the report to the file ``out``.

    Raises:
        InputError: ``out`` exists, there is no input, or one is missing or damaged.
        refer.ReferError: the refs cannot be read.
    """
    if out.exists():
        raise InputError(f"{out} exists; choose another `out` or remove it")
    page = render_page(inputs, title)
    with atomic_write(out) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))


def render_page(inputs: ReportInputs, title: str) -> str:
    """The HTML text of the report."""
    with ExitStack() as stack:
        parts = [open_part(stack, part, inputs.refer_root) for part in inputs.parts]
        return _render(inputs, parts, title)


def _render(inputs: ReportInputs, parts: Sequence[OpenPart], title: str) -> str:
    recipe_name, steps, provenance = ("", 0, None) if inputs.run is None else read_meta(inputs.run / "model.json")
    metrics = [part.metrics for part in parts if part.metrics is not None]
    for kind, rates in (inputs.detection or {}).items():
        for name in sections.AP_NAMES if rates else ():
            optional_number(rates, name, f"metrics of evaluate, {kind}")
    proof, original_audit = _audits(inputs)
    if proof is not None and provenance is not None and proof.image_ids_sha256 != provenance.image_ids_sha256:
        raise InputError(f"{inputs.trained_on}: not the images that {inputs.run} was trained on; give that file")
    proven = False
    body: list[tuple[str, str, Markup]] = []  # id, heading, content

    def add(name: str, heading: str, content: Markup) -> None:
        body.append((name, heading, content))

    if inputs.steps:
        add("steps", "Steps", sections.steps_section(inputs.steps))
    if provenance is not None:
        assert inputs.run is not None
        validated = was_validated(inputs.run)
        # images that may have chosen the weights are not audited here
        chosen = validated if provenance.selection is None else provenance.selection.by_validation
        unproven = [] if proof is None else why_unproven(provenance, proof, str(inputs.run), inputs.trained_on)
        proven = proof is not None and not proof.leaked and not unproven and not chosen
        content = sections.leak_section(provenance, proof, original_audit, validated, unproven)
        add("leak", "No leaks" if proven else "Training data", content)
    if inputs.run is not None:
        log = read_log(inputs.run / "metrics.jsonl")
        validations, on_other_data = read_validations(inputs.run / "metrics.jsonl")
        if log or validations:
            add("loss", "Training", sections.loss_section(log, validations, on_other_data))
    if inputs.detection is not None:
        add("detection", "Detection", sections.detection_section(inputs.detection))
    _add_regions(inputs, parts, metrics, add)
    if not body:
        raise InputError("nothing to report: give a run directory, a store or metrics")
    unseen = proven and _evaluated_on(metrics) <= {split.name for split in (proof.splits if proof else ())}
    subtitle = _subtitle(recipe_name, steps, inputs.run is not None, unseen)
    return render(
        "page.html",
        title=title,
        subtitle=subtitle,
        highlights=_highlights(inputs.detection, metrics, proof),
        sections=[{"id": name, "heading": heading, "content": content} for name, heading, content in body],
        version=__version__,
    )


def _add_regions(
    inputs: ReportInputs, parts: Sequence[OpenPart], metrics: Sequence[Mapping[str, Any]], add: Any
) -> None:
    """The sections about the regions and the answers."""
    stores = [part.store for part in parts if part.store is not None]
    if stores:
        add("stores", "Regions", stores_section(stores))
    errors = _errors(inputs, parts)
    if errors is not None:
        add("errors", "Where the detector errs", errors)
    if metrics:
        add("refer", "Referring expressions", sections.refer_section(metrics))
    scenes = all_scenes(parts, inputs.pictures)
    referred = [obj for scene in scenes for obj in scene.referents]
    if referred:
        add("ceiling", "What no region covers", sections.ceiling_section(referred))
    pictures = None
    if inputs.images is not None and stores:
        pictures = Pictures(inputs.images, stores[0].options.get("exif", "ignore"), scenes)
    wrong = wrong_answers(parts, pictures, inputs.pictures)
    answered = [part for part in metrics if any("comprehension" in values for values in part["splits"].values())]
    if answered:
        add("listener", "Comprehension with a listener", sections.listener_section(answered, **wrong))
    generalized = [part for part in metrics if any("generalized" in values for values in part["splits"].values())]
    if generalized:
        add("generalized", "Answers to gRefCOCO", sections.generalized_section(generalized))
    if pictures is not None:
        add("pictures", "Example images", pictures_section(scenes, pictures, inputs.pictures))


def _errors(inputs: ReportInputs, parts: Sequence[OpenPart]) -> Markup | None:
    """The section about the errors of the first store of detections; None without annotations of its images."""
    part = next(
        (candidate for candidate in parts if candidate.store is not None and not candidate.store.has_ann_ids), None
    )
    if part is None or part.store is None:
        return None
    path = inputs.instances
    if path is None and part.refer is not None and inputs.refer_root is not None:
        path = inputs.refer_root / part.dataset.partition("/")[0] / "instances.json"
    if path is None:
        return None
    store, index = part.store, CocoIndex.load(path)
    ids = [image_id for image_id in store if image_id in index.images and image_id not in store.errors]
    if not ids:
        raise InputError(f"{path}: has none of the images of {store.path}; give the file that lists them")
    fix = "give the file that they were extracted for as `instances`"
    check_images(store, ids, index.images, str(path), "the report", fix)
    warn_about_categories(store, index.categories, str(path))
    annotated = len(ids)
    ids = sample_evenly(ids, MAX_EVALUATED_IMAGES)
    results: list[dict[str, Any]] = []

    def images() -> Any:
        for image_id in ids:
            regions = read_regions(store, image_id)
            results.extend(replace(regions, masks=None).to_coco())
            yield regions

    errors = detection_errors(index, images())
    rates = ap_by_category(index, ids, results, "bbox")
    return sections.errors_section(errors, rates, {**store.names, **index.categories}, path.name, of_images=annotated)


def _evaluated_on(metrics: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of the splits that metrics are of, such as "refcoco/unc/val"."""
    return {f"{part['dataset']}/{part['split_by']}/{split}" for part in metrics for split in part["splits"]}


def _subtitle(recipe: str, steps: int, run: bool, unseen: bool) -> str:
    if not run:
        return "Regions of images, each with a box, a category and a score, for models that understand phrases."
    model = f"A Mask R-CNN ({recipe or 'custom'} recipe, {format_count(steps, 'step')})"
    subtitle = f"{model} detects the objects of an image, each with a box, a mask and features, for models that "
    subtitle += "understand phrases such as “the small red star”."
    return subtitle + " It has never seen the REFER images it is evaluated on." * unseen


def _highlights(
    detection: Mapping[str, Any] | None, metrics: Sequence[Mapping[str, Any]], proof: AuditResult | None
) -> list[tuple[str, str]]:
    highlights = []
    for kind, name in (("bbox", "box AP50"), ("segm", "mask AP50")):
        if detection is not None and detection.get(kind):
            highlights.append((number(detection[kind]["AP50"]), f"{name} on the val images"))
    recalls = [values["referent_recall"]["0.5"] for part in metrics for values in part["splits"].values()]
    if recalls:
        lowest = f"lowest of {format_count(len(recalls), 'split')}"
        highlights.append((number(min(recalls)), f"referent recall at IoU 0.5, {lowest}"))
    answers = [part["splits"].get("val", {}).get("comprehension") for part in metrics]
    for boxes in filter(None, answers):
        guessing = number(boxes["random_baseline@0.5"])
        highlights.append((number(boxes["accuracy@0.5"]), f"accuracy of a listener on val; random baseline {guessing}"))
    if proof is not None:
        held_out = format_count(proof.held_out_images, "held-out image")
        unknown = f"; {format_count(proof.unidentified, 'image')} of it unknown" if proof.unidentified else ""
        highlights.append((str(len(proof.leaked)), f"of {held_out} in the training file{unknown}"))
    return highlights


def _audits(inputs: ReportInputs) -> tuple[AuditResult | None, AuditResult | None]:
    """Audits of the training file, and of the original file that build-split made it from."""
    if inputs.trained_on is None:
        return None, None
    if inputs.refer_root is None:
        raise InputError("`trained_on` needs `refer_root`, whose val and test images it must not have")
    paths = (inputs.trained_on, inputs.original_instances)
    first, second = (None if path is None else audit(path, inputs.refer_root) for path in paths)
    return first, second
