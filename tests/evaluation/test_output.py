"""What evaluate-on-refer writes and prints: metrics.json, a tidy CSV, a figure, tables."""

from __future__ import annotations

import csv
import errno
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import h5py
import pandas as pd
import pytest
from click.testing import CliRunner
from evaluate_examples import regions, write_refer, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from refdet.cli.main import main
from refdet.evaluation.refer_benchmark import evaluate_on_refer
from refdet.evaluation.tables import COLUMNS, tables, to_dataframe, write
from refdet.files.spreadsheet_text import spreadsheet_cell
from refdet.report.recall_charts import recall_figure
from refdet.report.templates import ENVIRONMENT


@pytest.fixture
def evaluation_output(tmp_path: Path) -> tuple[Path, str, list[str]]:
    """The output folder of an evaluation with predictions, the printed text, and the arguments without --out."""
    box = {"image_id": 1, "category_id": 1}
    objects = [{**box, "bbox": [10, 10, 20, 20], "split": "val"}, {**box, "bbox": [50, 50, 1, 30], "split": "testA"}]
    root = write_refer(tmp_path / "refer", objects)
    write_store(tmp_path / "a.h5", [regions(1, [[10, 10, 30, 30], [50, 50, 51, 80]])], masks=False)
    answers = [{"sent_id": 0, "region": 0}, {"sent_id": 10, "region": 1}, {"sent_id": 11, "region": 1}]
    (tmp_path / "p.json").write_text(json.dumps(answers))
    arguments = ["evaluate-on-refer", "--features", str(tmp_path / "a.h5"), "--refer-root", str(root),
                 "--dataset", "toy", "--split-by", "me", "--predictions", str(tmp_path / "p.json")]  # fmt: skip
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "m")], catch_exceptions=False)
    return tmp_path / "m", result.output, arguments


