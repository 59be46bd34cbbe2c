"""`REFER`: refs, sentences and annotations of one dataset, with the names of lichengunc/refer."""

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
from .lookup import Ids, ids_of, records_of
from .masks import decode
from .plain_files import no_garbage_collection
from .table import to_dataframe
from .types import NO_TARGET, Annotation, Image, Ref, Sentence, target_ids
from .validation import box_of

if TYPE_CHECKING:
    import pandas

# The splits of the published data. A dataset that lacks one of them simply has no refs in it.
_SPLITS = ("train", "val", "test", "testA", "testB", "testC", "testAB", "testBC", "testAC")
_IMAGE_DIRS = {"refclef": ("images/saiapr_tc-12",)}
_COCO_DIRS = ("images/mscoco/images/train2014", "images/train2014")


class REFER:
    """One dataset of referring expressions under one division into splits. Its length and items are its refs.

    Args:
        data_root: the folder that holds the folder ``dataset``.
        dataset: "refclef", "refcoco", "refcoco+", "refcocog", "grefcoco" or any other folder of that layout.
        splitBy: who divided it: "unc", "google", "umd", "berkeley", ...

    Attributes:
        data: "dataset", "refs", "images", "annotations", "categories" as in the files.
        Refs, Anns, Imgs, Sents: id -> record.
        Cats: category id -> name.
        imgToRefs, imgToAnns: image id -> list of records; images without any are not in it.
        refToAnn, annToRef: ref id -> annotation, annotation id -> ref.
        catToRefs: category id -> list of refs.
        sentToRef, sentToTokens: sentence id -> ref, -> list of tokens.
        availableSplits: the splits that there are refs of, in the order of the file.
        ROOT_DIR, DATA_DIR, IMAGE_DIR: the folders of this module, of the dataset, and of the images.
        generalized: whether this is gRefCOCO, where a ref means any number of annotations and none. There
            ``refToAnn`` and ``annToRef`` hold lists, as in gRefCOCO's own API, `getRefBox` gives a list of boxes
            and `getMask` the union; all these are empty for a ref without a target, whose annotation -1 is None.

    Raises:
        ReferNotFoundError: no such dataset, split or file; lists what there is, and how to get it.
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
        """Make the index attributes from ``data`` anew, say after refs were taken out of ``data["refs"]``."""
        self.Anns: dict[Any, Annotation] = {ann["id"]: ann for ann in self.data["annotations"]}
        self.Imgs: dict[int, Image] = {image["id"]: image for image in self.data["images"]}
        self.Cats: dict[int, str] = {category["id"]: category["name"] for category in self.data["categories"]}
        self.imgToAnns: dict[int, list[Annotation]] = {}
        of_image = self.imgToAnns.setdefault
        for ann in self.data["annotations"]:
            of_image(ann["image_id"], []).append(ann)

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
            raise ReferDataError(f"{self.DATA_DIR}: ref {ref_id} is on image {image_id}, "
                                 "which is not in instances.json")  # fmt: skip
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
        ann = self.Anns.get(ann_id)
        if ann is None:
            raise ReferDataError(f"{self.DATA_DIR}: ref {ref['ref_id']} points to annotation {ann_id}, "
                                 "which is not in instances.json")  # fmt: skip
        if ann["image_id"] != ref["image_id"]:
            raise ReferDataError(f"{self.DATA_DIR}: ref {ref['ref_id']} is on image {ref['image_id']}, "
                                 f"its annotation {ann_id} on image {ann['image_id']}")  # fmt: skip
        return ann

    def __len__(self) -> int:
        return len(self.data["refs"])

    def __iter__(self) -> Iterator[Ref]:
        return iter(self.data["refs"])

    def __repr__(self) -> str:
        return f"REFER({self.DATA_DIR!r}: {len(self)} refs, {len(self.Sents)} sentences, {len(self.Imgs)} images)"

    def getRefIds(
        self, image_ids: Ids = (), cat_ids: Ids = (), ref_ids: Ids = (), split: str | Iterable[str] = ""
    ) -> list[int]:
        """Ids of the refs that pass every filter given, in the order of the images given, else of the file.

        Args:
            image_ids: one id or several; none means no filter.
            cat_ids: likewise, of categories.
            ref_ids: likewise, of refs.
            split: "train", "val", "testA", ..., or several; "test" means every test split, "testA" those with
                an A after "test", as in the original. "" means no filter.

        Raises:
            ReferDataError: there is no such split.
        """
        images, cats, ids = ids_of(image_ids), set(ids_of(cat_ids)), set(ids_of(ref_ids))
        asked = [name for name in ([split] if isinstance(split, str) else split) if name]
        splits = {name for one in asked for name in self._splits(one)}
        refs = [ref for one in dict.fromkeys(images) for ref in self.imgToRefs.get(one, [])] if images else list(self)
        if cats:
            of_cats = {ref["ref_id"] for cat in cats for ref in self.catToRefs.get(cat, [])}
            refs = [ref for ref in refs if ref["ref_id"] in of_cats]
        return [
            ref["ref_id"] for ref in refs
            if (not ids or ref["ref_id"] in ids) and (not asked or ref["split"] in splits)
        ]  # fmt: skip

    def _splits(self, asked: str) -> set[str]:
        there = set(self.availableSplits)
        if asked not in there and asked not in _SPLITS:
            raise ReferDataError(f"{self.DATA_DIR}: no split {asked!r}; there is {', '.join(sorted(there))}")
        tests = {name for name in there if name.startswith("test")}
        if asked == "test":
            return tests
        if asked in ("testA", "testB", "testC"):
            return {name for name in tests if asked[-1] in name[4:]}
        return {asked}

    def getAnnIds(self, image_ids: Ids = (), cat_ids: Ids = (), ref_ids: Ids = ()) -> list[Any]:
        """Ids of the annotations that pass every filter given, in the order of the images given, else of the file."""
        images, cats, refs = ids_of(image_ids), set(ids_of(cat_ids)), self.loadRefs(ref_ids)
        ids = {ann_id for ref in refs for ann_id in target_ids(ref)}
        anns = self.data["annotations"]
        if images:
            anns = [ann for one in dict.fromkeys(images) for ann in self.imgToAnns.get(one, [])]
        return [
            ann["id"] for ann in anns
            if (not cats or ann.get("category_id") in cats) and (not refs or ann["id"] in ids)
        ]  # fmt: skip

    def getImgIds(self, ref_ids: Ids = ()) -> list[int]:
        """Ids of the images of these refs, each once; of all images where no ref is given."""
        refs = self.loadRefs(ref_ids)
        return list(dict.fromkeys(ref["image_id"] for ref in refs)) if refs else list(self.Imgs)

    def getCatIds(self) -> list[int]:
        """Ids of all categories."""
        return list(self.Cats)

    def loadRefs(self, ref_ids: Ids = ()) -> list[Ref]:
        """The refs with these ids; ReferIdError, a KeyError, names one that is not there."""
        return records_of(self.Refs, ids_of(ref_ids), "ref")

    def loadAnns(self, ann_ids: Ids | str | Iterable[str] = ()) -> list[Any]:
        """The annotations with these ids, in gRefCOCO None for -1; ReferIdError names one that is not there."""
        known = ChainMap[Any, Any](self.Anns, {NO_TARGET: None}) if self.generalized else self.Anns
        return records_of(known, ids_of(ann_ids, texts=self.data["dataset"] == "refclef"), "annotation")

    def loadImgs(self, image_ids: Ids = ()) -> list[Image]:
        """The images with these ids; ReferIdError names one that is not there."""
        return records_of(self.Imgs, ids_of(image_ids), "image")

    def loadCats(self, cat_ids: Ids = ()) -> list[str]:
        """The names of these categories; ReferIdError names one that is not there."""
        return records_of(self.Cats, ids_of(cat_ids), "category")

    def getRefBox(self, ref_id: int) -> list[Any]:
        """The box of the referred object, ``[x, y, width, height]`` in pixels; in gRefCOCO a list of such boxes."""
        boxes = [box_of(self.DATA_DIR, ann) for ann in self._anns(*self.loadRefs(ref_id))]
        return boxes if self.generalized else boxes[0]

    @overload
    def getMask(self, ref: None) -> None: ...
    @overload
    def getMask(self, ref: Ref | Annotation) -> dict[str, Any]: ...
    def getMask(self, ref: Any) -> dict[str, Any] | None:
        """The mask of the referred object.

        Args:
            ref: a ref; in gRefCOCO also one of its annotations, as its own API has it, None for that of no target.

        Returns:
            "mask": (height, width) uint8, 1 inside; "area": its pixels. The mask is the union of the parts of
            the object; the original adds them up, which differs only where they overlap. In gRefCOCO it is the
            union of all targets but crowds, as in its own API, and zero where there is none. None for None.

        Raises:
            ReferDataError: a segmentation is missing or damaged, or the annotation is a crowd.
        """
        if self.generalized and ref is None:
            return None
        if self.generalized and "ref_id" not in ref:
            if ref.get("iscrowd"):
                raise ReferDataError(
                    f"{self.DATA_DIR}: annotation {ref['id']} is a crowd, which has no mask of its own"
                )
            return _with_area(self._mask(ref, self._image(ref)))
        masks = self._masks(ref)
        if len({mask.shape for mask in masks}) > 1:
            raise ReferDataError(f"{self.DATA_DIR}: the masks of ref {ref['ref_id']} are of different sizes")
        return _with_area(np.bitwise_or.reduce(masks or [self._no_mask(ref)]))

    def getMaskByRef(self, ref: Ref | None = None, ref_id: int | None = None, merge: bool = False) -> Any:
        """The masks of the targets of a ref, as gRefCOCO's own API gives them.

        Args:
            ref: the ref.
            ref_id: its id, instead.
            merge: give their union.

        Returns:
            For a ref without a target {"mask": zeros, "empty": True}. Else a list of {"mask", "area"}, one a target
            but crowds; with ``merge`` {"mask": their union, "empty": False}. Masks are (height, width) uint8.

        Raises:
            ReferDataError: neither ref nor ref_id is given, or see `getMask`; ReferIdError: there is no such ref.
        """
        if ref is None:
            asked = [] if ref_id is None else self.loadRefs(ref_id)
            if len(asked) != 1:
                raise ReferDataError(f"getMaskByRef needs a ref or one ref_id, not {ref_id!r:.40}")
            ref = asked[0]
        if not target_ids(ref):
            return {"mask": self._no_mask(ref), "empty": True}
        if merge:
            return {"mask": self.getMask(ref)["mask"], "empty": False}
        return [_with_area(mask) for mask in self._masks(ref)]

    def _masks(self, ref: Ref) -> list[np.ndarray]:
        """Of each target, in gRefCOCO of each that is no crowd."""
        image, anns = self._image(ref), self._anns(ref)
        return [self._mask(ann, image) for ann in anns if not (self.generalized and ann.get("iscrowd"))]

    def _no_mask(self, ref: Ref) -> np.ndarray:
        image = self._image(ref)
        return self._decode(f"image {image['id']}", [], image)

    def _mask(self, ann: Annotation, image: Image) -> np.ndarray:
        if not ann.get("segmentation"):
            raise ReferDataError(f"{self.DATA_DIR}: annotation {ann['id']} has no segmentation")
        return self._decode(f"annotation {ann['id']}", ann["segmentation"], image)

    def _decode(self, what: str, segmentation: Any, image: Image) -> np.ndarray:
        try:
            return decode(segmentation, image["height"], image["width"])
        except ReferDataError as error:
            raise ReferDataError(f"{self.DATA_DIR}: {what}: {error}") from None

    def _anns(self, ref: Ref) -> list[Annotation]:
        (found,) = records_of(self.refToAnn, [ref["ref_id"]], "ref")
        return found if self.generalized else [found]

    def _image(self, ref: Ref | Annotation) -> Image:
        (image,) = records_of(self.Imgs, [ref["image_id"]], "image")
        for key in ("height", "width"):
            if key not in image:
                raise ReferDataError(f"{self.DATA_DIR}: image {image['id']} has no {key!r}")
        return image

    def showRef(self, ref: Ref, seg_box: str = "seg") -> None:
        """Draw the image into pyplot's current axes and the object on it, and print the sentences.

        Args:
            seg_box: "seg" draws the outline, "box" the box, as in the original.

        Raises:
            ReferError: matplotlib is not installed.
            ReferNotFoundError: the image is not in ``IMAGE_DIR``; see `refer.image_lookup` for where it is sought.
            ReferDataError: what is there is no image, or one of another size.
        """
        if seg_box not in ("seg", "box"):
            raise ReferDataError(f"seg_box is {seg_box!r}, it must be 'seg' or 'box'")
        ax, image = drawing.axes(), self._image(ref)
        drawing.draw_image(ax, self.IMAGE_DIR, image, self.Imgs.values())
        for position, sentence in enumerate(ref["sentences"], start=1):
            print(f"{position}. {sentence['sent']}")
        for ann in self._anns(ref):
            if seg_box == "box":
                drawing.draw_box(ax, box_of(self.DATA_DIR, ann))
            else:
                mask = self._mask(ann, image)  # which also checks the polygons
                drawing.draw_outline(ax, ann["segmentation"], mask)

    def showMask(self, ref: Ref) -> None:
        """Draw the mask of `getMask` into pyplot's current axes; ReferError if matplotlib is not installed."""
        mask = self.getMask(ref)["mask"]
        drawing.axes().imshow(mask)

    def to_dataframe(self) -> pandas.DataFrame:
        """A pandas table with a row a sentence; see `refer.table.to_dataframe` for its columns."""
        return to_dataframe(self)

    def frame(self) -> pandas.DataFrame:
        """The older name of `to_dataframe`; it works until the next version."""
        warnings.warn("REFER.frame is called to_dataframe now", DeprecationWarning, stacklevel=2)
        return self.to_dataframe()


def _with_area(mask: np.ndarray) -> dict[str, Any]:
    return {"mask": mask, "area": int(mask.sum())}
