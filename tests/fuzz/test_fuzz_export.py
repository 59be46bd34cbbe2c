"""The export to MAttNet succeeds or ends in a one-line error when an input other than a store is damaged at random."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from export_examples import ANNOTATIONS, DETECTIONS, write_dataset, write_store
from fuzzing import change_bytes, change_tree, fuzz

from refdet.files.strict_json import strict_json
from refdet.store.export.mattnet import export_mattnet
from refdet.store.export.mattnet_prepro import Prepro, PreproOptions, prepare

pytestmark = pytest.mark.slow

# the attribute words of sentences, as in sents.json of refer-parser2
ATTRIBUTE_WORDS = [{"sent_id": 10 * n, "atts": {"r1": ["dog"], "r2": ["red"], "r7": ["big", "none"]}} for n in range(5)]


@pytest.mark.parametrize("kind", ["refs(unc).p", "instances.json", "data.json", "sents.json"])
def test_damaged_inputs_of_mattnet(tmp_path: Path, kind: str) -> None:
    root = write_dataset(tmp_path / "refer")
    prepare(root, "refcoco", "unc", PreproOptions()).write(tmp_path)  # data.json among others
    (tmp_path / "sents.json").write_text(json.dumps(ATTRIBUTE_WORDS))
    detections = write_store(tmp_path / "detections.h5", DETECTIONS)
    annotations = write_store(tmp_path / "annotations.h5", ANNOTATIONS)
    path = tmp_path / kind if (tmp_path / kind).exists() else root / "refcoco" / kind
    good = path.read_bytes()
    tree = pickle.loads(good) if kind.endswith(".p") else json.loads(good)
    dump: Callable[[object], bytes] = pickle.dumps if kind.endswith(".p") else lambda tree: json.dumps(tree).encode()
    options = PreproOptions(
        word_count_threshold=0, attributes=tmp_path / "sents.json" if kind == "sents.json" else None
    )
    out = tmp_path / "out"

    def change(rng: random.Random) -> None:
        path.write_bytes(change_bytes(good, rng) if rng.random() < 0.25 else dump(change_tree(tree, rng)))
        shutil.rmtree(out, ignore_errors=True)

    def export() -> None:
        prepro = Prepro.read(path) if kind == "data.json" else prepare(root, "refcoco", "unc", options)
        export_mattnet(detections, out, annotations, prepro, options={})
        for written in out.glob("*.json"):
            strict_json(written.read_bytes())

    fuzz(change, export, tmp_path)
