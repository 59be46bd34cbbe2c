"""The simplest model of referring expressions: answer every sentence with the largest region of its image.

To use your own model, replace `answer`. The output is for ``refdet evaluate-on-refer --predictions``.

    python examples/largest_region.py --features refcoco.h5 --refer-root data/refer --out answers.json
"""

import argparse
import json

import numpy as np

from refdet import store
from refdet.structures.regions import Regions
from refer import REFER


def answer(sentence: str, regions: Regions) -> int:
    """Return the index of the region that a sentence refers to."""
    sides = regions.boxes[:, 2:] - regions.boxes[:, :2]
    return int(np.argmax(sides.prod(axis=1)))


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--features", required=True)
parser.add_argument("--refer-root", required=True)
parser.add_argument("--dataset", default="refcoco")
parser.add_argument("--split-by", default="unc")
parser.add_argument("--out", required=True)
options = parser.parse_args()

refer = REFER(options.refer_root, options.dataset, options.split_by)
predictions = []
with store.open(options.features) as features:
    image_ids = set(features.image_ids.tolist())
    for ref in refer.Refs.values():
        if ref["image_id"] not in image_ids or not len(features[ref["image_id"]]):
            continue
        regions, first = features[ref["image_id"]], features.rows(ref["image_id"]).start
        for sentence in ref["sentences"]:
            region = first + answer(sentence["sent"], regions)
            predictions.append({"sent_id": sentence["sent_id"], "region": int(region)})
with open(options.out, "w", encoding="utf-8") as file:
    json.dump(predictions, file)
print(f"answers: {len(predictions)}, in {options.out}")
