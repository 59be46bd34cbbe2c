"""`Indexer`: compute in the background what takes seconds, while the page is already shown, and add it to the catalog.

That is the IoU of each referent's best region, the categories and sizes of the regions of each image, and whether a
model's answers are right.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import defaultdict
from typing import Any

import numpy as np

from refdet import store as stores
from refdet.errors import InputError, RefdetError
from refdet.evaluation.grefcoco import Answer, generalized_scores
from refdet.evaluation.metrics import box_iou
from refdet.evaluation.predictions import Prediction, load_predictions
from refdet.report.browse.catalog import AnswerRow, Catalog, size_of
from refdet.report.browse.collection import Collection
from refdet.store import Store

log = logging.getLogger(__name__)

_BLOCK_IMAGES = 64  # images read at a time
_PAUSE, _MAX_PAUSE = 0.1, 1.0  # seconds to wait after a request, and at most before each block
_CORRECT_IOU = 0.5  # IoU from which an answer is correct


class Indexer:
    """Computes in a thread of its own; `status` returns its progress.

    Args:
        collection: the stores, and the catalog to add to.
    """

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._thread = threading.Thread(target=self._run, name="refdet-browse-index", daemon=True)
        self._stop = threading.Event()
        self._total = sum(len(store) for store in collection.stores)
        self._done = 0
        self._stage = "regions"
        self._error = ""
        self._scores = (0.0, 1.0)
        self._last_request = 0.0

    def start(self) -> None:
        """Start computing."""
        self._thread.start()

    def stop(self) -> None:
        """Stop computing, and wait until the stores are no longer read."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def wait(self) -> None:
        """Wait until everything is computed."""
        self._thread.join()

    def give_way(self) -> None:
        """Pause for a request, which would otherwise compete with this thread for the interpreter."""
        self._last_request = time.monotonic()

    def status(self) -> dict[str, Any]:
        """The stage ("regions", "answers" or "" when done), its progress in 0..1, an error or "", and the score range.

        The range is from the lowest to the highest score of the regions so far, and at least 0 to 1.
        """
        part = self._done / self._total if self._total and self._stage == "regions" else 1.0
        return {"stage": self._stage, "part": round(part, 3), "error": self._error, "scores": self._scores}

    def _wait_for_requests(self) -> None:
        latest = time.monotonic() + _MAX_PAUSE
        while time.monotonic() < min(latest, self._last_request + _PAUSE) and not self._stop.is_set():
            self._stop.wait(_PAUSE / 5)

    def _run(self) -> None:
        try:
            for number, store in enumerate(self._collection.stores):
                self._regions(number, store)
            self._stage = "answers"
            if self._collection.inputs.predictions is not None and not self._stop.is_set():
                self._answers()
        except RefdetError as error:
            self._error = str(error)
            log.error("error: %s", error)
        except Exception as error:  # a thread's exception would otherwise be printed as a traceback, and be lost
            self._error = f"unexpected {type(error).__name__}: {error}"
            log.error("error: %s", self._error)
        self._stage = ""

    def _regions(self, number: int, store: Store) -> None:
        for begin in range(0, len(store), _BLOCK_IMAGES):
            self._wait_for_requests()
            if self._stop.is_set():
                return
            end = min(begin + _BLOCK_IMAGES, len(store))
            try:
                block = _Block.read(store, begin, end)
            except stores.CORRUPTION_ERRORS as error:
                raise InputError(f"{store.path}: damaged: {error}; extract it again") from None
            scores = block.scores[np.isfinite(block.scores)]
            low, high = self._scores
            self._scores = (float(scores.min(initial=low)), float(scores.max(initial=high)))
            if number == 0:
                block.describe(self._collection.catalog, begin)
            block.cover(self._collection.catalog, number)
            self._done += end - begin

    def _answers(self) -> None:
        collection = self._collection
        path, catalog = collection.inputs.predictions, collection.catalog
        assert path is not None
        predictions = load_predictions(path, collection.stores[0], collection.sentence_images, collection.generalized)
        truths = catalog.rows("SELECT s.sent_id, o.boxes FROM sentence s JOIN object o ON o.key = s.object")
        catalog.add_answers(
            {
                sent_id: _answer(predictions[sent_id], json.loads(boxes))
                for sent_id, boxes in truths
                if sent_id in predictions
            }
        )


