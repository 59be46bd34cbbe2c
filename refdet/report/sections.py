"""The sections of the report, each a function from values to HTML. No files, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refdet.files.short_text import counted
from refdet.report.charts import Axes, Series, legend, line_chart
from refdet.report.markup import Markup, html, joined
from refdet.report.recall import recall_axes, recall_series, split_names
from refdet.structures.provenance import Provenance

AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
THRESHOLDS = ("0.5", "0.6", "0.7", "0.8", "0.9")
# The losses in metrics.jsonl, and their labels in the chart.
LOSSES = (
    ("loss", "total"),
    ("loss_classifier", "class: which category is it?"),
    ("loss_box_reg", "box: where exactly?"),
    ("loss_mask", "mask: which pixels?"),
    ("loss_objectness", "proposals: is anything here?"),
    ("loss_rpn_box_reg", "proposals: roughly where?"),
)

IOU_FIGURE = Markup("""<svg class="iou" viewBox="0 0 480 118" role="img"
 aria-label="Three pairs of boxes with IoU 0.5, 0.7 and 0.9">
<g fill="none">
<rect class="truth" x="12" y="4" width="84" height="84"/><rect class="region" x="40" y="4" width="84" height="84"/>
<rect class="truth" x="182" y="4" width="84" height="84"/><rect class="region" x="197" y="4" width="84" height="84"/>
<rect class="truth" x="346" y="4" width="84" height="84"/><rect class="region" x="350.4" y="4" width="84" height="84"/>
</g>
<g fill="currentColor" font-size="14" text-anchor="middle">
<text x="68" y="109">IoU 0.5</text><text x="231" y="109">IoU 0.7</text><text x="390" y="109">IoU 0.9</text>
</g></svg>""")


@dataclass(frozen=True)
class Step:
    """One command that was run.

    Attributes:
        name: "build-split".
        about: its purpose in one sentence.
        commands: the command lines.
        seconds: their total time.
    """

    name: str
    about: str
    commands: tuple[str, ...]
    seconds: float


def number(value: Any) -> str:
    """A human-readable rate; a dash if undefined (None, or COCO's -1)."""
    return "–" if value is None or value < 0 else f"{value:.3f}"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], groups: Markup | None = None) -> Markup:
    """A table whose first column names the rows. ``groups``: a row above the header."""
    first, *others = header
    names = html('<th class="text" scope="col">{}</th>', first)
    names += joined(html('<th scope="col">{}</th>', name) for name in others)
    body = joined(
        (
            html('<tr><th scope="row">{}</th>{}</tr>', row[0], joined(html("<td>{}</td>", cell) for cell in row[1:]))
            for row in rows
        ),
        "\n",
    )
    return html(
        '<p class="soft small">{caption}</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
        "<thead>{groups}<tr>{names}</tr></thead>\n<tbody>{body}</tbody></table></div>",
        caption=caption,
        groups=groups or "",
        names=names,
        body=body,
    )


def tiles(values: Sequence[tuple[str, str]]) -> Markup:
    """Tiles of key figures: (value, description)."""
    cells = (html('<div class="tile"><b>{}</b><span>{}</span></div>', value, what) for value, what in values)
    return html('<div class="tiles">{}</div>', joined(cells))


def steps_section(steps: Sequence[Step]) -> Markup:
    """The commands in order, with bars of their time."""
    longest = max((step.seconds for step in steps), default=0.0) or 1.0
    items = joined(
        (
            html(
                '<li><h3>{}. {} <span>{}</span></h3><div class="share" style="width:{:.1f}%"></div><p>{}</p>{}</li>',
                i,
                step.name,
                _seconds(step.seconds),
                100 * step.seconds / longest,
                step.about,
                joined(html("<pre><code>{}</code></pre>", command) for command in step.commands),
            )
            for i, step in enumerate(steps, 1)
        ),
        "\n",
    )
    return html(
        """<p>These commands were run in this order, {} in total; the bars compare their times. To run them on your
own images, change the paths.</p>
<ol class="steps">{}</ol>""",
        _seconds(sum(step.seconds for step in steps)),
        items,
    )


