"""A small model of referring expressions that reads only feature stores and REFER data.

It trains on the train refs whose images are in one store, and answers the other refs whose images are in another:

    python examples/listener.py --train train.h5 --test test.h5 --refer-root data/refer --out answers.json
    refdet evaluate-on-refer --store test.h5 --refer-root data/refer ... --predictions answers.json --out metrics

The score of a region is the sum of three terms, as in MAttNet (Yu et al., 2018):

- subject: do its features match the words that describe the referent ("red circle")?
- location: is it in the right place among the regions that match as well ("leftmost")?
- relation: is it in the right place relative to the region that other words describe ("below the star")?

As in MAttNet, an auxiliary loss has the model predict the words of a sentence from the features of its referent.

Dimensions in comments: B sentences, L words of a sentence, I images, N regions of an image, V words of the vocabulary.
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

COMPONENTS = {"pool5": 64, "fc7": 16}  # principal components of each feature: pool5 has colors, fc7 categories
MIN_SCORE, MAX_REGIONS = 0.3, 16
PADDING, UNKNOWN = 0, 1  # word indices
BATCH_SIZE, LEARNING_RATE = 32, 5e-3


@dataclass
class Image:
    """The regions of an image: index of the image, (N,) rows in the store, (N, 4) boxes, (H, W) and (N, C) features."""

    index: int
    rows: np.ndarray
    boxes: np.ndarray
    size: tuple[int, int]
    features: dict[str, np.ndarray]


@dataclass
class Sentences:
    """(B,) sentence ids, (B,) indices of their images, (B, L) words, and (B, N) whether a region is the referent."""

    ids: list[int]
    images: Tensor
    words: Tensor
    is_referent: Tensor


def read_image(file: store.Store, image_id: int, index: int) -> Image:
    """Read the regions with high scores, best first, and only the best of those that overlap with IoU 0.5 or more."""
    regions, kept = file.read(image_id, tuple(COMPONENTS)), list[int]()
    for row in np.argsort(-regions.scores, kind="stable").tolist():
        is_new = not kept or box_iou(regions.boxes[row], regions.boxes[kept]).max() < 0.5
        if is_new and len(kept) < MAX_REGIONS and (regions.scores[row] >= MIN_SCORE or not kept):
            kept.append(row)
    features = {name: np.asarray(values[kept], np.float32) for name, values in regions.features.items()}
    rows_in_store = np.array(kept, np.int64) + file.rows(image_id).start
    return Image(index, rows_in_store, regions.boxes[kept], (regions.height, regions.width), features)


class Preprocessor:
    """Reduces features to their first principal components over the training regions, scaled to variance 1."""

    def __init__(self, images: Collection[Image]) -> None:
        self.projections = {}
        for name, count in COMPONENTS.items():
            values = np.concatenate([image.features[name] for image in images]).astype(np.float64)
            variances, axes = np.linalg.eigh(np.cov(values, rowvar=False))
            largest = np.argsort(-variances)[:count]
            scaled_axes = axes[:, largest] / np.sqrt(variances[largest] + 1e-3 * variances.max())
            self.projections[name] = values.mean(0), scaled_axes

    def __call__(self, images: Collection[Image]) -> tuple[Tensor, Tensor, Tensor]:
        """Return (I, N, C) features, (I, N, 5) positions and the (I, N) mask of regions, padded to the largest N.

        A position is the center, width, height and log area of a box, relative to the image, times 5.
        """
        features, positions, masks = [], [], []
        for image in images:
            projected = [(image.features[name] - mean) @ axes for name, (mean, axes) in self.projections.items()]
            features.append(torch.from_numpy(np.concatenate(projected, axis=1)).float())
            x1, y1, x2, y2 = (image.boxes / np.tile(image.size[::-1], 2)).T
            log_area = np.log(((x2 - x1) * (y2 - y1)).clip(1e-4)) / 5
            position = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, log_area], axis=1)
            positions.append(torch.from_numpy(5 * position).float())
            masks.append(torch.ones(len(position), dtype=torch.bool))
        return pad_sequence(features, True), pad_sequence(positions, True), pad_sequence(masks, True)


class Listener(nn.Module):
    """Scores the regions of an image for a sentence, and predicts the words for each region."""

    def __init__(self, words: int, features: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.gru = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        # how much a word describes the subject, describes the related object, gives the location, gives the relation
        self.roles = nn.Linear(width, 4)
        self.encoder = nn.Sequential(nn.Dropout(0.2), nn.Linear(features, width))
        self.word_classifier = nn.Linear(width, words)
        self.location = nn.Sequential(nn.Linear(11, 32), nn.Tanh(), nn.Linear(32, width))
        self.relation = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, width))
        self.location_query, self.relation_query = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, words: Tensor, features: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (B, N) scores of regions, and the (B, N, V) logits of the words that describe each region."""
        is_word = (words != PADDING)[..., None]
        context, _ = self.gru(F.dropout(self.embedding(words), 0.1, self.training))
        roles = self.roles(context)  # (B, L, 4)
        describes = torch.sigmoid(roles[..., :2]) * is_word
        attention = roles[..., 2:].masked_fill(~is_word, -1e9).softmax(1)
        location_query, relation_query = torch.einsum("blk,bld->kbd", attention, context)

        word_logits = self.word_classifier(self.encoder(features))
        logits_of_sentence = word_logits.gather(2, words[:, None].expand(-1, features.shape[1], -1))  # (B, N, L)
        # a region must match all words that describe it: the log of a product of probabilities
        subject, related = torch.einsum("bnl,blk->kbn", F.logsigmoid(logits_of_sentence), describes)

        # how many of the other regions that match as well are further left, up, smaller, right, down, larger
        offsets = positions[:, :, None] - positions[:, None]  # (B, N, N, 5)
        signed_offsets = torch.cat([offsets[..., [0, 1, 4]], -offsets[..., [0, 1, 4]]], -1)
        is_further = torch.sigmoid(signed_offsets * offsets.new_tensor([6, 6, 12] * 2))
        rivals = (subject.exp() * mask)[:, None] * (1 - torch.eye(mask.shape[1]))
        rival_counts = torch.einsum("bijk,bij->bik", is_further, rivals)
        location_keys = self.location(torch.cat([rival_counts, positions], -1))
        location = torch.einsum("bnd,bd->bn", location_keys, self.location_query(location_query))

        relation_keys = self.relation(torch.cat([offsets, offsets.abs()], -1))
        relation_to_each = torch.einsum("bijd,bd->bij", relation_keys, self.relation_query(relation_query))
        is_related_object = related.masked_fill(~mask, -1e9).softmax(1)
        relation = torch.einsum("bij,bj->bi", relation_to_each, is_related_object)
        return (subject + location + relation).masked_fill(~mask, -1e9), word_logits


