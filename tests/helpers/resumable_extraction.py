"""An extraction of ten images, in four shards, that tests interrupt and resume; all of its images are readable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interrupted_extraction import BATCHES, RECORDS, compute, interrupt_at
from store_examples import HEADER, PLAN

from refdet.data.coco import ImageRecord
from refdet.errors import Interrupted
from refdet.extraction import shards
from refdet.extraction.pipeline import extract
from refdet.extraction.summary import Summary

RECIPE = {"model": {"width": 64}, "input": {"min_sizes": [600], "max_size": 1000}}
RECIPE_HEADER = replace(HEADER, recipe=json.dumps(RECIPE), options=PLAN.options)


def load(record: ImageRecord) -> np.ndarray:
    """An image whose pixels are its id, which `compute` checks."""
    return np.full((record.height, record.width, 3), record.id, np.uint8)


def run(out: Path, stop_at: int | None = None, **changes: Any) -> Summary:
    """Extract into ``out``.

    Args:
        out: the store.
        stop_at: index in ``BATCHES`` of the batch that Ctrl-C interrupts, None for none.
        **changes: other arguments of `extract`, such as ``resume``.
    """
    compute_batch = compute if stop_at is None else interrupt_at(BATCHES[stop_at])
    arguments: dict[str, Any] = {
        "header": RECIPE_HEADER,
        "load": load,
        "compute": compute_batch,
        "shard_images": 2,
        **changes,
    }
    return extract(out, PLAN, batches=BATCHES, records=RECORDS, **arguments)


def interrupted_before_the_merge(out: Path) -> None:
    """Extract all shards into ``out``, and let Ctrl-C interrupt it before they are merged into the store."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="10 of 10"):
        patch.setattr(shards.ShardSet, "merge", interrupt)
        run(out)


def interrupt(*_: object) -> None:
    """Replaces a function at which Ctrl-C is to interrupt."""
    raise KeyboardInterrupt
