"""The items that can be downloaded, and their sources: the only file with their URLs.

REFER's server, bvisionweb1.cs.unc.edu, stopped answering in September 2022; the Web Archive captured its archives that
April (``id_`` in a URL asks for the original bytes). Sizes and SHA-256 of COCO's archives are from TensorFlow Datasets,
those of REFER's were published by users of these captures, and the MD5 of the minival lists is from the scripts that
download them. refdet has not been run against these URLs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

_COCO = ("http://images.cocodataset.org", "https://s3.amazonaws.com/images.cocodataset.org")
_REFER = "https://bvisionweb1.cs.unc.edu/licheng/referit/data"
# By dataset: time of the Web Archive's capture; size in bytes and checksum of the archive; its split_bys.
_CAPTURES = {
    "refclef": "20220413011817",
    "refcoco": "20220413011718",
    "refcoco+": "20220413011656",
    "refcocog": "20220413012904",
}
_REFER_FILES = {
    "refclef": (None, None),
    "refcoco": (53_993_993, "sha256:7f924bb7ed8dc4568058e4ff626281918d56e5206f4c868c5a80f088f38c8bf0"),
    "refcoco+": (45_613_210, "sha256:5f1238112d63199e68da54a28f201471909b21ded7ed79a57d51b4c1443c6b45"),
    "refcocog": (56_712_951, "sha256:3d1f7e5b2ff2205940bf59de55f861f5f2cc1403fb980669933a7f9af1aa8211"),
}
_SPLIT_BYS = {
    "refclef": ("unc", "berkeley"),
    "refcoco": ("unc", "google"),
    "refcoco+": ("unc",),
    "refcocog": ("umd", "google"),
}


@dataclass(frozen=True)
class Item:
    """An archive and the files that it provides.

    Attributes:
        name: name to select the item by; "A" also selects "A/B".
        archive: file name of the archive.
        contents: description of the contents, for the list of items.
        urls: sources of the archive, in the order in which they are tried.
        outputs: the files that exist once the item is fetched, relative to the data folder.
        size: size of the archive in bytes, None if unknown.
        checksum: "sha256:..." or "md5:...", None if unknown.
        target_path: function from the path of a file in the archive to the file's path in the data folder, or to None
            to skip the file. If there is no function, the archive itself is kept, as refdet reads images from zips.
        dataset: the REFER dataset in the archive, whose published size is checked; "" if there is none.
        default: whether the item is fetched if no items are selected.
        magic: first bytes of the archive, to check if there is no checksum.
    """

    name: str
    archive: str
    contents: str
    urls: tuple[str, ...]
    outputs: tuple[str, ...]
    size: int | None = None
    checksum: str | None = None
    target_path: Callable[[str], str | None] | None = None
    dataset: str = ""
    default: bool = False
    magic: bytes = b""


def refer_path(dataset: str) -> Callable[[str], str | None]:
    """Return the `Item.target_path` for a REFER archive, which has a folder named after the dataset."""
    pattern = re.compile(rf"(?:.*/)?{re.escape(dataset)}/(instances\.json|refs\(\w+\)\.p)")

    def target_path(member: str) -> str | None:
        match = pattern.fullmatch(member)
        return f"refer/{dataset}/{match[1]}" if match and not member.startswith("__MACOSX/") else None

    return target_path


def instances_path(member: str) -> str | None:
    """`Item.target_path` for COCO's annotations: keeps the instances files, skips captions and keypoints."""
    match = re.fullmatch(r"(?:.*/)?(instances_\w+\.json)", member)
    return f"annotations/{match[1]}" if match and not member.startswith("__MACOSX/") else None


def _refer(dataset: str) -> Item:
    size, checksum = _REFER_FILES[dataset]
    url = f"{_REFER}/{dataset}.zip"
    names = ("instances.json", *(f"refs({by}).p" for by in _SPLIT_BYS[dataset]))
    return Item(
        name=dataset,
        archive=f"{dataset}.zip",
        contents=f"refs split by {' and by '.join(_SPLIT_BYS[dataset])}, and their instances",
        urls=(f"https://web.archive.org/web/{_CAPTURES[dataset]}id_/{url}", url),
        outputs=tuple(f"refer/{dataset}/{name}" for name in names),
        size=size,
        checksum=checksum,
        target_path=refer_path(dataset),
        dataset=dataset,
        default=dataset != "refclef",
    )


