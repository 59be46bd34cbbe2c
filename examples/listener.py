"""A small model of referring expressions that reads only stores of regions: words, features, places.

It learns from the train refs on the images of one store, and answers the sentences on the images of another:

    python examples/listener.py --train train.h5 --test test.h5 --refer-root data/refer --out answers.json
    refdet evaluate-on-refer --store test.h5 --refer-root data/refer ... --predictions answers.json --out metrics

A region fits if the words that describe it fit its features ("red circle"), if it stands right among those that fit as
well ("leftmost"), and if it stands right to what other words fit ("below the star"). So does MAttNet (Yu et al., 2018):
subject, location, relation; and like there an auxiliary loss has the features tell the words said of their region.
"""

import argparse
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from refdet import store
from refdet.evaluation.metrics import box_iou
from refer import REFER

COMPONENTS = {"pool5": 64, "fc7": 16}  # principal components that are kept: pool5 tells colors, fc7 categories
MIN_SCORE, MAX_REGIONS = 0.3, 16
NO_WORD, UNKNOWN = 0, 1
# Their ids (s), images as places in a list (s), words (s, l), and which regions (s, n) they mean.
Sentences = tuple[list[int], Tensor, Tensor, Tensor]


@dataclass
class Image:
    """Its place in the list, (n,) rows of its regions, (n, 4) boxes in its pixels, (h, w), name -> (n, d) features."""

    place: int
    rows: np.ndarray
    boxes: np.ndarray
    size: tuple[int, int]
    features: dict[str, np.ndarray]


def look(file: store.Store, image_id: int, place: int) -> Image:
    """The likely regions of an image, best first, and of several on one object (IoU 0.5) the likeliest."""
    regions, rows = file.read(image_id, tuple(COMPONENTS)), list[int]()
    for row in np.argsort(-regions.scores, kind="stable").tolist():
        new = not rows or box_iou(regions.boxes[row], regions.boxes[rows]).max() < 0.5
        if new and len(rows) < MAX_REGIONS and (regions.scores[row] >= MIN_SCORE or not rows):
            rows.append(row)
    kept = {name: np.asarray(values[rows], np.float32) for name, values in regions.features.items()}
    of_file = np.array(rows, np.int64) + file.rows(image_id).start
    return Image(place, of_file, regions.boxes[rows], (regions.height, regions.width), kept)


class Senses:
    """Features made small and even: their first principal components over the train regions, of variance 1."""

    def __init__(self, images: Collection[Image]) -> None:
        self.parts = {}
        for name, count in COMPONENTS.items():
            values = np.concatenate([image.features[name] for image in images]).astype(np.float64)
            variance, axes = np.linalg.eigh(np.cov(values, rowvar=False))
            best = np.argsort(-variance)[:count]
            self.parts[name] = values.mean(0), axes[:, best] / np.sqrt(variance[best] + 1e-3 * variance.max())

    def __call__(self, images: Collection[Image]) -> tuple[Tensor, Tensor, Tensor]:
        """(i, n, d) features, (i, n, 5) center, size and log area in fifths of the image, (i, n) is there a region."""
        features, places, there = [], [], []
        for image in images:
            told = [(image.features[name] - mean) @ axes for name, (mean, axes) in self.parts.items()]
            features.append(torch.from_numpy(np.concatenate(told, axis=1)).float())
            x1, y1, x2, y2 = (image.boxes / np.tile(image.size[::-1], 2)).T
            area = np.log(((x2 - x1) * (y2 - y1)).clip(1e-4)) / 5
            place = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, area], axis=1)
            places.append(torch.from_numpy(5 * place).float())
            there.append(torch.ones(len(place), dtype=torch.bool))
        return pad_sequence(features, True), pad_sequence(places, True), pad_sequence(there, True)


