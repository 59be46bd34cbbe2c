"""An extraction resumes after its detector was validated, and the store's record of the selection claims no more."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from part_extraction import run_part
from resumable_extraction import RECIPE_HEADER, load, run
from store_examples import PLAN, contents

from refdet import store
from refdet.data.coco import ImageRecord
from refdet.errors import InputError, Interrupted
from refdet.extraction import open_extraction
from refdet.extraction.selection_record import merge_provenances
from refdet.splits.inspect import describe
from refdet.store import Header
from refdet.structures.provenance import Provenance, Selection


def file(name: str) -> Provenance:
    """Provenance of a file."""
    return Provenance(f"{name}.json", "ab" * 32, 2, 3, (name * 64)[:64], {})


TRAINED = file("a")
LAST, LAST_B, LAST_C = Selection(False), Selection(False, (file("b"),)), Selection(False, (file("c"),))
LAST_BC, BEST_B, BEST_C = (
    Selection(False, (file("b"), file("c"))),
    Selection(True, (file("b"),)),
    Selection(True, (file("c"),)),
)
# records of the selection of the same weights at two times, and what a store must say
MERGED = [
    (LAST, LAST_B, LAST_B), (LAST_B, LAST, LAST_B), (LAST_B, LAST_C, LAST_BC), (LAST, LAST, LAST),
    (None, LAST_B, None), (LAST_B, None, None), (None, BEST_B, BEST_B), (BEST_B, None, BEST_B),
    (LAST_C, BEST_B, BEST_B), (BEST_B, LAST_C, BEST_B), (BEST_B, BEST_B, BEST_B),
]  # fmt: skip


def header(selection: Selection | None) -> Header:
    return replace(RECIPE_HEADER, provenance=replace(TRAINED, selection=selection).to_json())


def selection_of(provenance: dict[str, Any]) -> Selection | None:
    return Provenance.from_json(provenance).selection


@pytest.mark.parametrize(("first", "second", "merged"), MERGED)
def test_the_store_has_the_record_that_claims_less(
    tmp_path: Path, first: Selection | None, second: Selection | None, merged: Selection | None
) -> None:
    out = tmp_path / "a.h5"
    with pytest.raises(Interrupted):
        run(out, stop_at=1, header=header(first))
    with pytest.raises(Interrupted):
        run(out, stop_at=2, header=header(second), resume=True)
    unfinished = describe(tmp_path / "a.h5.parts")
    assert selection_of(unfinished["provenance"]) == merged
    # resumed with either record: the other one was recorded
    assert run(out, header=header(first), resume=True).computed == 5
    with store.open(out) as found:
        assert selection_of(found.provenance) == merged
    run(tmp_path / "b.h5", header=header(merged))
    assert contents(out) == contents(tmp_path / "b.h5")


def test_a_record_of_another_process_is_read_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, check = tmp_path / "a.h5", open_extraction.check_resumable
    with pytest.raises(Interrupted):
        run(out, stop_at=1, header=header(LAST))

    def check_then_wait(*args: Any) -> Any:
        found = check(*args)
        monkeypatch.setattr(open_extraction, "check_resumable", check)
        with pytest.raises(Interrupted):
            run(out, stop_at=2, header=header(LAST_B), resume=True)
        return found

    monkeypatch.setattr(open_extraction, "check_resumable", check_then_wait)
    run(out, header=header(LAST), resume=True)
    with store.open(out) as found:
        assert selection_of(found.provenance) == LAST_B


def test_a_part_that_merges_has_the_record_of_a_later_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "a.h5"
    for part, selection in (("1/3", LAST), ("2/3", LAST_B), ("3/3", LAST)):
        options = {"header": replace(header(selection), options=PLAN.options)}
        run_part(out, part, **options)
    assert "the record of how the weights of `checkpoint` were selected differs" in caplog.text
    with store.open(out) as found:
        assert selection_of(found.provenance) == LAST_B


@pytest.mark.parametrize(
    "other",
    [
        replace(RECIPE_HEADER, provenance=replace(TRAINED, images=3, selection=LAST_B).to_json()),
        replace(RECIPE_HEADER, provenance=replace(TRAINED, weights="w", selection=LAST_B).to_json()),
        replace(RECIPE_HEADER, provenance=TRAINED.to_json() | {"selection": {"by_validation": 1}}),
        replace(header(LAST_B), classes=[{"id": 3, "name": "cat"}]),
        replace(header(LAST_B), recipe="name: other"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_differences_are_still_refused(tmp_path: Path, other: Header, finished: bool) -> None:
    out = tmp_path / "a.h5"
    if finished:
        run(out, header=header(LAST))
    else:
        with pytest.raises(Interrupted):
            run(out, stop_at=2, header=header(LAST))
    with pytest.raises(InputError, match="of the checkpoint"):
        run(out, header=other, resume=True)


def test_weights_chosen_on_two_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path / "a.h5", stop_at=2, header=header(BEST_B))
    with pytest.raises(InputError, match="another provenance of the checkpoint"):
        run(tmp_path / "a.h5", header=header(BEST_C), resume=True)


@pytest.mark.parametrize(("first", "second", "merged"), MERGED)
def test_a_complete_store_is_accepted_unless_it_claims_more(
    tmp_path: Path, first: Selection | None, second: Selection | None, merged: Selection | None
) -> None:
    run(tmp_path / "a.h5", header=header(first))
    claims = [selection is not None and not selection.by_validation for selection in (first, merged)]
    if first == merged or all(claims):
        assert run(tmp_path / "a.h5", header=header(second), resume=True).computed == 0
    else:
        with pytest.raises(InputError, match="another selection by validation, or none recorded, of the checkpoint"):
            run(tmp_path / "a.h5", header=header(second), resume=True)
    with store.open(tmp_path / "a.h5") as found:
        assert selection_of(found.provenance) == first


def test_a_repair_keeps_the_record_that_claims_less(tmp_path: Path) -> None:
    def load_all_but_one(record: ImageRecord) -> Any:
        if record.id == 4:
            raise InputError("damaged")
        return load(record)

    for name, first, second, merged in (("a", BEST_B, LAST, BEST_B), ("b", LAST, LAST_B, LAST_B)):
        out = tmp_path / f"{name}.h5"
        run(out, header=header(first), load=load_all_but_one)
        assert run(out, header=header(second), resume=True).computed
        with store.open(out) as found:
            assert selection_of(found.provenance) == merged and not found.errors


def test_merging_is_symmetric_up_to_the_order_of_files() -> None:
    def merge(first: Selection | None, second: Selection | None) -> Any:
        tree = merge_provenances(header(first).provenance, header(second).provenance)
        if tree is None:
            return "excluded"
        selection = selection_of(tree)
        return selection and (selection.by_validation, sorted(file.source for file in selection.validated_on))

    selections = (None, LAST, LAST_B, LAST_C, LAST_BC, BEST_B, BEST_C)
    for first, second in product(selections, repeat=2):
        assert merge(first, second) == merge(second, first)
    assert [merge(BEST_B, selection) for selection in selections].count("excluded") == 1
