"""The folders of RefCOCO, RefCOCO+ and RefCOCOg: refs pickles and instances.json."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refdet.data.shapes.coco_files import Picture, write_instances
from refdet.data.shapes.phrases import REFCOCO, REFCOCO_PLUS, REFCOCOG, Style, meanings, sample_meanings, sentence
from refdet.data.shapes.refer_splits import Referent, google_splits, sample_umd, sample_unc


def ref_records(
    rng: np.random.Generator, referents: Sequence[Referent], style: Style, sentence_range: tuple[int, int]
) -> list[dict[str, Any]]:
    """Make one record per referent, as in REFER's pickles, with `sentence_range` (min, max) sentences each.

    A referent with fewer meanings than the sampled number of sentences has one sentence per meaning, but at least the
    minimum.
    """
    fewest, most = sentence_range
    records: list[dict[str, Any]] = []
    sent_id = 0
    for ref_id, referent in enumerate(referents):
        picture, thing = referent.picture, referent.thing
        candidates = meanings(thing, picture.things, style)
        chosen = sample_meanings(rng, candidates, style, int(rng.integers(fewest, most + 1)))
        sents: list[str] = []
        for k in range(max(fewest, len(chosen))):
            # repeat a meaning if there are too few, as if two annotators had the same idea
            sents.append(sentence(rng, chosen[k % len(chosen)], style))
        sentences = [
            {"tokens": s.split(), "raw": _raw(rng, s, style), "sent_id": sent_id + k, "sent": s}
            for k, s in enumerate(sents)
        ]
        sent_id += len(sents)
        records.append(
            {
                "sent_ids": [s["sent_id"] for s in sentences],
                "file_name": f"{picture.file_name.removesuffix('.jpg')}_{thing}.jpg",
                "ann_id": picture.annotation_ids[thing],
                "ref_id": ref_id,
                "image_id": picture.id,
                "split": referent.split,
                "sentences": sentences,
                "category_id": picture.things[thing].category.id,
            }
        )
    return records


def _raw(rng: np.random.Generator, sent: str, style: Style) -> str:
    """The sentence as an annotator may have typed it.

    A full phrase has a capital and a period; one in five short ones has a capital.
    """
    if style.full:
        return sent[0].upper() + sent[1:] + "."
    return sent.capitalize() if rng.random() < 0.2 else sent


def _with_splits(records: list[dict[str, Any]], splits: list[str]) -> list[dict[str, Any]]:
    """Copies of the records with other splits."""
    return [{**record, "split": split} for record, split in zip(records, splits, strict=True)]


def _write_dataset(folder: Path, pictures: Sequence[Picture], refs: dict[str, list[dict[str, Any]]]) -> None:
    """Write instances.json of the referred images, and a pickle of refs per split_by."""
    image_ids = {record["image_id"] for records in refs.values() for record in records}
    write_instances(folder / "instances.json", pictures, image_ids)
    for split_by, records in refs.items():
        # protocol 2 as in the published files, readable by Python 2
        (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(records, protocol=2))


def write_refer(root: Path, pictures: Sequence[Picture], rng: np.random.Generator) -> None:
    """Write root/refcoco, root/refcoco+ and root/refcocog, with refs on `pictures`, those of train2014."""
    referents = sample_unc(rng, pictures)
    refs = ref_records(rng, referents, REFCOCO, (2, 4))
    google_refs = _with_splits(refs, google_splits(rng, len(refs), test=True))
    _write_dataset(root / "refcoco", pictures, {"unc": refs, "google": google_refs})
    _write_dataset(root / "refcoco+", pictures, {"unc": ref_records(rng, referents, REFCOCO_PLUS, (2, 4))})
    refs = ref_records(rng, sample_umd(rng, pictures), REFCOCOG, (1, 2))
    google_refs = _with_splits(refs, google_splits(rng, len(refs), test=False))
    _write_dataset(root / "refcocog", pictures, {"umd": refs, "google": google_refs})
