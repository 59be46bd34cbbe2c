"""`ImageList`: the images of an extraction and their annotations, of a REFER dataset or of an instances file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refdet.data.coco import CocoIndex, ImageRecord
from refdet.data.refer_splits import choose_splits
from refdet.errors import InputError
from refdet.files.short_text import format_count


@dataclass(frozen=True)
class ImageList:
    """The images of an extraction and their annotations.

    Attributes:
        records: the images, in the order of the store.
        index: the instances file of the images.
        name: where the images are from, such as "refcoco/unc/val", as recorded in the store.
        crowd_as_object: whether annotations of ``iscrowd`` 1 were read as objects.
    """

    records: list[ImageRecord]
    index: CocoIndex
    name: str
    crowd_as_object: bool = False

    @classmethod
    def of_instances(cls, path: str | Path, *, crowd_as_object: bool = False) -> ImageList:
        """List all images of a COCO instances JSON, in its order.

        Args:
            path: the instances JSON.
            crowd_as_object: read annotations of ``iscrowd`` 1 as objects.

        Raises:
            InputError: the file is damaged.
        """
        path = Path(path)
        index = CocoIndex.load(path, crowd_as_object=crowd_as_object)
        return cls(list(index.images.values()), index, path.name, crowd_as_object)

    @classmethod
    def of_refer(
        cls,
        root: str | Path,
        dataset: str,
        split_by: str,
        *,
        splits: Sequence[str] = (),
        crowd_as_object: bool = False,
    ) -> ImageList:
        """List the images of the refs of a REFER dataset, by ascending id.

        Args:
            root: folder of the REFER data.
            dataset: "refcoco", "refcoco+", "refcocog", ...: a folder in ``root``.
            split_by: "unc", "umd", "google" or "berkeley".
            splits: the splits to use; all if empty.
            crowd_as_object: read annotations of ``iscrowd`` 1 as objects.

        Raises:
            InputError: unknown split, or instances.json lacks an image or annotation of a ref.
            refer.ReferError: the refs cannot be read.
        """
        from refer import read_refs, target_ids

        root = Path(root)
        refs = read_refs(root, dataset, split_by)
        chosen = choose_splits(refs, splits, f"{root / dataset}, split-by {split_by}")
        index = CocoIndex.load(root / dataset / "instances.json", crowd_as_object=crowd_as_object)
        ids = sorted({ref["image_id"] for ref in refs if ref["split"] in chosen})
        missing = [i for i in ids if i not in index.images]
        if missing:
            raise InputError(
                f"{index.path}: lacks {format_count(len(missing), 'image')} of the refs, first: {missing[0]}; download "
                "both files again"
            )
        annotations = {annotation["id"] for annotation in index.raw["annotations"]}
        unmatched = [ref for ref in refs if ref["split"] in chosen and not annotations.issuperset(target_ids(ref))]
        if unmatched:
            raise InputError(
                f"{index.path}: lacks annotations of {format_count(len(unmatched), 'ref')}, first: ref "
                f"{unmatched[0]['ref_id']} to annotation {unmatched[0]['ann_id']}; download both files again"
            )
        name = f"{dataset}/{split_by}/{','.join(chosen)}"
        return cls([index.images[i] for i in ids], index, name, crowd_as_object)

    def sha256(self) -> str:
        """SHA-256 of the images' ids, file names, sizes and order; file contents are not read."""
        lines = (f"{r.id}\t{r.file_name}\t{r.height}\t{r.width}\n" for r in self.records)
        return hashlib.sha256("".join(lines).encode()).hexdigest()
