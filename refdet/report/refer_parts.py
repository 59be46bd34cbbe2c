"""Pair stores with metrics of evaluate-on-refer, and open each pair (a part of the report) with its REFER dataset."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refdet import store as stores
from refdet.data.box_format import DEFAULT_FORMAT
from refdet.errors import InputError
from refdet.evaluation import targets
from refdet.evaluation.metrics import Protocol
from refdet.evaluation.refer_benchmark import evaluate_on_refer
from refdet.evaluation.renamed_metrics import rename_old_names
from refdet.report.fields import check_metrics
from refdet.report.inputs import ReferPart
from refdet.report.recall_charts import split_names
from refdet.store import Store
from refer import REFER

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenPart:
    """A `ReferPart` whose store and REFER dataset are open.

    Attributes:
        store: the store, None for metrics alone.
        refer: the REFER dataset of the store; None without a store, if the store has none, or if the REFER data was not
            given.
        dataset: dataset and split_by, such as "refcoco/unc", of the store or the metrics; "" without a dataset.
        splits: the splits to show: those of the metrics, or those whose images are all in the store.
        metrics: the metrics of evaluate-on-refer, None if there are none.
        predictions: JSON of a model's answers, None if there are none.
        protocol: how the metrics compare boxes.
        box_format: format of the boxes in ``predictions``.
    """

    store: Store | None
    refer: REFER | None
    dataset: str
    splits: Sequence[str]
    metrics: Mapping[str, Any] | None
    predictions: Path | None
    protocol: Protocol = "standard"
    box_format: str = DEFAULT_FORMAT

    @property
    def has_scenes(self) -> bool:
        """Whether refs can be drawn on their images. Those of gRefCOCO cannot, as they have any number of objects."""
        return self.store is not None and self.refer is not None and not targets.is_generalized(self.refer.data["refs"])

    def count_refs(self) -> int:
        """Number of refs in `splits`, including those on unusable images; 0 without a REFER dataset."""
        return 0 if self.refer is None else sum(ref["split"] in self.splits for ref in self.refer.data["refs"])


def pair_up(
    paths: Sequence[Path], metrics: Sequence[Mapping[str, Any]], predictions: Path | None, dataset: str = ""
) -> list[ReferPart]:
    """Pair each store with the metrics of its dataset; metrics without a store come after them.

    Args:
        paths: the stores.
        metrics: contents of metrics.json files of evaluate-on-refer.
        predictions: a model's answers, whose regions are those of the first store; None if there are none.
        dataset: dataset and split_by, such as "refcoco/unc", of all stores; "" for the dataset that each store was
            extracted for.

    Raises:
        InputError: a store is missing, or a store or metrics are damaged.
    """
    unpaired = [rename_old_names(entry) for entry in metrics]
    for entry in unpaired:
        check_metrics(entry, "metrics of evaluate-on-refer")
    names, provenances = [], []
    for path in paths:
        with stores.open(path) as store:
            names.append(dataset or dataset_of(store))
            provenances.append(store.provenance)
    chosen: dict[int, Mapping[str, Any]] = {}  # index of a store -> the metrics paired with it
    # a single store and its metrics belong together, even if the store does not say for which dataset it was extracted
    if len(paths) == len(metrics) == 1 and dataset in ("", _dataset_name(unpaired[0])):
        chosen[0] = unpaired.pop()
    # Pair metrics with stores of the same detector first, so that no other store of the dataset takes them. Then
    # pair the rest by the dataset alone.
    for same_detector_only in (True, False):
        for index, (name, provenance) in enumerate(zip(names, provenances, strict=True)):
            for entry in unpaired:
                is_other = same_detector_only and _is_of_another_detector(entry, provenance)
                if index not in chosen and _dataset_name(entry) == name and not is_other:
                    chosen[index] = entry
            unpaired = [entry for entry in unpaired if entry is not chosen.get(index)]
    parts = [
        ReferPart(path, chosen.get(index), None if index else predictions, name)
        for index, (path, name) in enumerate(zip(paths, names, strict=True))
    ]
    return parts + [ReferPart(None, entry) for entry in unpaired]


def _dataset_name(metrics: Mapping[str, Any]) -> str:
    """Dataset and split_by of metrics, such as "refcoco/unc"."""
    return f"{metrics['dataset']}/{metrics['split_by']}"


def dataset_of(store: Store) -> str:
    """The REFER dataset that a store was extracted for, such as "refcoco/unc"; "" for other images."""
    words = str(store.options.get("image_list", "")).split("/")
    return "/".join(words[:2]) if len(words) == 3 else ""


def open_part(stack: ExitStack, part: ReferPart, refer_root: Path | None) -> OpenPart:
    """Open the store of a part; if its metrics are missing, or lack those of its predictions, compute them if possible.

    Args:
        stack: exit stack that closes the store.
        part: the store and its results.
        refer_root: folder of the REFER data, None if not given.

    Raises:
        InputError: a file is missing or damaged; or there are predictions, but no store, no REFER dataset or no split
            to evaluate them on.
        refer.ReferError: the refs cannot be read.
    """
    store = None if part.store is None else stack.enter_context(stores.open(part.store))
    metrics = None if part.metrics is None else rename_old_names(part.metrics)
    name = part.dataset
    if metrics is not None:
        check_metrics(metrics, "metrics of evaluate-on-refer")
        name = _dataset_name(metrics)
        if store is not None and _is_of_another_detector(metrics, store.provenance):
            log.warning(
                "note: report: the metrics of %s are of another detector than %s: their provenance differs",
                name,
                store.path,
            )
    elif store is not None:
        name = name or dataset_of(store)
    if part.predictions is not None and (store is None or refer_root is None or not name):
        raise InputError(f"{part.predictions}: answers need a store, `refer_root`, `dataset` and `split_by`")
    if store is None or refer_root is None or not name:
        return OpenPart(store, None, name, split_names(metrics) if metrics else (), metrics, None)
    dataset, _, split_by = name.partition("/")
    if metrics is None and part.predictions is None and not (refer_root / dataset).is_dir():
        # the store was extracted for a list of images whose name, such as "a/b/c", only looks like a dataset's
        return OpenPart(store, None, name, (), None, None)
    refer = REFER(refer_root, dataset, split_by)
    splits = split_names(metrics) if metrics else _complete_splits(store, refer)
    if part.predictions is not None and not splits:
        raise InputError(
            f"{part.predictions}: {store.path} lacks images of every split of {name} except train, so the answers "
            "cannot be evaluated; give the metrics of evaluate-on-refer for the splits that it has"
        )
    protocol: Protocol = metrics.get("protocol", "standard") if metrics else "standard"
    box_format: str = metrics.get("box_format", DEFAULT_FORMAT) if metrics else DEFAULT_FORMAT
    if splits and (metrics is None or (part.predictions is not None and not _has_answers(metrics))):
        metrics = evaluate_on_refer(
            store.path,
            refer_root,
            dataset,
            split_by,
            splits=splits,
            predictions=part.predictions,
            protocol=protocol,
            box_format=box_format,
        )
    return OpenPart(store, refer, name, splits, metrics, part.predictions, protocol, box_format)


def _has_answers(metrics: Mapping[str, Any]) -> bool:
    """Whether metrics include those of a model's answers."""
    return any("comprehension" in values or "generalized" in values for values in metrics["splits"].values())


def _is_of_another_detector(metrics: Mapping[str, Any], provenance: Mapping[str, Any]) -> bool:
    """Whether metrics have a provenance that differs from the store's."""
    return metrics.get("provenance", provenance) != provenance


def _complete_splits(store: Store, refer: REFER) -> list[str]:
    """The splits other than train whose images are all in the store; val first."""
    refs = refer.data["refs"]
    incomplete = {ref["split"] for ref in refs if ref["image_id"] not in store}
    complete = {ref["split"] for ref in refs} - incomplete - {"train"}
    return sorted(complete, key=lambda split: (split != "val", split))
