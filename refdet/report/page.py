"""The HTML report of a run, in one self-contained file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from markupsafe import escape

from refdet import store
from refdet.config.renamed_keys import LOSSES
from refdet.data.coco import ImageRecord
from refdet.detector.checkpoint import LARGEST_META
from refdet.errors import InputError
from refdet.evaluation.renamed_metrics import in_new_names
from refdet.files.atomic import atomic_write
from refdet.files.json_files import read_bytes
from refdet.files.short_text import counted
from refdet.files.small_files import strict_json
from refdet.files.version import __version__
from refdet.report import sections
from refdet.report.fields import check_metrics, count, field, rate, text
from refdet.report.figures import picture
from refdet.report.markup import Markup, html, joined
from refdet.report.recall import split_names
from refdet.report.samples import Scene, hardest, sample, scenes
from refdet.report.sections import Step
from refdet.structures.provenance import Provenance
from refdet.training.run_folder import LARGEST_LOG

__all__ = ["Inputs", "ReferPart", "Step", "write"]


@dataclass(frozen=True)
class ReferPart:
    """The store of regions of one REFER dataset, and the metrics.json of evaluate-on-refer."""

    features: Path
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """Inputs of a report.

    Attributes:
        run: run directory of the detector.
        refer_root: folder of the REFER data.
        images: folder or zip of the images of the stores.
        parts: the datasets of REFER.
        detection: output of ``refdet evaluate --json``; None to leave its section out.
        instances: instances file that the detector was trained on, to audit again; None for no audit.
        source: the instances file that `instances` was made from, also audited.
        steps: the commands that were run; empty to leave their section out.
        pictures: approximate number of images; a third as many of the worst ones are added.
    """

    run: Path
    refer_root: Path
    images: Path
    parts: Sequence[ReferPart]
    detection: Mapping[str, Any] | None = None
    instances: Path | None = None
    source: Path | None = None
    steps: Sequence[Step] = ()
    pictures: int = 12


def write(out: Path, inputs: Inputs, title: str = "refdet: regions for referring expressions") -> None:
    """Write the report to the file ``out``.

    Raises:
        InputError: ``out`` exists, or an input is missing or damaged.
        refer.ReferError: the refs cannot be read.
    """
    if out.exists():
        raise InputError(f"{out} exists; choose another `out` or remove it")
    page = render(inputs, title)
    with atomic_write(out) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))


def render(inputs: Inputs, title: str) -> str:
    """The HTML text of the report."""
    recipe_name, steps, provenance = _read_meta(inputs.run / "model.json")
    log = _read_log(inputs.run / "metrics.jsonl")
    metrics = [in_new_names(part.metrics) for part in inputs.parts]
    for part in metrics:
        check_metrics(part, "metrics of evaluate-on-refer")
    for kind, rates in (inputs.detection or {}).items():
        for name in sections.AP_NAMES if rates else ():
            rate(rates, name, f"metrics of evaluate, {kind}")
    audit, source_audit = _audits(inputs)
    if audit is not None and audit["image_ids_sha256"] != provenance.image_ids_sha256:
        raise InputError(f"{inputs.instances}: not the images that {inputs.run} was trained on; give that file")
    body: list[tuple[str, str, Markup]] = []  # id, heading, content
    if inputs.steps:
        body.append(("steps", "Steps", sections.steps_section(inputs.steps)))
    proof = sections.leak_section(provenance, audit, source_audit)
    body.append(("leak", "No leaks" if audit and audit["clean"] else "Training data", proof))
    if inputs.detection is not None:
        body.append(("detection", "Detection", sections.detection_section(inputs.detection)))
    if metrics:
        body.append(("refer", "Referring expressions", sections.refer_section(metrics)))
    heard = [part for part in metrics if any("comprehension" in values for values in part["splits"].values())]
    if heard:
        body.append(("listener", "Comprehension with a listener", sections.listener_section(heard)))
    if log:
        body.append(("loss", "Training loss", sections.loss_section(log)))
    if metrics:
        body.append(("pictures", "Example images", _pictures(inputs)))
    model = f"A Mask R-CNN ({recipe_name or 'custom'} recipe, {counted(steps, 'step')})"
    subtitle = f"{model} detects the objects of an image, each with a box, a mask and features, for models that "
    subtitle += "understand phrases such as “the small red star”."
    if audit and audit["clean"]:
        subtitle += " It has never seen the REFER images it is evaluated on."
    highlights = sections.tiles(_highlights(inputs.detection, metrics, audit))
    parts = (
        html(
            '<section aria-labelledby="{name}"><h2 id="{name}">{heading}</h2>\n{content}</section>',
            name=name,
            heading=heading,
            content=content,
        )
        for name, heading, content in body
    )
    values = {
        "title": title,
        "subtitle": subtitle,
        "links": joined(html('<a href="#{}">{}</a>', name, heading) for name, heading, _ in body),
        "body": highlights + joined(parts, "\n"),
        "footer": f"Generated by refdet {__version__}. Rates are from 0 to 1, as in metrics.json.",
    }
    # not `html`: the template's style sheet has braces
    return Template(_template()).substitute({name: escape(value) for name, value in values.items()})


def _template() -> str:
    return (resources.files("refdet.report") / "template.html").read_text(encoding="utf-8")


def _highlights(
    detection: Mapping[str, Any] | None, metrics: Sequence[Mapping[str, Any]], audit: Mapping[str, Any] | None
) -> list[tuple[str, str]]:
    found = []
    for kind, name in (("bbox", "box AP50"), ("segm", "mask AP50")):
        if detection is not None and detection.get(kind):
            found.append((sections.number(detection[kind]["AP50"]), f"{name} on the val images"))
    recalls = [values["referent_recall"]["0.5"] for part in metrics for values in part["splits"].values()]
    if recalls:
        lowest = f"lowest of {counted(len(recalls), 'split')}"
        found.append((sections.number(min(recalls)), f"referent recall at IoU 0.5, {lowest}"))
    answers = [part["splits"].get("val", {}).get("comprehension") for part in metrics]
    for boxes in filter(None, answers):
        guessing = sections.number(boxes["random_baseline@0.5"])
        right = sections.number(boxes["accuracy@0.5"])
        found.append((right, f"accuracy of a listener on val; random baseline {guessing}"))
    if audit is not None:
        leaked, held_out = len(audit["leaked_image_ids"]), audit["held_out_images"]
        found.append((str(leaked), f"of {counted(held_out, 'held-out image')} in the training file"))
    return found


def _audits(inputs: Inputs) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    from refdet.splits.leak_audit import audit

    paths = (inputs.instances, inputs.source if inputs.instances is not None else None)
    first, second = (None if path is None else audit(path, inputs.refer_root).to_json() for path in paths)
    return first, second


def _pictures(inputs: Inputs) -> Markup:
    from refdet.data.image_source import ImageSource  # brings torch

    every: list[Scene] = []
    for part in inputs.parts:
        about = part.metrics
        splits = split_names(about)
        every += scenes(part.features, inputs.refer_root, about["dataset"], about["split_by"], splits)
    with store.open(inputs.parts[0].features) as found:  # its boxes lie on the pixels as they were read for it
        exif = found.options.get("exif", "ignore")
    source = ImageSource.open(inputs.images, exif)
    source.locate([_record(scene) for scene in every])

    def gallery(chosen: Sequence[Scene]) -> Markup:
        figures = []
        for scene in chosen:
            figures.append(picture(scene, source.read(_record(scene))))
        return html('<div class="gallery">{}</div>', joined(figures))

    shown = sample(every, inputs.pictures)
    worst = hardest(every, inputs.pictures // 3)
    text = html(
        """<p>Colored regions are referred to by the sentence with the same number. Gray ones are other confident
