"""`refdet report`: pages from some or all of its inputs, and its errors."""

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
def folder(tmp_path: Path) -> Path:
    """A folder with the store d.h5, a REFER folder, images/ and detection.json, metrics of a detector."""
    write_store(tmp_path / "d.h5", DETECTIONS)
    write_dataset(tmp_path / "refer")
    (tmp_path / "images").mkdir()
    for regions in DETECTIONS[:2]:
        Image.new("RGB", (WIDTH, HEIGHT), "#888").save(tmp_path / "images" / regions.file_name)
    (tmp_path / "detection.json").write_text(json.dumps({"bbox": RATES, "segm": None}))
    return tmp_path


def test_report_on_a_store_alone(folder: Path) -> None:
    result = run("--store", folder / "d.h5", "--out", folder / "r.html", "--json")
    assert result.exit_code == 0, result.stderr
    page = (folder / "r.html").read_text(encoding="utf-8")
    assert json.loads(result.stdout) == {"out": str(folder / "r.html"), "bytes": len(page.encode())}
    for text in ("d.h5", "cannot be read", "COCO_train2014_000000000005.jpg", "Detector of"):
        assert text in page, text
    assert "1.0 to" not in page  # the last bin of scores ends at 1.0
    assert "image/jpeg" not in page and "Referring expressions" not in page


@pytest.mark.parametrize("name", ["", "model.json", "model.safetensors"])
def test_a_run_can_be_given_by_its_folder_or_a_file_in_it(tmp_path: Path, name: str) -> None:
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "model.safetensors").write_bytes(b"weights")
    meta = {"recipe": {"name": "demo"}, "step": 40, "provenance": PROVENANCE}
    (run_folder / "model.json").write_text(json.dumps(meta))
    result = run("--run", run_folder / name, "--out", tmp_path / "r.html")
    assert result.exit_code == 0, result.stderr
    assert "demo recipe, 40 steps" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_report_on_metrics_of_evaluate_alone(folder: Path) -> None:
    assert run("--metrics", folder / "detection.json", "--out", folder / "r.html").exit_code == 0
    assert "0.870" in (folder / "r.html").read_text(encoding="utf-8")


def test_report_on_a_store_with_refer_images_and_answers(folder: Path) -> None:
    """The store is evaluated on REFER, and wrong answers are drawn beside the referents."""
    sentences = [sentence for ref in refs_of_testb(folder) for sentence in ref["sentences"]]
    answers = [{"sent_id": sentence["sent_id"], "box": [0, 0, 1, 1]} for sentence in sentences]
    (folder / "answers.json").write_text(json.dumps(answers))
    result = run(
        "--store", folder / "d.h5", "--refer-root", folder / "refer", "--dataset", "refcoco", "--split-by", "unc",
        "--images", folder / "images", "--predictions", folder / "answers.json", "--out", folder / "r.html",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    page = (folder / "r.html").read_text(encoding="utf-8")
    for text in ("refcoco unc testB", "Wrong answers", "answer: IoU", "Where the detector errs", "By category"):
        assert text in page, text
    assert f"{len(answers)} of {len(answers)} answers are wrong" in page and page.count("image/jpeg") > len(answers) / 2


def test_objects_on_unusable_images_are_said_to_be_left_out_of_the_ceiling(folder: Path) -> None:
    result = run(
        "--store", folder / "d.h5", "--refer-root", folder / "refer", "--dataset", "refcoco", "--split-by", "unc",
        "--out", folder / "r.html",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    page = " ".join((folder / "r.html").read_text(encoding="utf-8").split())
    assert "refcoco unc val: 1 of 1 image could not be used" in page
    assert "1 object on images without usable regions is not counted" in page


def test_ap_is_not_said_to_be_on_val_images(folder: Path) -> None:
    """The output of evaluate does not say which images it is about."""
    assert run("--metrics", folder / "detection.json", "--out", folder / "r.html").exit_code == 0
    assert "val images" not in (folder / "r.html").read_text(encoding="utf-8")


def refs_of_testb(folder: Path) -> list[dict]:
    from refer import REFER

    return [ref for ref in REFER(folder / "refer", "refcoco", "unc").data["refs"] if ref["split"] == "testB"]


def test_missing_images_are_counted_and_an_error_if_all_are_missing(folder: Path) -> None:
    (folder / "images" / DETECTIONS[0].file_name).unlink()
    args = ("--store", folder / "d.h5", "--images", folder / "images", "--out")
    result = run(*args, folder / "r.html")
    assert result.exit_code == 0 and "1 image could not be read, first: " in result.stderr
    assert "1 image could not be read" in (folder / "r.html").read_text(encoding="utf-8")
    (folder / "images" / DETECTIONS[1].file_name).unlink()
    result = run(*args, folder / "no.html")
    assert result.exit_code == 2 and "lacks all 2 images" in result.stderr and not (folder / "no.html").exists()


def test_annotated_objects_give_the_confusion_of_categories(folder: Path) -> None:
    instances = {
        "images": [{"id": r.image_id, "file_name": r.file_name, "height": HEIGHT, "width": WIDTH} for r in DETECTIONS],
        "categories": CLASSES,
        "annotations": [a | {"id": 1 + i, "iscrowd": 0} for i, a in enumerate(DETECTIONS[0].to_coco())],
    }
    instances["annotations"][0]["category_id"] = 2  # cat, but its region is a dog (1)
    (folder / "instances.json").write_text(json.dumps(instances))
    options = ("--store", folder / "d.h5", "--instances", folder / "instances.json", "--out")
    assert run(*options, folder / "r.html").exit_code == 0
    page = (folder / "r.html").read_text(encoding="utf-8")
    assert '<tr><th scope="row">cat</th><td>dog</td><td>1</td><td>33%</td></tr>' in page
    (folder / "instances.json").write_text(json.dumps({"images": [], "annotations": [], "categories": CLASSES}))
    result = run(*options, folder / "no.html")
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
def test_invalid_input_is_one_error_line_and_writes_no_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(folder)
    Path("other.json").write_text('{"a": 1, "b": 2}')
    Path("broken.json").write_text("{")
    result = run(*args, "--out", "new.html")
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not Path("new.html").exists()
    assert "exists; choose another --out" in run(*args, "--out", "d.h5").stderr


def test_dataset_of_a_store_is_read_from_its_image_list(folder: Path) -> None:
    from refdet.report.refer_parts import dataset_of

    with open_store(folder / "d.h5") as store:
        store.options["image_list"] = "refcoco+/unc/val,testA"
        assert dataset_of(store) == "refcoco+/unc"
        store.options["image_list"] = "instances.json"
        assert dataset_of(store) == "" and store.provenance == PROVENANCE
