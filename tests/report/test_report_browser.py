"""The report in a real browser: accessible in light and dark, self-contained, and printable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from browser import WatchedPage, accessibility_violations
from evaluate_examples import PROVENANCE, regions, write_refer, write_store
from PIL import Image

from refdet.report import ReferPart, ReportInputs, write

pytestmark = [pytest.mark.slow, pytest.mark.browser]

OBJECTS: list[dict[str, Any]] = [
    {"image_id": 1, "bbox": [10, 10, 20, 20], "category_id": 1, "split": "val", "sents": ("<script>cat</script>",)},
    {"image_id": 1, "bbox": [60, 10, 40, 40], "category_id": 2, "split": "val", "sents": ("the dog",)},
    {"image_id": 2, "bbox": [0, 0, 100, 90], "category_id": 2, "split": "testA", "sents": ("left dogs",)},
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with all sections that a run, a store, refs and answers give."""
    root = tmp_path_factory.mktemp("report")
    write_refer(root, OBJECTS)
    detections = [regions(1, [[10, 10, 30, 30], [60, 10, 99, 50]], [1, 1]), regions(2, [[0, 0, 50, 9]], [2])]
    write_store(root / "s.h5", detections, masks=False, names={1: "cat", 2: "dog"})
    (root / "images").mkdir()
    for i in (1, 2):
        Image.new("RGB", (120, 100), (90, 40 * i, 0)).save(root / "images" / f"{i}.jpg")
    (root / "answers.json").write_text(json.dumps([{"sent_id": 0, "region": 1}, {"sent_id": 10, "region": 1}]))
    run = root / "run"
    run.mkdir()
    (run / "model.json").write_text(json.dumps({"recipe": {"name": "toy"}, "step": 40, "provenance": PROVENANCE}))
    rows = [{"step": step, "loss": 3 / step} for step in (1, 20, 40)] + [{"step": 40, "val_bbox_AP": 0.25}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    detection = {"bbox": dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), 0.5), "segm": None}
    parts = [ReferPart(root / "s.h5", None, root / "answers.json", "toy/me")]
    inputs = ReportInputs(
        run=run, refer_root=root, images=root / "images", parts=parts, detection=detection, pictures=3
    )
    write(root / "report.html", inputs, "A report")
    return root / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_is_accessible_and_requests_nothing_else(browser: Any, report: Path, scheme: str) -> None:
    watched = WatchedPage(browser.new_context(color_scheme=scheme).new_page())
    watched.page.goto(report.as_uri())
    assert accessibility_violations(watched.page) == []
    assert [url for url in watched.requests if not url.startswith("data:")] == [report.as_uri()]
    decode = (
        "() => Promise.all(Array.from(document.images, (image) => { image.loading = 'eager'; return image.decode(); }))"
    )
    assert len(watched.page.evaluate(decode)) > 8  # an image that cannot be decoded raises
    assert watched.page.title() == "A report" and "<script>cat</script>" in watched.page.inner_text("main")
    assert watched.errors == []
    watched.page.context.close()


def test_the_printed_report_fits_the_page_in_dark_on_white(browser: Any, report: Path) -> None:
    page = browser.new_page(color_scheme="dark", viewport={"width": 718, "height": 1047})  # A4 less margins
    page.goto(report.as_uri())
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert page.evaluate("() => document.body.scrollWidth <= window.innerWidth")
    ink = page.evaluate("() => getComputedStyle(document.body).color")
    assert ink == "rgb(22, 24, 29)"  # dark text, although the color scheme is dark
    page.close()
