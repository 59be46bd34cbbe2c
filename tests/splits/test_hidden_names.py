"""A COCO file name is recognized anywhere in a list of any format."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from split_examples import write_refs

from refdet.errors import InputError
from refdet.splits.build import build_split
from refdet.splits.leak_audit import audit

HELD_OUT = 379349
NAMES = [
    "COCO_train2014_000000379349.jpg", "train2017/000000379349.jpg", "000000379349", "/data/coco/000000379349.png",
    "http://images.cocodataset.org/train2017/000000379349.jpg?x=1", r"D:\coco\COCO_train2014_000000379349_4.jpg",
]  # fmt: skip
KEYS = st.sampled_from(
    ["image", "images", "img_path", "image_name", "meta", "caption", "a b", "conversations", "regions", "objects",
     "train", "x0", ""]
)  # fmt: skip
# The trees contain no ids; test_hidden_ids.py tests these.
LEAVES = st.booleans() | st.floats(allow_nan=False) | st.none() | st.text(max_size=8) | st.just("kitchen.jpg")
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=10
)
ENTRIES = st.dictionaries(KEYS, TREES, min_size=1, max_size=4)


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The key paths of a JSON tree and of all its parts."""
    yield path
    if isinstance(tree, dict):
        for key, inner in tree.items():
            yield from paths(inner, (*path, key))
    elif isinstance(tree, list):
        for index, inner in enumerate(tree):
            yield from paths(inner, (*path, index))


def hide(entry: Any, name: str, path: tuple[Any, ...], as_key: bool) -> Any:
    """A copy of the entry with the name instead of the part at a path, or as a new key around that part."""
    entry = copy.deepcopy(entry)
    if not path:
        return {name: entry} if as_key else {"x": name, "y": entry}
    parent = entry
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = {name: parent[path[-1]]} if as_key else name
    return entry


def list_text(list_format: str, entries: list[Any]) -> str:
    """A list file of the entries in one of several formats."""
    if list_format == "JSON lines":
        return "".join(json.dumps(entry) + "\n" for entry in entries)
    instances = {"images": [{"id": n, **entry} for n, entry in enumerate(entries, start=1)]}
    by_split = {"version": 1, "train": entries[:1], "more": {"val": entries[1:], "none": []}}
    by_name = {f"{n}.x": entry for n, entry in enumerate(entries)}
    return json.dumps({"list": entries, "instances": instances, "by split": by_split, "by name": by_name}[list_format])


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data(), list_format=st.sampled_from(["list", "instances", "by split", "by name", "JSON lines"]))
def test_a_hidden_name_is_found_and_removed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, list_format: str
) -> None:
    folder = tmp_path_factory.mktemp("hidden")
    root = write_refs(folder / "refer", {("refcoco", "unc"): [(HELD_OUT, "val"), (500, "testA")]})
    entries = data.draw(st.lists(ENTRIES, min_size=1, max_size=3))
    entries.append({"image": "000000000009.jpg"})
    target = data.draw(st.integers(0, len(entries) - 2))
    path = data.draw(st.sampled_from(list(paths(entries[target]))))
    name, as_key = data.draw(st.sampled_from(NAMES)), data.draw(st.booleans())
    entries[target] = hide(entries[target], name, path, as_key)
    source = folder / ("list.jsonl" if list_format == "JSON lines" else "list.json")
    source.write_text(list_text(list_format, entries))
    assert audit(source, root).leaked, source.read_text()
    after = build_split(source, root, folder / f"out{source.suffix}").out
    assert str(HELD_OUT) not in after.read_text() and "000000000009.jpg" in after.read_text()
    assert audit(after, root).leaked == []


LIST_FORMATS: dict[str, Any] = {
    "Karpathy's": {"images": [{"filename": "COCO_val2014_{:012d}.jpg", "imgid": "N", "cocoid": "ID"}], "dataset": "x"},
    "ODVG": "lines",
    "by split": {"train": [{"image_id": "ID", "expressions": ["the cat"]}]},
    "by name": "names",
    "several images an entry": [{"id": "N", "image": ["coco/{:012d}.jpg", "coco/000000000025.jpg"]}],
    "other key": [{"img_path": "COCO_train2014_{:012d}.jpg", "expression": "the cat"}],
    "nested": [{"id": "N", "meta": {"source": {"file": "train2017/{:012d}.jpg"}}}],
    "MDETR's": {"images": [{"id": "N", "original_id": "ID", "file_name": "COCO_train2014_{:012d}.jpg"}]},
}


@pytest.mark.parametrize("list_format", LIST_FORMATS)
def test_common_list_formats(tmp_path: Path, list_format: str) -> None:
    held, free = [379349, 212679, 100667], [9, 30, 790]
    root = write_refs(tmp_path / "refer", {("refcoco", "unc"): [(number, "val") for number in held]})
    numbers = [number for pair in zip(held, free, strict=True) for number in pair]
    source = tmp_path / ("x.jsonl" if list_format == "ODVG" else "x.json")

    def fill(template: Any, n: int, number: int) -> Any:
        text = json.dumps(template).replace('"ID"', str(number)).replace('"N"', str(n))
        return json.loads(text.replace("{:012d}", f"{number:012d}"))

    if list_format == "ODVG":
        rows = [{"filename": f"{n:012d}.jpg", "detection": {"instances": [{"bbox": [1, 1, 5, 5]}]}} for n in numbers]
        source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif list_format == "by name":
        source.write_text(json.dumps({f"COCO_train2014_{n:012d}.jpg": {"caption": "a cat"} for n in numbers}))
    else:
        template = LIST_FORMATS[list_format]
        key = None if isinstance(template, list) else next(iter(template))
        [entry] = template if key is None else template[key]
        entries = [fill(entry, n, number) for n, number in enumerate(numbers)]
        source.write_text(json.dumps(entries if key is None else {**template, key: entries}))
    found = audit(source, root)
    assert [len(split.image_ids) for split in found.splits] == [3]
    assert bool(found.unknown) == (list_format == "by split")  # nothing confirms that its ids are COCO's
    result = build_split(source, root, tmp_path / f"out{source.suffix}")
    text = result.out.read_text()
    assert not any(str(number) in text for number in held) and all(str(number) in text for number in free)
    assert (result.report["images_before"], result.report["images_after"]) == (6, 3)
    assert audit(result.out, root).leaked == []


def test_lists_without_coco_ids_and_malformed_lines_are_refused(tmp_path: Path) -> None:
    root = write_refs(tmp_path / "refer", {("refcoco", "unc"): [(5, "val")]})
    for text in (
        '{"a": [{"x": 1.5}], "b": {"c": {}}}',
        '[{"image": "kitchen.jpg"}]',
        '{"image": "kitchen.jpg"}\n{}\n',
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(InputError, match=r"x.json: its \d entr(y has|ies have) no COCO image id"):
            audit(tmp_path / "x.json", root)
    # The name of the second file contains an error message with another line number.
    for path in (tmp_path / "x.jsonl", tmp_path / "x.jsonl: malformed JSON in line 1: .jsonl"):
        path.write_text('{"image": "000000000009.jpg"}\n\n{"image": \n')
        with pytest.raises(InputError) as raised:
            audit(path, root)
        assert str(raised.value) == f"{path}: malformed JSON in line 3: Expecting value"
