"""Evaluation of a store of regions, and of model outputs on it, on the splits of a REFER dataset. No torch."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refdet import store as stores
from refdet.data.box_format import DEFAULT_FORMAT
from refdet.data.coco import CocoIndex
from refdet.data.refer_splits import choose_splits
from refdet.errors import InputError
from refdet.evaluation import targets
from refdet.evaluation.average_precision import box_and_mask_ap, coco_results, why_undefined
from refdet.evaluation.comprehension import comprehension, generalized_comprehension
from refdet.evaluation.language import Scorers, load_expressions
from refdet.evaluation.metrics import Protocol, mean
from refdet.evaluation.predictions import Prediction, load_predictions
from refdet.evaluation.recall import Coverage, coverage, recall_at_k, referent_recall
from refdet.evaluation.store_check import check_images, read_regions, warn_about_categories
from refdet.files.short_text import agree, format_count, format_share, shorten
from refdet.store import Store
from refdet.structures.provenance import Provenance
from refdet.structures.regions import Regions
from refer import REFER

log = logging.getLogger(__name__)


def evaluate_on_refer(
    store: str | Path,
    refer_root: str | Path,
    dataset: str,
    split_by: str,
    *,
    splits: Sequence[str] = (),
    predictions: str | Path | None = None,
    expressions: str | Path | None = None,
    protocol: Protocol = "standard",
    box_format: str = DEFAULT_FORMAT,
) -> dict[str, Any]:
    """Evaluate a store of regions, and a model's predictions if given, on the splits of a REFER dataset.

    Examples:
        >>> metrics = refdet.evaluate_on_refer("demo/features/refcoco.h5", "demo/data/refer", "refcoco", "unc")
        >>> sorted(metrics["splits"]["val"]["detection"])
        ['bbox', 'segm']

    Args:
        store: HDF5 file written by `refdet.extract_features`.
        refer_root: folder of the REFER data.
        dataset: "refcoco", "refcoco+", "refcocog" or "grefcoco": a folder in ``refer_root``.
        split_by: "unc", "umd" or "google".
        splits: names of splits, also comma-separated; all but train if empty.
        predictions: JSON of a model's predictions, as read by `refdet.evaluation.predictions.load_predictions`.
        expressions: JSON of generated expressions, as read by `refdet.evaluation.language.load_expressions`.
        protocol: how boxes are compared: "standard" IoU, "mattnet" or "mdetr"; COCO's AP and the metrics of gRefCOCO's
            predictions do not depend on it.
        box_format: format of the boxes in ``predictions``, one of `refdet.data.box_format.NAMES`.

    Returns:
        The contents of ``metrics.json``; metrics in 0..1 (CIDEr in 0..10), None if undefined, such as AP of small
        objects if there are none, or mask AP of a store without masks. A sentence without a prediction counts as wrong;
        ``missing`` is the number of such sentences, in ``segmentation`` including those with only a box.

    Raises:
        InputError: a file or a split is missing or damaged; the store lacks images of a split; or expressions are given
            and pycocoevalcap is not installed.
        refer.ReferError: the refs cannot be read.
    """
    scorers = Scorers.find() if expressions is not None else None
    refer_root = Path(refer_root)
    with stores.open(store) as opened:
        _check_provenance(opened)
        refer = REFER(refer_root, dataset, split_by)
        where = f"{refer_root / dataset}, split-by {split_by}"
        split_names = choose_splits(refer.data["refs"], splits, where, skip=("train",))
        if not split_names:
            raise InputError(f"{where}: all refs are in split train; give `splits` train to evaluate on it")
        index = CocoIndex.load(refer_root / dataset / "instances.json")
        loaded_predictions = (
            None
            if predictions is None
            else _load_predictions(Path(predictions), where, opened, refer, index, box_format)
        )
        loaded_expressions = None if expressions is None else load_expressions(Path(expressions), refer.Refs.keys())
        for split in split_names:
            command = (
                f"refdet extract-features --refer-root {refer_root} --dataset {dataset} --split-by {split_by} "
                f"--split {split}"
            )
            ids = sorted({ref["image_id"] for ref in _refs_of_split(refer, split)})
            check_images(opened, ids, index.images, str(index.path), f"split {split}", f"extract them with: {command}")
        warn_about_categories(opened, index.categories, str(index.path))
        benchmark = _Benchmark(opened, refer, index, loaded_predictions, protocol)
        metrics = {split: benchmark.metrics(split) for split in split_names}
        if scorers is not None and loaded_expressions is not None:
            for split in split_names:
                references = {
                    ref["ref_id"]: [sentence["sent"] for sentence in ref["sentences"]]
                    for ref in _refs_of_split(refer, split)
                }
                metrics[split]["language"] = scorers.scores(references, loaded_expressions)
        metadata = {"dataset": dataset, "split_by": split_by, "protocol": protocol}
        if box_format != DEFAULT_FORMAT:
            metadata["box_format"] = box_format
        return {**metadata, "provenance": opened.provenance, "splits": metrics}


def _check_provenance(store: Store) -> None:
    """Raise an InputError if the provenance of a store is damaged."""
    try:
        Provenance.from_json(store.provenance)
    except InputError as error:
        raise InputError(f"{store.path}: {error}") from None


def _load_predictions(
    path: Path, where: str, store: Store, refer: REFER, index: CocoIndex, box_format: str
) -> dict[int, Prediction]:
    """Predictions by sentence id; InputError if sentence ids are not unique in the dataset, which ``where`` names."""
    refs = refer.data["refs"]
    if len(refer.sentToRef) < sum(len(ref["sentences"]) for ref in refs):
        raise InputError(f"{where}: duplicate sent_id makes predictions ambiguous; renumber")
    images = {sent_id: index.images[ref["image_id"]] for sent_id, ref in refer.sentToRef.items()}
    return load_predictions(path, store, images, targets.is_generalized(refs), box_format)


def _refs_of_split(refer: REFER, split: str) -> list[Any]:
    # not by `REFER.getRefIds`, which for "test" returns testA and testB too
    return [ref for ref in refer.data["refs"] if ref["split"] == split]


@dataclass(frozen=True)
class _Benchmark:
    """Inputs of the metrics of every split."""

    store: Store
    refer: REFER
    index: CocoIndex
    predictions: dict[int, Prediction] | None
    protocol: Protocol

    def metrics(self, split: str) -> dict[str, Any]:
        """All metrics of a split except those of generated expressions."""
        refs = _refs_of_split(self.refer, split)
        regions = {i: read_regions(self.store, i) for i in sorted({ref["image_id"] for ref in refs})}
        unusable = [i for i in regions if i in self.store.errors]
        coverages = self.coverage(refs, regions)
        results = coco_results(regions.values())
        self._warn_about_regions(split, regions, unusable, results)
        metrics: dict[str, Any] = {
            "images": len(regions),
            **({"unusable": len(unusable)} if unusable else {}),
            "refs": len(refs),
            "sentences": sum(len(ref["sentences"]) for ref in refs),
            "regions_per_image": mean([len(image_regions) for image_regions in regions.values()]),
            "detection": box_and_mask_ap(self.index, regions, results, masks=self._has_mask_ap(split, regions)),
            "referent_recall": referent_recall(coverages),
            "recall@k": recall_at_k(coverages),
            "recall@k_with_category": recall_at_k(coverages, with_category=True),
        }
        if self.predictions is None:
            return metrics
        if targets.is_generalized(self.refer.data["refs"]):
            return metrics | generalized_comprehension(self.refer, self.index, refs, self.predictions)
        answered = comprehension(self.refer, self.index, refs, self.predictions, regions, self.protocol)
        _warn_about_answers(split, metrics["sentences"], answered)
        return metrics | answered

    def _warn_about_regions(
        self, split: str, regions: Mapping[int, Regions], unusable: Sequence[int], results: Sequence[dict[str, Any]]
    ) -> None:
        """Warn about unusable images, undefined AP and regions of unknown categories.

        Args:
            split: the split, for messages.
            regions: image id -> its regions.
            unusable: ids of the images without regions because of an error.
            results: the regions as entries of a COCO results JSON.
        """
        if unusable:
            log.warning(
                "note: split %s: %s unusable in the extraction, so their objects count as missed (first: %s); "
                "extract the images again with `resume=True` once they can be read",
                split,
                format_share(len(unusable), len(regions), "image", "is"),
                shorten(self.store.errors[unusable[0]], 200),
            )
        if reason := why_undefined(self.index, regions):
            log.warning("note: split %s: %s", split, reason)
        unknown_categories = sum(result["category_id"] not in self.index.categories for result in results)
        if unknown_categories:
            log.warning(
                "note: split %s: %s in a category that %s lacks; AP leaves %s out",
                split,
                format_share(unknown_categories, len(results), "region", "is"),
                self.index.path,
                "it" if unknown_categories == 1 else "them",
            )

    def _has_mask_ap(self, split: str, image_ids: Iterable[int]) -> bool:
        """Whether all regions and annotations have masks to compare; warn if only annotations lack them."""
        if not self.store.has_masks:
            return False
        annotations = [annotation for i in image_ids for annotation in self.refer.imgToAnns.get(i, [])]
        without_mask = sum(not annotation.get("segmentation") for annotation in annotations)
        if without_mask:
            log.warning(
                "note: split %s: %s in %s %s no segmentation; mask AP is left out",
                split,
                format_share(without_mask, len(annotations), "annotation"),
                self.index.path,
                agree(without_mask, "has"),
            )
        return not without_mask

    def coverage(self, refs: list[Any], regions: dict[int, Regions]) -> list[Coverage]:
        """Coverage of every referred object, ref by ref."""
        coverages = []
        for ref in refs:
            objects = targets.objects_of(self.refer, ref)
            categories = [annotation["category_id"] for annotation in objects]
            coverages += coverage(
                targets.boxes(self.refer, objects), categories, regions[ref["image_id"]], self.protocol
            )
        return coverages


def _warn_about_answers(split: str, sentences: int, answered: Mapping[str, Any]) -> None:
    """Warn about answers that are worse than guessing, missing ones aside, and about boxes among masks.

    Args:
        split: the split, for messages.
        sentences: number of sentences of the split.
        answered: the result of `comprehension`.
    """
    rates, masks = answered["comprehension"], answered["segmentation"]
    answers = sentences - rates["missing"]
    accuracy = rates["accuracy@0.5"] * sentences / answers if answers else math.nan
    if accuracy < rates["random_baseline@0.5"]:
        log.warning(
            "note: split %s: the accuracy of %s, %.3f, is below that of guessing a region (%.3f): if they are boxes, "
            "are they in pixels of the original images, and in the format given by `box_format`?",
            split,
            format_count(answers, "answer"),
            accuracy,
            rates["random_baseline@0.5"],
        )
    if masks and masks["missing"] > rates["missing"]:
        boxes_only = masks["missing"] - rates["missing"]
        log.warning(
            "note: split %s: %s answered with a box where others have a mask; among the masks %s as wrong",
            split,
            format_share(boxes_only, sentences, "sentence", "is"),
            "it counts" if boxes_only == 1 else "they count",
        )
