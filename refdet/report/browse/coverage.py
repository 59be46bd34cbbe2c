"""`Indexer`: completes the catalog in the background, while the page is already shown.

It adds what takes seconds to compute: the IoU of each referent's best region, the categories and sizes of the regions
of each image, and whether a model's answers are correct.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import defaultdict
from itertools import pairwise
from typing import Any

import numpy as np

from refdet import store as stores
from refdet.errors import InputError, RefdetError
from refdet.evaluation.grefcoco import Answer, generalized_scores
from refdet.evaluation.metrics import box_iou
from refdet.evaluation.predictions import Prediction, load_predictions
from refdet.report.browse.catalog import AnswerRow, Catalog, size_indices
from refdet.report.browse.collection import Collection
from refdet.store import Store

log = logging.getLogger(__name__)

_BLOCK_IMAGES = 64  # images read at a time
_PAUSE = 0.1  # seconds without a request before the next block of images is read
_MAX_PAUSE = 1.0  # seconds after which the next block is read even if requests keep coming
_CORRECT_IOU = 0.5  # IoU from which an answer is correct


class Indexer:
    """Completes the catalog in a thread; `status` returns its progress.

    Args:
        collection: the stores, and the catalog to add to.
    """

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._thread = threading.Thread(target=self._run, name="refdet-browse-index", daemon=True)
        self._stop = threading.Event()
        self._images_total = sum(len(store) for store in collection.stores)
        self._images_done = 0
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

    def pause_for_request(self) -> None:
        """Pause for a request, which would otherwise compete with the indexer's thread for the interpreter lock."""
        self._last_request = time.monotonic()

    def status(self) -> dict[str, Any]:
        """The progress, as JSON for the page.

        Returns:
            "stage", which is "regions", "answers" or, at the end, ""; "part", how much of the regions has been read, in
            0..1; "error", a message or ""; and "scores", the lowest and highest score of the regions read so far, or 0
            and 1 if these are lower and higher.
        """
        part = self._images_done / self._images_total if self._images_total and self._stage == "regions" else 1.0
        return {"stage": self._stage, "part": round(part, 3), "error": self._error, "scores": self._scores}

    def _wait_for_requests(self) -> None:
        """Wait until no request has come for `_PAUSE`, but at most `_MAX_PAUSE`."""
        latest = time.monotonic() + _MAX_PAUSE
        while time.monotonic() < min(latest, self._last_request + _PAUSE) and not self._stop.is_set():
            self._stop.wait(_PAUSE / 5)  # returns at once if stopped

    def _run(self) -> None:
        try:
            for store_index, store in enumerate(self._collection.stores):
                self._add_regions(store_index, store)
            self._stage = "answers"
            if self._collection.inputs.predictions is not None and not self._stop.is_set():
                self._add_answers()
        except RefdetError as error:
            self._error = str(error)
            log.error("error: %s", error)
        except Exception as error:  # a thread's exception would otherwise be printed as a traceback, and be lost
            self._error = f"unexpected {type(error).__name__}: {error}"
            log.error("error: %s", self._error)
        self._stage = ""

    def _add_regions(self, store_index: int, store: Store) -> None:
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
            if store_index == 0:  # images are listed, sorted and filtered as in the first store
                block.add_region_kinds(self._collection.catalog, begin)
            block.add_best_regions(self._collection.catalog, store_index)
            self._images_done += end - begin

    def _add_answers(self) -> None:
        collection = self._collection
        path, catalog = collection.inputs.predictions, collection.catalog
        assert path is not None
        predictions = load_predictions(
            path, collection.stores[0], collection.sentence_images, collection.generalized, collection.inputs.box_format
        )
        ground_truth = catalog.rows("SELECT s.sent_id, r.boxes FROM sentence s JOIN referent r ON r.key = s.referent")
        catalog.add_answers(
            {
                sent_id: _answer(predictions[sent_id], json.loads(boxes))
                for sent_id, boxes in ground_truth
                if sent_id in predictions
            }
        )


