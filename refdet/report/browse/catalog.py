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

_SMALL, _MEDIUM = 32**2, 96**2
_SCHEMA = """
CREATE TABLE image(position INTEGER PRIMARY KEY, id INTEGER, name TEXT, width INTEGER, height INTEGER,
                   regions INTEGER, error TEXT, score REAL);
CREATE TABLE present(category INTEGER, size INTEGER, position INTEGER, PRIMARY KEY(category, size, position))
    WITHOUT ROWID;
CREATE TABLE object(key INTEGER PRIMARY KEY, label TEXT, position INTEGER, split TEXT, category INTEGER, size INTEGER,
                    boxes TEXT, iou0 REAL, best0 INTEGER, iou1 REAL, best1 INTEGER, score REAL);
CREATE TABLE outline(object INTEGER PRIMARY KEY, segmentations BLOB);
CREATE TABLE annotation(position INTEGER, category INTEGER, box TEXT);
CREATE TABLE sentence(key INTEGER PRIMARY KEY, object INTEGER, sent_id INTEGER, text TEXT,
                      answer TEXT, answer_masks TEXT, iou REAL, wrong INTEGER);
CREATE VIRTUAL TABLE words USING fts5(text, content='sentence', content_rowid='key');
"""
# created after the rows are added, as updating an index row by row takes longer
_INDICES = """
CREATE INDEX object_position ON object(position);
CREATE INDEX annotation_position ON annotation(position);
CREATE INDEX sentence_object ON sentence(object);
CREATE INDEX sentence_id ON sentence(sent_id);
CREATE INDEX sentence_wrong ON sentence(wrong);
CREATE INDEX image_id ON image(id);
"""


@dataclass(frozen=True)
class Referent:
    """An object that sentences refer to, or several or none in gRefCOCO; without refs, an annotated object.

    Attributes:
        label: its name on the page, such as "ref 17".
        position: position of its image in the first store.
        split: the split of the ref, "" without refs.
        category: category id of the first object, None without objects.
        area: area of the first object in square pixels.
        boxes: (n, 4) half-open xyxy in pixels.
        sentences: (sent_id, text) of each sentence.
        segmentations: the segmentation of each object that has one, as in the file.
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
        iou: of a single answer with a single object, else None.
        wrong: whether it is wrong.
    """

    boxes: Sequence[Sequence[float]]
    masks: Sequence[str]
    iou: float | None
    wrong: bool


def size_of(area: np.ndarray) -> np.ndarray:
    """Index in `SIZES` of areas in square pixels."""
    return (area > _SMALL).astype(np.int64) + (area > _MEDIUM)


class Catalog:
    """The database. One connection for all threads, one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        self._connection.executescript(_SCHEMA)

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple]:
        """All rows of a query."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def write(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run a statement for each row."""
        values = list(rows)
        with self._lock, self._connection:
            self._connection.executemany(statement, values)

    def add_images(self, rows: Iterable[tuple[int, int, str, int, int, int, str]]) -> None:
        """Add (position, id, file name, width, height, number of regions, error) of each image."""
        self.write("INSERT INTO image VALUES (?,?,?,?,?,?,?,NULL)", rows)

    def add_referents(self, referents: Iterable[Referent]) -> None:
        """Add referents with their sentences."""
        objects, sentences, outlines = [], [], []
        for key, r in enumerate(referents):
            size = int(size_of(np.asarray(r.area))) if len(r.boxes) else None
            objects.append((key, r.label, r.position, r.split, r.category, size, json.dumps(r.boxes)))
            sentences += [(key, sent_id, text) for sent_id, text in r.sentences]
            if r.segmentations:
                outlines.append((key, msgspec.json.encode(list(r.segmentations))))
        self.write(
            "INSERT INTO object(key, label, position, split, category, size, boxes) VALUES (?,?,?,?,?,?,?)", objects
        )
        self.write("INSERT INTO sentence(object, sent_id, text) VALUES (?,?,?)", sentences)
        self.write("INSERT INTO outline VALUES (?,?)", outlines)

    def add_annotations(self, rows: Iterable[tuple[int, int, Sequence[float]]]) -> None:
        """Add (position, category id, xyxy box) of annotated objects, which are shown but not searched."""
        self.write("INSERT INTO annotation VALUES (?,?,?)", ((p, c, json.dumps(box)) for p, c, box in rows))

    def index(self) -> None:
        """Build the indices, once images, referents and annotations have been added."""
        with self._lock, self._connection:
            self._connection.executescript(_INDICES)
            self._connection.execute("INSERT INTO words(words) VALUES ('rebuild')")

    def count(self, table: str, condition: str = "1") -> int:
        """Number of rows of a table; the arguments must not be user input."""
        return int(self.rows(f"SELECT count(*) FROM {table} WHERE {condition}")[0][0])

    def segmentations(self, key: int) -> list[Any]:
        """The segmentations of a referent's objects, as in the file."""
        rows = self.rows("SELECT segmentations FROM outline WHERE object = ?", (key,))
        decoded: list[Any] = msgspec.json.decode(rows[0][0]) if rows else []
        return decoded

    def add_answers(self, answers: Mapping[int, AnswerRow]) -> None:
        """Add a model's answers by sentence id; in splits with answers, sentences without one count as wrong."""
        splits = (
            "SELECT DISTINCT o.split FROM sentence s JOIN object o ON o.key = s.object "
            f"WHERE s.sent_id IN ({','.join(str(int(sent_id)) for sent_id in answers)})"
        )
        of_splits = f"SELECT key FROM object WHERE split IN ({splits})"
        self.write(f"UPDATE sentence SET wrong = ? WHERE object IN ({of_splits})", [(1,)])
        self.write(
            "UPDATE sentence SET answer = ?, answer_masks = ?, iou = ?, wrong = ? WHERE sent_id = ?",
            (
                (json.dumps(answer.boxes), json.dumps(answer.masks), answer.iou, int(answer.wrong), sent_id)
                for sent_id, answer in answers.items()
            ),
        )
