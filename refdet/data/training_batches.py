"""Batches of images for training and extraction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from refdet.config.recipe import InputOptions, Recipe
from refdet.data.coco import Annotation, CocoIndex, ImageRecord, TrainingObjects
from refdet.data.image_source import ImageSource
from refdet.data.packed_images import PackedImages
from refdet.data.scale_jitter import crop_boxes, sample_jittered_size, visible_window
from refdet.data.segmentations import to_rle
from refdet.data.transforms import input_size, network_input, padded_inputs, resize_pillow
from refdet.errors import RefdetError
from refdet.structures.box_convention import BoxConvention, InputSize
from refdet.structures.ground_truth import GroundTruth

# Independent streams of random numbers from one seed.
_EPOCH_STREAM, _STEP_STREAM, _JITTER_STREAM, _SHORT_SIDE_STREAM = range(4)


@dataclass(frozen=True)
class Batch:
    """A batch of images and their annotations.

    Attributes:
        images: (H, W, 3) uint8 RGB: with ``input.resize=pillow`` at input size, otherwise as in the file, or as
            network input, (3, height, width) float32, if that takes fewer bytes.
        sizes: input size of each image.
        flips: whether each image is flipped left to right; float32 images are flipped already, uint8 ones are not.
        shape: height and width to which the network's inputs are padded.
        targets: annotations of each image, in pixels of the network's input.
        image_ids: ids of all images of the step, including those of other processes and of other chunks.
        orientations: file -> EXIF orientation, for files with an orientation other than 1.
    """

    images: PackedImages
    sizes: list[InputSize]
    flips: list[bool]
    shape: tuple[int, int]
    targets: list[GroundTruth]
    image_ids: list[int]
    orientations: dict[str, int] = field(default_factory=dict)

    def pin_memory(self) -> Batch:
        """Copy the images to pinned memory."""
        return replace(self, images=self.images.pin_memory())

    def chunk(self, count: int) -> list[Batch]:
        """Split the images into ``count`` batches with the same padding; ``count`` divides the number of images."""
        if count == 1:
            return [self]
        size = len(self.sizes) // count
        return [
            replace(
                self,
                images=images,
                sizes=self.sizes[first : first + size],
                flips=self.flips[first : first + size],
                targets=self.targets[first : first + size],
            )
            for first, images in zip(range(0, len(self.sizes), size), self.images.split(size), strict=True)
        ]

    @property
    def input_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image in pixels of the network's input, without padding."""
        return [(size.height, size.width) for size in self.sizes]

    def inputs(self, options: InputOptions, device: torch.device) -> Tensor:
        """Copy the images to the device and make the network's inputs: (B, 3, *shape) float32, channels_last."""
        images = self.images.unpack(device)
        images = [
            image.flip(1) if flip and image.dtype == torch.uint8 else image
            for image, flip in zip(images, self.flips, strict=True)
        ]
        return padded_inputs(images, self.sizes, options, self.shape)


