"""Convert REFER from the formats found on the web to its own layout."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refdet.data.refer_formats.assembling import merge_sentences, refer_instances, refer_refs
from refdet.data.refer_formats.coco_annotations import CocoAnnotations, read_coco
from refdet.data.refer_formats.other_divisions import refs_of_division, size_of
from refdet.data.refer_formats.reading import read_source, source_files
from refdet.data.refer_formats.records import Source, SourceInstances, SourceRef
from refdet.data.refer_formats.resolving import resolve
from refdet.data.refer_formats.split_names import USUAL_SPLIT_BY, match_split_names
from refdet.data.refer_statistics import compare_with_published, count_refs
from refdet.errors import InputError
from refdet.files.atomic import atomic_write
from refdet.files.short_text import short_repr
from refer import plain_files
from refer.statistics import COUNTS, Counts
from refer.validation import check_refs

_PROTOCOL = 2  # readable by Python 2, like the original's


@dataclass(frozen=True)
class ConvertedDataset:
    """A converted dataset and split_by.

    Attributes:
        dataset: such as "refcoco".
        split_by: such as "unc".
        refs_file: the refs file that was written.
        counts: size of each split.
        complete: whether all published splits have their published sizes.
        notes: human-readable notes about what was filled in, replaced or differs.
    """

    dataset: str
    split_by: str
    refs_file: Path
    counts: dict[str, Counts]
    complete: bool
    notes: list[str]


def convert_refer(
    sources: Sequence[str | Path],
    out: str | Path,
    dataset: str = "",
    split_by: str = "",
    instances: str | Path | None = None,
    split_names: Sequence[str] = (),
) -> list[ConvertedDataset]:
    """Convert REFER to ``OUT/DATASET/refs(SPLIT_BY).p`` and ``OUT/DATASET/instances.json``.

    Args:
        sources: files, or folders of files, in any of the formats of this package; all splits of a dataset together.
        out: the REFER root to write into.
        dataset: name of the dataset, where neither the files nor their names have it; of files with several datasets,
            the one to convert.
        split_by: likewise; "unc" for refcoco and refcoco+ and "umd" for refcocog where nothing has it.
        instances: COCO's instances_train2014.json; needed by formats without annotation ids, and by those without the
            other annotations of an image to write the same instances.json as REFER's.
        split_names: "OLD=NEW" for splits whose names and sizes say nothing.

    Returns:
        One result per dataset and split_by. Nothing is written unless everything can be.

    Raises:
        InputError: a file is damaged, in an unknown format or lacks a field; ids cannot be recovered; a split or
            dataset cannot be recognized; or the files to write exist.
        refer.ReferError: a JSON file is malformed, or the converted refs are invalid.
    """
    root = Path(out)
    renamed = _parse_split_names(split_names)
    loaded = [(path, read_source(path)) for path in source_files(sources)]
    groups = _group_by_dataset(loaded, dataset, split_by)
    _check_split_names(renamed, groups)
    _check_new(root, groups)
    coco = None if instances is None else read_coco(Path(instances))
    # everything is prepared before the first file is written, so that a late error leaves nothing behind
    plans = [_make_plan(root, pair, sources, coco, renamed) for pair, sources in groups.items()]
    new = [
        _new_instances(root, name, [plan for plan in plans if plan.result.dataset == name])
        for name in dict.fromkeys(pair[0] for pair in groups)
    ]
    for path, contents in filter(None, new):
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(contents), encoding="utf-8")
    for plan in plans:
        with atomic_write(plan.result.refs_file) as temporary:
            temporary.write_bytes(pickle.dumps(plan.entries, protocol=_PROTOCOL))
    return [plan.result for plan in plans]


@dataclass(frozen=True)
class _Plan:
    """What to write for a dataset and split_by: the entries of its refs file, and its instances."""

    result: ConvertedDataset
    entries: list[dict[str, Any]]
    instances: dict[str, Any]


_Sources = list[tuple[Path, Source, list[SourceRef]]]


def _parse_split_names(split_names: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in split_names]
    for (old, equals, new), text in zip(pairs, split_names, strict=True):
        if not (old and equals and new and new.isprintable()):
            raise InputError(f"`split_names` {text}: give OLD=NEW, such as test=testA")
    return {old: new for old, _, new in pairs}


def _check_split_names(renamed: dict[str, str], groups: dict[tuple[str, str], _Sources]) -> None:
    existing = dict.fromkeys(ref.split for sources in groups.values() for _, _, refs in sources for ref in refs)
    for old, new in renamed.items():
        if old not in existing:
            raise InputError(
                f"`split_names` {old}={new}: no split {short_repr(old)} in the sources, which have "
                f"{', '.join(existing)}"
            )


def _group_by_dataset(
    loaded: Sequence[tuple[Path, Source]], dataset: str, split_by: str
) -> dict[tuple[str, str], _Sources]:
    """The refs of each requested dataset and split_by, by file."""
    groups: dict[tuple[str, str], _Sources] = {}
    for path, source in loaded:
        several = len({(ref.dataset, ref.split_by) for ref in source.refs}) > 1
        by_pair: dict[tuple[str, str], list[SourceRef]] = {}
        for ref in source.refs:
            name = (ref.dataset if several else dataset or ref.dataset) or dataset
            if not name:
                raise InputError(f"{path}: neither its contents nor its name has the dataset; give `dataset`")
            by = (ref.split_by if several else split_by or ref.split_by) or split_by or USUAL_SPLIT_BY.get(name, "")
            if not by:
                raise InputError(f"{path}: unknown division of {name}; give `split_by`")
            if dataset in ("", name) and split_by in ("", by):
                by_pair.setdefault((name, by), []).append(ref)
        for pair, refs in by_pair.items():
            groups.setdefault(pair, []).append((path, source, refs))
    if not groups:
        files = ", ".join(str(path) for path, _ in loaded)
        raise InputError(f"`dataset` {dataset} `split_by` {split_by}: no such refs in {files}")
    return groups


def _check_new(root: Path, groups: dict[tuple[str, str], _Sources]) -> None:
    for dataset, split_by in groups:
        for argument, name in (("dataset", dataset), ("split_by", split_by)):
            if not name.isprintable() or set(name) & set("/\\()") or name in (".", ".."):
                raise InputError(f"`{argument}` {short_repr(name)}: cannot be a part of a file name")
        path = root / dataset / f"refs({split_by}).p"
        if path.exists():
            raise InputError(f"{path}: exists; choose another `out` or remove it")


def _make_plan(
    root: Path, pair: tuple[str, str], sources: _Sources, coco: CocoAnnotations | None, renamed: dict[str, str]
) -> _Plan:
    dataset, split_by = pair
    notes = [note for _, source, _ in sources for note in source.notes]
    refs: list[SourceRef] = []
    for path, source, file_refs in sources:
        resolve(path, Source(source.format, file_refs, source.one_sentence_each, source.layouts), coco)
        for ref in file_refs:
            ref.split = renamed.get(ref.split, ref.split)
    for one_sentence_each in (False, True):  # merges all sentences of an object, from any file
        file_refs = [
            ref
            for _, source, source_refs in sources
            if source.one_sentence_each is one_sentence_each
            for ref in source_refs
        ]
        refs += merge_sentences(file_refs, dataset, split_by) if one_sentence_each else file_refs
    included = coco or _merge_instances(sources)
    refs, left_out = _refs_of_division(dataset, split_by, refs)
    notes += left_out
    names = match_split_names(dataset, split_by, _sizes(refs))
    for old, new in names.items():
        if old != new:
            notes.append(f"split {old!r} is {new}")
    for ref in refs:
        ref.split = names[ref.split]
    ref_file_names = all(source.ref_file_names for _, source, _ in sources)
    entries, more = refer_refs(refs, ref_file_names, included)
    refs_file = root / dataset / f"refs({split_by}).p"
    check_refs(refs_file, entries, generalized=False)
    header = next((source.instances.header for _, source, _ in sources if source.instances.header), {})
    contents, incomplete = refer_instances(refs, included, included.instances.header or header)
    counts = count_refs(entries)  # type: ignore[arg-type]  # checked just now
    size_differences = compare_with_published(dataset, split_by, counts)
    published = COUNTS.get(pair, {})
    complete = bool(published) and all(
        _matches_published(counts.get(split), expected) for split, expected in published.items()
    )
    lines = [*notes, *more, *incomplete, *size_differences]
    if not complete and not size_differences:
        lines.append(f"{dataset}/{split_by}: a part of the published dataset, so its size was not checked")
    prefixed = [line if line.startswith(dataset + "/") else f"{dataset}/{split_by}: {line}" for line in lines]
    return _Plan(ConvertedDataset(dataset, split_by, refs_file, counts, complete, prefixed), entries, contents)


def _by_split(refs: Sequence[SourceRef]) -> dict[str, list[SourceRef]]:
    splits: dict[str, list[SourceRef]] = {}
    for ref in refs:
        splits.setdefault(ref.split, []).append(ref)
    return splits


def _refs_of_division(dataset: str, split_by: str, refs: Sequence[SourceRef]) -> tuple[list[SourceRef], list[str]]:
    """The refs without those that belong to another split_by, and notes about these."""
    kept: list[SourceRef] = []
    notes = []
    for split, split_refs in _by_split(refs).items():
        division_refs, note = refs_of_division(dataset, split_by, split, split_refs)
        kept += division_refs
        notes += [note] if note else []
    if not kept:
        raise InputError(f"`split_by` {split_by}: no refs of {dataset}/{split_by}; {'; '.join(notes)}")
    return kept, notes


def _sizes(refs: Sequence[SourceRef]) -> dict[str, Counts]:
    return {split: size_of(split_refs) for split, split_refs in _by_split(refs).items()}


def _matches_published(counts: Counts | None, published: Counts) -> bool:
    sentences = None if counts is None or published.sentences is None else counts.sentences
    return counts is not None and counts._replace(sentences=sentences) == published


def _merge_instances(sources: _Sources) -> CocoAnnotations:
    merged = SourceInstances(complete=all(source.instances.complete for _, source, _ in sources))
    for _, source, _ in sources:
        merged.images |= source.instances.images
        merged.annotations |= source.instances.annotations
        merged.header = merged.header or source.instances.header
    return CocoAnnotations(", ".join(str(path) for path, _, _ in sources), merged)


def _new_instances(root: Path, dataset: str, plans: Sequence[_Plan]) -> tuple[Path, dict[str, Any]] | None:
    """Contents of instances.json of all split_bys of a dataset; None if the existing one has all that they need."""
    path = root / dataset / "instances.json"
    contents = dict(plans[0].instances)
    for key in ("images", "annotations"):
        entries = {entry["id"]: entry for plan in plans for entry in plan.instances[key]}
        contents[key] = list(entries.values())
    if path.exists():
        existing = plain_files.read_json(path)
        for key in ("images", "annotations"):
            existing_entries = existing.get(key) if isinstance(existing, dict) else None
            if not isinstance(existing_entries, list) or not all(isinstance(entry, dict) for entry in existing_entries):
                raise InputError(f"{path}: exists and has no list of {key}; choose another `out` or remove it")
            existing_ids = {_id_of(entry) for entry in existing_entries}
            if not existing_ids >= {entry["id"] for entry in contents[key]}:
                raise InputError(f"{path}: exists and lacks {key} of the new refs; choose another `out` or remove it")
        for plan in plans:
            plan.result.notes.append(f"{dataset}/{plan.result.split_by}: kept the existing instances.json")
        return None
    return path, contents


def _id_of(entry: dict[str, Any]) -> int | None:
    value = entry.get("id")
    return value if isinstance(value, int) else None
