"""The report: complete, well-formed, self-contained, and safe with any text."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from store_examples import record

from refdet import report, store
from refdet.data.coco import CocoIndex
from refdet.data.instances_provenance import provenance_of_instances
from refdet.data.segmentations import to_rle
from refdet.errors import InputError
from refdet.evaluation.refer_benchmark import evaluate_on_refer
from refdet.report import PipelineStep, ReferPart, ReportInputs
from refdet.report.charts import MAX_VALUE, Axes, Series, line_chart, recall_svg
from refdet.report.figures import LONG_SIDE, Legend, draw
from refdet.report.samples import Referent, Scene, hardest_scenes, sample_scenes, scenes
from refdet.splits.build import build_split
from refdet.structures.drawing import COLORS
from refdet.structures.provenance import Provenance, Selection
from refdet.structures.regions import Regions
from refer import REFER

pytestmark = pytest.mark.slow

HOSTILE = "the <script>alert('x')</script> & \"that\""
EXAMPLES = settings(max_examples=10, deadline=None, derandomize=True)


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what tests ask about."""

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

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def annotation_store(path: Path, refer_root: Path, missed: int) -> None:
    """A store of all val and test images of refcoco/unc: the annotations as regions, but not one of them."""
    index = CocoIndex.load(refer_root / "refcoco" / "instances.json")
    refs = REFER(refer_root, "refcoco", "unc").data["refs"]
    regions = []
    for image_id in sorted({ref["image_id"] for ref in refs if ref["split"] != "train"}):
        image = index.images[image_id]
        found = [a for a in index.annotations[image_id] if not a.iscrowd and a.id != missed]
        masks = [to_rle(a.segmentation, image.height, image.width)["counts"] for a in found if a.segmentation]
        regions.append(Regions(
            image_id, image.file_name, image.height, image.width,
            np.array([a.box for a in found], np.float32).reshape(-1, 4),
            np.linspace(1, 0.3, len(found), dtype=np.float32),
            np.array([a.category_id for a in found], np.int64), masks=tuple(masks),
        ))  # fmt: skip
    classes = [{"id": i, "name": f"{name}<i>" if i == min(index.categories) else name}
               for i, name in index.categories.items()]  # fmt: skip
    rows = [store.ImageRow(r.image_id, r.file_name, r.height, r.width, "", len(r), sum(map(len, r.masks or ())))
            for r in regions]  # fmt: skip
    made = store.Header(classes, "", PROVENANCE, {})
    with store.create(path, made, store.Columns(masks=True), rows) as writer:
        for one in regions:
            writer.put(one)


PROVENANCE = {"source": "x.json", "source_sha256": "0" * 64, "images": 1, "annotations": 1,
              "image_ids_sha256": "1" * 64, "excluded": {}, "weights": None, "note": ""}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path) -> ReportInputs:
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

    annotation_store(work / "refcoco.h5", refer_root, missed=first["ann_id"])
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


def test_it_is_well_formed_and_self_contained(page: str) -> None:
    found = Page(page)
    for tag, attrs in found.tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "srcset"):
            assert re.match(r"data:image/|#", attrs.get(name) or "#")
    assert "url(" not in page and "@import" not in page
    assert len(page) < 5_000_000


def test_links_lead_somewhere(page: str) -> None:
    found = Page(page)
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {f"#{name}" for name in ids} == {link["href"] for link in found.of("a")}


def test_hostile_text_is_shown_not_run(page: str) -> None:
    found = Page(page)
    assert HOSTILE in found.words
    assert "refdet train --set 'a<b'" in found.words
    assert not found.of("script") and not found.of("i")[0].get("onclick")
    assert "<script" not in page


def test_numbers_are_there(page: str, inputs: ReportInputs) -> None:
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


def test_charts_and_pictures_are_there(page: str, inputs: ReportInputs) -> None:
    found = Page(page)
    charts = [svg_of(image["src"]) for image in found.of("img") if (image["src"] or "").startswith("data:image/svg")]
    assert len(charts) == 1 + 2 + 1 + 2  # loss; histograms of the store; calibration; recall by IoU and by regions
    for svg in charts:
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and "prefers-color-scheme:dark" in svg
        assert not [e for e in root.iter() if e.tag.endswith("}script") or any(k.startswith("on") for k in e.attrib)]
        assert not re.search(r"style=\"[^\"]*#[0-9a-f]{6}", svg)  # every color follows the page
    legends = [item for item in found.of("i") if str(item.get("class", "")).startswith("s")]
    assert len(legends) == 6 + 2 + 2 * len(inputs.parts[0].metrics["splits"])  # type: ignore[index]
    images = [image for image in found.of("img") if (image["src"] or "").startswith("data:image/jpeg")]
    assert len(images) >= 5
    assert all("referred object" in (image["alt"] or "") for image in images)
    assert "missed" in found.words and "Failure cases" in found.words


