"""What evaluate-on-refer writes and prints: metrics.json, a tidy CSV, a figure, tables."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from evaluate_examples import regions, write_refer, write_store
from refdet.cli.main import main

from refdet.evaluate.tables import COLUMNS, frame, tables


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, str, list[str]]:
    """The folder of a run with predictions, what it printed, and its arguments but --out."""
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


def test_csv_holds_every_number_of_the_json(written: tuple[Path, str, list[str]]) -> None:
    metrics = json.loads((written[0] / "metrics.json").read_text())
    table = pd.read_csv(written[0] / "metrics.csv", dtype={"metric": str})
    pd.testing.assert_frame_equal(table, frame(metrics), check_dtype=False)
    assert tuple(table.columns) == COLUMNS and not table.duplicated(list(COLUMNS[:-1])).any()
    val = metrics["splits"]["val"]
    rows = {
        (g, m): v for s, g, m, v in table[["split", "group", "metric", "value"]].itertuples(index=False) if s == "val"
    }
    assert rows["counts", "images"] == 1 and rows["detection.bbox", "AP50"] == val["detection"]["bbox"]["AP50"]
    assert rows["recall_by_regions", "all"] == 1 and rows["comprehension", "accuracy@0.5"] == 0.5
    assert rows["comprehension", "missing"] == 1 and rows["referent_recall", "0.5"] == 1
    wide = tables(frame(metrics))["recall_by_regions"]
    assert list(wide.columns) == ["1", "2", "5", "10", "20", "50", "100", "all"]
    assert wide.loc["testA"].tolist() == [0.0] + [1.0] * 7


def test_figure_and_tables_show_both_splits(written: tuple[Path, str, list[str]]) -> None:
    out, printed, _ = written
    words = "".join(ElementTree.parse(out / "recall.svg").getroot().itertext())
    assert "val" in words and "testA" in words and "all" in words and "toy me" in words
    for text in ("recall@0.5 by regions kept", "comprehension: boxes", "val: 1 of 2 sentences have no answer"):
        assert text in printed
    assert "nan" not in printed and "comprehension: masks" not in printed


def test_mattnets_protocol_is_used_and_recorded(written: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    """The object of testA is one pixel wide, which to MAttNet's IoU is none."""
    arguments = [*written[2], "--protocol", "mattnet", "--json", "--out", str(tmp_path / "n")]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    usual, other = json.loads((written[0] / "metrics.json").read_text()), json.loads(result.stdout)
    assert (usual["protocol"], other["protocol"]) == ("standard", "mattnet")
    assert usual["splits"]["testA"]["comprehension"]["accuracy@0.5"] == 1
    thin = other["splits"]["testA"]
    assert thin["comprehension"]["accuracy@0.5"] == 0 and thin["referent_recall"]["0.5"] == 0
    assert other["splits"]["val"] == usual["splits"]["val"]
    assert thin["detection"] == usual["splits"]["testA"]["detection"]
