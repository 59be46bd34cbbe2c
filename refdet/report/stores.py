"""The section about the contents of the stores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refdet.errors import InputError
from refdet.report.charts import Axes, Chart, bar_chart
from refdet.report.templates import Markup, render
from refdet.store import Store
from refdet.structures.provenance import Provenance

MAX_FAILED_IMAGES = 20  # rows of the table of unusable images
MAX_CHARTED_STORES = 3  # stores whose histograms are drawn
BINS = 20  # of a histogram


def stores_section(stores: Sequence[Store]) -> Markup:
    """The contents of each store, and the images that could not be used."""
    failed = [
        [image_id, str(name), str(error)]
        for store in stores
        for image_id, name, error in zip(store.image_ids, store.file_names, store.image_errors, strict=True)
        if error
    ]
    rows = [_row(store) for store in stores]
    charts = [chart for store in stores[:MAX_CHARTED_STORES] for chart in _charts(store)]
    listed, n_more = failed[:MAX_FAILED_IMAGES], len(failed) - MAX_FAILED_IMAGES
    if n_more > 0:
        listed.append(["...", f"and {n_more} more", "see /images/error in the store"])
    detectors = [(store.path.name, _detector(store)) for store in stores]
    return render("store.html", rows=rows, detectors=detectors, charts=charts, failed=listed)


def _detector(store: Store) -> str:
    """What the detector of a store was trained on, in one line."""
    try:
        return Provenance.from_json(store.provenance).one_line()
    except InputError:
        return "of unknown training data"


def _row(store: Store) -> list[object]:
    """A store's row in the table: file, images, unusable ones, regions, mean per usable image, masks and features."""
    usable = len(store) - len(store.errors)
    mean = f"{store.regions / usable:.1f}" if usable else "–"
    features = ", ".join((*store.feature_names, *store.map_names)) or "none"
    masks = "yes" if store.has_masks else "no"
    return [store.path.name, len(store), len(store.errors), store.regions, mean, masks, features]


def _charts(store: Store) -> list[Chart]:
    """Histograms of the regions per image and of their scores."""
    counts, scores = np.diff(store.region_start), store.data["regions/score"][:]
    charts = []
    for values, label, unit in ((counts, "regions per image", "images"), (scores, "score", "regions")):
        if not len(values) or not np.isfinite(values).all():  # an empty or damaged store
            continue
        # scores of boxes from a file may be negative, or so large that their difference exceeds float32
        value_range = (min(float(values.min()), 0.0), max(float(values.max()), 1.0))
        heights, edges = np.histogram(values.astype(np.float64), bins=BINS, range=value_range)
        centers = ((edges[:-1] + edges[1:]) / 2).tolist()
        tick_names = [f"{x:g}" if i % 5 == 0 else "" for i, x in enumerate(edges[:-1].round(2))]
        axes = Axes(label, unit, centers, width=320, height=200, x_names=tick_names)
        description = (
            f"{store.path.name}: {label} from {values.min():.3g} to {values.max():.3g}, median {np.median(values):.3g}"
        )
        charts.append(bar_chart(f"{store.path.name}: {label}", description, heights.tolist(), axes))
    return charts
