"""Converting REFER from the formats found on the web: what is kept, restored and noted."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import refer_format_files as formats

from refdet.data.refer_formats.convert import convert_refer
from refdet.data.refer_formats.layouts import rounding_unit
from refdet.errors import InputError

PAIRS = [("refcoco", "unc"), ("refcoco", "google"), ("refcoco+", "unc"), ("refcocog", "umd"), ("refcocog", "google")]
REAL = [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")]


def comparable(refs: formats.Refs, *, without: tuple[str, ...] = ()) -> list[Any]:
    """The refs in a form that compares equal regardless of order and of the given fields."""

    def to_json(record: dict[str, Any], *excluded: str) -> str:
        return json.dumps({key: value for key, value in record.items() if key not in excluded}, sort_keys=True)

    return sorted(
        (to_json(ref, *without, "sentences"), sorted(to_json(sentence, *without) for sentence in ref["sentences"]))
        for ref in refs
    )


# Fields whose integers some files hold as text.
INTEGER_FIELDS = ("id", "image_id", "category_id", "iscrowd", "width", "height")


def ids_to_text_in_parquet(path: Path) -> None:
    """Write the ids in the JSON texts of a Parquet file as text."""
    table = pq.read_table(path)
    for column in ("raw_anns", "raw_image_info"):
        entries = [json.loads(one) for one in table[column].to_pylist()]
        texts = [json.dumps(one | {name: str(one[name]) for name in INTEGER_FIELDS if name in one}) for one in entries]
        table = table.set_column(table.column_names.index(column), column, pa.array(texts))
    pq.write_table(table, path)


# Fields that most formats lack; the conversion numbers them anew or fills them in.
LACKING = ("ref_id", "sent_id", "sent_ids", "raw", "file_name")


@pytest.mark.parametrize("pair", PAIRS)
def test_all_fields_of_the_full_parquet_are_kept(
    shapes_root: Path, train_instances: Path, tmp_path: Path, pair: Any
) -> None:
    refs, instances = formats.load(shapes_root / "refer", *pair)
    source = formats.write_jxu124(tmp_path / "parquet", pair[0], refs, instances)
    (source / "dataset_infos.json").write_text('{"default": {}}')
    (result,) = convert_refer([source], tmp_path / "out", split_by=pair[1], instances=train_instances)
    assert formats.load(tmp_path / "out", *pair) == (refs, instances)
    assert (result.dataset, result.split_by, result.complete) == (*pair, False)
    assert sum(counts.sentences or 0 for counts in result.counts.values()) == sum(len(r["sentences"]) for r in refs)


@pytest.mark.parametrize("pair", REAL)
def test_real_refs_survive_the_full_parquet_format(shared: Path, tmp_path: Path, pair: Any) -> None:
    root = shared / "data" / "coco_mini" / "refer"
    refs, instances = formats.load(root, *pair)
    source = formats.write_jxu124(tmp_path / "parquet", pair[0], refs, instances)
    convert_refer([source], tmp_path / "out", instances=root / pair[0] / "instances.json")
    assert formats.load(tmp_path / "out", *pair) == (refs, instances)


def test_without_an_instances_file_only_referred_annotations_are_written(shapes_root: Path, tmp_path: Path) -> None:
    refs, instances = formats.load(shapes_root / "refer", "refcoco", "unc")
    for entry in (*refs, *instances["annotations"]):
        entry["category_id"] = 1  # the format has no category names, so these must be COCO's
    source = formats.write_jxu124(tmp_path / "parquet", "refcoco", refs, instances)
    (result,) = convert_refer([source], tmp_path / "out")
    found, contents = formats.load(tmp_path / "out", "refcoco", "unc")
    referred = {ref["ann_id"] for ref in refs}
    own = [one for one in instances["annotations"] if one["id"] in referred]
    assert found == refs
    assert formats.by_id(contents["annotations"]) == formats.by_id(own)
    assert formats.by_id(contents["images"]) == formats.by_id(instances["images"])
    assert any("only the annotations that refs refer to" in line for line in result.notes)


@pytest.mark.parametrize("suffix", [".PARQUET", ".parquet"])
def test_suffixes_of_files_are_case_insensitive(
    shapes_root: Path, train_instances: Path, tmp_path: Path, suffix: str
) -> None:
    refs, instances = formats.load(shapes_root / "refer", "refcoco", "unc")
    source = formats.write_jxu124(tmp_path / "parquet", "refcoco", refs, instances)
    first = min(source.iterdir())
    first.rename(first.with_suffix(suffix))
    convert_refer([source], tmp_path / "out", instances=train_instances)
    assert formats.load(tmp_path / "out", "refcoco", "unc") == (refs, instances)


def test_a_file_under_two_paths_is_read_once(shapes_root: Path, train_instances: Path, tmp_path: Path) -> None:
    refs, instances = formats.load(shapes_root / "refer", "refcoco", "unc")
    source = formats.write_lines(tmp_path / "lines", "refcoco", refs, instances)
    (tmp_path / "refcoco").symlink_to(source)
    (once,) = convert_refer([source], tmp_path / "once", instances=train_instances)
    (twice,) = convert_refer([source, tmp_path / "refcoco"], tmp_path / "twice", instances=train_instances)
    assert twice.counts == once.counts


@pytest.mark.parametrize("format_name", ["jxu124", "manual_download", "instances"])
def test_ids_given_as_text_become_integers(
    shapes_root: Path, train_instances: Path, tmp_path: Path, format_name: str
) -> None:
    refs, instances = formats.load(shapes_root / "refer", "refcoco", "unc")

    def as_text(file: formats.Instances) -> formats.Instances:
        for key in ("images", "annotations"):
            for entry in file[key]:
                entry |= {name: str(entry[name]) for name in INTEGER_FIELDS if name in entry}
        return file

    given = None
    source = tmp_path / "parquet"
    if format_name == "instances":
        formats.write_jxu124(source, "refcoco", refs, instances)
        given = tmp_path / "instances_train2014.json"
        given.write_text(json.dumps(as_text(json.loads(train_instances.read_text()))))
        right = instances["annotations"]
    else:
        for entry in (*refs, *instances["annotations"]):
            entry["category_id"] = 1
        right = json.loads(json.dumps(instances["annotations"]))
        if format_name == "jxu124":
            referred = {ref["ann_id"] for ref in refs}
            right = [one for one in right if one["id"] in referred]
            formats.write_jxu124(source, "refcoco", refs, instances)
            for path in source.iterdir():
                ids_to_text_in_parquet(path)
        else:
            source /= "refcoco.json"
            formats.write_manual_download(source, {("refcoco", "unc"): (refs, instances)})
            file = json.loads(source.read_text())
            for image in file["coco_anns"].values():
                as_text({"images": [image["info"]], "annotations": image["anns"]})
            source.write_text(json.dumps(file))
    convert_refer([source], tmp_path / "out", instances=given)
    found, contents = formats.load(tmp_path / "out", "refcoco", "unc")
    assert found == refs and formats.by_id(contents["annotations"]) == formats.by_id(right)
    assert formats.by_id(contents["images"]) == formats.by_id(instances["images"])


@pytest.mark.parametrize("pair", PAIRS)
def test_mdetr_format(shapes_root: Path, train_instances: Path, tmp_path: Path, pair: Any) -> None:
    refs, instances = formats.load(shapes_root / "refer", *pair)
    source = formats.write_mdetr(tmp_path / "mdetr", pair[0], refs, instances)
    (result,) = convert_refer([source], tmp_path / "out", split_by=pair[1], instances=train_instances)
    found, contents = formats.load(tmp_path / "out", *pair)
    assert contents == instances
    assert comparable(found, without=LACKING) == comparable(refs, without=LACKING)
    assert {ref["file_name"] for ref in found} == {image["file_name"] for image in instances["images"]}
    assert [one for ref in found for one in ref["sent_ids"]] == list(range(sum(len(r["sentences"]) for r in refs)))
    assert any("renumbered" in line for line in result.notes) and any("raw is sent" in line for line in result.notes)


@pytest.mark.parametrize("pair", PAIRS)
def test_parquet_format_with_images(shapes_root: Path, train_instances: Path, tmp_path: Path, pair: Any) -> None:
    refs, instances = formats.load(shapes_root / "refer", *pair)
    source = formats.write_lmms(tmp_path / "lmms", refs, instances)
    convert_refer([source], tmp_path / "out", *pair, instances=train_instances)
    found, contents = formats.load(tmp_path / "out", *pair)
    lacking = ("ref_id", "sent_id", "sent_ids", "raw")
    assert contents == instances and comparable(found, without=lacking) == comparable(refs, without=lacking)


@pytest.mark.parametrize("pair", REAL)
@pytest.mark.parametrize("format_name", ["mdetr", "lmms", "lines", "llava"])
def test_real_refs_are_identified_by_image_and_box(shared: Path, tmp_path: Path, pair: Any, format_name: str) -> None:
    root = shared / "data" / "coco_mini" / "refer"
    refs, instances = formats.load(root, *pair)
    source = tmp_path / pair[0]
    if format_name == "mdetr":
        formats.write_mdetr(source, pair[0], refs, instances)
        for path in source.iterdir():
            file = json.loads(path.read_text())
            for entry in (*file["images"], *file["annotations"]):
                del entry["original_id"]
            path.write_text(json.dumps(file))
    elif format_name == "lmms":
        formats.write_lmms(source, refs, instances)
    elif format_name == "lines":
        formats.write_lines(source, pair[0], refs, instances)
    else:
        formats.write_llava(source, pair[0], refs, instances, padded=True, digits=3)
    convert_refer([source], tmp_path / "out", instances=root / pair[0] / "instances.json")
    found, contents = formats.load(tmp_path / "out", *pair)
    assert contents == instances and comparable(found, without=LACKING) == comparable(refs, without=LACKING)


def test_tensorflow_datasets_manual_download_format(shapes_root: Path, train_instances: Path, tmp_path: Path) -> None:
    parts = {pair: formats.load(shapes_root / "refer", *pair) for pair in PAIRS}
    source = formats.write_manual_download(tmp_path / "refcoco.json", parts)
    results = convert_refer([source], tmp_path / "out", instances=train_instances)
    assert [(one.dataset, one.split_by) for one in results] == PAIRS
    for pair in PAIRS:
        assert formats.load(tmp_path / "out", *pair) == parts[pair]
    (only,) = convert_refer([source], tmp_path / "only", "refcocog", "umd", instances=train_instances)
    assert only.refs_file == tmp_path / "only" / "refcocog" / "refs(umd).p"
    assert formats.load(tmp_path / "only", "refcocog", "umd")[0] == parts["refcocog", "umd"][0]


@pytest.mark.parametrize("columns", [False, True])
def test_tensorflow_datasets_examples_format(
    shapes_root: Path, train_instances: Path, tmp_path: Path, columns: bool
) -> None:
    refs, instances = formats.load(shapes_root / "refer", "refcoco+", "unc")
    source = formats.write_examples(tmp_path / "refcocoplus", refs, instances, columns)
    for path in source.iterdir():  # objects are found by box in the test files, by annotation id in the others
        if path.name.startswith("test"):
            path.write_text(path.read_text().replace('"id":', '"identifier":'))
    (result,) = convert_refer([source], tmp_path / "out", instances=train_instances)
    assert sum("sent is raw, as the source has only one of them" in note for note in result.notes) == 1
    assert not any("raw is sent" in note for note in result.notes)
    found, contents = formats.load(tmp_path / "out", "refcoco+", "unc")
    without = ("ref_id", "file_name", "sent", "tokens")
    assert contents == instances and comparable(found, without=without) == comparable(refs, without=without)


@pytest.mark.parametrize(
    ("split_by", "note"),
    [
        ("unc", "refcoco/unc: a part of the published dataset, so its size was not checked"),
        ("mine", "refcoco/mine: no size is published for this division, so it was not checked"),
    ],
)
def test_note_says_why_the_size_was_not_checked(
    shapes_root: Path, train_instances: Path, tmp_path: Path, split_by: str, note: str
) -> None:
    refs, instances = formats.load(shapes_root / "refer", "refcoco", "unc")
    source = formats.write_jxu124(tmp_path / "parquet", "refcoco", refs, instances)
    (result,) = convert_refer([source], tmp_path / "out", "refcoco", split_by, instances=train_instances)
    assert not result.complete and [line for line in result.notes if "not checked" in line] == [note]


def test_files_without_refs_are_named(tmp_path: Path) -> None:
    path = tmp_path / "refcoco_val.json"
    path.write_text('[{"image/id": 9, "objects": []}]')
    with pytest.raises(InputError, match=r"^\S*refcoco_val\.json: no refs; download it again$"):
        convert_refer([path], tmp_path / "out")


def test_json_lines_format(shapes_root: Path, train_instances: Path, tmp_path: Path) -> None:
    refs, instances = formats.load(shapes_root / "refer", "refcocog", "umd")
    source = formats.write_lines(tmp_path / "lines", "refcocog", refs, instances)
    convert_refer([source], tmp_path / "out", instances=train_instances)
    found, contents = formats.load(tmp_path / "out", "refcocog", "umd")
    assert contents == instances and comparable(found, without=LACKING) == comparable(refs, without=LACKING)


@pytest.mark.parametrize("padded", [False, True])
def test_llava_conversations_format(shapes_root: Path, train_instances: Path, tmp_path: Path, padded: bool) -> None:
    refs, instances = formats.load(shapes_root / "refer", "refcoco", "unc")
    source = formats.write_llava(tmp_path / "llava", "refcoco", refs, instances, padded, digits=3)
    (result,) = convert_refer([source], tmp_path / "out", instances=train_instances)
    found, _ = formats.load(tmp_path / "out", "refcoco", "unc")
    assert comparable(found, without=LACKING) == comparable(refs, without=LACKING)
    assert any("without a box or an expression" in line for line in result.notes)


def test_a_second_conversion_keeps_the_existing_instances(
    shapes_root: Path, train_instances: Path, tmp_path: Path
) -> None:
    for split_by in ("unc", "google"):
        refs, instances = formats.load(shapes_root / "refer", "refcoco", split_by)
        source = formats.write_jxu124(tmp_path / split_by, "refcoco", refs, instances)
        (result,) = convert_refer([source], tmp_path / "out", split_by=split_by, instances=train_instances)
    assert any("kept the existing instances.json" in line for line in result.notes)
    assert formats.load(tmp_path / "out", "refcoco", "google") == (refs, instances)


@pytest.mark.parametrize("format_name", ["write_mdetr", "write_lines"])
@pytest.mark.parametrize("rows", ["all", "some"])
def test_a_copy_of_a_file_under_another_name_is_refused(
    shapes_root: Path, train_instances: Path, tmp_path: Path, format_name: str, rows: str
) -> None:
    refs, instances = formats.load(shapes_root / "refer", "refcoco", "unc")
    folder = getattr(formats, format_name)(tmp_path / "files", "refcoco", refs, instances)
    (original,) = folder.glob("*val*")
    copy = original.with_stem(f"{original.stem} (1)")
    text = original.read_text()
    copy.write_text(text if rows == "all" or "\n" not in text else "".join(text.splitlines(keepends=True)[:3]))
    with pytest.raises(InputError, match=r"its refs of split 'val' are also in .*; give one of the two"):
        convert_refer([folder], tmp_path / "out", instances=train_instances)
    assert not (tmp_path / "out").exists()
    copy.unlink()
    assert convert_refer([folder], tmp_path / "out", instances=train_instances)[0].counts["val"].refs


@pytest.mark.parametrize(
    ("numbers", "unit"),
    [
        ([3.0, 120.0], 1.0),
        ([3.25, 120.0], 0.01),
        ([0.25, 0.00001], 1e-5),
        ([0.25, 0.000023], 1e-6),  # its repr is 2.3e-05
        ([0.25, 0.0000001], 0.0),  # more decimals than anyone rounds to
        ([1 / 3, 0.5], 0.0),
        ([1e300, 0.5], 0.1),
        ([], 1.0),
    ],
)
def test_rounding_unit_of_boxes(numbers: list[float], unit: float) -> None:
    assert rounding_unit(numbers) == pytest.approx(unit, rel=1e-12)
