"""An extraction of ten images, in four shards, that tests interrupt and resume."""

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
    return np.full((record.height, record.width, 3), record.id, np.uint8)


def run(out: Path, stop_at: int | None = None, **changes: Any) -> Summary:
    """Extract into ``out``; with ``stop_at``, Ctrl-C interrupts the batch of that number."""
    computing = compute if stop_at is None else interrupt_at(BATCHES[stop_at])
    given: dict[str, Any] = {"header": RECIPE_HEADER, "load": load, "compute": computing, "shard_images": 2, **changes}
    return extract(out, PLAN, batches=BATCHES, records=RECORDS, **given)


def interrupted_before_the_merge(out: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="10 of 10"):
        patch.setattr(shards.ShardSet, "merge", interrupt)
        run(out)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
