"""Untrusted text in any field of a report's inputs is escaped or an error; it never becomes a tag."""

import ast
import base64
import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import UndefinedError
from store_examples import record

from refdet import report
from refdet.errors import InputError
from refdet.evaluation.detection_errors import DetectionErrors
from refdet.report import PipelineStep, ReferPart, ReportInputs, charts
from refdet.report.charts import Axes, Series, line_chart, standalone_svg
from refdet.report.fields import check_metrics
from refdet.report.figures import draw_picture
from refdet.report.samples import Answer, Referent, Scene
from refdet.report.sections import ceiling_section, errors_section
from refdet.report.templates import ENVIRONMENT
from refdet.structures.regions import Regions

HOSTILE = (
    "<img src=x onerror=\"document.title='PWNED'\"><script>document.title=1</script>",
    "</title><script>1</script>", "</style></svg></desc><script>1</script>", '" onmouseover="alert(1)" x="',
    "' onload='alert(1)", "<!--", "]]><script>1</script>", "<svg/onload=1>", "javascript:alert(1)", "${body} $title",
    "{0.__class__} {name!r} {", "&lt;script&gt;", "&#60;script&#62;", "\x00<script\x00>", "＜script＞", "<scr\nipt>",
    "<a href=javascript:1>x</a>", "<meta http-equiv=refresh content=0>", "<base href=//x>", "\u2028<script>1</script>",
)  # fmt: skip
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "section", "nav", "footer", "h1", "h2", "h3"),
    *("p", "a", "b", "i", "q", "em", "div", "span", "code", "pre", "ul", "ol", "li", "figure", "figcaption", "img"),
    *("table", "thead", "tbody", "tr", "th", "td"),
    *("svg", "g", "rect", "text"),
}
SVG_TAGS = {"svg", "style", "defs", "g", "path", "use", "text", "clipPath", "rect", "metadata", "RDF", "Work", "tspan"}


class Tags(HTMLParser):
    """Collects the tags with the names of their attributes, the attributes' values, the text and the comments."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.values: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.comments: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.values += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    handle_decl = unknown_decl = handle_pi = handle_comment


def assert_harmless(text: str) -> Tags:
    """Assert that a page has only known tags, no event handlers and no links to other pages; returns its tags."""
    page = Tags(text)
    assert {tag for tag, _ in page.tags} <= TAGS
    assert not [name for _, names in page.tags for name in names if name.startswith("on")]
    for name, value in page.values:
        if name in ("href", "src"):
            assert value.startswith(("#", "data:image/jpeg;base64,", "data:image/svg+xml;base64,")), value
        if value.startswith("data:image/svg"):
            assert_harmless_svg(base64.b64decode(value.partition(",")[2]).decode())
    return page


def assert_harmless_svg(svg: str) -> None:
    """Assert that a chart is well-formed, and has neither event handlers nor links to other files."""
    for element in ElementTree.fromstring(svg).iter():
        assert element.tag.split("}")[1] in SVG_TAGS, element.tag
        for name, value in element.attrib.items():
            assert not name.startswith("on") and (not name.endswith("href") or value.startswith("#"))


def assert_same_tags(render: Callable[[str], str], hostile: str) -> None:
    """Assert that a hostile text renders to the same tags and attributes as a plain one."""
    assert assert_harmless(render(hostile)).tags == assert_harmless(render("plain")).tags


PROVENANCE = {"source": "x.json", "source_sha256": "0" * 64, "images": 5, "annotations": 9,
              "image_ids_sha256": "1" * 64, "excluded": {}, "weights": "w", "note": "n"}  # fmt: skip
META = {"recipe": {"name": "demo"}, "step": 3, "provenance": PROVENANCE}
RATES = {"AP": 0.5, "AP50": 0.8, "AP75": 0.6, "APs": 0.4, "APm": 0.6, "APl": None}
SPLIT: dict[str, Any] = {
    "images": 2, "refs": 3, "sentences": 4, "detection": {"bbox": RATES, "segm": RATES},
    "referent_recall": {"0.5": 0.9, "0.6": 0.8, "0.7": 0.7, "0.8": 0.5, "0.9": 0.2, "mean_best_iou": 0.7},
    "recall@k": {"1": 0.2, "all": 0.9}, "comprehension": {"random_baseline@0.5": 0.1, "accuracy@0.5": 0.6},
    "segmentation": {"overall_iou": 0.5},
}  # fmt: skip
METRICS: dict[str, Any] = {"dataset": "refcoco", "split_by": "unc", "splits": {"val": SPLIT}}
LOG = {"step": 1, "loss": 2.5, "score": 1.0, "box": 0.5, "mask": 0.5, "rpn_score": 0.3, "rpn_box": 0.2}


@pytest.fixture
def render_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A function that renders the page of a run, a log and metrics; its charts are empty, which other tests check."""
    empty = '<svg xmlns="http://www.w3.org/2000/svg"><g/></svg>'
    monkeypatch.setattr(charts, "_svg", lambda axes, draw, background="none": empty)

    def render(meta: Any = META, log: Any = LOG, metrics: Any = METRICS, detection: Any = None, **more: Any) -> str:
        (tmp_path / "model.json").write_text(json.dumps(meta))
        (tmp_path / "metrics.jsonl").write_text((log if isinstance(log, str) else json.dumps(log)) + "\n")
        options = {"title": "a title", "steps": ()} | more
        parts = [ReferPart(None, metrics)]
        inputs = ReportInputs(tmp_path, parts=parts, detection=detection or {"bbox": RATES}, steps=options["steps"])
        (tmp_path / "r.html").unlink(missing_ok=True)
        report.write(tmp_path / "r.html", inputs, options["title"])
        return (tmp_path / "r.html").read_text(encoding="utf-8")

    return render