@pytest.mark.parametrize("name", ["metrics.json", "metrics.csv", "recall.svg"])
@pytest.mark.parametrize("meanwhile", [False, True])
def test_no_file_of_the_folder_is_overwritten(
    evaluation_output: tuple[Path, str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    meanwhile: bool,
) -> None:
    out = tmp_path / "other"
    out.mkdir()

    def evaluate(*args: Any, **options: Any) -> dict[str, Any]:
        (out / name).write_text("mine")  # as if by another process that was started at the same time
        return evaluate_on_refer(*args, **options)

    if meanwhile:
        monkeypatch.setattr("refdet.evaluation.refer_benchmark.evaluate_on_refer", evaluate)
    else:
        (out / name).write_text("mine")
    result = CliRunner().invoke(main, [*evaluation_output[2], "--out", str(out)])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"error: {out / name} exists; choose another --out or remove it"
    assert (out / name).read_text() == "mine"
    assert list(out.iterdir()) == [out / name]


def test_a_full_disk_leaves_no_file(
    example_metrics: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError):
        write(tmp_path / "m", example_metrics, "<svg/>")
    assert list((tmp_path / "m").iterdir()) == []


def test_csv_contains_every_number_of_the_json(evaluation_output: tuple[Path, str, list[str]]) -> None:
    metrics = json.loads((evaluation_output[0] / "metrics.json").read_text())
    table = pd.read_csv(evaluation_output[0] / "metrics.csv", dtype={"metric": str})
    pd.testing.assert_frame_equal(table, to_dataframe(metrics), check_dtype=False, check_column_type=False)
    assert tuple(table.columns) == COLUMNS and not table.duplicated(list(COLUMNS[:-1])).any()
    val = metrics["splits"]["val"]
    rows = {
        (g, m): v for s, g, m, v in table[["split", "group", "metric", "value"]].itertuples(index=False) if s == "val"
    }
    assert rows["counts", "images"] == 1 and rows["detection.bbox", "AP50"] == val["detection"]["bbox"]["AP50"]
    assert rows["recall@k", "all"] == 1 and rows["comprehension", "accuracy@0.5"] == 0.5
    assert rows["comprehension", "missing"] == 1 and rows["referent_recall", "0.5"] == 1
    wide = tables(to_dataframe(metrics))["recall@k"]
    assert list(wide.columns) == ["1", "2", "5", "10", "20", "50", "100", "all"]
    assert wide.loc["testA"].tolist() == [0.0] + [1.0] * 7


def test_figure_and_tables_show_both_splits(evaluation_output: tuple[Path, str, list[str]]) -> None:
    out, printed, _ = evaluation_output
    words = "".join(ElementTree.parse(out / "recall.svg").getroot().itertext())
    assert "val" in words and "testA" in words and "all" in words and "toy me" in words
    for text in (
        "recall@0.5 with the top k regions",
        "comprehension: boxes",
        "val: 1 of 2 sentences has no answer",
    ):
        assert text in printed
    assert "nan" not in printed and "comprehension: masks" not in printed


def test_mattnet_protocol_is_used_and_recorded(evaluation_output: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    """The object of testA is one pixel wide, so MAttNet's IoU with it is always 0."""
    arguments = [*evaluation_output[2], "--protocol", "mattnet", "--json", "--out", str(tmp_path / "n")]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    usual, other = json.loads((evaluation_output[0] / "metrics.json").read_text()), json.loads(result.stdout)
    assert (usual["protocol"], other["protocol"]) == ("standard", "mattnet")
    assert usual["splits"]["testA"]["comprehension"]["accuracy@0.5"] == 1
    thin = other["splits"]["testA"]
    assert thin["comprehension"]["accuracy@0.5"] == 0 and thin["referent_recall"]["0.5"] == 0
    assert other["splits"]["val"] == usual["splits"]["val"]
    assert thin["detection"] == usual["splits"]["testA"]["detection"]


NAMES = ['=HYPERLINK("http://x/"&A1)', "@SUM(1)", "+1", "-2+3", "\t=1", "\r=1", "\n=1", "a\r=1", "a\r\n=1",
         "＝1", " =1", "<script>alert(1)</script>", "]]>", "&amp;", '"', "a,b", "a\x1b[31mb", "\x00", "\ud800",
         "\ufffe", "val"]  # fmt: skip
TEMPLATE = ENVIRONMENT.from_string('<a b="{{ text }}">{{ text }}</a>')
FORMULA = "=+-@\t\r\n＝＋－＠"


@pytest.fixture(scope="module")
def example_metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("metrics")
    root = write_refer(folder / "refer", [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "split": "val"}])
    write_store(folder / "a.h5", [regions(1, [[10, 10, 30, 30]])], masks=False)
    return evaluate_on_refer(folder / "a.h5", root, "toy", "me")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_are_never_formulas_or_markup(example_metrics: dict[str, Any], tmp_path: Path, name: str) -> None:
    """Names of datasets and splits are untrusted text from files; numbers must not change."""
    metrics = {**example_metrics, "dataset": name, "split_by": name, "splits": {name: example_metrics["splits"]["val"]}}
    write(tmp_path, metrics, recall_figure(metrics))
    with (tmp_path / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    plain = to_dataframe(example_metrics)
    assert len(rows) == len(plain)
    readable = name if name not in ("\x00", "\ud800", "\ufffe") else "\ufffd"
    readable = " ".join(readable.replace("\x1b", "\ufffd").splitlines())
    for row, value in zip(rows, plain["value"], strict=True):
        assert not any(cell.startswith(tuple(FORMULA)) for cell in row.values())
        for column in ("dataset", "split_by", "split"):
            assert row[column] == ("'" + readable if readable.strip().startswith(tuple(FORMULA)) else readable)
        assert (row["value"] == "") == (value != value) and (row["value"] == "" or float(row["value"]) == value)
    tree = ElementTree.parse(tmp_path / "recall.svg")
    assert all(element.tag.split("}")[1] != "script" for element in tree.iter())
    words = "".join(tree.getroot().itertext())
    assert " ".join(readable.split()) in " ".join(words.split())
    assert json.loads((tmp_path / "metrics.json").read_text())["dataset"] == name


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(st.characters(codec=None)))
def test_any_text_is_a_safe_cell_and_valid_xml(text: str) -> None:
    cell = spreadsheet_cell(text)
    assert not cell.lstrip().startswith(tuple(FORMULA)) and "\r" not in cell and "\n" not in cell
    assert len(cell) <= len(text) + 1 and spreadsheet_cell(cell) == cell
    root = ElementTree.fromstring(TEMPLATE.render(text=text))
    expected = "".join("\ufffd" if ord(c) < 32 and c not in "\t\r\n" or c in "\ufffe\uffff" or "\ud800" <= c <= "\udfff"
                    else c for c in text)  # fmt: skip
    assert (root.text or "") == expected.replace("\r\n", "\n").replace("\r", "\n") and len(root) == 0


@pytest.mark.parametrize("provenance", [{}, {"source": 5}])
def test_a_store_with_invalid_provenance_is_refused(tmp_path: Path, provenance: dict[str, Any]) -> None:
    root = write_refer(tmp_path / "refer", [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "split": "val"}])
    write_store(tmp_path / "a.h5", [regions(1, [[1, 1, 9, 9]])], masks=False)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file.attrs["provenance"] = json.dumps(provenance)
    out = tmp_path / "m"
    done = CliRunner().invoke(main, ["evaluate-on-refer", "--store", str(tmp_path / "a.h5"), "--refer-root", str(root),
                                     "--dataset", "toy", "--split-by", "me", "--out", str(out)])  # fmt: skip
    assert done.exit_code == 2 and done.stderr.startswith(f"error: {tmp_path / 'a.h5'}: provenance: "), done.stderr
    assert done.stderr.count("\n") == 1 and not out.exists()
