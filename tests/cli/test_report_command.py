"""refdet report: one page of whatever there is, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from evaluate_examples import PROVENANCE
from export_examples import CLASSES, DETECTIONS, HEIGHT, WIDTH, write_dataset, write_store
from PIL import Image

from refdet.cli.main import main
from refdet.store import open as open_store

RATES = {"AP": 0.51, "AP50": 0.87, "AP75": 0.6, "APs": None, "APm": 0.6, "APl": 0.7}


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, args)])


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A store, a REFER folder, images, answers (the first is wrong) and metrics, in a folder."""
    write_store(tmp_path / "d.h5", DETECTIONS)
    write_dataset(tmp_path / "refer")
    (tmp_path / "images").mkdir()
    for regions in DETECTIONS[:2]:
        Image.new("RGB", (WIDTH, HEIGHT), "#888").save(tmp_path / "images" / regions.file_name)
    (tmp_path / "detection.json").write_text(json.dumps({"bbox": RATES, "segm": None}))
    return tmp_path


def test_a_store_alone(work: Path) -> None:
    result = run("--store", work / "d.h5", "--out", work / "r.html", "--json")
    assert result.exit_code == 0, result.stderr
    page = (work / "r.html").read_text(encoding="utf-8")
    assert json.loads(result.stdout) == {"out": str(work / "r.html"), "bytes": len(page.encode())}
    for text in ("d.h5", "cannot be read", "COCO_train2014_000000000005.jpg", "1.0 to", "Detector of"):
        assert (text in page) == (text != "1.0 to"), text
    assert "image/jpeg" not in page and "Referring expressions" not in page


@pytest.mark.parametrize("name", ["", "model.json", "model.safetensors"])
def test_a_run_may_be_given_by_a_file_in_it(tmp_path: Path, name: str) -> None:
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "model.safetensors").write_bytes(b"weights")
    meta = {"recipe": {"name": "demo"}, "step": 40, "provenance": PROVENANCE}
    (run_folder / "model.json").write_text(json.dumps(meta))
    result = run("--run", run_folder / name, "--out", tmp_path / "r.html")
    assert result.exit_code == 0, result.stderr
    assert "demo recipe, 40 steps" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_metrics_of_evaluate_alone(work: Path) -> None:
    assert run("--metrics", work / "detection.json", "--out", work / "r.html").exit_code == 0
    assert "0.870" in (work / "r.html").read_text(encoding="utf-8")


def test_a_store_with_all_that_belongs_to_it(work: Path) -> None:
    """It is evaluated, and wrong answers stand beside the right region."""
    sentences = [s for ref in json.loads(json.dumps(refs(work))) for s in ref["sentences"]]
    answers = [{"sent_id": sentence["sent_id"], "box": [0, 0, 1, 1]} for sentence in sentences]
    (work / "answers.json").write_text(json.dumps(answers))
    result = run(
        "--store", work / "d.h5", "--refer-root", work / "refer", "--dataset", "refcoco", "--split-by", "unc",
        "--images", work / "images", "--predictions", work / "answers.json", "--out", work / "r.html",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    page = (work / "r.html").read_text(encoding="utf-8")
    for text in ("refcoco unc testB", "Wrong answers", "answer: IoU", "Where the detector errs", "By category"):
        assert text in page, text
    assert f"{len(answers)} of {len(answers)} answers are wrong" in page and page.count("image/jpeg") > len(answers) / 2


def refs(work: Path) -> list[dict]:
    from refer import REFER

    return [ref for ref in REFER(work / "refer", "refcoco", "unc").data["refs"] if ref["split"] == "testB"]


def test_images_that_are_missing_are_counted(work: Path) -> None:
    (work / "images" / DETECTIONS[0].file_name).unlink()
    args = ("--store", work / "d.h5", "--images", work / "images", "--out")
    result = run(*args, work / "r.html")
    assert result.exit_code == 0 and "1 image could not be read, first: " in result.stderr
    assert "1 image could not be read" in (work / "r.html").read_text(encoding="utf-8")
    (work / "images" / DETECTIONS[1].file_name).unlink()
    result = run(*args, work / "no.html")
    assert result.exit_code == 2 and "lacks all 2 images" in result.stderr and not (work / "no.html").exists()


def test_objects_of_the_images(work: Path) -> None:
    objects = {
        "images": [{"id": r.image_id, "file_name": r.file_name, "height": HEIGHT, "width": WIDTH} for r in DETECTIONS],
        "categories": CLASSES,
        "annotations": [a | {"id": 1 + i, "iscrowd": 0} for i, a in enumerate(DETECTIONS[0].to_coco())],
    }
    objects["annotations"][0]["category_id"] = 2  # its region says 1
    (work / "instances.json").write_text(json.dumps(objects))
    given = ("--store", work / "d.h5", "--instances", work / "instances.json", "--out")
    assert run(*given, work / "r.html").exit_code == 0
    page = (work / "r.html").read_text(encoding="utf-8")
    assert '<tr><th scope="row">cat</th><td>dog</td><td>1</td><td>33%</td></tr>' in page
    (work / "instances.json").write_text(json.dumps({"images": [], "annotations": [], "categories": CLASSES}))
    result = run(*given, work / "no.html")
    assert result.exit_code == 2 and "has none of the images of" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "nothing to report: give at least one of --run, --store and --metrics"),
        (("--store", "no.h5"), "--store no.h5: no such file"),
        (("--store", "d.h5", "--dataset", "refcoco"), "--dataset and --split-by: give both"),
        (("--store", "d.h5", "--predictions", "detection.json"), "--predictions needs --refer-root"),
        (("--store", "d.h5", "--original-instances", "a.json"), "--original-instances a.json: no such file"),
        (("--store", "d.h5", "--original-instances", "detection.json"), "--original-instances needs --trained-on"),
        (("--store", "d.h5", "--made-from", "detection.json"), "--original-instances needs --trained-on"),
        (("--metrics", "detection.json", "--images", "images"), "--images needs --store"),
        (("--metrics", "detection.json", "--metrics", "detection.json"), "a second output of evaluate"),
        (("--metrics", "other.json"), "not metrics of evaluate-on-refer or evaluate --json, but a, b"),
        (("--metrics", "broken.json"), "--metrics broken.json: not JSON"),
        (("--metrics", "images"), "--metrics images/metrics.json: no such file"),
        (("--metrics", "detection.json", "--steps", "other.json"), "other.json: not a list of steps"),
        (("--run", "images"), "--run images: "),
    ],
)
def test_bad_input_is_one_line(
    work: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(work)
    Path("other.json").write_text('{"a": 1, "b": 2}')
    Path("broken.json").write_text("{")
    result = run(*args, "--out", "new.html")
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not Path("new.html").exists()
    assert "exists; choose another --out" in run(*args, "--out", "d.h5").stderr


def test_a_store_says_what_it_is_of(work: Path) -> None:
    from refdet.report.refer_parts import dataset_of

    with open_store(work / "d.h5") as store:
        store.options["image_list"] = "refcoco+/unc/val,testA"
        assert dataset_of(store) == "refcoco+/unc"
        store.options["image_list"] = "instances.json"
        assert dataset_of(store) == "" and store.provenance == PROVENANCE
