"""gRefCOCO: refs with several targets or none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from refer_examples import GREFS, REFS, write

from refdet.splits.build import build_split
from refdet.splits.leak_audit import audit
from refer import REFER, ReferDataError, available, read_refs, target_ids


def test_refs_with_several_targets_or_none(tmp_path: Path) -> None:
    single = GREFS[2] | {"ann_id": 9, "category_id": 1}  # integers instead of lists
    nothing = GREFS[1] | {"ann_id": [], "category_id": []}
    write(tmp_path, [GREFS[0], nothing, single, GREFS[3]], "grefs(unc).json", "grefcoco")
    assert available(tmp_path) == [("grefcoco", "unc")]
    r = REFER(tmp_path, "grefcoco", "unc")
    assert r.generalized and list(r) == GREFS and [target_ids(one) for one in r] == [[7, 8], [], [9], [6, 9]]
    assert [[ann["id"] for ann in r.refToAnn[i]] for i in range(4)] == [[7, 8], [], [9], [6, 9]]
    assert [one["ref_id"] for one in r.annToRef[9]] == [2, 3] and -1 not in r.annToRef
    assert r.getRefIds(cat_ids=2) == [0] and r.getRefIds(cat_ids=-1) == [1] and r.getRefIds(cat_ids=1) == [0, 2, 3]
    assert r.getAnnIds(ref_ids=[0, 3]) == [6, 7, 8, 9] and r.getAnnIds(ref_ids=1) == []
    assert r.getRefBox(0) == [[1, 0, 4, 2], [2, 0, 4, 2]] and r.getRefBox(1) == [] and len(r.getRefBox(2)) == 1
    expected = np.zeros((6, 8), np.uint8)
    expected[:4, :4] = 1  # the square of annotation 9, which contains the mask of annotation 6
    for ref_id in (3, 2):
        assert np.array_equal(r.getMask(GREFS[3] | {"ref_id": ref_id})["mask"], expected)
    empty = r.getMask(r.Refs[1])
    assert empty["area"] == 0 and empty["mask"].shape == (6, 8) and not empty["mask"].any()
    r.Anns[9]["iscrowd"] = 1  # omitted, as by gRefCOCO's own API; annotation 6 covers 10 pixels
    assert r.getMask(r.Refs[3])["area"] == 10
    table = r.to_dataframe()
    assert table["targets"].tolist() == [2, 0, 1, 2]
    assert table["category"].tolist() == [["dog", "cat"], [], ["dog"], ["dog", "dog"]]
    assert table["x"].isna().tolist() == [True, True, False, True]


def test_the_api_of_grefcoco(tmp_path: Path) -> None:
    """The methods and results that code written for gRefCOCO's G_REFER uses."""
    r = REFER(write(tmp_path, GREFS, "grefs(unc).json", "grefcoco"), "grefcoco", "unc")
    assert r.availableSplits == ["train", "val"]
    assert r.loadAnns([-1]) == [None] and r.loadAnns(-1) == [None] and r.loadAnns(r.Refs[1]["ann_id"]) == [None]
    assert [ann and ann["id"] for ann in r.loadAnns([9, -1])] == [9, None]
    assert [r.loadAnns(ref["ann_id"]) for ref in r][0] == [r.Anns[7], r.Anns[8]]
    for nothing in (r.getMaskByRef(r.Refs[1]), r.getMaskByRef(ref_id=1), r.getMaskByRef(ref_id=1, merge=True)):
        assert set(nothing) == {"mask", "empty"} and nothing["empty"]
        assert nothing["mask"].shape == (6, 8) and nothing["mask"].dtype == np.uint8 and not nothing["mask"].any()
    both = r.getMaskByRef(ref_id=0)
    assert [set(one) for one in both] == [{"mask", "area"}] * 2
    for one, ann_id in zip(both, (7, 8), strict=True):
        alone = r.getMask(r.Anns[ann_id])
        assert np.array_equal(one["mask"], alone["mask"]) and one["area"] == alone["area"] == alone["mask"].sum() > 0
    merged = r.getMaskByRef(r.Refs[0], merge=True)
    assert set(merged) == {"mask", "empty"} and not merged["empty"]
    assert np.array_equal(merged["mask"], both[0]["mask"] | both[1]["mask"])
    assert np.array_equal(merged["mask"], r.getMask(r.Refs[0])["mask"]) and r.getMask(None) is None
    r.Anns[8]["iscrowd"] = 1
    assert len(r.getMaskByRef(r.Refs[0])) == 1 and r.getMaskByRef(r.Refs[0], merge=True)["mask"].sum() == 12
    with pytest.raises(ValueError, match="annotation 8 is a crowd"):
        r.getMask(r.Anns[8])
    r.Anns[7]["iscrowd"] = 1
    assert r.getMaskByRef(r.Refs[0]) == [] and not r.getMaskByRef(r.Refs[0], merge=True)["mask"].any()
    for bad in (None, [], [0, 2]):
        with pytest.raises(ValueError, match="give a ref or a single ref_id"):
            r.getMaskByRef(ref_id=bad)  # type: ignore[arg-type]