def leak_section(
    provenance: Provenance, audit: Mapping[str, Any] | None, source_audit: Mapping[str, Any] | None
) -> Markup:
    """The training data of the detector, and the audit for REFER's val and test images.

    Args:
        provenance: of the detector.
        audit: `refdet.splits.leak_audit.AuditResult` as JSON, of the training file.
        source_audit: the same of the file that the training file was made from.
    """
    parts = [
        Markup(
            "<p>All images of RefCOCO, RefCOCO+ and RefCOCOg are in COCO train2014, so a detector trained on all "
            "of it has already seen the objects of the val and test images: its regions there are better than on "
            "new images. This is a <em>leak</em>. <code>build-split</code> removes those images and "
            "their annotations before training; <code>audit</code> verifies it.</p>"
        )
    ]
    if audit is not None:
        parts.append(_verdict(audit, source_audit))
        header, rows = ["held-out split", "images"], []
        if source_audit is not None:
            header.append("in the original file")
        header.append("in the training file")
        for name, leak in audit["splits"].items():
            before = [] if source_audit is None else [str(source_audit["splits"][name]["leaked"])]
            rows.append([name, str(leak["images"]), *before, str(leak["leaked"])])
        caption = "Images of each held-out split in the file; splits share images, so the sum is larger"
        parts.append(table(caption, header, rows))
    parts.append(
        html(
            '<p class="small hash"><b>Provenance of the detector.</b> Trained on {images} with {annotations} '
            "of <code>{source}</code>, started from {weights}.{note} SHA-256 of the source file "
            "<code>{source_sha256}</code>, of the image ids <code>{image_ids_sha256}</code>. "
            "The same record is in the split, the checkpoint, the feature files and the metrics.</p>",
            images=counted(provenance.images, "image"),
            annotations=counted(provenance.annotations, "annotation"),
            source=provenance.source,
            weights=provenance.weights or "random weights",
            note=html(" <b>{}</b>.", provenance.note) if provenance.note else "",
            source_sha256=provenance.source_sha256,
            image_ids_sha256=provenance.image_ids_sha256,
        )
    )
    return joined(parts, "\n")


def _verdict(audit: Mapping[str, Any], source_audit: Mapping[str, Any] | None) -> Markup:
    leaked, held_out = len(audit["leaked_image_ids"]), counted(audit["held_out_images"], "held-out image")
    if leaked:
        text = html('<b class="bad">Leak: {} of {} in the training file.</b>', leaked, held_out)
    else:
        text = html('<b class="good">Clean: 0 of {} in the training file.</b>', held_out)
    if source_audit is not None:
        before, after = source_audit["images"], audit["images"]
        there = len(source_audit["leaked_image_ids"])
        text += f" The original file had {counted(before, 'image')}, {there} of them held out; {after} remain."
    return html("<p>{}</p>", text)


def detection_section(detection: Mapping[str, Any]) -> Markup:
    """COCO AP of boxes and masks."""
    kinds = (("bbox", "boxes"), ("segm", "masks"))
    rows = [[name, *(number(detection[k][ap]) for ap in AP_NAMES)] for k, name in kinds if detection.get(k)]
    caption = "COCO average precision on the val images; a dash means no object of that size"
    return html(
        """<p><b>AP</b>, average precision, summarizes how many objects are found and how many detections are correct,
from 0 to 1. A detection is correct if its category is and it overlaps the object enough: <b>IoU</b>, intersection over
union, must reach a threshold. AP50 uses 0.5, AP75 uses 0.75; AP is the mean over thresholds from 0.5 to 0.95. APs, APm
and APl are AP of small, medium and large objects (under 32², under 96² and over 96² pixels).</p>
{figure}
{numbers}""",
        figure=IOU_FIGURE,
        numbers=table(caption, ["", *AP_NAMES], rows),
    )


def refer_section(metrics: Sequence[Mapping[str, Any]]) -> Markup:
    """Metrics of each split of each dataset, and recall by IoU threshold and number of regions."""
    rows = []
    for part in metrics:
        for split in split_names(part):
            values = part["splits"][split]
            box, mask = values["detection"]["bbox"], values["detection"]["segm"]
            recall = values["referent_recall"]
            rows.append(
                [f"{part['dataset']} {part['split_by']} {split}"]
                + [str(values[name]) for name in ("images", "refs", "sentences")]
                + [number(box["AP50"]), number(mask["AP50"] if mask else None)]
                + [number(recall[name]) for name in (*THRESHOLDS, "mean_best_iou")]
            )
    groups = Markup(
        '<tr class="groups"><td></td><th colspan="3" scope="colgroup">count</th>'
        '<th colspan="2" scope="colgroup">AP50</th>'
        '<th colspan="5" scope="colgroup">referent recall at IoU</th><th></th></tr>'
    )
    header = ["split", "images", "refs", "sentences", "box", "mask", *THRESHOLDS, "mean best IoU"]
    return html(
        """<p>A <b>ref</b> is one referred object, usually with several <b>sentences</b>.
<b>Referent recall</b> is the share of refs whose object has a region of at least the given IoU. It is the upper bound
of every model that picks one of these regions: what has no region cannot be picked.</p>
{numbers}
<h3>Recall by IoU threshold</h3>
<p class="soft small">Left: rough boxes count. Right: only near-perfect ones do. Where the lines drop, boxes are found
but not tight.</p>
{by_iou}
<h3>Recall by number of regions</h3>
<p class="soft small">How many of the top-scoring regions of an image a model needs, at IoU 0.5.</p>
{by_regions}""",
        numbers=table("Regions on the images of each split", header, rows, groups),
        by_iou=_recall_charts(metrics),
        by_regions=_kept_charts(metrics),
    )


