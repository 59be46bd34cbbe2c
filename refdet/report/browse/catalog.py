"""`Catalog`: images, referents and sentences in an SQLite database in memory, for filtering, sorting and searching."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

SIZES = ("small", "medium", "large")
"""COCO's sizes of objects, by area: up to 32 x 32 pixels, up to 96 x 96, and above."""

_MAX_SMALL, _MAX_MEDIUM = 32**2, 96**2  # square pixels
# image: position is the position in the first store, score the score of the top-scoring region.
# region_kind: a row for each combination of category and size (index in SIZES) among the regions of an image.
# referent: iou0 and best0 are the IoU and index of the best region in the first store, iou1 and best1 in the second;
# score is the score of best0.
# words: the index of the words of the sentences, for full-text search.
_SCHEMA = """
CREATE TABLE image(position INTEGER PRIMARY KEY, id INTEGER, name TEXT, width INTEGER, height INTEGER,
                   regions INTEGER, error TEXT, score REAL);
CREATE TABLE region_kind(category INTEGER, size INTEGER, position INTEGER, PRIMARY KEY(category, size, position))
    WITHOUT ROWID;
CREATE TABLE referent(key INTEGER PRIMARY KEY, label TEXT, position INTEGER, split TEXT, category INTEGER, size INTEGER,
                      boxes TEXT, iou0 REAL, best0 INTEGER, iou1 REAL, best1 INTEGER, score REAL);
CREATE TABLE segmentation(referent INTEGER PRIMARY KEY, segmentations BLOB);
CREATE TABLE annotation(position INTEGER, category INTEGER, box TEXT);
CREATE TABLE sentence(key INTEGER PRIMARY KEY, referent INTEGER, sent_id INTEGER, text TEXT,
                      answer TEXT, answer_masks TEXT, iou REAL, wrong INTEGER);
CREATE VIRTUAL TABLE words USING fts5(text, content='sentence', content_rowid='key');
"""
# Created after the rows are added, as updating an index row by row takes longer.
_INDICES = """
CREATE INDEX referent_position ON referent(position);
CREATE INDEX annotation_position ON annotation(position);
CREATE INDEX sentence_referent ON sentence(referent);
CREATE INDEX sentence_id ON sentence(sent_id);
CREATE INDEX sentence_wrong ON sentence(wrong);
CREATE INDEX image_id ON image(id);
"""


@dataclass(frozen=True)
class Referent:
    """An object that sentences refer to, or several or none in gRefCOCO; without refs, an annotated object.

    Attributes:
        label: name on the page, such as "ref 17".
        position: position of the image in the first store.
        split: the split of the ref, "" without refs.
        category: category id of the first object, None without objects.
        area: area of the first object in square pixels, 0 without objects.
        boxes: (n, 4) half-open xyxy in pixels.
        sentences: (sent_id, text) of each sentence.
        segmentations: the segmentation of each object that has one, as in the instances file.
    """

    label: str
    position: int
    split: str
    category: int | None
    area: float
    boxes: Sequence[Sequence[float]]
    sentences: Sequence[tuple[int, str]]
    segmentations: Sequence[Any] = ()


@dataclass(frozen=True)
class AnswerRow:
    """A model's answer to a sentence.

    Attributes:
        boxes: (n, 4) half-open xyxy in pixels.
        masks: counts of n compressed RLEs, or empty without masks.
        iou: IoU of the answer and the object; None unless the answer has one box and the referent one object.
        wrong: whether the answer is incorrect.
    """

    boxes: Sequence[Sequence[float]]
    masks: Sequence[str]
    iou: float | None
    wrong: bool


def size_indices(area: np.ndarray) -> np.ndarray:
    """Indices in `SIZES` of areas in square pixels."""
    return (area > _MAX_SMALL).astype(np.int64) + (area > _MAX_MEDIUM)


class Catalog:
    """The database. All threads share one connection, which a lock lets them use one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        self._connection.executescript(_SCHEMA)

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple]:
        """Run a query and return all its rows."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def write(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run a statement for each row."""
        values = list(rows)
        with self._lock, self._connection:
            self._connection.executemany(statement, values)

    def add_images(self, rows: Iterable[tuple[int, int, str, int, int, int, str]]) -> None:
        """Add images, each as (position, id, file name, width, height, number of regions, error)."""
        self.write("INSERT INTO image VALUES (?,?,?,?,?,?,?,NULL)", rows)

    def add_referents(self, referents: Iterable[Referent]) -> None:
        """Add referents with their sentences and segmentations; call it once, as keys are counted from 0."""
        rows, sentences, segmentations = [], [], []
        for key, r in enumerate(referents):
            size = int(size_indices(np.asarray(r.area))) if len(r.boxes) else None
            rows.append((key, r.label, r.position, r.split, r.category, size, json.dumps(r.boxes)))
            sentences += [(key, sent_id, text) for sent_id, text in r.sentences]
            if r.segmentations:
                segmentations.append((key, msgspec.json.encode(list(r.segmentations))))
        self.write(
            "INSERT INTO referent(key, label, position, split, category, size, boxes) VALUES (?,?,?,?,?,?,?)", rows
        )
        self.write("INSERT INTO sentence(referent, sent_id, text) VALUES (?,?,?)", sentences)
        self.write("INSERT INTO segmentation VALUES (?,?)", segmentations)

    def add_annotations(self, rows: Iterable[tuple[int, int, Sequence[float]]]) -> None:
        """Add annotated objects, each as (position, category id, xyxy box); they are shown but not searched."""
        encoded = ((position, category, json.dumps(box)) for position, category, box in rows)
        self.write("INSERT INTO annotation VALUES (?,?,?)", encoded)

    def build_indices(self) -> None:
        """Build the SQL indices and the search index, once images, referents and annotations have been added."""
        with self._lock, self._connection:
            self._connection.executescript(_INDICES)
            self._connection.execute("INSERT INTO words(words) VALUES ('rebuild')")

    def count(self, table: str, condition: str = "1") -> int:
        """Number of rows of a table; the arguments must not be user input."""
        return int(self.rows(f"SELECT count(*) FROM {table} WHERE {condition}")[0][0])

    def segmentations(self, key: int) -> list[Any]:
        """The segmentations of a referent's objects, as in the instances file; `key` is the referent's key."""
        rows = self.rows("SELECT segmentations FROM segmentation WHERE referent = ?", (key,))
        decoded: list[Any] = msgspec.json.decode(rows[0][0]) if rows else []
        return decoded

    def add_answers(self, answers: Mapping[int, AnswerRow]) -> None:
        """Add a model's answers by sentence id; sentences without an answer count as wrong if their split has any."""
        self.write(
            "UPDATE sentence SET answer = ?, answer_masks = ?, iou = ?, wrong = ? WHERE sent_id = ?",
            (
                (json.dumps(answer.boxes), json.dumps(answer.masks), answer.iou, int(answer.wrong), sent_id)
                for sent_id, answer in answers.items()
            ),
        )
        answered_splits = (
            "SELECT DISTINCT r.split FROM sentence s JOIN referent r ON r.key = s.referent WHERE s.answer IS NOT NULL"
        )
        referents = f"SELECT key FROM referent WHERE split IN ({answered_splits})"
        self.write(f"UPDATE sentence SET wrong = ? WHERE answer IS NULL AND referent IN ({referents})", [(1,)])