def test_a_bare_run_has_a_report_too(inputs: ReportInputs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(inputs.run, run)
    (run / "metrics.jsonl").unlink()
    bare = dataclasses.replace(inputs, run=run, parts=(), detection=None, trained_on=None, steps=())
    report.write(tmp_path / "report.html", bare)
    found = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not found.of("img") and "Provenance of the detector" in found.words
    assert "No leaks" not in found.words and "never seen" not in found.words


@pytest.mark.parametrize("chosen", [True, False, None])
def test_weights_that_validation_chose_are_not_called_clean(
    inputs: ReportInputs, tmp_path: Path, chosen: bool | None
) -> None:
    """Of the last step they are; without a record, as in older runs with a best/, they are not."""
    run = tmp_path / "run"
    shutil.copytree(inputs.run, run)
    meta = json.loads((run / "model.json").read_text())
    provenance = Provenance.from_json(meta["provenance"])
    file = dataclasses.replace(provenance, selection=None, source="minival.json")
    selection = None if chosen is None else Selection(chosen, (file,))
    meta["provenance"] = dataclasses.replace(provenance, selection=selection).to_json()
    (run / "model.json").write_text(json.dumps(meta))
    (run / "best").mkdir()
    report.write(tmp_path / "report.html", dataclasses.replace(inputs, run=run, parts=()))
    words = Page((tmp_path / "report.html").read_text(encoding="utf-8")).words
    assert ("No leaks" in words) == ("never seen" in words) == (chosen is False)
    assert ("chosen by their AP on minival.json" in words) == (chosen is True)
    assert ("without recording on which images" in words) == (chosen is None)


def test_a_leak_is_called_one(inputs: ReportInputs, tmp_path: Path) -> None:
    """A detector trained on the original file."""

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


def test_an_audit_of_another_file_proves_nothing(inputs: ReportInputs, tmp_path: Path) -> None:
    assert inputs.original_instances is not None
    with pytest.raises(InputError, match="not the images that .* was trained on"):
        report.write(tmp_path / "report.html", dataclasses.replace(inputs, trained_on=inputs.original_instances))
    assert not (tmp_path / "report.html").exists()


def test_bad_input(inputs: ReportInputs, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(InputError, match="exists; choose another `out`"):
        report.write(tmp_path / "report.html", inputs)
    with pytest.raises(InputError, match="model.json: no such file"):
        report.write(tmp_path / "new.html", dataclasses.replace(inputs, run=tmp_path))
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(InputError, match="model.json: not JSON"):
        report.write(tmp_path / "new.html", dataclasses.replace(inputs, run=tmp_path))


def test_a_listener_has_its_section(page: str, inputs: ReportInputs, tmp_path: Path) -> None:
    assert "listener" not in Page(page).words  # nobody listened
    metrics = json.loads(json.dumps(inputs.parts[0].metrics))
    boxes = {"accuracy@0.5": 0.8123, "random_baseline@0.5": 0.1456, "missing": 0}
    metrics["splits"]["val"] |= {"comprehension": boxes, "segmentation": None}
    metrics["splits"] = {"val": metrics["splits"]["val"]}
    heard = dataclasses.replace(inputs, parts=[dataclasses.replace(inputs.parts[0], metrics=metrics)])
    report.write(tmp_path / "report.html", heard)
    words = Page((tmp_path / "report.html").read_text(encoding="utf-8")).words
    assert words.count("0.812") == 2 and words.count("0.146") == 2  # in the section and among the highlights
    assert "Comprehension with a listener" in words


def test_a_chart_can_stand_alone() -> None:
    axes = Axes("regions", "recall", x_ticks=range(2), y_range=(0, 1), x_names=["1", "all <"])
    series = [Series("val & test", [(0, 0.25), (1, 1.0)], 1)]
    svg = recall_svg("a < b", series, axes)
    assert svg == recall_svg("a < b", series, axes)  # the same bytes
    root = ElementTree.fromstring(svg)
    words = "".join(root.itertext())
    assert "val & test" in words and "all <" in words and "a < b" in words
    assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_scenes_agree_with_the_metrics(inputs: ReportInputs) -> None:
    part = inputs.parts[0]
    for split, values in (part.metrics or {})["splits"].items():
        with store.open(part.store) as regions:  # type: ignore[arg-type]
            of_split = scenes(regions, REFER(inputs.refer_root, "refcoco", "unc"), "refcoco/unc", [split])
        ious = [one.iou for scene in of_split for one in scene.referents]
        assert (len(of_split), len(ious)) == (values["images"], values["refs"])
        assert np.mean(ious) == pytest.approx(values["referent_recall"]["mean_best_iou"])
        assert np.mean([iou >= 0.5 for iou in ious]) == pytest.approx(values["referent_recall"]["0.5"])


def scene(image_id: int, split: str, ious: tuple[float, ...], regions: tuple[int, ...] | None = None) -> Scene:
    boxes = np.array([[10, 10, 40, 40], [50, 20, 90, 70], [5, 60, 30, 75]], np.float32)
    scores = np.array([0.9, 0.2, 0.8], np.float32)
    of = Regions(image_id, "", 80, 100, boxes, scores, np.array([1, 1, 2]))
    rows = regions if regions is not None else tuple(range(len(ious)))
    referred = [Referent(1, "cat", ("it",), boxes[row].astype(float), row, iou)
                for row, iou in zip(rows, ious, strict=True)]  # fmt: skip
    return Scene(split, record(of), tuple(referred), {1: "cat", 2: "dog"}, lambda: of)


def test_sample_takes_of_each_split_and_no_image_twice() -> None:
    every = [scene(i, split, (0.9,)) for split in ("a", "b") for i in range(10)]
    every += [scene(100 + i, "c", (0.9,)) for i in range(2)]
    chosen = sample_scenes(every, 9)
    assert [s.split for s in chosen] == ["a"] * 3 + ["b"] * 3 + ["c"] * 2  # c has no more
    assert len({s.regions.image_id for s in chosen}) == 8
    assert sample_scenes([], 5) == [] and len(sample_scenes(every, 2)) == 2


def test_hardest_is_worst_first_and_only_missed_ones() -> None:
    every = [scene(1, "a", (0.9, 0.3)), scene(2, "a", (0.6,)), scene(3, "a", (0.1,)), scene(3, "b", (0.2,))]
    assert [s.regions.image_id for s in hardest_scenes(every, 5)] == [3, 1]
    assert [s.regions.image_id for s in hardest_scenes(every, 1)] == [3]


def test_objects_in_one_region_share_its_color() -> None:
    key = Legend.from_scene(scene(1, "a", (0.9, 0.4, 0.7), regions=(1, 2, 1)))
    assert key.numbers == {1: [1, 3]}  # the second is missed
    assert key.colors == [COLORS[0], COLORS[1], COLORS[0]]
    assert key.others == [0, 2]  # likely, and nobody speaks of them


def test_regions_are_drawn_where_they_are() -> None:
    one = scene(1, "a", (0.9,))
    image = draw(one, np.zeros((80, 100, 3), np.uint8), Legend.from_scene(one))
    assert image.size == (LONG_SIDE, round(80 * LONG_SIDE / 100))
    scale = LONG_SIDE / 100
    blue = tuple(int(COLORS[0][i : i + 2], 16) for i in (1, 3, 5))
    assert image.getpixel((round(25 * scale), round(40 * scale) - 1)) == blue  # lower side of region 0
    assert image.getpixel((round(70 * scale), round(45 * scale))) == (0, 0, 0)  # region 1 is unlikely
    assert image.getpixel((round(17 * scale), round(75 * scale) - 1)) != (0, 0, 0)  # region 2 in gray


@EXAMPLES
@given(st.lists(st.tuples(st.integers(0, 500), st.floats()), max_size=8), st.text(max_size=5), st.booleans())
def test_any_chart_is_well_formed(points: list[tuple[int, float]], name: str, log: bool) -> None:
    name = "".join(c for c in name if c.isprintable())
    svg = line_chart(name, name, [Series(name, points, 1)], Axes(name, name, log_y=log), dots=True).svg
    shown = [p for p in points if abs(p[1]) < MAX_VALUE and (p[1] > 0 or not log)]
    assert bool(svg) == bool(shown)
    if svg:
        root = ElementTree.fromstring(svg)
        drawn = next(e for e in root.iter() if e.get("id") == "series-0")
        path = next(e for e in drawn.iter() if e.tag.endswith("}path"))
        assert "nan" not in path.get("d", "") and len(shown) >= 1