def with_value(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    tree = copy.deepcopy(tree)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return tree


def key_paths(tree: Any, start: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The keys that lead to each value of a tree of dicts, the inner dicts included."""
    paths = [start] if start else []
    if isinstance(tree, dict):
        for key, value in tree.items():
            paths += key_paths(value, (*start, key))
    return paths


TREES = {"meta": META, "log": LOG, "metrics": METRICS, "detection": {"bbox": RATES}}
FIELDS = [(name, path) for name, tree in TREES.items() for path in key_paths(tree)]


@pytest.mark.parametrize(("name", "path"), FIELDS, ids=[f"{name}-{'.'.join(path)}" for name, path in FIELDS])
def test_each_field_is_escaped_or_an_error(render_report: Callable[..., str], name: str, path: tuple[str, ...]) -> None:
    for hostile in HOSTILE[:8]:
        try:
            text = render_report(**{name: with_value(TREES[name], path, hostile)})
        except InputError as error:
            assert len(str(error)) < 600 and "\n" not in str(error)
            continue
        assert assert_harmless(text).tags == assert_harmless(render_report()).tags
        assert "<script" not in text


def test_invalid_numbers_and_hashes_are_errors(render_report: Callable[..., str]) -> None:
    for path in (("step",), ("provenance", "images"), ("provenance", "image_ids_sha256"),
                 ("provenance", "source_sha256"), ("provenance", "annotations")):  # fmt: skip
        for value in ("x3", [], None, 1.5, True, -1, "g" * 64):
            with pytest.raises(InputError, match="model.json"):
                render_report(meta=with_value(META, path, value))
    for path in (("splits", "val", "images"), ("splits", "val", "referent_recall", "0.5")):
        for bad in ("3", [], None, True):
            with pytest.raises(InputError, match="metrics of evaluate-on-refer, split val"):
                render_report(metrics=with_value(METRICS, path, bad))
    for text in ('{"step": "1", "loss": 2}', '{"step": 1}', "[]", '{"step": NaN, "loss": 1}', "{", '{"step": 1e999}',
                 '{"step": 1, "loss": 2, "loss": 3}', "[" * 99_999, '{"step": 1, "loss": null}'):  # fmt: skip
        with pytest.raises(InputError, match="line 1"):
            render_report(log=text)


def test_names_of_datasets_splits_steps_and_ticks_are_escaped(render_report: Callable[..., str]) -> None:
    for hostile in HOSTILE:

        def page(name: str) -> str:
            recall = {f"{name}{key}": value for key, value in SPLIT["recall@k"].items()}
            split = {**SPLIT, "recall@k": recall}
            steps = (PipelineStep(name, name, (name,), 1.0),)
            return render_report(
                metrics={"dataset": name, "split_by": name, "splits": {name: split}}, title=name, steps=steps
            )

        assert_same_tags(page, hostile)


def test_the_content_security_policy_comes_before_style_and_title(render_report: Callable[..., str]) -> None:
    text = render_report()
    policy = text.index('http-equiv="Content-Security-Policy"')
    assert policy < text.index("<style") and policy < text.index("<title")
    rules = text[policy : text.index(">", policy)]
    assert "default-src 'none'" in rules and "script" not in rules and "img-src data:;" in rules


def scene(text: str, found: bool) -> Scene:
    """A scene with a text in every field; ``found`` tells whether a region covers its referents."""
    boxes = np.array([[2, 2, 20, 20], [30, 5, 60, 40]], np.float32)
    regions = Regions(7, text, 48, 64, boxes, np.array([0.9, 0.8], np.float32), np.array([1, 2]))
    first = Referent(1 if found else 3, text, (text, text), boxes[0], 0, 0.9 if found else 0.1)
    second = Referent(9, text, (), boxes[1], 1 if found else None, 0.8 if found else 0.0)
    return Scene(text, record(regions), (first, second), {1: text, 2: text}, lambda: regions)


def render_template(body: str, **values: Any) -> str:
    return ENVIRONMENT.from_string('{% import "ui.html" as ui %}' + body).render(**values)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_texts_in_pictures_and_tables_are_escaped(hostile: str) -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    for found in (True, False):

        def gallery(text: str, found: bool = found) -> str:
            answer = Answer(scene(text, found), np.array([1.0, 2, 9, 9]), 0.2, is_correct=False)
            return render_template("{{ ui.gallery(pictures) }}", pictures=[draw_picture(answer.scene, pixels, answer)])

        assert_same_tags(gallery, hostile)
    body = "{{ ui.table(x, [x, x], [[x, x]], [(1, x)]) }}{{ ui.tiles([(x, x)]) }}"
    assert_same_tags(lambda text: render_template(body, x=text), hostile)
    assert_same_tags(lambda text: ceiling_section(scene(text, False).referents), hostile)
    errors = DetectionErrors(1, 2, objects_by_category=Counter({1: 2}), confusions=Counter({(1, 2): 2}))
    rates = {1: {**RATES, "APl": 0.1}}
    assert_same_tags(lambda text: errors_section(errors, rates, {1: text, 2: text}, text, 1), hostile)


@pytest.mark.parametrize("hostile", HOSTILE[:4] + HOSTILE[9:11] + HOSTILE[13:16])
def test_texts_in_charts_are_escaped(hostile: str) -> None:
    series = [Series(hostile, [(0, 0.2), (1, 0.5)], 1)]
    axes = Axes(hostile, hostile, x_ticks=range(2), x_names=[hostile, hostile], y_range=(0, 1))
    chart = line_chart(hostile, hostile, series, axes, dots=True)
    assert_harmless_svg(chart.svg)
    assert_harmless_svg(standalone_svg(hostile, series, axes))
    plain = line_chart("plain", "plain", [Series("plain", series[0].points, 1)], axes)
    assert_same_tags(
        lambda text: render_template("{{ ui.chart(x) }}", x=replace(plain, title=text, description=text)), hostile
    )


def test_text_is_escaped_by_default() -> None:
    assert render_template("<b>{{ a }}</b>{{ b }}", a="<i>", b='"') == "<b>&lt;i&gt;</b>&#34;"
    tiles = render_template("{{ ui.tiles([(a, a)]) }}", a="<")
    assert tiles.count("&lt;") == 2 and tiles == render_template("{{ ui.tiles([('&'[:0] ~ a, a)]) }}", a="<")
    with pytest.raises(UndefinedError):
        render_template("{{ nothing }}")


def test_templates_are_files_that_mark_nothing_as_safe() -> None:
    """No template is built from data, and only rendered templates become `Markup`."""
    folder = Path(report.__file__).parent
    templates = list((folder / "templates").glob("*.html"))
    assert len(templates) > 8
    for file in templates:
        assert not re.search(
            r"\|\s*safe|autoescape|href=\"{|<script", file.read_text(encoding="utf-8").replace('href="#{', "")
        )
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("Markup", "ENVIRONMENT.from_string") or called.endswith("from_string"):
                assert file.name == "templates.py", f"{file.name}: {ast.unparse(node)}"
            if called == "render":
                assert isinstance(node, ast.Call) and isinstance(node.args[0], ast.Constant)


def test_metrics_that_lack_a_required_field_are_an_error() -> None:
    check_metrics(METRICS, "m.json")
    for path in key_paths(METRICS):
        broken = copy.deepcopy(METRICS)
        parent = broken
        for key in path[:-1]:
            parent = parent[key]
        del parent[path[-1]]
        if path[-1] in ("APs", "APm", "APl", "AP", "AP75", "comprehension"):
            check_metrics(broken, "m.json")
            continue
        if path[-2:] in (("recall@k", "1"), ("recall@k", "all")):
            continue
        with pytest.raises(InputError, match="m.json"):
            check_metrics(broken, "m.json")
