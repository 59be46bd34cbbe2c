"""Published files of weights, identified by their checksums, and the images they were trained on.

The name of a file of torchvision ends with the start of the file's SHA-256, that of a file of detectron2 with the start
of its MD5.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

LEAKS = "without exclusions: leaks"
"""Part of `TrainingSet.leak_note` if the set has images of REFER, to recognize such a note in a checkpoint."""


@dataclass(frozen=True)
class TrainingSet:
    """A published training set.

    Attributes:
        name: such as "COCO train2017".
        images: number of images in the set.
        refer_overlap: how many of REFER's images it contains: "all", "some" or "none".
    """

    name: str
    images: int
    refer_overlap: str

    def leak_note(self) -> str:
        """Note on which of REFER's val and test images a detector that was trained on the set has seen."""
        return {
            "all": f"trained on {self.name}, {LEAKS} all 3,000 val/test images of RefCOCO and "
            "RefCOCO+ and all 3,900 of RefCOCOg (umd)",
            "some": f"trained on {self.name}, {LEAKS} those val/test images of RefCOCO, RefCOCO+ and "
            "RefCOCOg that are among its images",
            "none": f"trained on {self.name}, which has no image of COCO",
        }[self.refer_overlap]


# REFER's images are in COCO train2014, which is part of train2017 (val2017 is part of val2014).
COCO = TrainingSet("COCO train2017", 118_287, "all")
LVIS = TrainingSet("LVIS v0.5 train", 57_263, "some")
IMAGENET = TrainingSet("ImageNet-1k", 1_281_167, "none")
TRAINING_SETS = {training_set.name: training_set for training_set in (COCO, LVIS, IMAGENET)}


@dataclass(frozen=True)
class KnownFile:
    """A published file of weights.

    Attributes:
        model: publisher and name of the model.
        trained_on: training set of the weights.
        norm_eps: epsilon of the frozen norms, added to their variances.
        weight_format: value of ``import-weights --weight-format`` for the file, None if its tensors show the format.
    """

    model: str
    trained_on: TrainingSet
    norm_eps: float = 1e-5
    weight_format: str | None = None


_DETECTRON2 = {  # start of the MD5 -> configuration
    "721ade": "COCO-Detection/faster_rcnn_R_50_C4_1x",
    "51d356": "COCO-Detection/faster_rcnn_R_50_DC5_1x",
    "b275ba": "COCO-Detection/faster_rcnn_R_50_FPN_1x",
    "f97cb7": "COCO-Detection/faster_rcnn_R_50_C4_3x",
    "68d202": "COCO-Detection/faster_rcnn_R_50_DC5_3x",
    "280758": "COCO-Detection/faster_rcnn_R_50_FPN_3x",
    "298dad": "COCO-Detection/faster_rcnn_R_101_C4_3x",
    "3e0943": "COCO-Detection/faster_rcnn_R_101_DC5_3x",
    "f6e8b1": "COCO-Detection/faster_rcnn_R_101_FPN_3x",
    "9243eb": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x",
    "4f86c3": "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x",
    "a54504": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
    "4ce675": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x",
    "84107b": "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_3x",
    "f10217": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x",
    "a2914c": "COCO-InstanceSegmentation/mask_rcnn_R_101_C4_3x",
    "0464b7": "COCO-InstanceSegmentation/mask_rcnn_R_101_DC5_3x",
    "a3ec72": "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x",
    "7ab50c": "Detectron1-Comparisons/faster_rcnn_R_50_FPN_noaug_1x",
    "62ca52": "Detectron1-Comparisons/mask_rcnn_R_50_FPN_noaug_1x",
    "571f7c": "LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
    "824ab5": "LVISv0.5-InstanceSegmentation/mask_rcnn_R_101_FPN_1x",
}
_TORCHVISION = {  # start of the SHA-256 -> model
    "bf2d0c1e": KnownFile("torchvision's maskrcnn_resnet50_fpn COCO_V1", COCO, norm_eps=0.0),
    "73cbd019": KnownFile("torchvision's maskrcnn_resnet50_fpn_v2 COCO_V1", COCO),
    "258fb6c6": KnownFile("torchvision's fasterrcnn_resnet50_fpn COCO_V1", COCO, norm_eps=0.0),
    "dd69338a": KnownFile("torchvision's fasterrcnn_resnet50_fpn_v2 COCO_V1", COCO),
    "f37072fd": KnownFile("torchvision's resnet18 IMAGENET1K_V1", IMAGENET),
    "b627a593": KnownFile("torchvision's resnet34 IMAGENET1K_V1", IMAGENET),
    "0676ba61": KnownFile("torchvision's resnet50 IMAGENET1K_V1", IMAGENET),
    "11ad3fa6": KnownFile("torchvision's resnet50 IMAGENET1K_V2", IMAGENET),
    "63fe2227": KnownFile("torchvision's resnet101 IMAGENET1K_V1", IMAGENET),
    "cd907fc2": KnownFile("torchvision's resnet101 IMAGENET1K_V2", IMAGENET),
    "394f9c45": KnownFile("torchvision's resnet152 IMAGENET1K_V1", IMAGENET),
    "f82ba261": KnownFile("torchvision's resnet152 IMAGENET1K_V2", IMAGENET),
    "397923af": KnownFile("torchvision's vgg16 IMAGENET1K_V1", IMAGENET, weight_format="torchvision"),
    "00b39a1b": KnownFile("jcjohnson/pytorch-vgg's vgg16", IMAGENET, weight_format="caffe"),
}


def imported_note(name: str, sha256: str, known: KnownFile) -> str:
    """The note in the provenance of an imported published file; `known_initial_weights` parses it."""
    return f"imported: {name}, sha256 {sha256}, is {known.model}, {known.trained_on.leak_note()}"


def known_initial_weights(weights: str) -> KnownFile | None:
    """The published file whose weights a training run started from.

    Args:
        weights: ``Provenance.weights`` of the run: the directory of the initial weights and, in parentheses, their hash
            and their own provenance in one line.

    Returns:
        The file, if that line is the `imported_note` of a published file and nothing else; None for other weights, such
        as those of a detector trained from a published file.
    """
    match = re.fullmatch(r".*\(sha256 [0-9a-f]{12}; (imported: (.*), sha256 ([0-9a-f]{64}), is .*)\)", weights)
    if match is None:
        return None
    known = _TORCHVISION.get(match[3][:8])
    return known if known is not None and match[1] == imported_note(match[2], match[3], known) else None


def identify_known_file(path: Path, sha256: str) -> KnownFile | None:
    """Identify a published file by its checksums; its name does not matter.

    Args:
        path: the file.
        sha256: SHA-256 of the file.

    Returns:
        The published file, None if the file is not one.
    """
    if (published := _TORCHVISION.get(sha256[:8])) is not None:
        return published
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    config = _DETECTRON2.get(digest.hexdigest()[:6])
    if config is None:
        return None
    return KnownFile(f"detectron2's {config}", LVIS if config.startswith("LVIS") else COCO)
