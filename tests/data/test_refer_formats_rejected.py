"""Converting REFER from other formats: input that is refused with a reason, or counted.

`jxu124` and `lmms` (lmms-lab) are accounts at Hugging Face with copies of REFER. A division is what REFER calls a
`split_by`: one of several ways to divide a dataset into splits.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import refer_format_files as formats
from click.testing import CliRunner

from refdet.cli.main import main
from refdet.data.parquet import read_rows
from refdet.data.refer_formats.convert import convert_refer
from refdet.data.refer_formats.json_lists import read_list
from refdet.data.refer_formats.other_divisions import refs_of_division
from refdet.data.refer_formats.records import SourceRef
from refdet.errors import InputError, RuntimeFailure
from refer.statistics import COUNTS, Counts


def assert_refused(sources: list[Path], out: Path, *words: str, **options: Any) -> None:
    """Assert that a conversion fails with one line that contains all the words, and writes nothing."""
    with pytest.raises(InputError) as caught:
        convert_refer(sources, out, **options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and not list(out.rglob("*"))


def test_hugging_face_split_names_are_translated(shapes_root: Path, train_instances: Path, tmp_path: Path) -> None:
    refs, instances = formats.load(shapes_root / "refer", "refcoco", "unc")
    source = formats.write_jxu124(tmp_path / "parquet", "refcoco", refs, instances, rename=True)
    (result,) = convert_refer([source], tmp_path / "out", instances=train_instances)
    assert formats.load(tmp_path / "out", "refcoco", "unc") == (refs, instances)
    assert "refcoco/unc: split 'test' is testA" in result.notes
    (source / "testB-00000-of-00001.parquet").unlink()
    assert_refused([source], tmp_path / "refused", "split 'test'", "`split_names=test=NAME`", instances=train_instances)
    (result,) = convert_refer([source], tmp_path / "named", instances=train_instances, split_names=["test=testA"])
    assert set(result.counts) == {"train", "testA", "val"}


def published_refs(published: Counts, split: str, first_image: int) -> list[SourceRef]:
    """As many refs, on as many images, as published for a split."""
    return [
        SourceRef(f"row {n}", split, [], image_id=first_image + n % published.images) for n in range(published.refs)
    ]


@pytest.mark.parametrize("google_first", [False, True])
def test_two_divisions_in_one_list_are_separated_by_their_sizes(google_first: bool) -> None:
    unc = published_refs(COUNTS["refcoco", "unc"]["val"], "val", 0)
    google = published_refs(COUNTS["refcoco", "google"]["val"], "val", 500)
    both = google + unc if google_first else unc + google
    part, note = refs_of_division("refcoco", "unc", "val", both)
    assert part == unc and note == "split 'val' also has the 5,000 refs of refcoco/google/val; they are left out"
    part, note = refs_of_division("refcoco", "google", "val", both)
    assert part == google and "the 3,811 refs of refcoco/unc/val" in note
    # interleaved, the two cannot be told apart
    assert refs_of_division("refcoco", "unc", "val", both[::2] + both[1::2]) == (both[::2] + both[1::2], "")
    assert refs_of_division("refcoco", "unc", "val", unc) == (unc, "")
    test = published_refs(COUNTS["refcoco", "google"]["test"], "test", 0)
    assert refs_of_division("refcoco", "unc", "test", test) == (
        [],
        "split 'test' is refcoco/google/test; it is left out",
    )
    assert refs_of_division("refcoco", "google", "test", test) == (test, "")


def test_a_split_of_another_size_than_published_is_reported(tmp_path: Path) -> None:
    box = [1.0, 2.0, 3.0, 4.0]
    ids = range(1809)  # one less than published
    rows = [
        {"ref_id": n, "ann_id": n, "image_id": n % 750, "split": "testB", "category_id": 1,
         "sentences": [{"sent_id": n, "sent": "a", "raw": "a", "tokens": ["a"]}],
         "raw_anns": json.dumps({"id": n, "image_id": n % 750, "bbox": box, "category_id": 1}),
         "raw_image_info": json.dumps({"id": n % 750, "file_name": "a.jpg", "height": 9, "width": 9})}
        for n in ids
    ]  # fmt: skip
    path = tmp_path / "refcoco-testB.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    (result,) = convert_refer([path], tmp_path / "out")
    assert not result.complete
    assert any(
        "refcoco/unc/testB: 1,809 refs instead of the published 1,810" in line and "1,809 sentences" in line
        for line in result.notes
    )


@pytest.mark.parametrize("column", ["ref_id", "ann_id", "image_id", "split", "sentences", "category_id"])
def test_a_missing_parquet_column_is_named(shapes_root: Path, tmp_path: Path, column: str) -> None:
    refs, instances = formats.load(shapes_root / "refer", "refcoco", "unc")
    source = formats.write_jxu124(tmp_path / "parquet", "refcoco", refs, instances)
    for path in source.iterdir():
        pq.write_table(pq.read_table(path).drop_columns([column]), path)
    assert_refused([source], tmp_path / "out", f"no column {column}")


def test_missing_columns_of_the_parquet_format_with_images_are_named(
    shapes_root: Path, train_instances: Path, tmp_path: Path
) -> None:
    refs, instances = formats.load(shapes_root / "refer", "refcoco", "unc")
    source = formats.write_lmms(tmp_path / "refcoco", refs, instances)
    for path in source.iterdir():
        pq.write_table(pq.read_table(path).drop_columns(["bbox", "file_name"]), path)
    assert_refused([source], tmp_path / "out", "no column bbox, file_name", instances=train_instances)


@pytest.mark.parametrize(
    "contents", [b"", b"<!DOCTYPE html><html>", b"PAR1 and no more", b"PAR1" + bytes(99) + b"PAR1"]
)
def test_a_damaged_parquet_file_is_refused(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "refcoco-val.parquet"
    path.write_bytes(contents)
    assert_refused([path], tmp_path / "out", str(path), "damaged or not a Parquet file")


def test_parquet_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "refcoco-val.parquet"
    text = pa.StringArray.from_buffers(1, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff"))
    columns: dict[str, Any] = dict.fromkeys(["ref_id", "ann_id", "image_id", "sentences", "category_id"], [1])
    pq.write_table(pa.table({**columns, "split": text}), path)
    assert_refused([path], tmp_path / "out", str(path), "damaged or not a Parquet file")


def test_running_out_of_memory_is_not_reported_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [1]}), path)

    def fail(*args: Any, **options: Any) -> None:
        raise pa.ArrowMemoryError("malloc of size 9 failed")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
    with pytest.raises(RuntimeFailure, match="not enough memory"):
        list(read_rows(path, ["a"]))


@pytest.mark.parametrize("contents", ["[1]", "{}", '{"images": 3, "annotations": []}', '{"images": [1]}'])
def test_an_existing_invalid_instances_file_is_kept_and_refused(
    shapes_root: Path, train_instances: Path, tmp_path: Path, contents: str
) -> None:
    source = formats.write_jxu124(
        tmp_path / "parquet", "refcoco", *formats.load(shapes_root / "refer", "refcoco", "unc")
    )
    path = tmp_path / "out" / "refcoco" / "instances.json"
    path.parent.mkdir(parents=True)
    path.write_text(contents)
    with pytest.raises(InputError, match="instances.json: exists and has no list of images"):
        convert_refer([source], tmp_path / "out", instances=train_instances)
    assert path.read_text() == contents


def test_split_names_must_exist_and_be_distinct(shapes_root: Path, train_instances: Path, tmp_path: Path) -> None:
    source = formats.write_jxu124(
        tmp_path / "parquet", "refcoco", *formats.load(shapes_root / "refer", "refcoco", "unc")
    )
    words = ("`split_names` vla=test: no split 'vla' in the sources", "train, ")
    assert_refused([source], tmp_path / "out", *words, instances=train_instances, split_names=["vla=test"])
    twice = ["val=testA", "val=testB"]
    assert_refused(
        [source], tmp_path / "out", "`split_names` val=testB: val is", instances=train_instances, split_names=twice
    )


def test_boxes_that_match_no_or_several_annotations_are_counted(
    shapes_root: Path, train_instances: Path, tmp_path: Path
) -> None:
    refs, instances = formats.load(shapes_root / "refer", "refcoco", "unc")
    source = formats.write_lines(tmp_path / "lines", "refcoco", refs, instances)
    assert_refused([source], tmp_path / "out", "no annotation ids", "`instances=instances_train2014.json`")
    file = json.loads(train_instances.read_text())
    referred = {ref["ann_id"] for ref in refs if ref["split"] == "val"}
    wrong = sorted(referred)[:2]
    sentences = sum(len(ref["sentences"]) for ref in refs if ref["ann_id"] in wrong and ref["split"] == "val")
    total = sum(len(ref["sentences"]) for ref in refs if ref["split"] == "val")
    moved = tmp_path / "instances.json"
    for annotation in list(file["annotations"]):
        if annotation["id"] == wrong[0]:
            file["annotations"].append({**annotation, "id": 999_999_999})
        elif annotation["id"] == wrong[1]:
            annotation["bbox"][0] += 1
    moved.write_text(json.dumps(file))
    path = source / "refcoco_val.jsonl"
    assert_refused(
        [path], tmp_path / "out", f"{sentences} of {total}", "with its image and box, or several", instances=moved
    )


def test_ids_that_contradict_coco_are_counted(shapes_root: Path, train_instances: Path, tmp_path: Path) -> None:
    refs, instances = formats.load(shapes_root / "refer", "refcoco", "unc")
    refs[3]["category_id"] = 2
    source = formats.write_jxu124(tmp_path / "parquet", "refcoco", refs, instances)
    assert_refused(
        [source], tmp_path / "out", "1 of ", "with its ann_id, image_id and category_id", instances=train_instances
    )
    file = json.loads(train_instances.read_text())
    file["images"] = [image for image in file["images"] if image["id"] != refs[3]["image_id"]]
    few = tmp_path / "few.json"
    few.write_text(json.dumps(file))
    assert_refused([source], tmp_path / "out", "no such image in", instances=few)


def test_existing_files_are_never_overwritten(shapes_root: Path, train_instances: Path, tmp_path: Path) -> None:
    refs, instances = formats.load(shapes_root / "refer", "refcoco", "unc")
    source = formats.write_jxu124(tmp_path / "parquet", "refcoco", refs, instances)
    out = tmp_path / "out" / "refcoco"
    out.mkdir(parents=True)
    (out / "refs(unc).p").write_bytes(pickle.dumps([]))
    with pytest.raises(InputError, match=r"refs\(unc\).p: exists"):
        convert_refer([source], out.parent, instances=train_instances)
    (out / "refs(unc).p").unlink()
    (out / "instances.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(InputError, match="exists and lacks images"):
        convert_refer([source], out.parent, instances=train_instances)
    assert [path.name for path in out.iterdir()] == ["instances.json"]


@pytest.mark.parametrize(
    ("name", "contents", "words"),
    [
        ("refcoco_val.json", "{}", "not in a known format"),
        ("refcoco_val.json", "[]", "no entries"),
        ("refcoco_val.json", "[3]", "not an object"),
        ("refcoco_val.json", '[{"image": "a.jpg"}]', "no field with the expression"),
        ("refcoco_val.json", '[{"image": "a.jpg", "sent": "x", "bbox": [1, 2, 3]}]', "four numbers"),
        ("refcoco_val.json", f'[{{"image": "a.jpg", "sent": "x", "bbox": [1, 2, 3, {"9" * 400}]}}]', "four numbers"),
        ("refcoco_val.json", '[{"image": "a.jpg", "sent": "x", "bbox": [1, 2, 3, true]}]', "four numbers"),
        ("refcoco_val.json", '[{"image": "a.jpg", "sent": "x", "bbox": [1, 2, 3, 4]}]', "no COCO id"),
        ("refcoco.json", '[{"image": "9.jpg", "sent": "x", "bbox": [1, 2, 3, 4]}]', "has the split"),
        ("val.json", '[{"image": "9.jpg", "sent": "x", "bbox": [1, 2, 3, 4]}]', "has the dataset"),
        (
            "refcoco_val.json",
            '[{"image": "9.jpg", "sent": "x", "bbox": [1, 2, 3, 4], "dataset_name": "flickr"}]',
            "unknown division of flickr",
        ),
        ("refcoco_val.json", '[{"image": "9.jpg", "conversations": []}]', "no question with a box"),
        ("refcoco_val.json", '{"images": [{"id": 1, "caption": "a"}], "annotations": []}', "no annotation for"),
        (
            "refcoco_val.json",
            '{"images": [{"id": 1, "caption": "a"}, {"id": 1, "caption": "b"}], "annotations": []}',
            "duplicate id 1",
        ),
        ("refcoco_val.json", '[{"image/id": 9, "objects": {"id": [1], "bbox": []}}]', "different lengths"),
        ("refcoco.json", '{"ref": [{"split": "val"}], "coco_anns": {}}', "no 'dataset'"),
    ],
)
def test_incomplete_json_files_are_refused_with_a_reason(tmp_path: Path, name: str, contents: str, words: str) -> None:
    path = tmp_path / "source" / name
    path.parent.mkdir()
    path.write_text(contents)
    assert_refused([path], tmp_path / "out", str(path), words)


def run(*args: str | Path) -> Any:
    return CliRunner().invoke(main, ["convert-refer", *map(str, args)])


def test_convert_refer_command(shapes_root: Path, train_instances: Path, tmp_path: Path) -> None:
    refs, instances = formats.load(shapes_root / "refer", "refcoco", "unc")
    source = formats.write_jxu124(tmp_path / "parquet", "refcoco", refs, instances)
    result = run("--from", source, "--out", tmp_path / "out", "--instances", train_instances, "--json")
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)
    assert found["refs_file"] == str(tmp_path / "out" / "refcoco" / "refs(unc).p")
    assert {split: n["refs"] for split, n in found["splits"].items()} == {
        split: sum(ref["split"] == split for ref in refs) for split in formats.splits_of(refs)
    }
    again = run("--from", source, "--out", tmp_path / "out", "--instances", train_instances)
    assert again.exit_code == 2 and again.stderr.count("\n") == 1 and "another --out" in again.stderr
    for path in source.iterdir():  # without --instances, categories must be COCO's
        table = pq.read_table(path)
        ones = pa.array([1] * len(table))
        table = table.set_column(table.column_names.index("category_id"), "category_id", ones)
        texts = [json.dumps(json.loads(one) | {"category_id": 1}) for one in table["raw_anns"].to_pylist()]
        pq.write_table(table.set_column(table.column_names.index("raw_anns"), "raw_anns", pa.array(texts)), path)
    few = json.loads(run("--from", source, "--out", tmp_path / "few", "--json").stdout)
    assert any("give --instances instances_train2014.json to include" in line for line in few[0]["notes"])
    source = formats.write_jxu124(tmp_path / "again", "refcoco", refs, instances)
    text = run("--from", source, "--out", tmp_path / "text", "--instances", train_instances)
    assert text.exit_code == 0 and "refcoco/unc/testA" in text.stdout


def test_errors_of_the_command_name_its_options(shapes_root: Path, tmp_path: Path) -> None:
    refs, instances = formats.load(shapes_root / "refer", "refcoco", "unc")
    source = formats.write_lines(tmp_path / "lines", "refcoco", refs, instances)
    result = run("--from", source, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "give --instances instances_train2014.json" in result.stderr
    missing = run("--from", tmp_path / "none", "--out", tmp_path / "out")
    assert missing.exit_code == 2 and "no such file or folder" in missing.stderr


@pytest.mark.parametrize(
    ("question", "answer", "expression"),
    [
        ("<image>\nWhere is this: the cat", "[0.1, 0.2, 0.3, 0.4]", "the cat"),
        ("Where is this: the cat\n<image>", "[0.1, 0.2, 0.3, 0.4]", "the cat"),
        ("Where is this: the cat<image>", "[0.1, 0.2, 0.3, 0.4]", "the cat"),
        ("<image>\n<ref>the cat</ref>", "<ref>it</ref> [0.1, 0.2, 0.3, 0.4]", "the cat"),
        ("What is in [0.1, 0.2, 0.3, 0.4]?\n<image>", "the cat", "the cat"),
        ("What is in [0.1, 0.2, 0.3, 0.4]?\n<image>", "<ref>the cat</ref>", "the cat"),
    ],
)
@pytest.mark.parametrize("system", [False, True])
def test_expressions_are_found_in_conversations(
    tmp_path: Path, question: str, answer: str, expression: str, system: bool
) -> None:
    """The image tag may come last, and a system prompt is not taken for a question."""
    turns = [{"from": "system", "value": "You find [1, 2, 3, 4]."}] * system
    turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns += [{"from": "human", "value": "Where is this: the dog"}, {"from": "gpt", "value": "[0.5, 0.5, 0.6, 0.7]"}]
    source = read_list(tmp_path / "x.json", [{"image": "9.jpg", "conversations": turns}], "val")
    assert [(ref.sentences[0].sent, ref.box) for ref in source.refs] == [
        (expression, [0.1, 0.2, 0.3, 0.4]),
        ("the dog", [0.5, 0.5, 0.6, 0.7]),
    ]
    assert not source.notes


@pytest.mark.parametrize(
    ("turns", "skipped"),
    [
        (("What is in [0.1, 0.2, 0.3, 0.4]?",), 1),  # without an answer
        (("What is in [0.1, 0.2, 0.3, 0.4]?", " "), 1),
        (("What is in [0.1, 0.2, 0.3, 0.4]?", "", "Hello", "Hello", "And [0, 0, 1, 1]?"), 3),
        ((f"What is in [0, 0, 1, {'9' * 400}]?", "the sky"), 1),  # beyond the range of floats
    ],
)
def test_questions_of_conversations_are_used_or_counted(tmp_path: Path, turns: tuple[str, ...], skipped: int) -> None:
    used = ("What is in [0.5, 0.5, 0.6, 0.7]?", "the dog")
    conversation = [{"from": "human", "value": turn} for turn in (*used, *turns)]
    source = read_list(tmp_path / "x.json", [{"image": "9.jpg", "conversations": conversation}], "val")
    assert [ref.sentences[0].sent for ref in source.refs] == ["the dog"]
    assert f" {skipped} question{'s' * (skipped > 1)} without a box or an expression" in source.notes[0]
    assert "with several boxes or without an image" in source.notes[0]
