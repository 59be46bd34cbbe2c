"""`RegionsDataset`: a store as a PyTorch dataset, an item an image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from refdet import store
from refdet.errors import InputError
from refdet.store.hdf5_door import known


class RegionsDataset(Dataset):
    """The images of a store, in the order of the file or as they are given.

    It may be used in forked and in spawned workers and before them in the parent: each process opens the file for
    itself when it first reads. Images have different numbers of regions, so a `DataLoader` needs a ``collate_fn`` that
    pads or, as ``collate_fn=list``, leaves them apart.

    ``dataset[k]`` is a dictionary, its boxes in pixels of the original image, half-open:

    - "image_id" int, "file_name" str, "size" (height, width) int;
    - "boxes" (n, 4), "scores" (n,) float32; "category_ids" (n,) int64, and "ann_ids" (n,) int64 if the store has them;
    - "masks": n pycocotools RLE objects, with ``masks=True``;
    - "features": name -> (n, ...) tensor, "maps": name -> (C, H, W), of the type they are stored in;
    - "im_info": (3,) float32, where there are maps.

    Examples:
        >>> dataset = refdet.RegionsDataset("demo/features/refcoco.h5", features=["fc7"])
        >>> loader = torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=list)
        >>> [item["features"]["fc7"].shape[1] for item in next(iter(loader))]
        [32, 32]

    Args:
        path: the store.
        features: features and maps to read, None for all.
        image_ids: the images, None for all; such as those of one split.
        masks: whether to give the masks.

    Raises:
        InputError: see `refdet.store.open`; the store lacks a feature or an image.
    """

    def __init__(
        self,
        path: str | Path,
        features: Sequence[str] | None = None,
        image_ids: Sequence[int] | None = None,
        masks: bool = False,
    ) -> None:
        self.path = Path(path)
        self.features = None if features is None else tuple(features)
        self.masks = masks
        self._store: store.Store | None = None
        self._process = 0
        with store.open(self.path) as found:
            self._state = known.here(self.path)
            lacking = sorted(set(self.features or ()) - {*found.feature_names, *found.map_names})
            if lacking or (masks and not found.has_masks):
                raise InputError(f"{self.path}: has no {lacking[0] if lacking else 'masks'}; extract it with them")
            self.image_ids = [int(i) for i in (found if image_ids is None else image_ids)]
            strange = [i for i in self.image_ids if i not in found]
        if strange:
            raise InputError(f"{self.path}: lacks {len(strange)} of the images asked for, the first is {strange[0]}")

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        regions = self._opened().read(self.image_ids[index], self.features)
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
        return {**self.__dict__, "_store": None}

    def _opened(self) -> store.Store:
        if self._store is None or self._process != os.getpid():
            if self._store is not None:
                self._store.close()  # the copy that fork made; HDF5 would hand out its state again
            if self._state is not None:
                known.add_here(self._state)  # the parent looked through it; a spawned worker need not
            self._store, self._process = store.open(self.path), os.getpid()
        return self._store