def test_get_mask_by_ref_on_other_datasets(tmp_path: Path) -> None:
    r = REFER(write(tmp_path, REFS), "refcoco", "unc")
    (alone,) = r.getMaskByRef(ref_id=0)
    assert np.array_equal(alone["mask"], r.getMask(r.Refs[0])["mask"])
    assert np.array_equal(r.getMaskByRef(r.Refs[0], merge=True)["mask"], alone["mask"])
    assert r.availableSplits == ["train", "testA", "testB", "val"]
    with pytest.raises(KeyError):
        r.loadAnns([-1])


def test_generalized_refs_as_a_pickle(tmp_path: Path) -> None:
    write(tmp_path, GREFS, "grefs(unc).p", "grefcoco")
    assert list(REFER(tmp_path, "grefcoco")) == GREFS


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("refs(unc).p", "grefs(unc).json"),
            r"contains refs\(unc\)\.p and grefs\(unc\)\.json; move gRefCOCO to its own folder",
        ),
        (("grefs(unc).p", "grefs(unc).json"), r"contains grefs\(unc\)\.p and grefs\(unc\)\.json; keep one of them"),
    ],
)
def test_two_refs_files_of_one_split_by_are_refused(tmp_path: Path, names: tuple[str, str], message: str) -> None:
    """Otherwise, held-out images that only one of them lists would be overlooked."""
    write(tmp_path, REFS, dataset="other")
    for name in names:
        write(tmp_path, GREFS if name.startswith("g") else REFS, name, "both")
    instances = tmp_path / "other/instances.json"
    for call in (
        lambda: available(tmp_path),
        lambda: read_refs(tmp_path, "both", "unc"),
        lambda: REFER(tmp_path, "both"),
        lambda: build_split(instances, tmp_path, tmp_path / "clean.json"),
        lambda: audit(instances, tmp_path),
    ):
        with pytest.raises(ReferDataError, match=message):
            call()
    assert list(REFER(tmp_path, "other")) == REFS


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ann_id": [9, 99]}, "ref 2 has annotation 99, which is not in"),
        ({"ann_id": [9, 7]}, "annotation 7 has image 3"),
        ({"ann_id": [9.0]}, "'ann_id' must contain only integers"),
        ({"ann_id": "9"}, "'ann_id' is '9'; it must be of type list"),
        ({"category_id": None}, "'category_id' is None"),
        ({"category_id": [[1]]}, "'category_id' must contain only integers"),
    ],
)
def test_an_invalid_generalized_ref_is_named(tmp_path: Path, change: dict, text: str) -> None:
    write(tmp_path, [GREFS[0], GREFS[2] | change], "grefs(unc).json", "grefcoco")
    with pytest.raises(ReferDataError) as caught:
        REFER(tmp_path, "grefcoco", "unc")
    assert text in str(caught.value) and "grefcoco" in str(caught.value)
