"""Batches: which images go together, for training and for extraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from refdet.config.recipe import InputOptions, Recipe
from refdet.data.coco import CocoIndex, ImageRecord
from refdet.data.image_source import ImageSource
from refdet.data.segmentations import to_rle
from refdet.data.training_objects import TrainingObjects
from refdet.data.transforms import input_size, network_input
from refdet.errors import RefdetError
from refdet.structures.box_convention import BoxConvention
from refdet.structures.ground_truth import GroundTruth


@dataclass(frozen=True)
class Batch:
    """Images padded with zeros, below and right, to one size (B, 3, H, W), and what is in them."""

    images: Tensor
    sizes: list[tuple[int, int]]  # (height, width) of each without padding
    targets: list[GroundTruth]
    image_ids: list[int]
    oriented: dict[str, int] = field(default_factory=dict)  # their files with an EXIF orientation other than 1 -> which

    def pin_memory(self) -> Batch:
        """The same with the images in memory from which a GPU can be fed while it works; called by the DataLoader."""
        return replace(self, images=self.images.pin_memory())


def pad_batch(images: Sequence[Tensor]) -> Tensor:
    """Images (3, Hi, Wi) -> (B, 3, H, W), the largest height and width, zero (the mean colour) elsewhere."""
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    padded = images[0].new_zeros(len(images), 3, height, width)
    for row, image in zip(padded, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return padded


class TrainingBatches(Dataset):
    """The batch of every step of a run, each a function of the recipe's seed and the step alone.

    So a run that was interrupted goes on with exactly the batches that it would have had, whatever the number
    of worker processes. Within an epoch each image comes once, but for less than a batch of them; landscape
    and portrait images go apart, which saves padding.

    Args:
        objects: what of the index is trained on, where that is known and its images were found already.

    Raises:
        InputError: no objects, or image files missing.
    """

    def __init__(
        self, index: CocoIndex, source: ImageSource, recipe: Recipe, objects: TrainingObjects | None = None
    ) -> None:
        self.source, self.recipe = source, recipe
        self.labels = {category: label for label, category in enumerate(index.categories, start=1)}
        self.objects = objects or TrainingObjects(index, recipe.model.masks, recipe.train.empty_images)
        self.records = self.objects.records
        if objects is None:
            source.check(self.records, index.path, index.images.values())
        self._landscape = np.array([r.width >= r.height for r in self.records])
        self._plan: tuple[int, list[np.ndarray]] = (-1, [])  # the epoch that was asked for last

    @property
    def epoch_steps(self) -> int:
        """How many steps go over all images once."""
        return max(len(self.records) // self.recipe.train.batch_size, 1)

    def __len__(self) -> int:
        return self.recipe.train.steps

    def __getitem__(self, step: int) -> Batch | RefdetError:
        """The batch of a step, or the error of an image that cannot be used.

        An exception raised in a worker process would reach the user wrapped in a traceback.
        """
        options = self.recipe.input
        epoch, position = divmod(step, self.epoch_steps)
        if self._plan[0] != epoch:
            self._plan = (epoch, self._epoch(epoch))
        rows = self._plan[1][position]
        random = np.random.default_rng((self.recipe.train.seed, 1, step))
        short_side = int(random.choice(options.min_sizes))
        flips = (random.random(len(rows)) < 0.5) & self.recipe.train.flip
        try:
            examples = [self._example(self.records[r], short_side, bool(f)) for r, f in zip(rows, flips, strict=True)]
        except RefdetError as error:
            return error
        images = [image for image, _ in examples]
        return Batch(
            pad_batch(images),
            [(image.shape[1], image.shape[2]) for image in images],
            [target for _, target in examples],
            [self.records[r].id for r in rows],
            self.source.oriented_among([self.records[r] for r in rows]),
        )

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """Rows of `records` of each batch of an epoch."""
        size = self.recipe.train.batch_size
        random = np.random.default_rng((self.recipe.train.seed, 0, epoch))
        order = random.permutation(len(self.records))
        if len(order) < size:
            return [np.resize(order, size)]
        landscape = self._landscape[order]
        batches, rest = [], []
        for group in (order[landscape], order[~landscape]):
            whole = len(group) // size * size
            batches += list(group[:whole].reshape(-1, size))
            rest.append(group[whole:])
        mixed = np.concatenate(rest)
        batches += list(mixed[: len(mixed) // size * size].reshape(-1, size))
        return [batches[i] for i in random.permutation(len(batches))]

    def _example(self, record: ImageRecord, short_side: int, flip: bool) -> tuple[Tensor, GroundTruth]:
        options, convention = self.recipe.input, BoxConvention(self.recipe.model.legacy_plus_one)
        size = input_size(record.height, record.width, options, short_side)
        pixels = self.source.read(record)
        objects = self.objects.objects(record.id)
        boxes, crowds = (
            convention.clip(_stack([a.box for a in kind]), record.height, record.width)
            for kind in (objects, self.objects.crowds(record.id))
        )
        if flip:
            pixels = pixels[:, ::-1]
            boxes, crowds = _mirror(boxes, record.width), _mirror(crowds, record.width)
        image = network_input(pixels, size, options)
        boxes, crowds = (convention.scale(b, size.scale) for b in (boxes, crowds))
        masks = None
        if self.recipe.model.masks:
            masks = [
                None if a.segmentation is None else to_rle(a.segmentation, record.height, record.width) for a in objects
            ]
        labels = torch.tensor([self.labels[a.category_id] for a in objects], dtype=torch.int64)
        return image, GroundTruth(boxes, labels, masks, crowds, size.scale, float(record.width) if flip else None)


def _stack(boxes: Sequence[tuple[float, float, float, float]]) -> Tensor:
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def _mirror(boxes: Tensor, width: float) -> Tensor:
    return torch.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), dim=1)


def group_by_input_size(
    records: Sequence[ImageRecord], options: InputOptions, batch_size: int
) -> list[list[ImageRecord]]:
    """Images in batches of one exact input size, so that no padding ever touches a feature.

    The plan depends on the list and the batch size alone. Batches come in the order of their first image, and
    images within one in the order of the list.
    """
    open_batches: dict[tuple[int, int], list[ImageRecord]] = {}
    batches: list[list[ImageRecord]] = []
    for record in records:
        size = input_size(record.height, record.width, options)
        batch = open_batches.get((size.height, size.width))
        if batch is None or len(batch) == batch_size:
            batch = open_batches[size.height, size.width] = []
            batches.append(batch)
        batch.append(record)
    return batches
