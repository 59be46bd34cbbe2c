"""MAttNet's ``data.json`` and ``data.h5``: numbered refs, images, annotations and sentences, with a vocabulary.

Equivalent to the output of MAttNet's ``tools/prepro.py`` in a Python with ordered dictionaries.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refdet.errors import InputError
from refdet.files.json_files import read_json
from refdet.files.short_text import shorten
from refdet.store.hdf5_file import OLDEST_READERS, new_file
from refdet.structures.limits import is_id
from refer import REFER
from refer.validation import Types, box_of, check_fields

# Dataset -> maximum number of tokens of a sentence, as in prepro.py.
MAX_LENGTH = {"refcoco": 10, "refclef": 10, "refcoco+": 10, "refcocog": 20}
PAD, UNKNOWN, BEGIN, END = "<PAD>", "<UNK>", "<BOS>", "<EOS>"
ATTRIBUTE_TYPES = ("r1", "r2", "r7")  # in Kazemzadeh et al.: category, color and other attributes
NO_ATTRIBUTE = "none"  # refer-parser2's word for no attribute
_IMAGE: dict[str, Types] = {"file_name": str, "height": int, "width": int}
_ANNOTATION: dict[str, Types] = {"category_id": int}
METADATA_BYTES = 64 << 10  # maximum size of HDF5's metadata in a file of a few datasets


@dataclass(frozen=True)
class PreproOptions:
    """Options of prepro.py, with the same defaults.

    Attributes:
        word_count_threshold: words that occur at most this often become ``<UNK>``.
        max_length: maximum number of tokens of a sentence, None for that of the dataset in `MAX_LENGTH`.
        attributes: ``sents.json`` of refer-parser2, None for no attribute words.
        top_attributes: number of attribute words to keep, the most frequent ones.
    """

    word_count_threshold: int = 5
    max_length: int | None = None
    attributes: Path | None = None
    top_attributes: int = 50


@dataclass(frozen=True)
class Prepro:
    """Contents of ``data.json`` and ``data.h5``.

    Attributes:
        data: JSON object with "refs", "images", "anns", "sentences", "word_to_ix", "att_to_ix", "att_to_cnt",
            "cat_to_ix" and "label_length".
        labels: (sentences, label_length) int32 numbers of the words in ``word_to_ix``, padded with 0; None if ``data``
            was read from a file.
    """

    data: dict[str, Any]
    labels: np.ndarray | None = None

    @classmethod
    def read(cls, data_json: Path) -> Prepro:
        """Read a data.json written by prepro.py.

        Args:
            data_json: the file.

        Returns:
            The contents of the file, without labels.

        Raises:
            InputError: the file was not written by prepro.py, has duplicate ids, or does not number its annotations.
        """
        data = read_json(data_json)
        try:
            image_ids = [image["image_id"] for image in data["images"]]
            ann_ids = [ann["ann_id"] for ann in data["anns"]]
            rows = [ann["h5_id"] for ann in data["anns"]]  # in ann_feats.h5
            categories = data.get("cat_to_ix", {})
            if not isinstance(categories, dict) or not all(map(is_id, categories.values())):
                raise TypeError("cat_to_ix is not an object of numbers")
            if not all(map(is_id, [*image_ids, *ann_ids, *rows])):
                raise TypeError("image_id, ann_id or h5_id is not an integer")
        except (TypeError, KeyError) as error:
            raise InputError(
                f"`data_json` {data_json}: not a data.json of MAttNet's tools/prepro.py ({error!r})"
            ) from None
        for name, ids in (("image_id", image_ids), ("ann_id", ann_ids)):
            if len(set(ids)) < len(ids):
                raise InputError(f"`data_json` {data_json}: duplicate {name}; create it again")
        if sorted(rows) != list(range(len(rows))):
            raise InputError(f"`data_json` {data_json}: h5_id does not number its annotations from 0; create it again")
        return cls(data)

    def write(self, folder: Path) -> None:
        """Write ``data.json`` and ``data.h5``; the contents must have labels.

        Args:
            folder: the folder to write to.

        Raises:
            InputError: a box is not finite.
        """
        assert self.labels is not None
        try:
            text = json.dumps(self.data, allow_nan=False)
        except ValueError:
            raise InputError("data.json: a box of the dataset is not finite; correct its instances.json") from None
        (folder / "data.json").write_text(text, encoding="utf-8")
        with new_file(folder / "data.h5", self.labels.nbytes + METADATA_BYTES, OLDEST_READERS) as file:
            labels = file.create_dataset("labels", self.labels.shape, self.labels.dtype, track_times=False)
            labels[...] = self.labels


def prepare(root: Path, dataset: str, split_by: str, options: PreproOptions) -> Prepro:
    """Preprocess a dataset as prepro.py does.

    Images without refs are omitted, as MAttNet's loaders take an image's split from its first ref.

    Args:
        root: folder with the REFER datasets.
        dataset: such as "refcoco".
        split_by: such as "unc".
        options: options of prepro.py.

    Returns:
        Contents of ``data.json`` and ``data.h5``.

    Raises:
        refer.ReferError: the dataset cannot be read.
        InputError: refs with several targets, an unknown dataset without ``max_length``, or invalid attributes.
    """
    length = options.max_length or MAX_LENGTH.get(dataset)
    if length is None:
        raise InputError(f"`dataset` {dataset}: MAttNet has no default sentence length for it; give `max_length`")
    refer = REFER(root, dataset, split_by)
    if refer.generalized:
        raise InputError(
            f"`dataset` {dataset}: its refs have any number of targets; give a dataset whose refs have one target each"
        )
    instances = root / dataset / "instances.json"
    check_fields(instances, "image number {}", list(refer.Imgs.values()), _IMAGE)
    check_fields(instances, "annotation number {}", list(refer.Anns.values()), _ANNOTATION)
    word_to_ix, tokens = build_vocabulary(refer.sentToTokens, refer.Cats.values(), options.word_count_threshold)
    attribute_counts, attributes_of = count_attributes(refer, options)
    image_ids = [image_id for image_id in refer.Imgs if image_id in refer.imgToRefs]
    data = {
        "refs": [
            {
                "ref_id": ref_id,
                "split": ref["split"],
                "category_id": ref["category_id"],
                "ann_id": ref["ann_id"],
                "sent_ids": [sentence["sent_id"] for sentence in ref["sentences"]],
                "box": box_of(refer.DATA_DIR, refer.refToAnn[ref_id]),
                "image_id": ref["image_id"],
                "att_wds": attributes_of.get(ref_id, []),
            }
            for ref_id, ref in refer.Refs.items()
        ],
        "images": [
            {
                "image_id": i,
                "height": refer.Imgs[i]["height"],
                "width": refer.Imgs[i]["width"],
                "file_name": refer.Imgs[i]["file_name"],
                "ref_ids": [ref["ref_id"] for ref in refer.imgToRefs[i]],
                "ann_ids": [ann["id"] for ann in refer.imgToAnns[i]],
                "h5_id": row,
            }
            for row, i in enumerate(image_ids)
        ],
        "anns": [
            {
                "ann_id": ann["id"],
                "category_id": ann["category_id"],
                "box": box_of(refer.DATA_DIR, ann),
                "image_id": i,
                "h5_id": row,
            }
            for row, (i, ann) in enumerate((i, ann) for i in image_ids for ann in refer.imgToAnns[i])
        ],
        "sentences": [
            {"sent_id": sent_id, "tokens": words, "h5_id": row} for row, (sent_id, words) in enumerate(tokens.items())
        ],
        "word_to_ix": word_to_ix,
        "att_to_ix": {word: i for i, word in enumerate(attribute_counts)},
        "att_to_cnt": attribute_counts,
        "cat_to_ix": {name: category_id for category_id, name in refer.Cats.items()},
        "label_length": length,
    }
    labels = np.zeros((len(tokens), length), np.int32)
    for row, words in enumerate(tokens.values()):
        labels[row, : len(words)] = [word_to_ix[word] for word in words[:length]]
    return Prepro(data, labels)


def build_vocabulary(
    sentences: dict[int, list[str]], categories: Iterable[str], threshold: int
) -> tuple[dict[str, int], dict[int, list[str]]]:
    """Build the vocabulary and replace rare words.

    The order is ``<PAD>`` (0), words that occur more than ``threshold`` times by first occurrence, other words of
    category names and ``__background__``, ``<UNK>`` if there are rare words, ``<BOS>``, ``<EOS>``.

    Args:
        sentences: sentence id -> tokens.
        categories: names of the categories.
        threshold: words that occur at most this often are rare.

    Returns:
        Word -> number, and sentence id -> tokens with ``<UNK>`` for rare words.
    """
    counts = Counter(word for words in sentences.values() for word in words)
    frequent = {word: None for word, n in counts.items() if n > threshold}  # a dict as an ordered set
    has_rare_words = len(frequent) < len(counts)
    kept = frequent | {word: None for name in [*categories, "__background__"] for word in name.split()}
    words = [PAD, *kept, *([UNKNOWN] if has_rare_words else []), BEGIN, END]
    with_unknown = {sent_id: [w if w in kept else UNKNOWN for w in tokens] for sent_id, tokens in sentences.items()}
    return {word: i for i, word in enumerate(words)}, with_unknown


def count_attributes(refer: REFER, options: PreproOptions) -> tuple[dict[str, int], dict[int, list[str]]]:
    """Count the most frequent attribute words, excluding names of categories.

    Args:
        refer: the dataset.
        options: options of prepro.py.

    Returns:
        Word -> number of refs with the word, by descending number and then alphabetically; and ref id -> those of these
        words that describe the ref. Both empty without ``options.attributes``.

    Raises:
        InputError: ``options.attributes`` is not a sents.json of the dataset.
    """
    if options.attributes is None:
        return {}, {}
    words_by_ref: dict[int, dict[str, None]] = {}  # dicts as ordered sets
    excluded = {NO_ATTRIBUTE, *refer.Cats.values()}
    try:
        for sentence in read_json(options.attributes):
            ref = refer.sentToRef[sentence["sent_id"]]
            for attribute_type in ATTRIBUTE_TYPES:
                words = {str(word): None for word in sentence["atts"][attribute_type] if word not in excluded}
                words_by_ref.setdefault(ref["ref_id"], {}).update(words)
    except (TypeError, KeyError) as error:
        raise InputError(
            f"`attributes` {options.attributes}: not refer-parser2's sents.json of this dataset "
            f"({type(error).__name__}: {shorten(error)})"
        ) from None
    counts = Counter(word for words in words_by_ref.values() for word in words)
    top = dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[: options.top_attributes])
    words_of = {ref_id: [word for word in words if word in top] for ref_id, words in words_by_ref.items()}
    return top, words_of