detections, with category and score. A dashed box marks a missed object: no region has an IoU of 0.5 or more. The
images are evenly spaced through their splits, not selected by result.</p>
{}""",
        gallery(shown),
    )
    if worst:
        missed = sum(
            not one.found for scene in {s.regions.image_id: s for s in every}.values() for one in scene.referred
        )
        text += html(
            """<h3>Failure cases</h3>
<p>The images with the worst missed objects, worst first (missed objects in total: {}). They show what to
improve: objects that are too small, too occluded or too similar.</p>
{}""",
            missed,
            gallery(worst),
        )
    return text


def _record(scene: Scene) -> ImageRecord:
    of = scene.regions
    return ImageRecord(id=of.image_id, file_name=of.file_name, height=of.height, width=of.width)


def _read_meta(path: Path) -> tuple[str, int, Provenance]:
    """Name of the recipe, steps and provenance of a ``model.json``."""
    if not path.exists():
        raise InputError(f"{path}: not there; give a run directory that refdet train wrote")
    data = read_bytes(path, LARGEST_META)
    try:
        tree = strict_json(data)
    except InputError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    recipe = field(tree, "recipe", str(path))
    name = text(recipe, "name", f"{path}, recipe")
    try:
        provenance = Provenance.from_json(field(tree, "provenance", str(path)))
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    return name, count(tree, "step", str(path)), provenance


def _read_log(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl; empty without a log, as after an import.

    A truncated last line of a killed run is left out.
    """
    if not path.exists():
        return []
    lines = read_bytes(path, LARGEST_LOG).split(b"\n")
    log = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = strict_json(line)
        except InputError as error:
            if number == len(lines):  # cut when the run was killed
                break
            raise InputError(f"{path}: line {number} is not JSON ({error})") from None
        if isinstance(row, dict):
            row |= {name: row[old] for name, old in LOSSES.items() if old in row and name not in row}
        for name in ("step", "loss", *(key for key, _ in sections.LOSSES if isinstance(row, dict) and key in row)):
            if rate(row, name, where) is None:
                raise InputError(f"{where}: {name!r} is no number")
        log.append(row)
    return log