def listener_section(metrics: Sequence[Mapping[str, Any]]) -> Markup:
    """Comprehension accuracy of a model. ``metrics``: those that have predictions."""
    rows = []
    for part in metrics:
        for split in split_names(part):
            values = part["splits"][split]
            boxes, masks = values["comprehension"], values["segmentation"]
            rows.append(
                [f"{part['dataset']} {part['split_by']} {split}", str(values["sentences"])]
                + [number(boxes["random_baseline@0.5"]), number(boxes["accuracy@0.5"])]
                + [number(values["referent_recall"]["0.5"]), number(masks["overall_iou"] if masks else None)]
            )
    header = ["split", "sentences", "random baseline", "accuracy", "referent recall", "overall mask IoU"]
    return html(
        """<p>A <b>listener</b> reads a sentence and picks one of the regions of the image. It does not see the image:
it is a small model of words and stored features, trained on sentences about the train images. An answer is correct if
its region has an IoU of 0.5 or more with the object; the <b>random baseline</b> picks a region at random. If the
features said nothing about the objects, the two would be equal.</p>
{answers}""",
        answers=table("Answers to the sentences of each split", header, rows),
    )


def _kept_charts(metrics: Sequence[Mapping[str, Any]]) -> Markup:
    """Recall by number of regions, one chart per dataset."""
    charts = []
    for part in metrics:
        series, axes = recall_series(part), recall_axes(part, width=340, height=250)
        title = f"{part['dataset']} {part['split_by']}"
        told = "; ".join(f"{s.name} from {s.points[0][1]:.2f} to {s.points[-1][1]:.2f}" for s in series)
        svg = line_chart(f"Referent recall of {title} by number of regions", told, series, axes, dots=True)
        charts.append(_panel(title, legend(series), svg))
    return html('<div class="panels">{}</div>', joined(charts))


def _recall_charts(metrics: Sequence[Mapping[str, Any]]) -> Markup:
    names = list(dict.fromkeys(split for part in metrics for split in split_names(part)))
    style = {name: 1 + i % 5 for i, name in enumerate(names)}
    x_ticks = [float(t) for t in THRESHOLDS]
    axes = Axes("IoU threshold", "referent recall", x_ticks, (0.0, 1.0), width=340, height=250)
    charts = []
    for part in metrics:
        splits = part["splits"]
        series = [
            Series(name, [(float(t), splits[name]["referent_recall"][t]) for t in THRESHOLDS], style[name])
            for name in split_names(part)
        ]
        title = f"{part['dataset']} {part['split_by']}"
        told = "; ".join(f"{s.name} from {s.points[0][1]:.2f} to {s.points[-1][1]:.2f}" for s in series)
        svg = line_chart(f"Referent recall of {title} by IoU", told, series, axes, dots=True)
        charts.append(_panel(title, legend(series), svg))
    return html('<div class="panels">{}</div>', joined(charts))


def _panel(title: str, names: Markup, chart: Markup) -> Markup:
    figure = '<figure class="chart"><figcaption><b>{}</b></figcaption>{}{}</figure>'
    return html(figure, title, names, chart)


def loss_section(log: Sequence[Mapping[str, float]]) -> Markup:
    """The loss curve. ``log``: the rows of metrics.jsonl."""
    series = [
        Series(name, [(line["step"], line[key]) for line in log if key in line], style)
        for style, (key, name) in enumerate(LOSSES)
        if any(key in line for line in log)
    ]
    axes = Axes("training step", "loss (log scale)", log_y=True)
    first, last = log[0], log[-1]
    told = f"The total was {first['loss']:.2f} at step {first['step']} and {last['loss']:.2f} at step {last['step']}."
    return html(
        """<p>The <b>loss</b> measures the network's error on the training images; training lowers it step by step.
The total is the sum of its terms, one for each question the network learns to answer. {told} The logarithmic scale
keeps small terms visible.</p>
<figure class="chart">{chart}{names}</figure>""",
        told=told,
        chart=line_chart("Training loss by step", told, series, axes),
        names=legend(series),
    )


def _seconds(seconds: float) -> str:
    if seconds < 0.05:
        return "under 0.1 s"
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{int(seconds + 0.5) // 60} min {int(seconds + 0.5) % 60:02d} s"
