"""The HTML report of a run, a store and a model's answers, in one self-contained file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from refdet.data.coco import CocoIndex
from refdet.detector.checkpoint import was_validated
from refdet.errors import InputError
from refdet.evaluation.average_precision import ap_by_category
from refdet.evaluation.detection_errors import detection_errors
from refdet.evaluation.store_check import check_images, read_regions, warn_about_categories
from refdet.files.atomic import atomic_create
from refdet.files.short_text import format_count
from refdet.files.version import __version__
from refdet.report import sections
from refdet.report.fields import optional_number
from refdet.report.inputs import ReportInputs, RunMetadata, read_log, read_meta
from refdet.report.pictures import Pictures, all_scenes, pictures_section, wrong_answers
from refdet.report.refer_parts import OpenPart, open_part
from refdet.report.samples import sample_evenly
from refdet.report.stores import stores_section
from refdet.report.templates import Markup, number, render
from refdet.report.validations import read_validations
from refdet.splits.detector_audit import why_unproven
from refdet.splits.leak_audit import AuditResult, audit
from refdet.structures.provenance import Provenance
from refdet.structures.regions import Regions

log = logging.getLogger(__name__)

# Images whose regions are compared with annotations; with 100 regions each, this takes 1 GB of memory.
MAX_EVALUATED_IMAGES = 3000
TITLE = "refdet: regions for referring expressions"


def write(out: Path, inputs: ReportInputs, title: str = TITLE) -> None:
    """Write the report to the file ``out``.

    Raises:
        InputError: ``out`` exists, there is no input, or an input is missing or damaged.
        refer.ReferError: the refs cannot be read.
    """
    if os.path.lexists(out):
        raise InputError(f"{out} exists; choose another `out` or remove it")
    page = render_page(inputs, title)
    with atomic_create(out) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))


def render_page(inputs: ReportInputs, title: str) -> str:
    """The HTML text of the report."""
    with ExitStack() as stack:
        parts = [open_part(stack, part, inputs.refer_root) for part in inputs.parts]
        return _render(inputs, parts, title)


class _Section(NamedTuple):
    """A section of the page.

    Attributes:
        id: anchor of the section.
        heading: the heading.
        content: the HTML below the heading.
    """

    id: str
    heading: str
    content: Markup


def _render(inputs: ReportInputs, parts: Sequence[OpenPart], title: str) -> str:
    """The HTML text of the report, whose stores are open."""
    meta = None if inputs.run is None else read_meta(inputs.run / "model.json")
    metrics = [part.metrics for part in parts if part.metrics is not None]
    for kind, rates in (inputs.detection or {}).items():
        for name in sections.AP_NAMES if rates else ():
            optional_number(rates, name, f"metrics of evaluate, {kind}")
    proof, original_audit = _audits(inputs)
    page_sections: list[_Section] = []
    is_proven = False
    if inputs.steps:
        page_sections.append(_Section("steps", "Steps", sections.steps_section(inputs.steps)))
    if meta is not None and inputs.run is not None:
        provenance = meta.provenance
        if proof is not None and proof.image_ids_sha256 != provenance.image_ids_sha256:
            raise InputError(f"{inputs.trained_on}: not the images that {inputs.run} was trained on; give that file")
        was_run_validated = was_validated(inputs.run)
        # the images of a validation that may have selected the weights are not audited here
        may_be_selected = was_run_validated if provenance.selection is None else provenance.selection.by_validation
        unproven = [] if proof is None else why_unproven(provenance, proof, str(inputs.run), inputs.trained_on)
        is_proven = proof is not None and not proof.leaked and not unproven and not may_be_selected
        others = _of_other_detectors(parts, provenance)
        content = sections.leak_section(provenance, proof, original_audit, was_run_validated, unproven, others)
        page_sections.append(_Section("leak", "No leaks" if is_proven else "Training data", content))
        is_proven = is_proven and not others
        page_sections += _training_sections(inputs.run / "metrics.jsonl")
    if inputs.detection is not None:
        page_sections.append(_Section("detection", "Detection", sections.detection_section(inputs.detection)))
    page_sections += _region_sections(inputs, parts, metrics)
    if not page_sections:
        raise InputError("nothing to report: give a run directory, a store or metrics")
    is_unseen = is_proven and _evaluated_splits(metrics) <= {split.name for split in (proof.splits if proof else ())}
    return render(
        "page.html",
        title=title,
        subtitle=_subtitle(meta, is_unseen),
        highlights=_highlights(inputs.detection, metrics, proof),
        sections=page_sections,
        version=__version__,
    )


def _of_other_detectors(parts: Sequence[OpenPart], provenance: Provenance) -> list[str]:
    """Names of the stores and metrics whose provenance is not that of the run; logs a note about them."""
    others = []
    for part in parts:
        sources = [(part.store.path.name, part.store.provenance)] if part.store is not None else []
        if part.metrics is not None and "provenance" in part.metrics:
            sources.append((f"the metrics of {part.dataset}", part.metrics["provenance"]))
        others += [name for name, tree in sources if not _is_same_detector(tree, provenance)]
    if others:
        log.warning("note: report: not of the run's detector, as the provenance differs: %s", ", ".join(others))
    return others


def _is_same_detector(tree: Any, provenance: Provenance) -> bool:
    """Whether the provenance of a store or of metrics is that of a run.

    The weights may be selected otherwise than the run's, but not by a validation, whose images may be held out.
    """
    try:
        other = Provenance.from_json(tree)
    except InputError:
        return False
    if replace(other, selection=None) != replace(provenance, selection=None):
        return False
    return other.selection == provenance.selection or (
        other.selection is not None and not other.selection.by_validation
    )


def _training_sections(log_file: Path) -> list[_Section]:
    """The section with the curves of the loss and of the validation AP; none if nothing was logged."""
    rows = read_log(log_file)
    validations, on_other_data = read_validations(log_file)
    if not rows and not validations:
        return []
    return [_Section("loss", "Training", sections.loss_section(rows, validations, on_other_data))]


def _region_sections(
    inputs: ReportInputs, parts: Sequence[OpenPart], metrics: Sequence[Mapping[str, Any]]
) -> list[_Section]:
    """The sections about the regions of the stores and the answers of a model."""
    page_sections: list[_Section] = []
    stores = [part.store for part in parts if part.store is not None]
    if stores:
        page_sections.append(_Section("stores", "Regions", stores_section(stores)))
    errors = _errors_section(inputs, parts)
    if errors is not None:
        page_sections.append(_Section("errors", "Where the detector errs", errors))
    if metrics:
        page_sections.append(_Section("refer", "Referring expressions", sections.refer_section(metrics)))
    scenes = all_scenes(parts, inputs.pictures)
    referents = [referent for scene in scenes for referent in scene.referents]
    if referents:
        n_stores = sum(part.has_scenes for part in parts)
        n_refs = sum(part.count_refs() for part in parts if part.has_scenes)
        content = sections.ceiling_section(referents, n_stores, n_refs - len(referents))
        page_sections.append(_Section("ceiling", "What no region covers", content))
    pictures = None if inputs.images is None or not stores else Pictures(inputs.images, scenes)
    wrong = wrong_answers(parts, pictures, inputs.pictures)
    answered = _with_group(metrics, "comprehension")
    if answered:
        content = sections.listener_section(answered, **wrong)
        page_sections.append(_Section("listener", "Comprehension with a listener", content))
    generalized = _with_group(metrics, "generalized")
    if generalized:
        content = sections.generalized_section(generalized)
        page_sections.append(_Section("generalized", "Answers to gRefCOCO", content))
    if pictures is not None:
        content = pictures_section(scenes, pictures, inputs.pictures)
        page_sections.append(_Section("pictures", "Example images", content))
    return page_sections


def _with_group(metrics: Sequence[Mapping[str, Any]], group: str) -> list[Mapping[str, Any]]:
    """The metrics in which at least one split has a group, such as "comprehension"."""
    return [entry for entry in metrics if any(group in values for values in entry["splits"].values())]


def _errors_section(inputs: ReportInputs, parts: Sequence[OpenPart]) -> Markup | None:
    """The section about the errors of the first store of detections.

    None if there is no such store, or no instances file with the objects of its images.
    """
    part = next((part for part in parts if part.store is not None and not part.store.has_ann_ids), None)
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
    n_annotated = len(ids)
    ids = sample_evenly(ids, MAX_EVALUATED_IMAGES)
    detections: list[dict[str, Any]] = []  # COCO results, collected while `detection_errors` reads the regions

    def read_all() -> Iterator[Regions]:
        for image_id in ids:
            regions = read_regions(store, image_id)
            detections.extend(replace(regions, masks=None).to_coco())
            yield regions

    errors = detection_errors(index, read_all())
    ap = ap_by_category(index, ids, detections, "bbox")
    return sections.errors_section(errors, ap, {**store.names, **index.categories}, path.name, n_annotated)


def _evaluated_splits(metrics: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of the splits that metrics are of, such as "refcoco/unc/val"."""
    return {f"{entry['dataset']}/{entry['split_by']}/{split}" for entry in metrics for split in entry["splits"]}


