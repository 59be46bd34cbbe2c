"""Convert REFER from the formats found on the web to REFER's own layout."""

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refdet.data.refer_formats.assembling import build_instances, build_refs, merge_sentences
from refdet.data.refer_formats.coco_annotations import CocoAnnotations, read_coco
from refdet.data.refer_formats.other_divisions import refs_of_division, size_of
from refdet.data.refer_formats.reading import read_source, source_files
from refdet.data.refer_formats.records import Source, SourceInstances, SourceRef
from refdet.data.refer_formats.resolving import resolve_ids
from refdet.data.refer_formats.split_names import DEFAULT_SPLIT_BY, match_split_names
from refdet.data.refer_statistics import compare_with_published, count_refs
from refdet.errors import InputError
from refdet.files.atomic import atomic_write
from refdet.files.short_text import short_repr
from refer import plain_files
from refer.statistics import COUNTS, Counts
from refer.validation import check_refs

_PICKLE_PROTOCOL = 2  # readable by Python 2, as are REFER's own files


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
        sources: files, or folders of files, in any of the formats of this package; one call must have all splits of a
            dataset.
        out: the REFER root to write into.
        dataset: name of the dataset, instead of that in the files or their names; of a file with several datasets or
            split_bys, the dataset to convert.
        split_by: likewise for split_by. If neither given nor known, it is "unc" for refcoco and refcoco+ and "umd" for
            refcocog.
        instances: COCO's instances_train2014.json. Formats without annotation ids need it; those with only the
            annotations of refs need it to write an instances.json with all annotations, like REFER's.
        split_names: "OLD=NEW" for each split that is not recognized by name or size.

    Returns:
        One result per dataset and split_by. Nothing is written unless everything can be.

    Raises:
        InputError: a file is damaged, in an unknown format or lacks a field; ids cannot be recovered; a split or
            dataset cannot be recognized; or the files to write exist.
        refer.ReferError: a JSON file is malformed, or the converted refs are invalid.
    """
    root = Path(out)
    new_split_names = _parse_split_names(split_names)
    loaded = [(path, read_source(path)) for path in source_files(sources)]
    groups = _group_by_dataset(loaded, dataset, split_by)
    _check_split_names(new_split_names, groups)
    _check_not_written_yet(root, groups)
    for sources_of_pair in groups.values():
        _check_no_copies(sources_of_pair)
    coco = None if instances is None else read_coco(Path(instances))
    # everything is prepared before the first file is written, so that a late error leaves nothing behind
    plans = [_make_plan(root, pair, files, coco, new_split_names) for pair, files in groups.items()]
    instances_files: dict[Path, dict[str, Any]] = {}
    for name in dict.fromkeys(name for name, _ in groups):
        contents = _new_instances(root, name, [plan for plan in plans if plan.result.dataset == name])
        if contents is not None:
            instances_files[root / name / "instances.json"] = contents
    for path, contents in instances_files.items():
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(contents), encoding="utf-8")
    for plan in plans:
        with atomic_write(plan.result.refs_file) as temporary:
            temporary.write_bytes(pickle.dumps(plan.entries, protocol=_PICKLE_PROTOCOL))
    return [plan.result for plan in plans]


@dataclass(frozen=True)
class _Plan:
    """What to write for a dataset and split_by.

    Attributes:
        result: what `convert_refer` returns for them.
        entries: the entries of the refs file.
        instances: contents of instances.json for these refs alone.
    """

    result: ConvertedDataset
    entries: list[dict[str, Any]]
    instances: dict[str, Any]


_Sources = list[tuple[Path, Source]]
"""The files of a dataset and split_by, each with only the refs of that dataset and split_by."""


def _parse_split_names(split_names: Sequence[str]) -> dict[str, str]:
    """Name in the source -> name to give it."""
    new_names: dict[str, str] = {}
    for text in split_names:
        old, _, new = text.partition("=")
        if not (old and new and new.isprintable()):
            raise InputError(f"`split_names` {text}: give OLD=NEW, such as test=testA")
        if new_names.setdefault(old, new) != new:
            raise InputError(f"`split_names` {text}: {old} is already renamed to {new_names[old]}; give one of the two")
    return new_names


def _check_split_names(new_names: dict[str, str], groups: dict[tuple[str, str], _Sources]) -> None:
    """Raise an InputError if a split to rename does not exist."""
    existing = dict.fromkeys(ref.split for sources in groups.values() for _, source in sources for ref in source.refs)
    for old, new in new_names.items():
        if old not in existing:
            raise InputError(
                f"`split_names` {old}={new}: no split {short_repr(old)} in the sources, which have "
                f"{', '.join(existing)}"
            )


def _group_by_dataset(
    loaded: Sequence[tuple[Path, Source]], dataset: str, split_by: str
) -> dict[tuple[str, str], _Sources]:
    """Group the requested refs of the files by (dataset, split_by)."""
    groups: dict[tuple[str, str], _Sources] = {}
    for path, source in loaded:
        # Of several, the arguments select one; of one or none, they give the name.
        several = len({(ref.dataset, ref.split_by) for ref in source.refs}) > 1
        by_pair: dict[tuple[str, str], list[SourceRef]] = {}
        for ref in source.refs:
            name = (ref.dataset if several else dataset or ref.dataset) or dataset
            if not name:
                raise InputError(f"{path}: neither its contents nor its name has the dataset; give `dataset`")
            by = (ref.split_by if several else split_by or ref.split_by) or split_by or DEFAULT_SPLIT_BY.get(name, "")
            if not by:
                raise InputError(f"{path}: unknown division of {name}; give `split_by`")
            if dataset in ("", name) and split_by in ("", by):
                by_pair.setdefault((name, by), []).append(ref)
        for pair, refs in by_pair.items():
            groups.setdefault(pair, []).append((path, replace(source, refs=refs)))
    if not groups:
        files = ", ".join(str(path) for path, _ in loaded)
        if not any(source.refs for _, source in loaded):
            raise InputError(f"{files}: no refs; download {'it' if len(loaded) == 1 else 'them'} again")
        raise InputError(f"`dataset` {dataset} `split_by` {split_by}: no such refs in {files}")
    return groups


def _check_not_written_yet(root: Path, groups: dict[tuple[str, str], _Sources]) -> None:
    """Raise an InputError if a refs file to write exists, or its name would be invalid."""
    for dataset, split_by in groups:
        for argument, name in (("dataset", dataset), ("split_by", split_by)):
            if not name.isprintable() or set(name) & set("/\\()") or name in (".", ".."):
                raise InputError(f"`{argument}` {short_repr(name)}: cannot be a part of a file name")
        path = root / dataset / f"refs({split_by}).p"
        if path.exists():
            raise InputError(f"{path}: exists; choose another `out` or remove it")


def _check_no_copies(sources: _Sources) -> None:
    """Raise an InputError if all refs that a file has of a split are also in another file: a second download of it."""
    files_by_split: dict[str, list[tuple[Path, Counter[tuple]]]] = {}
    for path, source in sources:
        refs_by_split: dict[str, Counter[tuple]] = {}
        for ref in source.refs:
            sentences = tuple((sentence.sent_id, sentence.sent, sentence.raw) for sentence in ref.sentences)
            box = tuple(ref.box or ())
            key = (ref.ref_id, ref.ann_id, ref.image_id, ref.file_name, ref.category_id, box, sentences)
            refs_by_split.setdefault(ref.split, Counter())[key] += 1
        for split, refs in refs_by_split.items():
            files_by_split.setdefault(split, []).append((path, refs))
    for split, files in files_by_split.items():
        for (path, refs), (other, others) in itertools.permutations(files, 2):
            if refs <= others:
                raise InputError(
                    f"{path}: its refs of split {short_repr(split)} are also in {other}; give one of the two"
                )


def _make_plan(
    root: Path, pair: tuple[str, str], sources: _Sources, coco: CocoAnnotations | None, new_split_names: dict[str, str]
) -> _Plan:
    """Prepare the files of ``pair``, a dataset and split_by."""
    dataset, split_by = pair
    refs, notes = _merge_refs(pair, sources, coco, new_split_names)
    annotations = coco or _merge_instances(sources)
    ref_file_names = all(source.ref_file_names for _, source in sources)
    entries, refs_notes = build_refs(refs, ref_file_names, annotations)
    refs_file = root / dataset / f"refs({split_by}).p"
    check_refs(refs_file, entries, generalized=False)
    instances, instances_notes = build_instances(refs, annotations)
    counts = count_refs(entries)  # type: ignore[arg-type]  # checked just now
    size_differences = compare_with_published(dataset, split_by, counts)
    published = COUNTS.get(pair, {})
    complete = bool(published) and all(
        _matches_published(counts.get(split), expected) for split, expected in published.items()
    )
    notes += [*refs_notes, *instances_notes, *size_differences]
    if not published:
        notes.append("no size is published for this division, so it was not checked")
    elif not complete and not size_differences:
        notes.append("a part of the published dataset, so its size was not checked")
    prefixed = [note if note.startswith(dataset + "/") else f"{dataset}/{split_by}: {note}" for note in notes]
    return _Plan(ConvertedDataset(dataset, split_by, refs_file, counts, complete, prefixed), entries, instances)


def _merge_refs(
    pair: tuple[str, str], sources: _Sources, coco: CocoAnnotations | None, new_split_names: dict[str, str]
) -> tuple[list[SourceRef], list[str]]:
    """Merge the refs of all files; returns them, with ids and REFER's split names, and notes on what was changed."""
    notes = list(dict.fromkeys(note for _, source in sources for note in source.notes))
    for path, source in sources:
        resolve_ids(path, source, coco)
        for ref in source.refs:
            ref.split = new_split_names.get(ref.split, ref.split)
    refs = [ref for _, source in sources if not source.one_sentence_each for ref in source.refs]
    sentences = [ref for _, source in sources if source.one_sentence_each for ref in source.refs]
    refs += merge_sentences(sentences, *pair)
    refs, division_notes = _select_division(*pair, refs)
    notes += division_notes
    split_names = match_split_names(*pair, _sizes_by_split(refs))
    notes += [f"split {old!r} is {new}" for old, new in split_names.items() if old != new]
    for ref in refs:
        ref.split = split_names[ref.split]
    return refs, notes