class _Block:
    """Boxes, scores and categories of the regions of successive images.

    Args:
        ids: ids of the I images.
        starts: (I + 1,) row in the block of the first region of each image; the last entry is N, the number of regions.
        boxes: (N, 4) half-open xyxy in pixels.
        scores: (N,) scores.
        categories: (N,) category ids.
    """

    def __init__(
        self, ids: list[int], starts: np.ndarray, boxes: np.ndarray, scores: np.ndarray, categories: np.ndarray
    ) -> None:
        self.ids, self.starts = ids, starts
        self.boxes, self.scores, self.categories = boxes, scores, categories

    @classmethod
    def read(cls, store: Store, begin: int, end: int) -> _Block:
        """Read the regions of the images at positions ``begin`` to ``end`` - 1."""
        starts = store.region_start[begin : end + 1]
        rows = slice(int(starts[0]), int(starts[-1]))
        boxes, scores = store.data["regions/box"][rows], store.data["regions/score"][rows]
        categories = store.data["regions/category_id"][rows]
        return cls(store.image_ids[begin:end].tolist(), starts - starts[0], boxes, scores, categories)

    def add_region_kinds(self, catalog: Catalog, first: int) -> None:
        """Add the highest score of each image, and the categories and sizes of the regions of each image.

        Args:
            catalog: the catalog to complete.
            first: position of the first image of the block.
        """
        scores = [
            (float(self.scores[begin:end].max()), position)
            for position, (begin, end) in enumerate(pairwise(self.starts), first)
            if end > begin
        ]
        catalog.write("UPDATE image SET score = ? WHERE position = ?", scores)
        with np.errstate(all="ignore"):  # boxes of a damaged store may not be finite
            sizes = size_indices((self.boxes[:, 2:] - self.boxes[:, :2]).prod(axis=1))
        positions = first + np.repeat(np.arange(len(self.ids)), np.diff(self.starts))
        kinds = np.unique(np.stack([self.categories, sizes, positions], axis=1), axis=0)
        catalog.write("INSERT OR IGNORE INTO region_kind VALUES (?,?,?)", kinds.tolist())

    def add_best_regions(self, catalog: Catalog, store_index: int) -> None:
        """Add the index and IoU of the best region of each referent; of several objects, the worst-covered counts."""
        placeholders = ",".join("?" * len(self.ids))
        rows = catalog.rows(
            f"SELECT r.key, i.id, r.boxes FROM image i JOIN referent r USING (position) WHERE i.id IN ({placeholders})",
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
        if store_index == 0:
            catalog.write("UPDATE referent SET iou0 = ?, best0 = ?, score = ? WHERE key = ?", updates)
        else:  # without scores: the column is for sorting, and scores of two detectors are not comparable
            without_scores = [(iou, best, key) for iou, best, _, key in updates]
            catalog.write("UPDATE referent SET iou1 = ?, best1 = ? WHERE key = ?", without_scores)


def _best(boxes: np.ndarray, regions: np.ndarray) -> tuple[float, int | None]:
    """IoU and index of the best region of the worst-covered box; the index is None if no region overlaps that box.

    Args:
        boxes: (n, 4) boxes of the objects of a referent, half-open xyxy in pixels.
        regions: (m, 4) boxes of the regions of the image, likewise.
    """
    if not len(regions):
        return 0.0, None
    ious = np.nan_to_num(box_iou(boxes, regions))
    worst_covered = ious[ious.max(axis=1).argmin()]
    best = int(worst_covered.argmax())
    iou = float(worst_covered[best])
    return iou, best if iou > 0 else None


def _answer(prediction: Prediction, ground_truth: list[list[float]]) -> AnswerRow:
    """The row of a prediction, whose correctness is judged by the boxes of the referent's objects, (n, 4) xyxy.

    A single box for a single object is correct from `_CORRECT_IOU`, any other answer if its F1 score is 1.
    """
    boxes = np.array(ground_truth, np.float64).reshape(-1, 4)
    masks = [mask["counts"].decode("ascii") for mask in prediction.masks or ()]
    if len(boxes) == len(prediction.boxes) == 1:
        iou = float(box_iou(prediction.boxes, boxes)[0, 0])
        return AnswerRow(prediction.boxes.tolist(), masks, iou, iou < _CORRECT_IOU)
    scores = generalized_scores([Answer(boxes, None, prediction.boxes, None)])
    return AnswerRow(prediction.boxes.tolist(), masks, None, scores["precision@F1=1,IoU>=0.5"] != 1.0)