class Listener(nn.Module):
    """Scores (b, n) of regions for sentences, and logits (b, n, words) of what each region might be called."""

    def __init__(self, words: int, features: int, width: int = 64) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.order = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.roles = nn.Linear(width, 4)  # describes the subject, the other thing; says where, in which relation
        self.see = nn.Sequential(nn.Dropout(0.2), nn.Linear(features, width))
        self.names = nn.Linear(width, words)
        self.standing = nn.Sequential(nn.Linear(11, 32), nn.Tanh(), nn.Linear(32, width))
        self.relation = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, width))
        self.where, self.how = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor, features: Tensor, places: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of regions, of what and of where a sentence says."""
        said = (tokens != NO_WORD)[..., None]
        context, _ = self.order(F.dropout(self.words(tokens), 0.1, self.training))
        roles = self.roles(context)
        describes = torch.sigmoid(roles[..., :2]) * said
        asked = torch.einsum("blk,bld->kbd", roles[..., 2:].masked_fill(~said, -1e9).softmax(1), context)
        called = self.names(self.see(features))
        of_words = called.gather(2, tokens[:, None].expand(-1, features.shape[1], -1))  # (b, n, l)
        # All describing words must fit, which is a product of probabilities.
        subject, other = torch.einsum("bnl,blk->kbn", F.logsigmoid(of_words), describes)
        apart = places[:, :, None] - places[:, None]
        # How many of those that fit as well are further left, right, up, down, smaller, larger.
        sides = torch.cat([apart[..., [0, 1, 4]], -apart[..., [0, 1, 4]]], -1) * apart.new_tensor([6, 6, 12] * 2)
        rivals = (subject.exp() * there)[:, None] * (1 - torch.eye(there.shape[1]))
        counts = torch.einsum("bijk,bij->bik", torch.sigmoid(sides), rivals)
        standing = torch.einsum("bnd,bd->bn", self.standing(torch.cat([counts, places], -1)), self.where(asked[0]))
        relation = torch.einsum("bijd,bd->bij", self.relation(torch.cat([apart, apart.abs()], -1)), self.how(asked[1]))
        anchor = other.masked_fill(~there, -1e9).softmax(1)
        total = subject + standing + torch.einsum("bij,bj->bi", relation, anchor)
        return total.masked_fill(~there, -1e9), called


def learn(seen: tuple[Tensor, Tensor, Tensor], heard: Sentences, words: int, seed: int, epochs: int) -> Listener:
    """Train a listener on the sentences that mean at least one of the regions seen."""
    torch.manual_seed(seed)
    features, places, there = seen
    _, images, tokens, right = heard
    right = F.pad(right, (0, there.shape[1] - right.shape[1]))  # the images with most regions may have no sentence
    model = Listener(words, features.shape[-1])
    usable, batch, rate = right.any(1).nonzero()[:, 0], 32, 5e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * -(-len(usable) // batch))
    for _ in range(epochs):
        for chosen in usable[torch.randperm(len(usable))].split(batch):
            said, meant, image = tokens[chosen], right[chosen], images[chosen]
            scores, called = model(said, features[image], places[image], there[image])
            choice = -scores.log_softmax(1).masked_fill(~meant, -1e9).logsumexp(1).mean()
            names = torch.zeros(len(chosen), words).scatter_(1, said, 1.0)
            best = called[torch.arange(len(chosen)), meant.float().argmax(1)]
            naming = F.binary_cross_entropy_with_logits(best, names, reduction="sum") / len(chosen)
            optimizer.zero_grad()
            (choice + 0.5 * naming).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def gather(refers: Sequence[REFER], images: dict[int, Image], words: dict[str, int], train: bool) -> Sentences:
    """The sentences of the train refs, or of all others, on these images. Train sentences make their words known."""
    found = []
    for refer, ref in ((one, ref) for one in refers for ref in one.Refs.values()):
        if (ref["split"] == "train") != train or ref["image_id"] not in images:
            continue
        image = images[ref["image_id"]]
        x, y, w, h = refer.getRefBox(ref["ref_id"])
        meant = torch.from_numpy(box_iou(np.array([x, y, x + w, y + h]), image.boxes)[0] >= 0.5)
        for sentence in ref["sentences"]:
            said = sentence["tokens"] or ["?"]
            known = [words.setdefault(word, len(words)) if train else words.get(word, UNKNOWN) for word in said]
            found.append((sentence["sent_id"], image.place, torch.tensor(known), meant))
    if not found:
        raise SystemExit(f"error: no {'train' if train else 'other'} sentence is about an image of the store")
    sent_ids, places, tokens, right = zip(*found, strict=True)
    return list(sent_ids), torch.tensor(places), pad_sequence(list(tokens), True), pad_sequence(list(right), True)


def main() -> None:
    """Train and answer, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "test", "refer-root", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    about = "refcoco/unc and so on: it learns from the train refs of all, and answers the sentences of the first"
    parser.add_argument("--refs", nargs="+", default=["refcoco/unc"], metavar="DATASET/SPLIT_BY", help=about)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    refers = [REFER(options.refer_root, *name.split("/", 1)) for name in options.refs]
    words = {"": NO_WORD, "?": UNKNOWN}
    with store.open(options.train) as learnt, store.open(options.test) as asked:
        if shared := set(learnt) & set(asked):
            parser.error(f"{options.train} and {options.test} share {len(shared)} images; test on others")
        if lacking := set(COMPONENTS) - (set(learnt.feature_names) & set(asked.feature_names)):
            parser.error(f"a store lacks {' and '.join(sorted(lacking))}; extract both features")
        seen, new = ({i: look(file, i, place) for place, i in enumerate(file)} for file in (learnt, asked))
    train = gather(refers, seen, words, train=True)
    senses = Senses(seen.values())
    model = learn(senses(seen.values()), train, len(words), options.seed, options.epochs)
    sent_ids, places, tokens, _ = gather(refers[:1], new, words, train=False)
    rows, answers = [image.rows for image in new.values()], []
    features, where, there = senses(new.values())
    for sent_id, image, said in zip(sent_ids, places.tolist(), tokens, strict=True):
        if len(rows[image]):  # else there is nothing to choose from
            with torch.inference_mode():
                scores, _ = model(said[None], features[[image]], where[[image]], there[[image]])
            answers.append({"sent_id": sent_id, "region": int(rows[image][scores[0].argmax()])})
    options.out.write_text(json.dumps(answers), encoding="utf-8")
    print(f"learned from {len(train[0])} sentences on {len(seen)} images; {len(answers)} answers in {options.out}")


if __name__ == "__main__":
    main()