def _group_by_split(refs: Sequence[SourceRef]) -> dict[str, list[SourceRef]]:
    splits: dict[str, list[SourceRef]] = {}
    for ref in refs:
        splits.setdefault(ref.split, []).append(ref)
    return splits


def _select_division(dataset: str, split_by: str, refs: Sequence[SourceRef]) -> tuple[list[SourceRef], list[str]]:
    """Select the refs of a split_by; returns them, and notes about those of another split_by."""
    kept: list[SourceRef] = []
    notes = []
    for split, split_refs in _group_by_split(refs).items():
        division_refs, note = refs_of_division(dataset, split_by, split, split_refs)
        kept += division_refs
        notes += [note] if note else []
    if not kept:
        raise InputError(f"`split_by` {split_by}: no refs of {dataset}/{split_by}; {'; '.join(notes)}")
    return kept, notes


def _sizes_by_split(refs: Sequence[SourceRef]) -> dict[str, Counts]:
    return {split: size_of(split_refs) for split, split_refs in _group_by_split(refs).items()}


def _matches_published(counts: Counts | None, published: Counts) -> bool:
    """Whether a split has the published size; the number of sentences counts only if it is published."""
    sentences = None if counts is None or published.sentences is None else counts.sentences
    return counts is not None and counts._replace(sentences=sentences) == published


def _merge_instances(sources: _Sources) -> CocoAnnotations:
    """The images and annotations that the files include themselves."""
    merged = SourceInstances(complete=all(source.instances.complete for _, source in sources))
    for _, source in sources:
        merged.images |= source.instances.images
        merged.annotations |= source.instances.annotations
        merged.header = merged.header or source.instances.header
    return CocoAnnotations(", ".join(str(path) for path, _ in sources), merged)


def _new_instances(root: Path, dataset: str, plans: Sequence[_Plan]) -> dict[str, Any] | None:
    """Contents of instances.json for all split_bys of a dataset.

    Returns:
        The contents, or None to keep an existing file that has all of their images and annotations.

    Raises:
        InputError: the existing file lacks some of them.
    """
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
    return contents


def _id_of(entry: dict[str, Any]) -> int | None:
    """Id of an entry of an existing file, whose entries are not checked."""
    value = entry.get("id")
    return value if isinstance(value, int) else None