class _Block:
    """Boxes, scores and categories of the regions of successive images."""

    def __init__(self, ids: list[int], starts: np.ndarray, columns: list[np.ndarray]) -> None:
        self.ids, self.starts = ids, starts
        self.boxes, self.scores, self.categories = columns

    @classmethod
    def read(cls, store: Store, begin: int, end: int) -> _Block:
        starts = store.region_start[begin : end + 1]
        names = ("regions/box", "regions/score", "regions/category_id")
        columns = [store.data[name][int(starts[0]) : int(starts[-1])] for name in names]
        return cls(store.image_ids[begin:end].tolist(), starts - starts[0], columns)

    def describe(self, catalog: Catalog, first: int) -> None:
        """Add the highest score of each image, and the categories and sizes of its regions."""
        scores = [
            (float(self.scores[a:b].max()), first + i)
            for i, (a, b) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True))
            if b > a
        ]
        catalog.write("UPDATE image SET score = ? WHERE position = ?", scores)
        with np.errstate(all="ignore"):  # boxes of a damaged store may not be finite
            sizes = size_of((self.boxes[:, 2:] - self.boxes[:, :2]).prod(axis=1))
        positions = first + np.repeat(np.arange(len(self.ids)), np.diff(self.starts))
        present = np.unique(np.stack([self.categories, sizes, positions], axis=1), axis=0)
        catalog.write("INSERT OR IGNORE INTO present VALUES (?,?,?)", present.tolist())

    def cover(self, catalog: Catalog, number: int) -> None:
        """Add the best region of each referent and its IoU; with several objects, of the worst-covered one."""
        placeholders = ",".join("?" * len(self.ids))
        rows = catalog.rows(
            f"SELECT o.key, i.id, o.boxes FROM image i JOIN object o USING (position) WHERE i.id IN ({placeholders})",
            self.ids,
        )
        by_image: dict[int, list[tuple[int, Any]]] = defaultdict(list)
        for key, image_id, boxes in rows:
            by_image[image_id].append((key, json.loads(boxes)))
        updates = []
        for index, image_id in enumerate(self.ids):
            begin, end = self.starts[index], self.starts[index + 1]
            for key, boxes in by_image[image_id]:
                if boxes:
                    iou, best = _best(np.array(boxes, np.float64), self.boxes[begin:end])
                    updates.append((iou, best, None if best is None else float(self.scores[begin + best]), key))
        if number == 0:
            catalog.write("UPDATE object SET iou0 = ?, best0 = ?, score = ? WHERE key = ?", updates)
        else:  # without scores, as those of two detectors are not comparable
            without_scores = [(iou, best, key) for iou, best, _, key in updates]
            catalog.write("UPDATE object SET iou1 = ?, best1 = ? WHERE key = ?", without_scores)


def _best(boxes: np.ndarray, regions: np.ndarray) -> tuple[float, int | None]:
    """Lowest of the best IoUs of boxes (n, 4) with regions (m, 4), and that box's best region, None without overlap."""
    if not len(regions):
        return 0.0, None
    ious = np.nan_to_num(box_iou(boxes, regions))
    worst = int(ious.max(axis=1).argmin())
    best = float(ious[worst].max())
    return best, int(ious[worst].argmax()) if best > 0 else None


def _answer(prediction: Prediction, truth: list[list[float]]) -> AnswerRow:
    boxes = np.array(truth, np.float64).reshape(-1, 4)
    masks = [mask["counts"].decode("ascii") for mask in prediction.masks or ()]
    if len(boxes) == len(prediction.boxes) == 1:
        iou = float(box_iou(prediction.boxes, boxes)[0, 0])
        return AnswerRow(prediction.boxes.tolist(), masks, iou, iou < _CORRECT_IOU)
    scores = generalized_scores([Answer(boxes, None, prediction.boxes, None)])
    return AnswerRow(prediction.boxes.tolist(), masks, None, scores["precision@F1=1,IoU>=0.5"] != 1.0)
