"""`REFER`: refs, sentences and annotations of one dataset, with the names of lichengunc/refer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import ReferDataError
from .files import read_instances, read_refs
from .masks import decode
from .records import Annotation, Image, Ref, Sentence

Ids = int | Iterable[int]
_Record = TypeVar("_Record")

# The splits of the published data. A dataset that lacks one of them simply has no refs in it.
_SPLITS = ("train", "val", "test", "testA", "testB", "testC", "testAB", "testBC", "testAC")


class REFER:
    """One dataset of referring expressions under one division into splits.

    Arguments:
        data_root: the folder that holds the folder ``dataset``.
        dataset: "refcoco", "refcoco+", "refcocog" or any other folder of the same layout.
        splitBy: who divided it: "unc", "google", "umd", ...

    Attributes:
        data: "dataset", "refs", "images", "annotations", "categories" as in the files.
        Refs, Anns, Imgs, Sents: id -> record.
        Cats: category id -> name.
        imgToRefs, imgToAnns: image id -> list of records; images without any are not in it.
        refToAnn, annToRef: ref id -> annotation, annotation id -> ref.
        catToRefs: category id -> list of refs.
        sentToRef, sentToTokens: sentence id -> ref, -> list of tokens.
        DATA_DIR, IMAGE_DIR: where the original API looks for the files of the dataset and for COCO's images.

    Raises:
        ReferNotFoundError: no such dataset, split or file; lists what there is.
        ReferDataError: a damaged file, or a ref without its annotation or image.
    """

    def __init__(self, data_root: str | Path, dataset: str = "refcoco", splitBy: str = "unc") -> None:
        self.DATA_DIR = str(Path(data_root) / dataset)
        self.IMAGE_DIR = str(Path(data_root) / "images" / "mscoco" / "images" / "train2014")
        refs = read_refs(data_root, dataset, splitBy)
        instances = read_instances(data_root, dataset)
        self.data: dict[str, Any] = {"dataset": dataset, "refs": refs, **instances}

        self.Anns: dict[int, Annotation] = {ann["id"]: ann for ann in instances["annotations"]}
        self.Imgs: dict[int, Image] = {image["id"]: image for image in instances["images"]}
        self.Cats: dict[int, str] = {category["id"]: category["name"] for category in instances["categories"]}
        self.imgToAnns: dict[int, list[Annotation]] = {}
        for ann in instances["annotations"]:
            self.imgToAnns.setdefault(ann["image_id"], []).append(ann)

        self.Refs: dict[int, Ref] = {}
        self.Sents: dict[int, Sentence] = {}
        self.imgToRefs: dict[int, list[Ref]] = {}
        self.catToRefs: dict[int, list[Ref]] = {}
        self.refToAnn: dict[int, Annotation] = {}
        self.annToRef: dict[int, Ref] = {}
        self.sentToRef: dict[int, Ref] = {}
        self.sentToTokens: dict[int, list[str]] = {}
        for ref in refs:
            self._add(ref)

    def _add(self, ref: Ref) -> None:
        ref_id, ann_id, image_id = ref["ref_id"], ref["ann_id"], ref["image_id"]
        ann = self.Anns.get(ann_id)
        if ann is None:
            raise ReferDataError(f"{self.DATA_DIR}: ref {ref_id} points to annotation {ann_id}, "
                                 "which is not in instances.json")  # fmt: skip
        if image_id not in self.Imgs:
            raise ReferDataError(f"{self.DATA_DIR}: ref {ref_id} is on image {image_id}, "
                                 "which is not in instances.json")  # fmt: skip
        if ann["image_id"] != image_id:
            raise ReferDataError(f"{self.DATA_DIR}: ref {ref_id} is on image {image_id}, "
                                 f"its annotation {ann_id} on image {ann['image_id']}")  # fmt: skip
        self.Refs[ref_id] = ref
        self.imgToRefs.setdefault(image_id, []).append(ref)
        self.catToRefs.setdefault(ref["category_id"], []).append(ref)
        self.refToAnn[ref_id] = ann
        self.annToRef[ann_id] = ref
        for sentence in ref["sentences"]:
            self.Sents[sentence["sent_id"]] = sentence
            self.sentToRef[sentence["sent_id"]] = ref
            self.sentToTokens[sentence["sent_id"]] = sentence["tokens"]

    def getRefIds(self, image_ids: Ids = (), cat_ids: Ids = (), ref_ids: Ids = (), split: str = "") -> list[int]:
        """Ids of the refs that pass every filter given, in the order of the file.

        Arguments:
            image_ids, cat_ids, ref_ids: one id or several; none means no filter.
            split: "train", "val", "testA", ...; "test" means every test split, "testA" those with an A after
                "test", as in the original. "" means no filter.

        Raises:
            ReferDataError: there is no such split.
        """
        images, cats, ids = set(_ids(image_ids)), set(_ids(cat_ids)), set(_ids(ref_ids))
        splits = self._splits(split)
        return [
            ref["ref_id"]
            for ref in self.data["refs"]
            if (not images or ref["image_id"] in images)
            and (not cats or ref["category_id"] in cats)
            and (not ids or ref["ref_id"] in ids)
            and (not split or ref["split"] in splits)
        ]

    def _splits(self, asked: str) -> set[str]:
        there = {ref["split"] for ref in self.data["refs"]}
        if asked and asked not in there and asked not in _SPLITS:
            raise ReferDataError(f"{self.DATA_DIR}: no split {asked!r}; there is {', '.join(sorted(there))}")
        tests = {name for name in there if name.startswith("test")}
        if asked == "test":
            return tests
        if asked in ("testA", "testB", "testC"):
            return {name for name in tests if asked[-1] in name[4:]}
        return {asked}

    def getAnnIds(self, image_ids: Ids = (), cat_ids: Ids = (), ref_ids: Ids = ()) -> list[int]:
        """Ids of the annotations that pass every filter given, in the order of the file."""
        images, cats = set(_ids(image_ids)), set(_ids(cat_ids))
        ids = {ref["ann_id"] for ref in self.loadRefs(ref_ids)}
        return [
            ann["id"]
            for ann in self.data["annotations"]
            if (not images or ann["image_id"] in images)
            and (not cats or ann.get("category_id") in cats)
            and (not ids or ann["id"] in ids)
        ]

    def getImgIds(self, ref_ids: Ids = ()) -> list[int]:
        """Ids of the images of these refs, each once; of all images where no ref is given."""
        refs = self.loadRefs(ref_ids)
        return list(dict.fromkeys(ref["image_id"] for ref in refs)) if refs else list(self.Imgs)

    def getCatIds(self) -> list[int]:
        """Ids of all categories."""
        return list(self.Cats)

    def loadRefs(self, ref_ids: Ids = ()) -> list[Ref]:
        """The refs with these ids; ReferDataError names one that is not there."""
        return _load(self.Refs, ref_ids, "ref")

    def loadAnns(self, ann_ids: Ids = ()) -> list[Annotation]:
        """The annotations with these ids; ReferDataError names one that is not there."""
        return _load(self.Anns, ann_ids, "annotation")

    def loadImgs(self, image_ids: Ids = ()) -> list[Image]:
        """The images with these ids; ReferDataError names one that is not there."""
        return _load(self.Imgs, image_ids, "image")

    def loadCats(self, cat_ids: Ids = ()) -> list[str]:
        """The names of these categories; ReferDataError names one that is not there."""
        return _load(self.Cats, cat_ids, "category")

    def getRefBox(self, ref_id: int) -> list[float]:
        """The box of the referred object, ``[x, y, width, height]`` in pixels."""
        [ref] = self.loadRefs(ref_id)
        ann = self.refToAnn[ref["ref_id"]]
        if "bbox" not in ann:
            raise ReferDataError(f"{self.DATA_DIR}: annotation {ann['id']} has no bbox")
        return ann["bbox"]

    def getMask(self, ref: Ref) -> dict[str, Any]:
        """The mask of the referred object.

        Returns:
            "mask": (height, width) uint8, 1 inside; "area": its pixels. The mask is the union of the parts of
            the object; the original adds them up, which differs only where they overlap.
        """
        ann = self.refToAnn[ref["ref_id"]]
        image = self.Imgs[ref["image_id"]]
        if not ann.get("segmentation"):
            raise ReferDataError(f"{self.DATA_DIR}: annotation {ann['id']} has no segmentation")
        try:
            mask = decode(ann["segmentation"], image["height"], image["width"])
        except KeyError as error:
            raise ReferDataError(f"{self.DATA_DIR}: image {image['id']} has no {error}") from None
        except ReferDataError as error:
            raise ReferDataError(f"{self.DATA_DIR}: annotation {ann['id']}: {error}") from None
        return {"mask": mask, "area": int(mask.sum())}


def _ids(ids: Ids) -> list[int]:
    return list(ids) if isinstance(ids, Iterable) else [ids]


def _load(records: Mapping[int, _Record], ids: Ids, what: str) -> list[_Record]:
    wanted = _ids(ids)
    for one in wanted:
        if one not in records:
            raise ReferDataError(f"no {what} with id {one!r}")
    return [records[one] for one in wanted]
