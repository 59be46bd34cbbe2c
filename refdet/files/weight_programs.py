"""Detect the program and network of a checkpoint from the names of its tensors and classes, without torch.

Used only in error messages; `refdet.detector.weights.identify` decides what can be imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Descriptions of checkpoints, each with regular expressions that must all match the start of some tensor name. The
# first description whose expressions match is taken.
_BY_TENSOR_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a torchvision Mask R-CNN", (r"backbone\.body\.", r"roi_heads\.mask_predictor\.")),
    ("a torchvision Keypoint R-CNN", (r"backbone\.body\.", r"roi_heads\.keypoint_predictor\.")),
    ("a torchvision Faster R-CNN", (r"backbone\.body\.", r"roi_heads\.box_predictor\.")),
    ("a torchvision FCOS", (r"backbone\.body\.", r"head\.regression_head\.bbox_ctrness\.")),
    ("a torchvision SSD", (r"backbone\.(extra|features)\.", r"head\.classification_head\.module_list\.")),
    ("a torchvision RetinaNet", (r"backbone\.body\.", r"head\.classification_head\.")),
    ("a maskrcnn-benchmark detector", (r"backbone\.body\.stem\.", r"rpn\.head\.")),
    ("a torchvision segmentation network", (r"backbone\.layer1\.", r"classifier\.\d")),
    ("a detectron2 Mask R-CNN", (r"proposal_generator\.", r"roi_heads\.mask_head\.")),
    ("a detectron2 Faster R-CNN", (r"proposal_generator\.", r"roi_heads\.")),
    ("a detectron2 RetinaNet", (r"backbone\.bottom_up\.", r"head\.cls_score\.")),
    ("a detectron2 semantic segmentation network", (r"backbone\.bottom_up\.", r"sem_seg_head\.")),
    ("a detectron2 region proposal network", (r"backbone\.(bottom_up|res2)\.", r"proposal_generator\.")),
    ("a detectron2 network", (r"backbone\.(bottom_up|res2)\.",)),
    ("a detectron2 ImageNet backbone", (r"stem\.conv1\.", r"res2\.0\.")),
    ("a Caffe2 Detectron network", (r"res2_0_branch2a_w", r"conv_rpn")),
    ("a Caffe2 ImageNet backbone", (r"res2_0_branch2a_w",)),
    ("an MMDetection Mask R-CNN", (r"roi_head\.mask_head\.", r"(backbone|rpn_head)\.")),
    ("an MMDetection Faster R-CNN", (r"roi_head\.bbox_head\.", r"(backbone|rpn_head)\.")),
    ("an MMDetection detector", (r"backbone\.", r"(neck|bbox_head|rpn_head|panoptic_head)\.(convs|rpn_|lateral_)")),
    ("an MMDetection detector", (r"backbone\.", r"bbox_head\.")),
    ("jwyang's faster-rcnn.pytorch", (r"RCNN_base\.", r"RCNN_rpn\.")),
    ("an MDETR model", (r"transformer\.text_encoder\.", r"bbox_embed\.")),
    ("a Grounding DINO or GLIP model", (r"(bert|language_backbone)\.", r"(backbone|transformer|input_proj)\.")),
    ("a Hugging Face DETR", (r"model\.backbone\.", r"(class_labels_classifier|bbox_predictor|model\.decoder)\.")),
    ("a DETR", (r"transformer\.(encoder|decoder)\.", r"(class|bbox)_embed\.")),
    ("a Segment Anything model", (r"image_encoder\.", r"mask_decoder\.")),
    ("a CLIP model", (r"visual\.", r"(transformer\.resblocks|token_embedding)\.")),
    ("a Hugging Face CLIP model", (r"vision_model\.", r"text_model\.")),
    ("a Hugging Face ResNet", (r"resnet\.embedder\.",)),
    ("a Hugging Face transformer", (r"(bert|roberta|vit|vilt|blip|deit|dinov2|model)\.(embeddings|encoder|layers)\.",)),
    ("a Swin transformer", (r"(backbone\.)?layers\.\d\.blocks\.\d+\.attn\.",)),
    ("a vision transformer", (r"patch_embed\.proj\.", r"blocks\.0\.")),
    ("a YOLO network", (r"model\.\d+\.(conv|cv1|m|dfl)\.",)),
    ("an SSD", (r"(vgg\.\d|extras\.\d)",)),
    ("an ImageNet VGG-16", (r"features\.24\.weight", r"features\.26\.weight", r"classifier\.")),
    ("a VGG network", (r"features\.\d+\.weight", r"classifier\.0\.weight")),
    ("a DenseNet", (r"features\.denseblock1\.",)),
    ("an EfficientNet or MobileNet", (r"(features\.0\.0\.weight|_conv_stem\.|conv_stem\.)",)),
)
# Descriptions of checkpoints by the top-level module of a class that their pickle imports.
_BY_CLASS_MODULES = {
    "ultralytics": "an Ultralytics YOLO model",
    "models": "a YOLOv5 or YOLOv7 model",
    "mmcv": "an MMDetection checkpoint",
    "mmengine": "an MMDetection checkpoint",
    "mmdet": "an MMDetection detector",
    "detectron2": "a detectron2 checkpoint",
    "fvcore": "a detectron2 checkpoint",
    "maskrcnn_benchmark": "a maskrcnn-benchmark checkpoint",
    "torchvision": "a whole torchvision model",
    "timm": "a whole timm model",
    "transformers": "a whole Hugging Face model",
    "pytorch_lightning": "a PyTorch Lightning checkpoint",
    "lightning": "a PyTorch Lightning checkpoint",
}
# Descriptions of what refdet.detector.weights imports, or rejects with a more detailed message.
IMPORTABLE = frozenset(
    (
        "a torchvision Mask R-CNN",
        "a torchvision Keypoint R-CNN",
        "a torchvision Faster R-CNN",
        "a detectron2 Mask R-CNN",
        "a detectron2 Faster R-CNN",
        "a detectron2 ImageNet backbone",
        "a Caffe2 ImageNet backbone",
        "an ImageNet VGG-16",
    )
)
# Expressions for the tensors of refdet's own files: the weights of a run directory, and a training state.
REFDET = (r"backbone\.conv1\.weight$", r"rpn\.conv\.weight$", r"head\.box\.score\.weight$")
TRAINING_STATE = (r"model/", r"model/rpn\.conv\.weight$")
# Prefixes that wrappers such as DataParallel and torch.compile add to tensor names.
_WRAPPERS = re.compile(r"^((module|model|state_dict|_orig_mod|ema_model)\.)+")


def has_all(names: Iterable[str], expressions: Iterable[str]) -> bool:
    """Whether each regular expression matches the start of some name."""
    text = "\n".join(names)
    return all(re.search(f"^(?:{expression})", text, re.MULTILINE) for expression in expressions)


def describe_checkpoint(names: Iterable[str], classes: Iterable[str] = ()) -> str | None:
    """Describe a checkpoint, such as "a torchvision Mask R-CNN".

    Args:
        names: names of its tensors.
        classes: dotted names of the classes that its pickle imports.

    Returns:
        The description, None if unknown.
    """
    names = list(names)
    unwrapped = [_WRAPPERS.sub("", name) for name in names]
    by_tensors = next(
        (
            description
            for description, expressions in _BY_TENSOR_NAMES
            if has_all(unwrapped, expressions) or has_all(names, expressions)
        ),
        None,
    )
    if by_tensors is not None:
        return by_tensors
    modules = (name.partition(".")[0] for name in classes)
    return next((_BY_CLASS_MODULES[module] for module in modules if module in _BY_CLASS_MODULES), None)
