"""`REFER`: refs, sentences and annotations of a dataset, with the API of lichengunc/refer."""

from __future__ import annotations

import warnings
from collections import ChainMap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from . import drawing
from .errors import ReferDataError
from .files import is_generalized, read_instances, read_refs, refs_file
from .lookup import Ids, ids_of, matching_splits, records_of
from .masks import decode
from .plain_files import no_garbage_collection
from .table import to_dataframe
from .types import NO_TARGET, Annotation, Image, Ref, Sentence, target_ids
from .validation import box_of

if TYPE_CHECKING:
    import pandas

_IMAGE_DIRS = {"refclef": ("images/saiapr_tc-12",)}
_COCO_DIRS = ("images/mscoco/images/train2014", "images/train2014")


class REFER:
    """A dataset of referring expressions with one division into splits, as a sequence of its refs.

    Args:
        data_root: folder that contains the folder ``dataset``.
        dataset: "refclef", "refcoco", "refcoco+", "refcocog", "grefcoco" or another folder of that layout.
        splitBy: name of the division: "unc", "google", "umd", "berkeley", ...

    Attributes:
        data: "dataset", "refs", "images", "annotations" and "categories" as in the files.
        Refs: ref id -> ref.
        Anns: annotation id -> annotation.
        Imgs: image id -> image.
        Sents: sentence id -> sentence.
        Cats: category id -> name.
        imgToRefs: image id -> refs, without images that have none.
        imgToAnns: image id -> annotations, without images that have none.
        refToAnn: ref id -> annotation.
        annToRef: annotation id -> ref.
        catToRefs: category id -> refs.
        sentToRef: sentence id -> ref.
        sentToTokens: sentence id -> tokens.
        availableSplits: splits that have refs, in file order.
        ROOT_DIR: folder of this module.
        DATA_DIR: folder of the dataset.
        IMAGE_DIR: folder of the images.
        generalized: whether it is gRefCOCO, with any number of targets per ref. As in its own API, ``refToAnn`` and
            ``annToRef`` then hold lists, and `getRefBox` returns a list; a ref without target has annotation -1.

    Raises:
        ReferNotFoundError: no such dataset, split or file; the message lists the existing ones and how to get it.
        ReferDataError: a damaged file, or a ref without its annotation or image.
    """

    def __init__(self, data_root: str | Path, dataset: str = "refcoco", splitBy: str = "unc") -> None:
        with no_garbage_collection():
            self.generalized = is_generalized(refs_file(data_root, dataset, splitBy))
            refs = read_refs(data_root, dataset, splitBy)
            self.ROOT_DIR = str(Path(__file__).resolve().parent)
            self.DATA_DIR = str(Path(data_root) / dataset)
            folders = [Path(data_root) / folder for folder in _IMAGE_DIRS.get(dataset, _COCO_DIRS)]
            self.IMAGE_DIR = str(next((folder for folder in folders if folder.is_dir()), folders[0]))
            self.data: dict[str, Any] = {"dataset": dataset, "refs": refs, **read_instances(data_root, dataset)}
            self.createIndex()

    def createIndex(self) -> None:
        """Rebuild the index attributes from ``data``, for example after removing items of ``data["refs"]``."""
        self.Anns: dict[Any, Annotation] = {ann["id"]: ann for ann in self.data["annotations"]}
        self.Imgs: dict[int, Image] = {image["id"]: image for image in self.data["images"]}
        self.Cats: dict[int, str] = {category["id"]: category["name"] for category in self.data["categories"]}
        self.imgToAnns: dict[int, list[Annotation]] = {}
        for ann in self.data["annotations"]:
            self.imgToAnns.setdefault(ann["image_id"], []).append(ann)

        self.Refs: dict[int, Ref] = {}
        self.Sents: dict[int, Sentence] = {}
        self.imgToRefs: dict[int, list[Ref]] = {}
        self.catToRefs: dict[int, list[Ref]] = {}
        self.refToAnn: dict[int, Any] = {}
        self.annToRef: dict[Any, Any] = {}
        self.sentToRef: dict[int, Ref] = {}
        self.sentToTokens: dict[int, list[str]] = {}
        self.availableSplits: list[str] = list(dict.fromkeys(ref["split"] for ref in self.data["refs"]))
        for ref in self.data["refs"]:
            self._add(ref)

    def _add(self, ref: Ref) -> None:
        ref_id, image_id = ref["ref_id"], ref["image_id"]
        if image_id not in self.Imgs:
            raise ReferDataError(f"{self.DATA_DIR}: ref {ref_id} has image {image_id}, which is not in instances.json")
        anns = [self._target(ref, ann_id) for ann_id in target_ids(ref)]
        self.Refs[ref_id] = ref
        self.imgToRefs.setdefault(image_id, []).append(ref)
        for category_id in dict.fromkeys(ref["category_id"]) if self.generalized else (ref["category_id"],):
            self.catToRefs.setdefault(category_id, []).append(ref)
        self.refToAnn[ref_id] = anns if self.generalized else anns[0]
        for ann in anns:
            if self.generalized:
                self.annToRef.setdefault(ann["id"], []).append(ref)
            else:
                self.annToRef[ann["id"]] = ref
        for sentence in ref["sentences"]:
            sent_id = sentence["sent_id"]
            self.Sents[sent_id] = sentence
            self.sentToRef[sent_id] = ref
            self.sentToTokens[sent_id] = sentence["tokens"]

    def _target(self, ref: Ref, ann_id: Any) -> Annotation:
        """The annotation with this id; raises ReferDataError if it is missing or in another image than the ref."""
        ann = self.Anns.get(ann_id)
        if ann is None:
            raise ReferDataError(
                f"{self.DATA_DIR}: ref {ref['ref_id']} has annotation {ann_id}, which is not in instances.json"
            )
        if ann["image_id"] != ref["image_id"]:
            raise ReferDataError(
                f"{self.DATA_DIR}: ref {ref['ref_id']} has image {ref['image_id']}, but "
                f"its annotation {ann_id} has image {ann['image_id']}"
            )
        return ann

    def __len__(self) -> int:
        return len(self.data["refs"])

    def __iter__(self) -> Iterator[Ref]:
        return iter(self.data["refs"])

    def __repr__(self) -> str:
        return f"REFER({self.DATA_DIR!r}, refs={len(self)}, sentences={len(self.Sents)}, images={len(self.Imgs)})"

    def getRefIds(
        self, image_ids: Ids = (), cat_ids: Ids = (), ref_ids: Ids = (), split: str | Iterable[str] = ""
    ) -> list[int]:
        """Return the ids of refs that match all filters, in the order of the given images or else in file order.

        Args:
            image_ids: one id or several; empty for all.
            cat_ids: one id or several; empty for all.
            ref_ids: one id or several; empty for all.
            split: "train", "val", "testA", ..., or several; "" for all. As in the original, "test" matches every test
                split and "testA" those with an A after "test".

        Raises:
            ReferDataError: unknown split.
        """
        images, cats, ids = ids_of(image_ids), set(ids_of(cat_ids)), set(ids_of(ref_ids))
        requested = [name for name in ([split] if isinstance(split, str) else split) if name]
        splits = {name for key in requested for name in matching_splits(self.DATA_DIR, key, self.availableSplits)}
        refs = [ref for key in dict.fromkeys(images) for ref in self.imgToRefs.get(key, [])] if images else list(self)
        if cats:
            matching = {ref["ref_id"] for cat in cats for ref in self.catToRefs.get(cat, [])}
            refs = [ref for ref in refs if ref["ref_id"] in matching]
        return [
            ref["ref_id"]
            for ref in refs
            if (not ids or ref["ref_id"] in ids) and (not requested or ref["split"] in splits)
        ]

    def getAnnIds(self, image_ids: Ids = (), cat_ids: Ids = (), ref_ids: Ids = ()) -> list[Any]:
        """Return the ids of annotations that match all filters, in the order of the given images or else in file order.

        Each filter is one id or several, empty for all; that by refs is for the annotations of these refs.
        """
        images, cats, refs = ids_of(image_ids), set(ids_of(cat_ids)), self.loadRefs(ref_ids)
        ids = {ann_id for ref in refs for ann_id in target_ids(ref)}
        anns = self.data["annotations"]
        if images:
            anns = [ann for image_id in dict.fromkeys(images) for ann in self.imgToAnns.get(image_id, [])]
        return [
            ann["id"] for ann in anns if (not cats or ann.get("category_id") in cats) and (not refs or ann["id"] in ids)
        ]

    def getImgIds(self, ref_ids: Ids = ()) -> list[int]:
        """Return the unique ids of the images of refs, or of all images if no ref is given."""
        refs = self.loadRefs(ref_ids)
        return list(dict.fromkeys(ref["image_id"] for ref in refs)) if refs else list(self.Imgs)

    def getCatIds(self) -> list[int]:
        """Return the ids of all categories."""
        return list(self.Cats)

    def loadRefs(self, ref_ids: Ids = ()) -> list[Ref]:
        """Return the refs with these ids; raises ReferIdError, a KeyError, for an unknown id."""
        return records_of(self.Refs, ids_of(ref_ids), "ref")

    def loadAnns(self, ann_ids: Ids | str | Iterable[str] = ()) -> list[Any]:
        """Return the annotations with these ids (None for -1 in gRefCOCO); raises ReferIdError for an unknown id."""
        anns = ChainMap[Any, Any](self.Anns, {NO_TARGET: None}) if self.generalized else self.Anns
        return records_of(anns, ids_of(ann_ids, allow_strings=self.data["dataset"] == "refclef"), "annotation")

    def loadImgs(self, image_ids: Ids = ()) -> list[Image]:
        """Return the images with these ids; raises ReferIdError for an unknown id."""
        return records_of(self.Imgs, ids_of(image_ids), "image")

    def loadCats(self, cat_ids: Ids = ()) -> list[str]:
        """Return the names of categories; raises ReferIdError for an unknown id."""
        return records_of(self.Cats, ids_of(cat_ids), "category")

    def getRefBox(self, ref_id: int) -> list[Any]:
        """Return the box of a ref, ``[x, y, width, height]`` in pixels, or a list of boxes in gRefCOCO."""
        boxes = [box_of(self.DATA_DIR, ann) for ann in self._anns(*self.loadRefs(ref_id))]
        return boxes if self.generalized else boxes[0]

    @overload
    def getMask(self, ref: None) -> None: ...
    @overload
    def getMask(self, ref: Ref | Annotation) -> dict[str, Any]: ...
    def getMask(self, ref: Any) -> dict[str, Any] | None:
        """Return the mask of a ref.

        Args:
            ref: a ref. In gRefCOCO also an annotation as in its own API, or None for no target.

        Returns:
            "mask", (height, width) uint8 with 1 inside, and "area" in pixels; None for None. The mask is the union of
            the object's parts (the original sums them, which differs only where they overlap). In gRefCOCO it is the
            union of all targets except crowds, as in its own API, and zero if there are none.

        Raises:
            ReferDataError: a segmentation is missing or damaged, or the annotation is a crowd.
        """
        if self.generalized and ref is None:
            return None
        if self.generalized and "ref_id" not in ref:
            if ref.get("iscrowd"):
                raise ReferDataError(f"{self.DATA_DIR}: annotation {ref['id']} is a crowd, which has no mask")
            return _with_area(self._mask(ref, self._image(ref)))
        masks = self._masks(ref)
        if len({mask.shape for mask in masks}) > 1:
            raise ReferDataError(f"{self.DATA_DIR}: the masks of ref {ref['ref_id']} have different sizes")
        return _with_area(np.bitwise_or.reduce(masks or [self._empty_mask(ref)]))

    def getMaskByRef(self, ref: Ref | None = None, ref_id: int | None = None, merge: bool = False) -> Any:
        """Return the masks of a ref's targets, as gRefCOCO's own API does.

        Args:
            ref: the ref.
            ref_id: its id, instead of ``ref``.
            merge: whether to return the union of the masks.

        Returns:
            {"mask": zeros, "empty": True} without targets, else a list of {"mask", "area"} for targets except crowds,
            or {"mask": union, "empty": False} with ``merge``. Masks are (height, width) uint8.

        Raises:
            ReferDataError: neither ``ref`` nor ``ref_id`` is given, or a segmentation is missing or damaged.
            ReferIdError: unknown ref.
        """
        if ref is None:
            matching = [] if ref_id is None else self.loadRefs(ref_id)
            if len(matching) != 1:
                raise ReferDataError(f"getMaskByRef: give a ref or a single ref_id, not {ref_id!r:.40}")
            ref = matching[0]
        if not target_ids(ref):
            return {"mask": self._empty_mask(ref), "empty": True}
        if merge:
            return {"mask": self.getMask(ref)["mask"], "empty": False}
        return [_with_area(mask) for mask in self._masks(ref)]

    def _masks(self, ref: Ref) -> list[np.ndarray]:
        """Mask of each target, (height, width) uint8, except crowds in gRefCOCO."""
        image, anns = self._image(ref), self._anns(ref)
        return [self._mask(ann, image) for ann in anns if not (self.generalized and ann.get("iscrowd"))]

    def _empty_mask(self, ref: Ref) -> np.ndarray:
        """Mask of zeros, (height, width) uint8."""
        image = self._image(ref)
        return self._decode(f"image {image['id']}", [], image)

    def _mask(self, ann: Annotation, image: Image) -> np.ndarray:
        """Mask of an annotation, (height, width) uint8."""
        if not ann.get("segmentation"):
            raise ReferDataError(f"{self.DATA_DIR}: annotation {ann['id']} has no segmentation")
        return self._decode(f"annotation {ann['id']}", ann["segmentation"], image)

    def _decode(self, owner: str, segmentation: Any, image: Image) -> np.ndarray:
        """Decode a segmentation to a mask, (height, width) uint8; ``owner`` names it in error messages."""
        try:
            any_size = self.data["dataset"] == "refclef"  # whose RLEs are taken as they are
            return decode(segmentation, image["height"], image["width"], any_size)
        except ReferDataError as error:
            raise ReferDataError(f"{self.DATA_DIR}: {owner}: {error}") from None

    def _anns(self, ref: Ref) -> list[Annotation]:
        """The annotations of a ref's targets; raises ReferIdError if the ref is not in this dataset."""
        (targets,) = records_of(self.refToAnn, [ref["ref_id"]], "ref")
        return targets if self.generalized else [targets]

    def _image(self, ref: Ref | Annotation) -> Image:
        """The image of a ref or annotation; raises ReferError if it is missing, or has no height or width."""
        (image,) = records_of(self.Imgs, [ref["image_id"]], "image")
        for key in ("height", "width"):
            if key not in image:
                raise ReferDataError(f"{self.DATA_DIR}: image {image['id']} has no {key!r}")
        return image

    def showRef(self, ref: Ref, seg_box: str = "seg") -> None:
        """Draw the image and the object in pyplot's current axes, and print the sentences.

        Args:
            ref: the ref.
            seg_box: "seg" to draw the outline, "box" to draw the box, as in the original.

        Raises:
            ReferError: matplotlib is not installed, or the image is missing, unreadable or of another size.
        """
        if seg_box not in ("seg", "box"):
            raise ReferDataError(f"seg_box {seg_box!r}: must be 'seg' or 'box'")
        ax, image = drawing.axes(), self._image(ref)
        drawing.draw_image(ax, self.IMAGE_DIR, image, self.Imgs.values())
        for position, sentence in enumerate(ref["sentences"], start=1):
            print(f"{position}. {sentence['sent']}")
        for ann in self._anns(ref):
            if seg_box == "box":
                drawing.draw_box(ax, box_of(self.DATA_DIR, ann))
            else:
                mask = self._mask(ann, image)  # also checks the polygons
                drawing.draw_outline(ax, ann["segmentation"], mask)

    def showMask(self, ref: Ref) -> None:
        """Draw the mask of a ref in pyplot's current axes; raises ReferError if matplotlib is not installed."""
        mask = self.getMask(ref)["mask"]
        drawing.axes().imshow(mask)

    def to_dataframe(self) -> pandas.DataFrame:
        """Convert to a pandas data frame with a row per sentence (`refer.table.to_dataframe`)."""
        return to_dataframe(self)

    def frame(self) -> pandas.DataFrame:
        """Deprecated alias of `to_dataframe`, to be removed in the next version."""
        warnings.warn("REFER.frame was renamed to to_dataframe", DeprecationWarning, stacklevel=2)
        return self.to_dataframe()


def _with_area(mask: np.ndarray) -> dict[str, Any]:
    return {"mask": mask, "area": int(mask.sum())}