class TrainingBatches(Dataset):
    """Batches of a training run, indexed by step and determined only by the recipe's seed and the step.

    A resumed run therefore continues with the same batches, for any number of worker processes. Each image occurs once
    per epoch, except for a remainder of less than a batch, which is left out and differs from epoch to epoch; images of
    less than one batch are repeated to fill it. Landscape (also square) and portrait images are batched separately,
    which saves padding; at most one batch per epoch has both.

    If several processes train together, each loads its share of a batch. The images of a batch and their padding do not
    depend on the number of processes.

    Args:
        index: the instances file.
        source: the images.
        recipe: the recipe.
        objects: the objects to train on, if already selected and their images located with ``source``.
        rank: rank of this process.
        world_size: number of processes.

    Raises:
        InputError: no objects, or missing image files.
    """

    def __init__(
        self,
        index: CocoIndex,
        source: ImageSource,
        recipe: Recipe,
        objects: TrainingObjects | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.source, self.recipe, self.rank, self.world_size = source, recipe, rank, world_size
        self.labels = {category: label for label, category in enumerate(index.categories, start=1)}
        self.objects = objects or TrainingObjects(index, recipe.model.masks, recipe.train.empty_images)
        self.records = self.objects.records
        if objects is None:
            source.check(self.records, index.path, index.images.values())
        self._landscape = np.array([r.width >= r.height for r in self.records])
        self._plan: tuple[int, list[np.ndarray]] = (-1, [])  # the last planned epoch, and its batches

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps per epoch."""
        return max(len(self.records) // self.recipe.train.batch_size, 1)

    def __len__(self) -> int:
        return self.recipe.train.steps

    def __getitem__(self, step: int) -> Batch | RefdetError:
        """Load this process's share of the batch of a step.

        Returns:
            The batch, or the error of an unusable image, which is for the caller to raise: the DataLoader would wrap an
            error raised here in a worker's traceback.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._plan[0] != epoch:
            self._plan = (epoch, self._plan_epoch(epoch))
        rows = self._plan[1][position]
        rng = np.random.default_rng((self.recipe.train.seed, _STEP_STREAM, step))
        short_side = int(rng.choice(self.recipe.input.min_sizes))
        flips = (rng.random(len(rows)) < 0.5) & self.recipe.train.flip
        return self._load_batch(rows, [self._input_size(self.records[r], step, short_side) for r in rows], flips)

    def largest_batch(self) -> Batch | RefdetError:
        """Load a batch as large as any that may occur: of the largest images, at the largest of ``input.min_sizes``.

        Returns:
            The batch, or the error of an unusable image, as `__getitem__` does.
        """
        batch_size = self.recipe.train.batch_size
        short_side = max(self.recipe.input.min_sizes)
        sizes = [self._input_size(record, 0, short_side, largest=True) for record in self.records]
        sides = np.array([(size.height, size.width) for size in sizes])
        long, short, area = sides.max(axis=1), sides.min(axis=1), sides.prod(axis=1)

        def largest_of(group: np.ndarray, count: int) -> list[int]:
            # The images with the longest long and short sides determine the padding; the rest have the most pixels.
            by_area = group[np.argsort(-area[group], kind="stable")]
            longest = [group[side[group].argmax()] for side in (long, short)] if batch_size > 1 else []
            return list(dict.fromkeys([*longest, *by_area]))[:count]  # without repeats

        rows = np.arange(len(sizes))
        landscape, portrait = rows[self._landscape], rows[~self._landscape]
        candidates = [largest_of(group, batch_size) for group in (landscape, portrait) if len(group) >= batch_size]
        if len(rows) < batch_size:
            candidates = [list(np.resize(rows, batch_size))]
        elif batch_size > 1 and len(landscape) and len(portrait):  # the batch of both orientations
            portraits = min(max(batch_size // 2, batch_size - len(landscape)), len(portrait))
            candidates.append(largest_of(landscape, batch_size - portraits) + largest_of(portrait, portraits))
        chosen = max(candidates, key=lambda rows: math.prod(self._padded_shape([sizes[row] for row in rows])))
        return self._load_batch(np.array(chosen), [sizes[row] for row in chosen], np.zeros(batch_size, bool))

    def _padded_shape(self, sizes: Sequence[InputSize]) -> tuple[int, int]:
        """Height and width of the padded inputs of a batch."""
        return padded_shape(sizes, self.recipe.input.size_divisibility, self.recipe.input.crop_size)

    def _load_batch(self, rows: np.ndarray, sizes: list[InputSize], flips: np.ndarray) -> Batch | RefdetError:
        """Load this process's share of the batch of the given rows of ``records``, or return the error of an image."""
        own = slice(self.rank * len(rows) // self.world_size, (self.rank + 1) * len(rows) // self.world_size)
        own_records = [self.records[r] for r in rows[own]]
        try:
            loaded = zip(own_records, sizes[own], flips[own].tolist(), strict=True)
            examples = [self._load_example(record, size, flip) for record, size, flip in loaded]
        except RefdetError as error:
            return error
        return Batch(
            images=PackedImages.from_images([image for image, _ in examples]),
            sizes=sizes[own],
            flips=flips[own].tolist(),
            shape=self._padded_shape(sizes),
            targets=[target for _, target in examples],
            image_ids=[self.records[r].id for r in rows],
            orientations=self.source.orientations_of(own_records),
        )

    def _plan_epoch(self, epoch: int) -> list[np.ndarray]:
        """Draw the batches of an epoch, each as an array of rows (indices) of ``records``."""
        size = self.recipe.train.batch_size
        rng = np.random.default_rng((self.recipe.train.seed, _EPOCH_STREAM, epoch))
        order = rng.permutation(len(self.records))
        if len(order) < size:
            return [np.resize(order, size)]  # repeats images
        # Drop the remainder before grouping: a group smaller than a batch would otherwise be left out in every epoch.
        order = order[: len(order) // size * size]
        landscape = self._landscape[order]
        batches, remainders = [], []
        for group in (order[landscape], order[~landscape]):
            count = len(group) // size * size
            batches += list(group[:count].reshape(-1, size))
            remainders.append(group[count:])
        batches += list(np.concatenate(remainders).reshape(-1, size))  # one batch of both orientations, or none
        return [batches[i] for i in rng.permutation(len(batches))]

    def _input_size(self, record: ImageRecord, step: int, short_side: int, largest: bool = False) -> InputSize:
        """Input size of an image in a step, for ``short_side`` unless the recipe draws one for each image.

        With ``largest``, none is drawn for the image. With large-scale jitter neither has an effect: the size is drawn,
        and the input is padded to ``crop_size`` anyway.
        """
        options = self.recipe.input
        if options.crop_size:
            return sample_jittered_size(
                record.height, record.width, options, self._image_rng(_JITTER_STREAM, step, record)
            )
        if options.short_side_per == "image" and not largest:
            short_side = int(self._image_rng(_SHORT_SIDE_STREAM, step, record).choice(options.min_sizes))
        return input_size(record.height, record.width, options, short_side)

    def _image_rng(self, stream: int, step: int, record: ImageRecord) -> np.random.Generator:
        """Random generator that depends only on the seed, the stream, the step and the image."""
        return np.random.default_rng((self.recipe.train.seed, stream, step, record.id % 2**64))  # ids may be negative

    def _load_example(self, record: ImageRecord, size: InputSize, flip: bool) -> tuple[np.ndarray, GroundTruth]:
        """Load an image and its annotations, as in `Batch.images` and `Batch.targets`."""
        return self._load_image(record, size, flip), self._make_target(record, size, flip)

    def _load_image(self, record: ImageRecord, size: InputSize, flip: bool) -> np.ndarray:
        """Load an image as in `Batch.images`."""
        pixels = self.source.read(record)
        if self.recipe.input.resize == "pillow":
            if flip and size.cropped_from is not None:
                # The crop is one of the mirrored image. It is mirrored back, as `Batch.inputs` flips uint8 images.
                return resize_pillow(pixels[:, ::-1], size)[:, ::-1]
            return resize_pillow(pixels, size)
        if input_is_smaller(size):
            return network_input(pixels[:, ::-1] if flip else pixels, size, self.recipe.input).numpy()
        return pixels

    def _make_target(self, record: ImageRecord, size: InputSize, flip: bool) -> GroundTruth:
        """The annotations of an image, as in `Batch.targets`."""
        convention = BoxConvention(self.recipe.model.legacy_plus_one)
        objects = self.objects.objects(record.id)
        boxes, crowds = (
            convention.clip(_box_tensor(annotations), record.height, record.width)
            for annotations in (objects, self.objects.crowds(record.id))
        )
        masks = None
        if self.recipe.model.masks:
            masks = [
                None if a.segmentation is None else to_rle(a.segmentation, record.height, record.width) for a in objects
            ]
        if size.cropped_from is not None:
            window = visible_window(size, flip)
            kept, boxes = crop_boxes(boxes, masks or [None] * len(boxes), window)
            objects = [objects[i] for i in kept]
            if masks is not None:
                masks = [masks[i] for i in kept]
            crowds = crop_boxes(crowds, [None] * len(crowds), window)[1]
        if flip:
            boxes, crowds = _mirror(boxes, record.width), _mirror(crowds, record.width)
        crop_origin = torch.tensor(size.crop_origin * 2, dtype=torch.float32)  # xyxy
        boxes, crowds = (convention.scale(b, size.scale) - crop_origin for b in (boxes, crowds))
        if size.cropped_from is not None:  # rounding may have moved boxes outside the crop
            boxes, crowds = (convention.clip(b, size.height, size.width) for b in (boxes, crowds))
        labels = torch.tensor([self.labels[a.category_id] for a in objects], dtype=torch.int64)
        flipped_width = record.width if flip else None
        return GroundTruth(boxes, labels, masks, crowds, size.scale, flipped_width, size.crop_origin)


def padded_shape(sizes: Sequence[InputSize], divisor: int, min_side: int = 0) -> tuple[int, int]:
    """Height and width to pad a batch to: at least ``min_side``, and multiples of ``divisor`` unless that is 0."""
    divisor = max(divisor, 1)
    height, width = max(min_side, *(size.height for size in sizes)), max(min_side, *(size.width for size in sizes))
    return height + -height % divisor, width + -width % divisor


def image_bytes(size: InputSize, options: InputOptions) -> int:
    """Bytes of an image of this input size in `Batch.images`."""
    if options.resize == "pillow":
        return 3 * size.height * size.width
    if input_is_smaller(size):
        return 4 * 3 * size.height * size.width
    return 3 * size.image_height * size.image_width


def max_image_bytes(height: int, width: int, options: InputOptions) -> int:
    """Upper bound, for any step, of the `image_bytes` of an image of this height and width in pixels."""
    if options.crop_size:
        return 3 * (options.crop_size**2 if options.resize == "pillow" else height * width)
    return image_bytes(input_size(height, width, options, max(options.min_sizes)), options)


def input_is_smaller(size: InputSize) -> bool:
    """Whether a network input in float32 has fewer bytes than the image as stored in uint8."""
    return 4 * size.height * size.width < size.image_height * size.image_width


def _box_tensor(annotations: Sequence[Annotation]) -> Tensor:
    """Boxes (N, 4) float32, half-open xyxy in pixels of the image."""
    return torch.tensor([a.box for a in annotations], dtype=torch.float32).reshape(-1, 4)


def _mirror(boxes: Tensor, width: float) -> Tensor:
    """Flip boxes (N, 4) xyxy left to right in an image of a width in pixels."""
    return torch.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), dim=1)


def group_by_input_size(
    records: Sequence[ImageRecord], options: InputOptions, batch_size: int
) -> list[list[ImageRecord]]:
    """Group images into batches of equal input size for extraction, so that padding never affects features.

    Args:
        records: the images.
        options: input options of the recipe.
        batch_size: maximum number of images per batch.

    Returns:
        The batches, ordered by their first image, with images in the order of ``records``.
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
