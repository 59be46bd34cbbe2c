import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import refer_format_files as forms

from refdet.data.refer_formats.convert import convert_refer
from refdet.data.refer_formats.layouts import rounding_unit

PAIRS = [("refcoco", "unc"), ("refcoco", "google"), ("refcoco+", "unc"), ("refcocog", "umd"), ("refcocog", "google")]
REAL = [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")]


@pytest.fixture
def coco(shapes_root: Path) -> Path:
    return shapes_root / "annotations" / "instances_train2014.json"


def plain(refs: forms.Refs, *, without: tuple[str, ...] = ()) -> list[Any]:
    """What the refs say, in no order, but for the fields left out."""
    kept = []
    for ref in refs:
        sentences = sorted(
            json.dumps({key: value for key, value in one.items() if key not in without}, sort_keys=True)
            for one in ref["sentences"]
        )
        rest = {key: value for key, value in ref.items() if key not in (*without, "sentences")}
        kept.append((json.dumps(rest, sort_keys=True), sentences))
    return sorted(kept)


IDS = ("id", "image_id", "category_id", "iscrowd", "width", "height")


def texts_in_columns(path: Path) -> None:
    """Write the ids in the JSON texts of a Parquet file as text."""
    table = pq.read_table(path)
    for column in ("raw_anns", "raw_image_info"):
        entries = [json.loads(one) for one in table[column].to_pylist()]
        texts = [json.dumps(one | {name: str(one[name]) for name in IDS if name in one}) for one in entries]
        table = table.set_column(table.column_names.index(column), column, pa.array(texts))
    pq.write_table(table, path)


LACKING = ("ref_id", "sent_id", "sent_ids", "raw", "file_name")


@pytest.mark.parametrize("pair", PAIRS)
def test_all_fields_of_the_full_parquet_are_kept(shapes_root: Path, coco: Path, tmp_path: Path, pair: Any) -> None:
    refs, instances = forms.load(shapes_root / "refer", *pair)
    source = forms.write_jxu124(tmp_path / "parquet", pair[0], refs, instances)
    (source / "dataset_infos.json").write_text('{"default": {}}')
    (result,) = convert_refer([source], tmp_path / "out", split_by=pair[1], instances=coco)
    assert forms.load(tmp_path / "out", *pair) == (refs, instances)
    assert (result.dataset, result.split_by, result.complete) == (*pair, False)
    assert sum(counts.sentences or 0 for counts in result.counts.values()) == sum(len(r["sentences"]) for r in refs)


@pytest.mark.parametrize("pair", REAL)
def test_real_refs_in_full_parquet(shared: Path, tmp_path: Path, pair: Any) -> None:
    root = shared / "data" / "coco_mini" / "refer"
    refs, instances = forms.load(root, *pair)
    source = forms.write_jxu124(tmp_path / "parquet", pair[0], refs, instances)
    convert_refer([source], tmp_path / "out", instances=root / pair[0] / "instances.json")
    assert forms.load(tmp_path / "out", *pair) == (refs, instances)


def test_without_instances_there_are_the_referred_annotations(shapes_root: Path, tmp_path: Path) -> None:
    refs, instances = forms.load(shapes_root / "refer", "refcoco", "unc")
    for image in instances["images"]:
        image["id"] = image["id"]
    for entry in (*refs, *instances["annotations"]):
        entry["category_id"] = 1  # one of COCO's, as the form has no categories
    source = forms.write_jxu124(tmp_path / "parquet", "refcoco", refs, instances)
    (result,) = convert_refer([source], tmp_path / "out")
    found, contents = forms.load(tmp_path / "out", "refcoco", "unc")
    referred = {ref["ann_id"] for ref in refs}
    own = [one for one in instances["annotations"] if one["id"] in referred]
    assert found == refs
    assert forms.by_id(contents["annotations"]) == forms.by_id(own)
    assert forms.by_id(contents["images"]) == forms.by_id(instances["images"])
    assert any("only the annotations that refs refer to" in line for line in result.notes)


@pytest.mark.parametrize("suffix", [".PARQUET", ".parquet"])
def test_all_files_of_a_folder_are_read_however_their_suffix_is_written(
    shapes_root: Path, coco: Path, tmp_path: Path, suffix: str
) -> None:
    refs, instances = forms.load(shapes_root / "refer", "refcoco", "unc")
    source = forms.write_jxu124(tmp_path / "parquet", "refcoco", refs, instances)
    first = min(source.iterdir())
    first.rename(first.with_suffix(suffix))
    convert_refer([source], tmp_path / "out", instances=coco)
    assert forms.load(tmp_path / "out", "refcoco", "unc") == (refs, instances)


def test_a_file_under_two_paths_is_read_once(shapes_root: Path, coco: Path, tmp_path: Path) -> None:
    refs, instances = forms.load(shapes_root / "refer", "refcoco", "unc")
    source = forms.write_lines(tmp_path / "lines", "refcoco", refs, instances)
    (tmp_path / "refcoco").symlink_to(source)
    (once,) = convert_refer([source], tmp_path / "once", instances=coco)
    (twice,) = convert_refer([source, tmp_path / "refcoco"], tmp_path / "twice", instances=coco)
    assert twice.counts == once.counts


@pytest.mark.parametrize("form", ["jxu124", "manual_download", "instances"])
def test_ids_given_as_text_become_integers(shapes_root: Path, coco: Path, tmp_path: Path, form: str) -> None:
    refs, instances = forms.load(shapes_root / "refer", "refcoco", "unc")

    def as_text(file: forms.Instances) -> forms.Instances:
        for key in ("images", "annotations"):
            for entry in file[key]:
                entry |= {name: str(entry[name]) for name in IDS if name in entry}
        return file

    given = None
    source = tmp_path / "parquet"
    if form == "instances":
        forms.write_jxu124(source, "refcoco", refs, instances)
        given = tmp_path / "instances_train2014.json"
        given.write_text(json.dumps(as_text(json.loads(coco.read_text()))))
        right = instances["annotations"]
    else:
        for entry in (*refs, *instances["annotations"]):
            entry["category_id"] = 1
        right = json.loads(json.dumps(instances["annotations"]))
        if form == "jxu124":
            referred = {ref["ann_id"] for ref in refs}
            right = [one for one in right if one["id"] in referred]
            forms.write_jxu124(source, "refcoco", refs, instances)
            for path in source.iterdir():
                texts_in_columns(path)
        else:
            source /= "refcoco.json"
            forms.write_manual_download(source, {("refcoco", "unc"): (refs, instances)})
            file = json.loads(source.read_text())
            for image in file["coco_anns"].values():
                as_text({"images": [image["info"]], "annotations": image["anns"]})
            source.write_text(json.dumps(file))
    convert_refer([source], tmp_path / "out", instances=given)
    found, contents = forms.load(tmp_path / "out", "refcoco", "unc")
    assert found == refs and forms.by_id(contents["annotations"]) == forms.by_id(right)
    assert forms.by_id(contents["images"]) == forms.by_id(instances["images"])


@pytest.mark.parametrize("pair", PAIRS)
def test_mdetr(shapes_root: Path, coco: Path, tmp_path: Path, pair: Any) -> None:
    refs, instances = forms.load(shapes_root / "refer", *pair)
    source = forms.write_mdetr(tmp_path / "mdetr", pair[0], refs, instances)
    (result,) = convert_refer([source], tmp_path / "out", split_by=pair[1], instances=coco)
    found, contents = forms.load(tmp_path / "out", *pair)
    assert contents == instances
    assert plain(found, without=LACKING) == plain(refs, without=LACKING)
    assert {ref["file_name"] for ref in found} == {image["file_name"] for image in instances["images"]}
    assert [one for ref in found for one in ref["sent_ids"]] == list(range(sum(len(r["sentences"]) for r in refs)))
    assert any("renumbered" in line for line in result.notes) and any("raw is sent" in line for line in result.notes)


@pytest.mark.parametrize("pair", PAIRS)
def test_parquet_with_images(shapes_root: Path, coco: Path, tmp_path: Path, pair: Any) -> None:
    refs, instances = forms.load(shapes_root / "refer", *pair)
    source = forms.write_lmms(tmp_path / "lmms", refs, instances)
    convert_refer([source], tmp_path / "out", *pair, instances=coco)
    found, contents = forms.load(tmp_path / "out", *pair)
    lacking = ("ref_id", "sent_id", "sent_ids", "raw")
    assert contents == instances and plain(found, without=lacking) == plain(refs, without=lacking)


@pytest.mark.parametrize("pair", REAL)
@pytest.mark.parametrize("form", ["mdetr", "lmms", "lines", "llava"])
def test_real_refs_by_image_and_box(shared: Path, tmp_path: Path, pair: Any, form: str) -> None:
    root = shared / "data" / "coco_mini" / "refer"
    refs, instances = forms.load(root, *pair)
    source = tmp_path / pair[0]
    if form == "mdetr":
        forms.write_mdetr(source, pair[0], refs, instances)
        for path in source.iterdir():
            file = json.loads(path.read_text())
            for entry in (*file["images"], *file["annotations"]):
                del entry["original_id"]
            path.write_text(json.dumps(file))
    elif form == "lmms":
        forms.write_lmms(source, refs, instances)
    elif form == "lines":
        forms.write_lines(source, pair[0], refs, instances)
    else:
        forms.write_llava(source, pair[0], refs, instances, padded=True, digits=3)
    convert_refer([source], tmp_path / "out", instances=root / pair[0] / "instances.json")
    found, contents = forms.load(tmp_path / "out", *pair)
    assert contents == instances and plain(found, without=LACKING) == plain(refs, without=LACKING)


def test_manual_download_of_tensorflow_datasets(shapes_root: Path, coco: Path, tmp_path: Path) -> None:
    parts = {pair: forms.load(shapes_root / "refer", *pair) for pair in PAIRS}
    source = forms.write_manual_download(tmp_path / "refcoco.json", parts)
    results = convert_refer([source], tmp_path / "out", instances=coco)
    assert [(one.dataset, one.split_by) for one in results] == PAIRS
    for pair in PAIRS:
        assert forms.load(tmp_path / "out", *pair) == parts[pair]
    (only,) = convert_refer([source], tmp_path / "only", "refcocog", "umd", instances=coco)
    assert only.refs_file == tmp_path / "only" / "refcocog" / "refs(umd).p"
    assert forms.load(tmp_path / "only", "refcocog", "umd")[0] == parts["refcocog", "umd"][0]


@pytest.mark.parametrize("columns", [False, True])
def test_examples_of_tensorflow_datasets(shapes_root: Path, coco: Path, tmp_path: Path, columns: bool) -> None:
    refs, instances = forms.load(shapes_root / "refer", "refcoco+", "unc")
    source = forms.write_examples(tmp_path / "refcocoplus", refs, instances, columns)
    for path in source.iterdir():  # ids by box, and by the form's own
        if path.name.startswith("test"):
            path.write_text(path.read_text().replace('"id":', '"identifier":'))
    (result,) = convert_refer([source], tmp_path / "out", instances=coco)
    assert sum("sent is raw, as the source has only one of them" in note for note in result.notes) == 1
    assert not any("raw is sent" in note for note in result.notes)
    found, contents = forms.load(tmp_path / "out", "refcoco+", "unc")
    without = ("ref_id", "file_name", "sent", "tokens")
    assert contents == instances and plain(found, without=without) == plain(refs, without=without)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (("refcoco", "unc"), "refcoco/unc: a part of the published dataset, so its size was not checked"),
        (("refcoco", "mine"), "refcoco/mine: no size is published for this division, so it was not checked"),
    ],
)
def test_why_the_size_was_not_checked(
    shapes_root: Path, coco: Path, tmp_path: Path, pair: tuple[str, str], words: str
) -> None:
    source = forms.write_jxu124(tmp_path / "parquet", "refcoco", *forms.load(shapes_root / "refer", "refcoco", "unc"))
    (result,) = convert_refer([source], tmp_path / "out", "refcoco", pair[1], instances=coco)
    assert not result.complete and [note for note in result.notes if "not checked" in note] == [words]


