"""`Collection`: the opened files that the page shows, and the contents of one image."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refdet import store as stores
from refdet.data.box_format import DEFAULT_FORMAT
from refdet.data.coco import CocoIndex, ImageRecord
from refdet.data.image_source import ImageSource
from refdet.errors import ArgumentError, InputError
from refdet.evaluation.targets import is_generalized
from refdet.files.short_text import format_count, format_share
from refdet.report.browse.catalog import Catalog
from refdet.report.browse.json_numbers import shortest_decimals, to_json_numbers
from refdet.report.browse.referents import add_annotations, add_refs
from refdet.store import Store
from refdet.store.known_files import FileState
from refer import REFER

log = logging.getLogger(__name__)

MAX_STORES = 2
MAX_PREVIEW_REGIONS = 100  # regions in a thumbnail


@dataclass(frozen=True)
class BrowseInputs:
    """What to show.

    Attributes:
        stores: one store, or two to show side by side; images and their order are those of the first.
        images: folder or zip of the images; None shows boxes without them.
        refer_root: folder of the REFER data; needs ``dataset`` and ``split_by``. None for no refs.
        dataset: folder in ``refer_root``.
        split_by: the division into splits.
        predictions: JSON of a model's answers on the first store; needs refs.
        box_format: format of the boxes in ``predictions``.
        instances: instances JSON whose objects are shown next to the regions; without refs, the objects are also the
            referents.
    """

    stores: Sequence[Path]
    images: Path | None = None
    refer_root: Path | None = None
    dataset: str | None = None
    split_by: str | None = None
    predictions: Path | None = None
    box_format: str = DEFAULT_FORMAT
    instances: Path | None = None


class Collection:
    """The open stores, their images, and the catalog of images, referents and sentences.

    The regions of an image are read on demand; features are never read.

    Args:
        inputs: what to show.

    Attributes:
        inputs: as given.
        stores: the open stores.
        source: the images; None if no images were given.
        catalog: the database of images, referents and sentences.
        names: category id -> name, for each store; the refs and the instances file name the categories that a store
            does not.
        referent_names: category id -> name in the refs, or without refs in the instances file; empty without both.
        annotation_names: category id -> name in the instances file, empty without one.
        notes: sentences about what is unusual in the files.
        generalized: whether the refs are gRefCOCO's, with any number of objects.
        sentence_images: sentence id -> image of the sentence, for reading predictions; empty without predictions.

    Raises:
        InputError: a file is missing or damaged.
        refer.ReferError: the refs cannot be read.
    """

    def __init__(self, inputs: BrowseInputs) -> None:
        self.inputs = inputs
        self.notes: list[str] = []
        if not 1 <= len(inputs.stores) <= MAX_STORES:
            raise ArgumentError("stores", f"{len(inputs.stores)} stores; give one, or two to show side by side")
        self.generalized = False
        self.sentence_images: dict[int, ImageRecord] = {}
        # None for a path that is not a file, which stores.open reports
        self._states = [FileState.from_path(path) if path.is_file() else None for path in inputs.stores]
        self.stores = [stores.open(path) for path in inputs.stores]
        first = self.stores[0]
        self.names: list[dict[int, str]] = [dict(store.names) for store in self.stores]
        self.referent_names: dict[int, str] = {}
        self.annotation_names: dict[int, str] = {}
        self._positions = {image_id: position for position, image_id in enumerate(first.image_ids.tolist())}
        self.catalog = Catalog()
        self.catalog.add_images(
            zip(
                range(len(first)),
                first.image_ids.tolist(),
                first.file_names.tolist(),
                first.widths.tolist(),
                first.heights.tolist(),
                np.diff(first.region_start).tolist(),
                first.image_errors.tolist(),
                strict=True,
            )
        )
        self.source = None if inputs.images is None else self._open_images(inputs.images)
        self._compare_stores()
        self._add_referents()
        self.catalog.build_indices()

    def position(self, image_id: int) -> int | None:
        """Position of an image in the first store, None if the store lacks the image."""
        return self._positions.get(image_id)

    def record(self, position: int) -> ImageRecord:
        """The record of the image at a position of the first store."""
        first = self.stores[0]
        return ImageRecord(
            int(first.image_ids[position]),
            str(first.file_names[position]),
            int(first.heights[position]),
            int(first.widths[position]),
        )

    def close(self) -> None:
        """Close the stores."""
        for store in self.stores:
            store.close()

    def changed(self) -> list[str]:
        """Paths of the stores whose files have changed since they were opened."""
        return [
            str(store.path) for store, state in zip(self.stores, self._states, strict=True) if _state(store) != state
        ]

    def preview_boxes(self, position: int, max_regions: int, min_score: float | None) -> list[list[float]]:
        """Boxes of the top-scoring regions of an image in the first store, for a thumbnail.

        Args:
            position: position of the image.
            max_regions: maximum number of regions; never more than `MAX_PREVIEW_REGIONS` are returned.
            min_score: minimum score, None for all.

        Returns:
            Boxes [x1, y1, x2, y2] in pixels, highest score first.
        """
        first = self.stores[0]
        begin, end = (int(row) for row in first.region_start[position : position + 2])
        try:
            boxes, scores = first.data["regions/box"][begin:end], first.data["regions/score"][begin:end]
        except stores.CORRUPTION_ERRORS as error:
            raise InputError(f"{first.path}: damaged: {error}; extract it again") from None
        ranked = np.argsort(-scores, kind="stable")[: min(max_regions, MAX_PREVIEW_REGIONS)]
        if min_score is not None:
            ranked = ranked[scores[ranked] >= np.float32(min_score)]
        return to_json_numbers(boxes[ranked], digits=1)

    def box(self, position: int, region: int) -> list[float]:
        """The box [x1, y1, x2, y2], in pixels, of a region in the first store.

        Args:
            position: position of the image.
            region: index of the region among those of the image.
        """
        first = self.stores[0]
        row = int(first.region_start[position]) + region
        try:
            box: list[float] = to_json_numbers(first.data["regions/box"][row])
        except stores.CORRUPTION_ERRORS as error:
            raise InputError(f"{first.path}: damaged: {error}; extract it again") from None
        return box

    def regions(self, store_index: int, image_id: int) -> dict[str, Any]:
        """The regions of an image in a store, as JSON for the page.

        Returns:
            "path", the name of the store's file; "absent", a message if the store lacks the image, else ""; "regions",
            with box, score, category, row in the store and mask, if the store has masks. If the store has the image,
            also "error" of its extraction, "size" [height, width], and "masks", whether the store has masks.
        """
        store = self.stores[store_index]
        if image_id not in store:
            return {"path": store.path.name, "absent": f"{store.path.name} has no image {image_id}", "regions": []}
        image_regions, rows = store.read(image_id, features=()), store.rows(image_id)
        categories = map(str, image_regions.category_ids.tolist())
        columns = zip(
            to_json_numbers(image_regions.boxes), shortest_decimals(image_regions.scores), categories, strict=True
        )
        regions: list[dict[str, Any]] = [
            {"box": box, "score": score, "category": category, "row": row}
            for row, (box, score, category) in zip(rows, columns, strict=True)
        ]
        for region, mask in zip(regions, image_regions.masks or (), strict=False):  # no masks: none are added
            region["mask"] = mask.decode("ascii")
        return {
            "path": store.path.name,
            "absent": "",
            "error": image_regions.error,
            "size": [image_regions.height, image_regions.width],
            "masks": store.has_masks,
            "regions": regions,
        }

    def _open_images(self, path: Path) -> ImageSource:
        """Open the folder or zip of images, and note which images it lacks."""
        exif = self.stores[0].options.get("exif")
        source = ImageSource.open(path, exif if exif in ("ignore", "apply") else "ignore")
        missing = source.locate([self.record(position) for position in range(len(self.stores[0]))])
        if missing:
            self._note(
                f"{format_share(len(missing), len(self.stores[0]), 'image', 'is')} missing in {path}, first: "
                f"{missing[0]}; their regions are shown on gray"
            )
        return source

    def _compare_stores(self) -> None:
        """Note how the second store, if there is one, differs from the first."""
        if len(self.stores) == 1:
            return
        first, second = self.stores
        first_ids, second_ids = set(first.image_ids.tolist()), set(second.image_ids.tolist())
        n_only_first, n_only_second = len(first_ids - second_ids), len(second_ids - first_ids)
        if n_only_first:
            share = format_share(n_only_first, len(first), "image")
            self._note(f"{second.path.name} lacks {share} of {first.path.name}")
        if n_only_second:
            images = format_count(n_only_second, "image")
            self._note(f"not shown: {images} of {second.path.name} that {first.path.name} lacks")
        modes = [str(store.options.get("exif", "ignore")) for store in self.stores]
        if modes[0] != modes[1]:
            self._note(f"the stores have EXIF modes {modes[0]} and {modes[1]}: their boxes may not line up")
        sizes = zip(second.heights.tolist(), second.widths.tolist(), strict=True)
        self._compare_sizes(dict(zip(second.image_ids.tolist(), sizes, strict=True)), second.path.name)
        differing = [i for i, name in second.names.items() if first.names.get(i, name) != name]
        if differing:
            self._note(
                f"the detectors name {format_count(len(differing), 'category')} differently, first: {differing[0]} is "
                f"{first.names[differing[0]]!r} and {second.names[differing[0]]!r}"
            )

    def _compare_names(self, names: Mapping[int, str], file: str) -> None:
        """Note categories that a file and the first store name differently; add the file's names to `names`.

        Args:
            names: category id -> name in the file.
            file: what the notes call the file.
        """
        first = self.stores[0]
        differing = [i for i, name in first.names.items() if names.get(i, name) != name]
        if differing:
            self._note(
                f"{file} and {first.path.name} name {format_count(len(differing), 'category')} differently, first: "
                f"{differing[0]} is {names[differing[0]]!r} and {first.names[differing[0]]!r}; objects are shown with "
                f"the names of {file}, regions with those of {first.path.name}"
            )
        self.names = [{**names, **store_names} for store_names in self.names]

    def _compare_sizes(self, sizes: Mapping[int, tuple[int, int]], file: str) -> None:
        """Note images whose size in a file is not that in the first store.

        Args:
            sizes: image id -> (height, width) in the file.
            file: what the notes call the file.
        """
        first = self.stores[0]
        first_sizes = zip(first.heights.tolist(), first.widths.tolist(), strict=True)
        resized = [i for i, size in zip(self._positions, first_sizes, strict=True) if sizes.get(i, size) != size]
        if resized:
            self._note(
                f"{format_count(len(resized), 'image', 'has')} a different size in {file} than in {first.path.name}, "
                f"first: {resized[0]}; their boxes and overlaps are not comparable"
            )

    def _add_referents(self) -> None:
        """Add the refs and the instances that were given to the catalog; notes how they differ from the store."""
        inputs = self.inputs
        refer_options = [inputs.refer_root, inputs.dataset, inputs.split_by]
        if any(value is not None for value in refer_options):
            if None in refer_options:
                raise InputError("refs need all of `refer_root`, `dataset` and `split_by`")
            self._add_refs(str(inputs.refer_root), str(inputs.dataset), str(inputs.split_by))
        elif inputs.predictions is not None:
            raise InputError("`predictions` are answers to sentences; give `refer_root`, `dataset` and `split_by` too")
        if inputs.instances is not None:
            has_refs = inputs.refer_root is not None
            index = CocoIndex.load(inputs.instances)
            n_not_in_file = add_annotations(self.catalog, self._positions, index, as_referents=not has_refs)
            self.annotation_names = index.categories
            if not has_refs:
                self.referent_names = index.categories
            self._compare_names(index.categories, inputs.instances.name)
            sizes = {i: (image.height, image.width) for i, image in index.images.items()}
            self._compare_sizes(sizes, inputs.instances.name)
            if n_not_in_file:
                images = format_share(n_not_in_file, len(self._positions), "image")
                self._note(f"{inputs.instances.name} lacks {images} of the store")

    def _add_refs(self, root: str, dataset: str, split_by: str) -> None:
        refer = REFER(root, dataset, split_by)
        n_not_in_store = add_refs(self.catalog, self._positions, refer)
        self.referent_names = dict(refer.Cats)
        self._compare_names(self.referent_names, f"the refs of {dataset}")
        self._compare_sizes(
            {
                i: (image["height"], image["width"])
                for i, image in refer.Imgs.items()
                if {"height", "width"} <= image.keys()
            },
            f"the refs of {dataset}",
        )
        refs = refer.data["refs"]
        self.generalized = is_generalized(refs)
        if n_not_in_store:
            refs_are = format_share(n_not_in_store, len(refs), "ref", "is")
            self._note(f"{refs_are} on images that {self.stores[0].path.name} lacks")
        if self.inputs.predictions is not None:
            if len(refer.sentToRef) < sum(len(ref["sentences"]) for ref in refs):  # an id overwrote another
                raise InputError(
                    f"{root}/{dataset}: duplicate sent_id makes `predictions` ambiguous; renumber the sentences"
                )
            records = {i: _record(image) for i, image in refer.Imgs.items()}
            records |= {
                i: self.record(position) for i, position in self._positions.items()
            }  # the store's, if it has it
            self.sentence_images = {sent_id: records[ref["image_id"]] for sent_id, ref in refer.sentToRef.items()}

    def _note(self, text: str) -> None:
        self.notes.append(text)
        log.warning("note: %s", text)


def _record(image: Any) -> ImageRecord:
    """The record of an image of the refs; 1 x 1, as sides must be positive, if the refs do not say its size."""
    height, width = int(image.get("height") or 1), int(image.get("width") or 1)
    return ImageRecord(image["id"], file_name="", height=height, width=width)


def _state(store: Store) -> FileState | None:
    """The state of the file at a store's path, None if it cannot be read."""
    try:
        return FileState.from_path(store.path)
    except OSError:
        return None
