"""The report is complete, well-formed and self-contained, and says that nothing leaked only where that is proven."""

import base64
import dataclasses
import json
import pickle
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from evaluate_examples import PROVENANCE
from hypothesis import given, settings
from hypothesis import strategies as st
from store_examples import record, write_regions

from refdet import report, store
from refdet.data.coco import CocoIndex
from refdet.data.instances_provenance import provenance_of_instances
from refdet.data.segmentations import to_rle
from refdet.errors import InputError
from refdet.evaluation.refer_benchmark import evaluate_on_refer
from refdet.report import PipelineStep, ReferPart, ReportInputs
from refdet.report.charts import MAX_VALUE, Axes, Series, line_chart, standalone_svg
from refdet.report.figures import LONG_SIDE, Legend, draw
from refdet.report.samples import Referent, Scene, hardest_scenes, sample_scenes, scenes_of_splits
from refdet.splits.build import build_split
from refdet.structures.drawing import COLORS
from refdet.structures.provenance import Provenance, Selection
from refdet.structures.regions import Regions
from refer import REFER

pytestmark = pytest.mark.slow

HOSTILE = "the <script>alert('x')</script> & \"that\""
EXAMPLES = settings(max_examples=10, deadline=None, derandomize=True)


class Page(HTMLParser):
    """Parses a page, asserting that tags are closed in order.

    Attributes:
        open: tags that are not closed yet.
        tags: all tags with their attributes.
        words: the text outside of style sheets.
    """

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words += data

    def attributes_of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def write_annotation_store(path: Path, refer_root: Path, missed: int) -> None:
    """Write a store of all val and test images of refcoco/unc whose regions are the annotations, except for one."""
    index = CocoIndex.load(refer_root / "refcoco" / "instances.json")
    refs = REFER(refer_root, "refcoco", "unc").data["refs"]
    regions = []
    for image_id in sorted({ref["image_id"] for ref in refs if ref["split"] != "train"}):
        image = index.images[image_id]
        objects = [a for a in index.annotations[image_id] if not a.iscrowd and a.id != missed]
        masks = [to_rle(a.segmentation, image.height, image.width)["counts"] for a in objects if a.segmentation]
        regions.append(Regions(
            image_id, image.file_name, image.height, image.width,
            np.array([a.box for a in objects], np.float32).reshape(-1, 4),
            np.linspace(1, 0.3, len(objects), dtype=np.float32),
            np.array([a.category_id for a in objects], np.int64), masks=tuple(masks),
        ))  # fmt: skip
    classes = [{"id": i, "name": f"{name}<i>" if i == min(index.categories) else name}
               for i, name in index.categories.items()]  # fmt: skip
    write_regions(path, regions, store.Header(classes, "", PROVENANCE, {}), store.Columns(masks=True))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path) -> ReportInputs:
    """All inputs of a report: a run, its split, a store of the shapes dataset and its metrics, and a pipeline step."""
    work = tmp_path_factory.mktemp("report")
    refer_root = work / "refer"
    shutil.copytree(shapes_root / "refer", refer_root)
    file = refer_root / "refcoco" / "refs(unc).p"
    refs = pickle.loads(file.read_bytes())
    first = next(ref for ref in refs if ref["split"] == "val")
    first["sentences"][0]["sent"] = HOSTILE
    file.write_bytes(pickle.dumps(refs, protocol=2))

    source = shapes_root / "annotations" / "instances_train2014.json"
    build_split(source, refer_root, work / "split.json")
    run = work / "run"
    run.mkdir()
    provenance = json.loads((work / "split.json").read_text())["info"]["refdet"]
    (run / "model.json").write_text(json.dumps({"recipe": {"name": "demo"}, "step": 40, "provenance": provenance}))
    terms = {"rpn_score": 0.5, "rpn_box": 0.02, "score": 1.5, "box": 0.4, "mask": 0.6}
    log = [{"step": step, "loss": 3.02 / step, **{k: v / step for k, v in terms.items()}} for step in (1, 20, 40)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))

    write_annotation_store(work / "refcoco.h5", refer_root, missed=first["ann_id"])
    metrics = evaluate_on_refer(work / "refcoco.h5", refer_root, "refcoco", "unc")
    rates = {"AP": 0.5125, "AP50": 0.8765, "AP75": 0.6, "APs": 0.4, "APm": 0.6, "APl": None}
    return ReportInputs(
        run=run, refer_root=refer_root, images=shapes_root / "train2014",
        parts=[ReferPart(work / "refcoco.h5", metrics)],
        detection={"bbox": rates, "segm": {**rates, "AP50": 0.8321}},
        trained_on=work / "split.json", original_instances=source,
        steps=[PipelineStep("train", "Trains.", ("refdet train --set 'a<b'",), 125.0)], pictures=6,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(inputs: ReportInputs, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    report.write(out, inputs)
    return out.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_self_contained(page: str) -> None:
    parsed = Page(page)
    for tag, attrs in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "srcset"):
            assert re.match(r"data:image/|#", attrs.get(name) or "#")
    assert "url(" not in page and "@import" not in page
    assert len(page) < 5_000_000


def test_every_link_has_a_target_and_every_section_a_link(page: str) -> None:
    parsed = Page(page)
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {f"#{name}" for name in ids} == {link["href"] for link in parsed.attributes_of("a")}


def test_markup_in_texts_is_shown_as_text(page: str) -> None:
    parsed = Page(page)
    assert HOSTILE in parsed.words
    assert "refdet train --set 'a<b'" in parsed.words
    assert not parsed.attributes_of("script") and not parsed.attributes_of("i")[0].get("onclick")
    assert "<script" not in page


def test_the_page_shows_the_numbers_of_the_metrics(page: str, inputs: ReportInputs) -> None:
    words = Page(page).words
    assert "0.876" in words or "0.877" in words  # box AP50
    assert "0.832" in words and "2 min 05 s" in words
    for split, values in (inputs.parts[0].metrics or {})["splits"].items():
        assert f"refcoco unc {split}" in words
        assert f"{values['referent_recall']['mean_best_iou']:.3f}" in words
    assert "Clean: 0 of " in words


def svg_of(uri: str | None) -> str:
    assert uri is not None
    return base64.b64decode(uri.partition(",")[2]).decode()


def test_the_page_has_its_charts_and_pictures(page: str, inputs: ReportInputs) -> None:
    parsed = Page(page)
    charts = [
        svg_of(image["src"])
        for image in parsed.attributes_of("img")
        if (image["src"] or "").startswith("data:image/svg")
    ]
    assert len(charts) == 1 + 2 + 1 + 2  # loss; histograms of the store; calibration; recall by IoU and by regions
    for svg in charts:
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and "prefers-color-scheme:dark" in svg
        assert not [e for e in root.iter() if e.tag.endswith("}script") or any(k.startswith("on") for k in e.attrib)]
        assert not re.search(r"style=\"[^\"]*#[0-9a-f]{6}", svg)  # colors are classes, which follow the color scheme
    legends = [item for item in parsed.attributes_of("i") if str(item.get("class", "")).startswith("s")]
    # entries: 6 losses, 2 of the calibration, and each split in both recall charts
    assert len(legends) == 6 + 2 + 2 * len(inputs.parts[0].metrics["splits"])  # type: ignore[index]
    images = [image for image in parsed.attributes_of("img") if (image["src"] or "").startswith("data:image/jpeg")]
    assert len(images) >= 5
    assert all("referred object" in (image["alt"] or "") for image in images)
    assert "missed" in parsed.words and "Failure cases" in parsed.words


def test_report_on_a_run_without_log_or_store(inputs: ReportInputs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(inputs.run, run)
    (run / "metrics.jsonl").unlink()
    bare = dataclasses.replace(inputs, run=run, parts=(), detection=None, trained_on=None, steps=())
    report.write(tmp_path / "report.html", bare)
    parsed = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not parsed.attributes_of("img") and "Provenance of the detector" in parsed.words
    assert "No leaks" not in parsed.words and "never seen" not in parsed.words


@pytest.mark.parametrize("by_validation", [True, False, None])
def test_weights_selected_by_validation_are_not_called_clean(
    inputs: ReportInputs, tmp_path: Path, by_validation: bool | None
) -> None:
    """Those of the last step are clean; those of older runs with a best/, which recorded no selection, are not."""
    run = tmp_path / "run"
    shutil.copytree(inputs.run, run)
    meta = json.loads((run / "model.json").read_text())
    provenance = Provenance.from_json(meta["provenance"])
    file = dataclasses.replace(provenance, selection=None, source="minival.json")
    selection = None if by_validation is None else Selection(by_validation, (file,))
    meta["provenance"] = dataclasses.replace(provenance, selection=selection).to_json()
    (run / "model.json").write_text(json.dumps(meta))
    (run / "best").mkdir()
    report.write(tmp_path / "report.html", dataclasses.replace(inputs, run=run, parts=()))
    words = Page((tmp_path / "report.html").read_text(encoding="utf-8")).words
    assert ("No leaks" in words) == ("never seen" in words) == (by_validation is False)
    assert ("chosen by their AP on minival.json" in words) == (by_validation is True)
    assert ("without recording on which images" in words) == (by_validation is None)


def test_a_detector_trained_on_the_original_file_is_called_leaking(inputs: ReportInputs, tmp_path: Path) -> None:
    assert inputs.original_instances is not None
    run = tmp_path / "run"
    shutil.copytree(inputs.run, run)
    meta = json.loads((run / "model.json").read_text())
    meta["provenance"] = provenance_of_instances(CocoIndex.load(inputs.original_instances)).to_json()
    (run / "model.json").write_text(json.dumps(meta))
    leaky = dataclasses.replace(
        inputs, run=run, trained_on=inputs.original_instances, original_instances=None, parts=()
    )
    report.write(tmp_path / "report.html", leaky)
    words = Page((tmp_path / "report.html").read_text(encoding="utf-8")).words
    assert "held-out images in the training file" in words and "Leak:" in words
    assert "No leaks" not in words and "never seen" not in words


def test_an_instances_file_that_the_run_was_not_trained_on_is_an_error(inputs: ReportInputs, tmp_path: Path) -> None:
    assert inputs.original_instances is not None
    with pytest.raises(InputError, match="not the images that .* was trained on"):
        report.write(tmp_path / "report.html", dataclasses.replace(inputs, trained_on=inputs.original_instances))
    assert not (tmp_path / "report.html").exists()


def test_existing_output_and_invalid_run_directories_are_errors(inputs: ReportInputs, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("an existing file")
    with pytest.raises(InputError, match="exists; choose another `out`"):
        report.write(tmp_path / "report.html", inputs)
    with pytest.raises(InputError, match="model.json: no such file"):
        report.write(tmp_path / "new.html", dataclasses.replace(inputs, run=tmp_path))
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(InputError, match="model.json: not JSON"):
        report.write(tmp_path / "new.html", dataclasses.replace(inputs, run=tmp_path))


def test_comprehension_metrics_have_a_section(page: str, inputs: ReportInputs, tmp_path: Path) -> None:
    assert "listener" not in Page(page).words  # these metrics have no answers
    metrics = json.loads(json.dumps(inputs.parts[0].metrics))
    comprehension = {"accuracy@0.5": 0.8123, "random_baseline@0.5": 0.1456, "missing": 0}
    metrics["splits"]["val"] |= {"comprehension": comprehension, "segmentation": None}
    metrics["splits"] = {"val": metrics["splits"]["val"]}
    with_answers = dataclasses.replace(inputs, parts=[dataclasses.replace(inputs.parts[0], metrics=metrics)])
    report.write(tmp_path / "report.html", with_answers)
    words = Page((tmp_path / "report.html").read_text(encoding="utf-8")).words
    assert words.count("0.812") == 2 and words.count("0.146") == 2  # in the section and among the highlights
    assert "Comprehension with a listener" in words


def test_a_standalone_chart_is_reproducible_and_escapes_its_texts() -> None:
    axes = Axes("regions", "recall", x_ticks=range(2), y_range=(0, 1), x_names=["1", "all <"])
    series = [Series("val & test", [(0, 0.25), (1, 1.0)], 1)]
    svg = standalone_svg("a < b", series, axes)
    assert svg == standalone_svg("a < b", series, axes)
    root = ElementTree.fromstring(svg)
    words = "".join(root.itertext())
    assert "val & test" in words and "all <" in words and "a < b" in words
    assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_ious_of_the_scenes_agree_with_the_metrics(inputs: ReportInputs) -> None:
    part = inputs.parts[0]
    for split, values in (part.metrics or {})["splits"].items():
        with store.open(part.store) as regions:  # type: ignore[arg-type]
            of_split = scenes_of_splits(regions, REFER(inputs.refer_root, "refcoco", "unc"), "refcoco/unc", [split])
        ious = [referent.iou for scene in of_split for referent in scene.referents]
        assert (len(of_split), len(ious)) == (values["images"], values["refs"])
        assert np.mean(ious) == pytest.approx(values["referent_recall"]["mean_best_iou"])
        assert np.mean([iou >= 0.5 for iou in ious]) == pytest.approx(values["referent_recall"]["0.5"])


def scene(image_id: int, split: str, ious: tuple[float, ...], rows: tuple[int, ...] | None = None) -> Scene:
    """A scene with three regions, and referents with the given IoUs; ``rows`` are their best regions."""
    boxes = np.array([[10, 10, 40, 40], [50, 20, 90, 70], [5, 60, 30, 75]], np.float32)
    scores = np.array([0.9, 0.2, 0.8], np.float32)
    regions = Regions(image_id, "", 80, 100, boxes, scores, np.array([1, 1, 2]))
    rows = tuple(range(len(ious))) if rows is None else rows
    referred = [Referent(1, "cat", ("it",), boxes[row].astype(float), row, iou)
                for row, iou in zip(rows, ious, strict=True)]  # fmt: skip
    return Scene(split, record(regions), tuple(referred), {1: "cat", 2: "dog"}, lambda: regions)


def test_sampled_scenes_are_of_all_splits_and_of_different_images() -> None:
    all_scenes = [scene(i, split, (0.9,)) for split in ("a", "b") for i in range(10)]
    all_scenes += [scene(100 + i, "c", (0.9,)) for i in range(2)]
    chosen = sample_scenes(all_scenes, 9)
    assert [s.split for s in chosen] == ["a"] * 3 + ["b"] * 3 + ["c"] * 2  # c has no more
    assert len({s.regions.image_id for s in chosen}) == 8
    assert sample_scenes([], 5) == [] and len(sample_scenes(all_scenes, 2)) == 2


def test_hardest_scenes_have_missed_referents_and_start_with_the_worst() -> None:
    all_scenes = [scene(1, "a", (0.9, 0.3)), scene(2, "a", (0.6,)), scene(3, "a", (0.1,)), scene(3, "b", (0.2,))]
    assert [s.regions.image_id for s in hardest_scenes(all_scenes, 5)] == [3, 1]
    assert [s.regions.image_id for s in hardest_scenes(all_scenes, 1)] == [3]


def test_referents_of_one_region_share_its_color() -> None:
    legend = Legend.from_scene(scene(1, "a", (0.9, 0.4, 0.7), rows=(1, 2, 1)))
    assert legend.numbers == {1: [1, 3]}  # the second is missed
    assert legend.colors == [COLORS[0], COLORS[1], COLORS[0]]
    assert legend.others == [0, 2]  # confident regions without a referent


def test_confident_regions_are_drawn_at_their_boxes() -> None:
    drawn_scene = scene(1, "a", (0.9,))
    image = draw(drawn_scene, np.zeros((80, 100, 3), np.uint8), Legend.from_scene(drawn_scene))
    assert image.size == (LONG_SIDE, round(80 * LONG_SIDE / 100))
    scale = LONG_SIDE / 100
    blue = tuple(int(COLORS[0][i : i + 2], 16) for i in (1, 3, 5))
    assert image.getpixel((round(25 * scale), round(40 * scale) - 1)) == blue  # lower side of region 0
    assert image.getpixel((round(70 * scale), round(45 * scale))) == (0, 0, 0)  # region 1 has a low score
    assert image.getpixel((round(17 * scale), round(75 * scale) - 1)) != (0, 0, 0)  # region 2 in gray


@EXAMPLES
@given(st.lists(st.tuples(st.integers(0, 500), st.floats()), max_size=8), st.text(max_size=5), st.booleans())
def test_any_chart_is_well_formed(points: list[tuple[int, float]], name: str, log: bool) -> None:
    name = "".join(c for c in name if c.isprintable())
    svg = line_chart(name, name, [Series(name, points, 1)], Axes(name, name, log_y=log), dots=True).svg
    visible = [p for p in points if abs(p[1]) < MAX_VALUE and (p[1] > 0 or not log)]
    assert bool(svg) == bool(visible)
    if svg:
        root = ElementTree.fromstring(svg)
        drawn = next(e for e in root.iter() if e.get("id") == "series-0")
        path = next(e for e in drawn.iter() if e.tag.endswith("}path"))
        assert path.attrib["d"].startswith("M") and "nan" not in path.attrib["d"]