def test_lines(shapes_root: Path, coco: Path, tmp_path: Path) -> None:
    refs, instances = forms.load(shapes_root / "refer", "refcocog", "umd")
    source = forms.write_lines(tmp_path / "lines", "refcocog", refs, instances)
    convert_refer([source], tmp_path / "out", instances=coco)
    found, contents = forms.load(tmp_path / "out", "refcocog", "umd")
    assert contents == instances and plain(found, without=LACKING) == plain(refs, without=LACKING)


@pytest.mark.parametrize("padded", [False, True])
def test_conversations(shapes_root: Path, coco: Path, tmp_path: Path, padded: bool) -> None:
    refs, instances = forms.load(shapes_root / "refer", "refcoco", "unc")
    source = forms.write_llava(tmp_path / "llava", "refcoco", refs, instances, padded, digits=3)
    (result,) = convert_refer([source], tmp_path / "out", instances=coco)
    found, _ = forms.load(tmp_path / "out", "refcoco", "unc")
    assert plain(found, without=LACKING) == plain(refs, without=LACKING)
    assert any("without a box or an expression" in line for line in result.notes)


def test_a_conversion_beside_another_keeps_its_instances(shapes_root: Path, coco: Path, tmp_path: Path) -> None:
    for split_by in ("unc", "google"):
        refs, instances = forms.load(shapes_root / "refer", "refcoco", split_by)
        source = forms.write_jxu124(tmp_path / split_by, "refcoco", refs, instances)
        (result,) = convert_refer([source], tmp_path / "out", split_by=split_by, instances=coco)
    assert any("kept the existing instances.json" in line for line in result.notes)
    assert forms.load(tmp_path / "out", "refcoco", "google") == (refs, instances)


@pytest.mark.parametrize(
    ("numbers", "unit"),
    [
        ([3.0, 120.0], 1.0),
        ([3.25, 120.0], 0.01),
        ([0.25, 0.00001], 1e-5),
        ([0.25, 0.000023], 1e-6),  # whose repr has an exponent
        ([0.25, 0.0000001], 0.0),  # more decimals than anyone rounds to
        ([1 / 3, 0.5], 0.0),
        ([1e300, 0.5], 0.1),
        ([], 1.0),
    ],
)
def test_the_unit_that_boxes_are_rounded_to(numbers: list[float], unit: float) -> None:
    assert rounding_unit(numbers) == pytest.approx(unit, rel=1e-12)
