"""`RegionsDataset`: a store as a PyTorch dataset of images."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from refdet import store
from refdet.errors import ArgumentError, InputError
from refdet.files.short_text import format_count, short_repr
from refdet.store.hdf5_access import known_files


class RegionsDataset(Dataset):
    """Images of a store with their regions and features.

    Works in forked and spawned workers of a `DataLoader`, even after use in the parent process, as each process opens
    the file on its first read. Images differ in their number of regions N, so the `DataLoader` needs a ``collate_fn``
    that pads the regions, or ``collate_fn=list``.

    ``dataset[k]`` is a dictionary:

    - "image_id" int, "file_name" str, "size" (height, width) int in pixels;
    - "boxes" (N, 4) float32, half-open ``x1 y1 x2 y2`` in pixels of the original image, "scores" (N,) float32,
      "category_ids" (N,) int64, and "ann_ids" (N,) int64 if the store has them;
    - "masks": N pycocotools RLE objects, with ``masks=True``;
    - "features": name -> (N, ...) tensor, "maps": name -> (C, H, W) tensor, in the stored dtype;
    - "im_info": (3,) float32 height, width and scale of the network input, if there are maps.

    Examples:
        >>> dataset = refdet.RegionsDataset("demo/features/refcoco.h5", features=["fc7"])
        >>> loader = torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=list)
        >>> [item["features"]["fc7"].shape[1] for item in next(iter(loader))]
        [32, 32]

    Args:
        path: the store.
        features: features and maps to read, None for all.
        image_ids: ids of the images in order, such as those of a split; None for all in file order.
        masks: whether to read masks.

    Raises:
        ArgumentError: ``features`` is not a list, or ``image_ids`` are not integers.
        InputError: the store cannot be opened (`refdet.store.open`), or lacks a feature, masks or an image.
    """

    def __init__(
        self,
        path: str | Path,
        features: Sequence[str] | None = None,
        image_ids: Sequence[int] | None = None,
        masks: bool = False,
    ) -> None:
        if isinstance(features, str):
            raise ArgumentError("features", f"a list of names is needed, not {features!r}")
        self.path = Path(path)
        self.features = None if features is None else tuple(features)
        self.masks = masks
        self._store: store.Store | None = None
        self._pid = 0
        with store.open(self.path) as opened:
            self._state = known_files.get(self.path)  # for `_open_store` in other processes
            missing = sorted(set(self.features or ()) - {*opened.feature_names, *opened.map_names})
            if missing or (masks and not opened.has_masks):
                raise InputError(f"{self.path}: no {missing[0] if missing else 'masks'}; extract it with them")
            self.image_ids = _as_ints(opened if image_ids is None else image_ids)
            unknown = [i for i in self.image_ids if i not in opened]
        if unknown:
            missing_images = format_count(len(unknown), "requested image")
            raise InputError(f"{self.path}: {missing_images} missing, first: {unknown[0]}; extract them")

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        regions = self._open_store().read(self.image_ids[index], self.features)
        item: dict[str, Any] = {
            "image_id": regions.image_id,
            "file_name": regions.file_name,
            "size": (regions.height, regions.width),
            "boxes": torch.from_numpy(regions.boxes),
            "scores": torch.from_numpy(regions.scores),
            "category_ids": torch.from_numpy(regions.category_ids),
            "features": {name: torch.from_numpy(values) for name, values in regions.features.items()},
            "maps": {name: torch.from_numpy(values) for name, values in regions.maps.items()},
        }
        if regions.ann_ids is not None:
            item["ann_ids"] = torch.from_numpy(regions.ann_ids)
        if self.masks:
            item["masks"] = regions.rles()
        if regions.im_info is not None:
            item["im_info"] = torch.from_numpy(regions.im_info)
        return item

    def __getstate__(self) -> dict[str, Any]:
        # an open file cannot be sent to another process
        return {**self.__dict__, "_store": None}

    def _open_store(self) -> store.Store:
        """The store as opened by this process, which opens it on the first call."""
        if self._store is None or self._pid != os.getpid():
            if self._store is not None:
                self._store.close()  # inherited from the parent in a fork; HDF5 would share its state
            if self._state is not None:
                # a spawned worker need not check the file again, as its parent has
                known_files.add_in_process(self._state)
            self._store, self._pid = store.open(self.path), os.getpid()
        return self._store


def _as_ints(image_ids: Iterable[Any]) -> list[int]:
    """Convert ids, which may be numpy or PyTorch integers, to ints; raises ArgumentError for other values."""
    ids = []
    for image_id in image_ids:
        try:
            ids.append(operator.index(image_id))
        except TypeError:
            raise ArgumentError("image_ids", f"integers are needed, not {short_repr(image_id)}") from None
    return ids