def _subtitle(meta: RunMetadata | None, is_unseen: bool) -> str:
    """What was detected by what; ``is_unseen`` is whether the detector provably has not seen the evaluated images."""
    if meta is None:
        return "Regions of images, each with a box, a category and a score, for models that understand phrases."
    model = f"A Mask R-CNN ({meta.recipe_name or 'custom'} recipe, {format_count(meta.step, 'step')})"
    subtitle = (
        f"{model} detects the objects of an image, each with a box, a mask and features, for models that understand "
        "phrases such as “the small red star”."
    )
    return f"{subtitle} It has never seen the REFER images it is evaluated on." if is_unseen else subtitle


def _highlights(
    detection: Mapping[str, Any] | None, metrics: Sequence[Mapping[str, Any]], proof: AuditResult | None
) -> list[tuple[str, str]]:
    """The (number, description) pairs at the top of the page."""
    highlights = []
    for kind, name in (("bbox", "box AP50"), ("segm", "mask AP50")):
        if detection is not None and detection.get(kind):
            highlights.append((number(detection[kind]["AP50"]), f"{name}, from refdet evaluate"))
    recalls = [values["referent_recall"]["0.5"] for entry in metrics for values in entry["splits"].values()]
    if recalls:
        lowest = f"lowest of {format_count(len(recalls), 'split')}"
        highlights.append((number(min(recalls)), f"referent recall at IoU 0.5, {lowest}"))
    for entry in metrics:
        accuracies = entry["splits"].get("val", {}).get("comprehension")
        if accuracies:
            baseline = number(accuracies["random_baseline@0.5"])
            text = f"accuracy of a listener on {entry['dataset']} val; random baseline {baseline}"
            highlights.append((number(accuracies["accuracy@0.5"]), text))
    if proof is not None:
        held_out = format_count(proof.held_out_images, "held-out image")
        unknown = f"; {format_count(proof.unidentified, 'image')} of this file unknown" if proof.unidentified else ""
        highlights.append((str(len(proof.leaked)), f"of {held_out} in the training file{unknown}"))
    return highlights


def _audits(inputs: ReportInputs) -> tuple[AuditResult | None, AuditResult | None]:
    """Audits of the training file and of the original file that it was built from; None for a file not given."""
    if inputs.trained_on is None:
        return None, None
    if inputs.refer_root is None:
        raise InputError("`trained_on` needs `refer_root`, whose val and test images it must not have")
    original = inputs.original_instances
    return audit(inputs.trained_on, inputs.refer_root), None if original is None else audit(original, inputs.refer_root)
