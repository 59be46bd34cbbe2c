"""Generated expressions: pycocoevalcap as it is used by hand, clear errors, and what goes without Java."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from evaluate_examples import regions, write_refer, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from refdet.errors import InputError, RuntimeFailure
from refdet.evaluation import language
from refdet.evaluation.language import Scorers, load_expressions
from refdet.evaluation.refer_benchmark import evaluate_on_refer

pytestmark = pytest.mark.slow

TRUTH = {1: ["the left man", "man in red shirt"], 2: ["a woman with a yellow t - shirt"], 5: ["dog", "the brown dog"]}
SAID = {1: "the man in the red shirt", 2: "woman, on the left!", 5: "a brown dog"}
PEOPLE = st.lists(st.text(max_size=12), min_size=1, max_size=3)
METEOR = 0.28182759195196844
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java")
needs_library = pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is None, reason="no pycocoevalcap")


@pytest.fixture(scope="module")
def with_java() -> dict[str, Any] | None:
    """Once, since METEOR reads its tables for seconds."""
    if shutil.which("java") is None:
        return None
    return Scorers(java=True).scores(TRUTH, SAID)


@needs_library
@needs_java
def test_scores_are_those_of_the_library(with_java: dict[str, Any]) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    people = PTBTokenizer().tokenize({i: [{"caption": s} for s in sents] for i, sents in TRUTH.items()})
    machine = PTBTokenizer().tokenize({i: [{"caption": s}] for i, s in SAID.items()})
    bleu, _ = Bleu(4).compute_score(people, machine, verbose=0)
    wanted = {f"BLEU-{n}": value for n, value in enumerate(bleu, 1)}
    wanted["ROUGE-L"] = Rouge().compute_score(people, machine)[0]
    wanted["CIDEr"] = Cider().compute_score(people, machine)[0]
    wanted["METEOR"] = METEOR  # pycocoevalcap 1.2 by hand
    about = {"refs": 3, "missing": 0, "tokenizer": "ptb"}
    assert with_java == pytest.approx(wanted | about)


@needs_library
@needs_java
def test_odd_texts_stay_with_their_refs() -> None:
    """PTBTokenizer goes by lines: line ends of all kinds and empty sentences must not shift them."""
    odd = {1: ["a\u2028b\nc", "", "x ||| y", "\ud800"], 2: ["   ", "..."], 5: ["dog\x85", "\x1c"]}
    clean = {ref_id: [language._clean(text) for text in texts] for ref_id, texts in odd.items()}
    assert Scorers(java=True)._tokenize(clean) == {1: ["a b c", "", "x y", ""], 2: ["", ""], 5: ["dog", ""]}


@needs_library
def test_without_java(with_java: dict[str, Any] | None) -> None:
    found = Scorers(java=False).scores(TRUTH, SAID)
    assert found["METEOR"] is None and found["tokenizer"] == "blanks"
    if with_java is not None:
        assert all(found[name] == pytest.approx(with_java[name]) for name in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"))


@needs_library
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.dictionaries(st.integers(0, 9), st.tuples(PEOPLE, st.none() | st.text(max_size=12)), min_size=1, max_size=4))
def test_any_text_has_scores(texts: dict[int, Any]) -> None:
    truth = {ref_id: people for ref_id, (people, _) in texts.items()}
    said = {ref_id: text for ref_id, (_, text) in texts.items() if text is not None}
    found = Scorers(java=False).scores(truth, said)
    assert found["missing"] == len(truth) - len(said)
    assert all(0 <= found[name] <= 1.0001 for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"))
    assert 0 <= found["CIDEr"] <= 10.0001


@needs_library
def test_the_same_words_are_right_and_none_are_wrong() -> None:
    same = Scorers(java=False).scores(TRUTH, {i: sents[0] for i, sents in TRUTH.items()})
    assert same["BLEU-1"] == pytest.approx(1) and same["ROUGE-L"] == pytest.approx(1)
    none = Scorers(java=False).scores(TRUTH, {})
    assert none["missing"] == 3 and none["CIDEr"] == 0 and none["ROUGE-L"] == 0 and none["BLEU-1"] < 1e-6


@needs_library
def test_a_java_that_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(RuntimeFailure, match="PTBTokenizer returned 1 of .*java -version"):
        Scorers.find().scores(TRUTH, SAID)
    with pytest.raises(RuntimeFailure, match="METEOR failed.*java -version"):
        language._meteor({1: ["a"]}, {1: ["a"]})


def test_a_missing_library_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pycocoevalcap", "pycocoevalcap.bleu", "pycocoevalcap.bleu.bleu"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install pycocoevalcap"):
        evaluate_on_refer(tmp_path / "a.h5", tmp_path, "toy", "me", expressions=tmp_path / "g.json")


@needs_library
def test_expressions_are_measured_split_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({}, "a JSON object; it must be a list of objects with ref_id and sent"),
        ([3], "entry 0: it must be an object with an integer ref_id and a str"),
        ([{"ref_id": 1}], "entry 0: it must be"),
        ([{"ref_id": True, "sent": "a"}], "entry 0: it must be"),
        ([{"ref_id": 1, "sent": "a"}, {"ref_id": 8, "sent": "a"}], "entry 1: ref 8 is not in this dataset"),
        ([{"ref_id": 1, "sent": "a"}, {"ref_id": 1, "sent": "b"}], "entry 1: duplicate entry for ref 1; remove one"),
    ],
)
def test_bad_expressions_are_named(tmp_path: Path, entries: Any, says: str) -> None:
    path = tmp_path / "g.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(InputError, match=says) as raised:
        load_expressions(path, {1, 2})
    assert "g.json" in str(raised.value)