def train_listener(
    regions: tuple[Tensor, Tensor, Tensor], sentences: Sentences, vocabulary_size: int, seed: int, epochs: int
) -> Listener:
    """Train a listener on the sentences whose referent is covered by a region."""
    torch.manual_seed(seed)
    features, positions, mask = regions
    # images with more regions than all others may have no sentence
    is_referent = F.pad(sentences.is_referent, (0, mask.shape[1] - sentences.is_referent.shape[1]))
    model = Listener(vocabulary_size, features.shape[-1])
    usable = is_referent.any(1).nonzero()[:, 0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    steps = epochs * -(-len(usable) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for batch in usable[torch.randperm(len(usable))].split(BATCH_SIZE):
            words, target, image = sentences.words[batch], is_referent[batch], sentences.images[batch]
            scores, word_logits = model(words, features[image], positions[image], mask[image])
            region_loss = -scores.log_softmax(1).masked_fill(~target, -1e9).logsumexp(1).mean()
            is_in_sentence = torch.zeros(len(batch), vocabulary_size).scatter_(1, words, 1.0)
            logits = word_logits[torch.arange(len(batch)), target.float().argmax(1)]
            word_loss = F.binary_cross_entropy_with_logits(logits, is_in_sentence, reduction="sum") / len(batch)
            optimizer.zero_grad()
            (region_loss + 0.5 * word_loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def read_sentences(
    refers: Sequence[REFER], images: dict[int, Image], vocabulary: dict[str, int], train: bool
) -> Sentences:
    """Read the sentences of the train refs, or of all other refs, on these images.

    Words of train sentences are added to the vocabulary. Regions with IoU 0.5 or more count as the referent.
    """
    ids, indices, words, is_referent = [], [], [], []
    for refer in refers:
        for ref in refer.Refs.values():
            if (ref["split"] == "train") != train or ref["image_id"] not in images:
                continue
            image = images[ref["image_id"]]
            x, y, w, h = refer.getRefBox(ref["ref_id"])
            covers = torch.from_numpy(box_iou(np.array([x, y, x + w, y + h]), image.boxes)[0] >= 0.5)
            for sentence in ref["sentences"]:
                tokens = sentence["tokens"] or ["?"]
                if train:
                    word_indices = [vocabulary.setdefault(token, len(vocabulary)) for token in tokens]
                else:
                    word_indices = [vocabulary.get(token, UNKNOWN) for token in tokens]
                ids.append(sentence["sent_id"])
                indices.append(image.index)
                words.append(torch.tensor(word_indices))
                is_referent.append(covers)
    if not ids:
        raise SystemExit(f"error: no {'train' if train else 'other'} sentence is about an image of the store")
    return Sentences(ids, torch.tensor(indices), pad_sequence(words, True), pad_sequence(is_referent, True))


def main() -> None:
    """Train a listener on one store, and write its answers to the sentences on another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "test", "refer-root", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    help_text = "datasets, such as refcoco/unc: train on the train refs of all, and answer the other refs of the first"
    parser.add_argument("--refs", nargs="+", default=["refcoco/unc"], metavar="DATASET/SPLIT_BY", help=help_text)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    refers = [REFER(options.refer_root, *name.split("/", 1)) for name in options.refs]
    vocabulary = {"": PADDING, "?": UNKNOWN}
    with store.open(options.train) as train_store, store.open(options.test) as test_store:
        if shared := set(train_store) & set(test_store):
            parser.error(f"{options.train} and {options.test} share {len(shared)} images; test on others")
        if lacking := set(COMPONENTS) - (set(train_store.feature_names) & set(test_store.feature_names)):
            parser.error(f"a store lacks {' and '.join(sorted(lacking))}; extract both features")
        train_images = {image_id: read_image(train_store, image_id, i) for i, image_id in enumerate(train_store)}
        test_images = {image_id: read_image(test_store, image_id, i) for i, image_id in enumerate(test_store)}
    train_sentences = read_sentences(refers, train_images, vocabulary, train=True)
    preprocess = Preprocessor(train_images.values())
    regions = preprocess(train_images.values())
    model = train_listener(regions, train_sentences, len(vocabulary), options.seed, options.epochs)

    test_sentences = read_sentences(refers[:1], test_images, vocabulary, train=False)
    features, positions, mask = preprocess(test_images.values())
    rows, answers = [image.rows for image in test_images.values()], []
    for sent_id, i, words in zip(test_sentences.ids, test_sentences.images.tolist(), test_sentences.words, strict=True):
        if len(rows[i]):  # an image without regions has no answer
            with torch.inference_mode():
                scores, _ = model(words[None], features[[i]], positions[[i]], mask[[i]])
            answers.append({"sent_id": sent_id, "region": int(rows[i][scores[0].argmax()])})
    options.out.write_text(json.dumps(answers), encoding="utf-8")
    print(
        f"learned from {len(train_sentences.ids)} sentences on {len(train_images)} images; "
        f"{len(answers)} answers in {options.out}"
    )


if __name__ == "__main__":
    main()
