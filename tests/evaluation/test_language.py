"""Metrics of generated expressions: equal to plain pycocoevalcap, with and without Java, and clear errors."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from evaluate_examples import regions, write_refer, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from refdet.cli.main import main
from refdet.errors import InputError, RuntimeFailure
from refdet.evaluation import language
from refdet.evaluation.language import Scorers, load_expressions
from refdet.evaluation.refer_benchmark import evaluate_on_refer

pytestmark = pytest.mark.slow

TRUTH = {1: ["the left man", "man in red shirt"], 2: ["a woman with a yellow t - shirt"], 5: ["dog", "the brown dog"]}
GENERATED = {1: "the man in the red shirt", 2: "woman, on the left!", 5: "a brown dog"}
HUMAN = st.lists(st.text(max_size=12), min_size=1, max_size=3)
METEOR = 0.28182759195196844  # of GENERATED, computed by calling pycocoevalcap 1.2 directly
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java")
needs_library = pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is None, reason="no pycocoevalcap")


@pytest.fixture(scope="module")
def scores_with_java() -> dict[str, Any] | None:
    """Scores computed with Java, once per module, as METEOR takes seconds to start; None without Java."""
    if shutil.which("java") is None:
        return None
    return Scorers(java=True).scores(TRUTH, GENERATED)


@needs_library
@needs_java
def test_scores_equal_pycocoevalcap(scores_with_java: dict[str, Any]) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    human = PTBTokenizer().tokenize({i: [{"caption": s} for s in sents] for i, sents in TRUTH.items()})
    machine = PTBTokenizer().tokenize({i: [{"caption": s}] for i, s in GENERATED.items()})
    bleu, _ = Bleu(4).compute_score(human, machine, verbose=0)
    expected = {f"BLEU-{n}": value for n, value in enumerate(bleu, 1)}
    expected["ROUGE-L"] = Rouge().compute_score(human, machine)[0]
    expected["CIDEr"] = Cider().compute_score(human, machine)[0]
    expected["METEOR"] = METEOR
    about = {"refs": 3, "missing": 0, "tokenizer": "ptb"}
    assert scores_with_java == pytest.approx(expected | about)


@needs_library
@needs_java
def test_line_breaks_and_empty_sentences_do_not_shift_the_tokens() -> None:
    """PTBTokenizer works line by line, so line breaks in sentences and empty sentences must not shift the others."""
    odd = {1: ["a\u2028b\nc", "", "x ||| y", "\ud800"], 2: ["   ", "..."], 5: ["dog\x85", "\x1c"]}
    clean = {ref_id: [language._clean(text) for text in texts] for ref_id, texts in odd.items()}
    assert Scorers(java=True)._tokenize(clean) == {1: ["a b c", "", "x y", ""], 2: ["", ""], 5: ["dog", ""]}


@needs_library
def test_only_meteor_needs_java(scores_with_java: dict[str, Any] | None) -> None:
    found = Scorers(java=False).scores(TRUTH, GENERATED)
    assert found["METEOR"] is None and found["tokenizer"] == "blanks"
    if scores_with_java is not None:
        assert all(
            found[name] == pytest.approx(scores_with_java[name]) for name in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr")
        )


@needs_library
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.dictionaries(st.integers(0, 9), st.tuples(HUMAN, st.none() | st.text(max_size=12)), min_size=1, max_size=4))
def test_any_text_has_scores_in_range(texts: dict[int, Any]) -> None:
    truth = {ref_id: human for ref_id, (human, _) in texts.items()}
    generated = {ref_id: text for ref_id, (_, text) in texts.items() if text is not None}
    found = Scorers(java=False).scores(truth, generated)
    assert found["missing"] == len(truth) - len(generated)
    assert all(0 <= found[name] <= 1.0001 for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"))
    assert 0 <= found["CIDEr"] <= 10.0001


@needs_library
def test_scores_of_identical_and_of_missing_expressions() -> None:
    same = Scorers(java=False).scores(TRUTH, {i: sents[0] for i, sents in TRUTH.items()})
    assert same["BLEU-1"] == pytest.approx(1) and same["ROUGE-L"] == pytest.approx(1)
    none = Scorers(java=False).scores(TRUTH, {})
    assert none["missing"] == 3 and none["CIDEr"] == 0 and none["ROUGE-L"] == 0 and none["BLEU-1"] < 1e-6


@needs_library
def test_errors_of_a_broken_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(RuntimeFailure, match="PTBTokenizer returned 1 of .*java -version"):
        Scorers.find().scores(TRUTH, GENERATED)
    with pytest.raises(RuntimeFailure, match="METEOR failed.*java -version"):
        language._meteor({1: ["a"]}, {1: ["a"]})


def test_a_missing_library_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pycocoevalcap", "pycocoevalcap.bleu", "pycocoevalcap.bleu.bleu"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install pycocoevalcap"):
        evaluate_on_refer(tmp_path / "a.h5", tmp_path, "toy", "me", expressions=tmp_path / "g.json")


@needs_library
def test_expressions_are_scored_per_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    box = {"image_id": 1, "bbox": [10, 10, 20, 20], "category_id": 1}
    objects = [{**box, "split": "val", "sents": ("red dog", "a dog")}, {**box, "split": "testA", "sents": ("a cat",)}]
    root = write_refer(tmp_path / "refer", objects)
    write_store(tmp_path / "a.h5", [regions(1, [[10, 10, 30, 30]])], masks=False)
    path = tmp_path / "g.json"
    path.write_text(json.dumps([{"ref_id": 0, "sent": "Red dog."}]))
    found = evaluate_on_refer(tmp_path / "a.h5", root, "toy", "me", expressions=path)["splits"]
    assert found["val"]["language"]["BLEU-2"] == pytest.approx(1) and found["val"]["language"]["missing"] == 0
    assert found["testA"]["language"]["BLEU-1"] < 1e-6 and found["testA"]["language"]["missing"] == 1
    assert "comprehension" not in found["val"]
    arguments = ["--store", tmp_path / "a.h5", "--refer-root", root, "--dataset", "toy", "--split-by", "me",
                 "--expressions", path, "--out", tmp_path / "out"]  # fmt: skip
    result = CliRunner().invoke(main, ["evaluate-on-refer", *map(str, arguments)], catch_exceptions=False)
    assert "testA: 1 of 1 ref has no generated expression, scored as an empty one" in result.stderr
    assert "counted as wrong" not in result.stderr


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "a JSON object; it must be a list of objects with ref_id and sent"),
        ([3], "entry 0: it must be an object with an integer ref_id and a str"),
        ([{"ref_id": 1}], "entry 0: it must be"),
        ([{"ref_id": True, "sent": "a"}], "entry 0: it must be"),
        ([{"ref_id": 1, "sent": "a"}, {"ref_id": 8, "sent": "a"}], "entry 1: ref 8 is not in this dataset"),
        ([{"ref_id": 1, "sent": "a"}, {"ref_id": 1, "sent": "b"}], "entry 1: duplicate entry for ref 1; remove one"),
    ],
)
def test_invalid_expressions_are_named(tmp_path: Path, entries: Any, message: str) -> None:
    path = tmp_path / "g.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(InputError, match=message) as raised:
        load_expressions(path, {1, 2})
    assert "g.json" in str(raised.value)