def _coco_images(split: str, size: int, sha256: str, *more_urls: str, default: bool = False) -> Item:
    return Item(
        name=split,
        archive=f"{split}.zip",
        contents="COCO's images, kept as a zip, which refdet reads",
        urls=(*(f"{server}/zips/{split}.zip" for server in _COCO), *more_urls),
        outputs=(f"{split}.zip",),
        size=size,
        checksum=f"sha256:{sha256}",
        default=default,
    )


def _coco_annotations(year: int, size: int, sha256: str, default: bool = False) -> Item:
    archive = f"annotations_trainval{year}.zip"
    return Item(
        name=f"annotations{year}",
        archive=archive,
        contents=f"COCO's instances of train{year} and val{year}",
        urls=tuple(f"{server}/annotations/{archive}" for server in _COCO),
        outputs=tuple(f"annotations/instances_{part}{year}.json" for part in ("train", "val")),
        size=size,
        checksum=f"sha256:{sha256}",
        target_path=instances_path,
        default=default,
    )


def _parquet(dataset: str, repository: str, split: str) -> Item:
    """The item of a split in Hugging Face's own conversion to Parquet, which ``convert-refer`` reads."""
    folder = f"{dataset}-parquet"
    return Item(
        name=f"{folder}/{split}",
        archive=f"{folder}-{split}.parquet",
        contents=f"{split} split in another format, without google's division; for refdet convert-refer",
        urls=(
            f"https://huggingface.co/datasets/{repository}/resolve/refs%2Fconvert%2Fparquet/default/{split}/0000.parquet",
        ),
        outputs=(f"parquet/{dataset}/{split}.parquet",),
        magic=b"PAR1",
    )


_PARQUET = (  # dataset, repository, splits
    ("refcoco", "jxu124/refcoco", ("train", "validation", "test", "testB")),
    ("refcoco+", "jxu124/refcocoplus", ("train", "validation", "test", "testB")),
    ("refcocog", "jxu124/refcocog", ("train", "validation", "test")),
)
_MINIVAL = "detectron/coco/coco_annotations_minival.tgz"

ITEMS: tuple[Item, ...] = (
    _refer("refcoco"),
    _refer("refcoco+"),
    _refer("refcocog"),
    _coco_annotations(
        2014, 252_872_794, "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009", default=True
    ),
    Item(
        name="minival2014",
        archive="coco_annotations_minival.tgz",
        contents="instances of the 5000 minival images of val2014, and of the others",
        urls=(f"https://dl.fbaipublicfiles.com/{_MINIVAL}", f"https://s3-us-west-2.amazonaws.com/{_MINIVAL}"),
        outputs=("annotations/instances_minival2014.json", "annotations/instances_valminusminival2014.json"),
        checksum="md5:2d2b9d2283adb5e3b8d25eec88e65064",
        target_path=instances_path,
        default=True,
    ),
    _coco_images(
        "train2014",
        13_510_573_713,
        "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
        "https://huggingface.co/datasets/omlab/VLM-R1/resolve/main/train2014.zip",
        default=True,
    ),
    _coco_images("val2014", 6_645_013_297, "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0"),
    _coco_annotations(2017, 252_907_541, "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268"),
    _coco_images("train2017", 19_336_861_798, "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
    _coco_images("val2017", 815_585_330, "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
    _refer("refclef"),
    *(_parquet(dataset, repository, split) for dataset, repository, splits in _PARQUET for split in splits),
)


def mirror_url(item: Item, mirror: str) -> str:
    """URL or path of an item's archive on a mirror, which is given as that of the archive itself or of its folder."""
    return mirror if mirror.endswith(f"/{item.archive}") else f"{mirror.rstrip('/')}/{quote(item.archive, safe='+')}"
