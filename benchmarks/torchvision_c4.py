"""torchvision's side of `benchmarks/extract.py`: C4 Mask R-CNN built from torchvision's detection modules.

This is what one would write without refdet: unmodified `RegionProposalNetwork`, `RoIHeads` and
`GeneralizedRCNNTransform`, layer4 as the box head and as the mask head, `paste_masks_in_image` (called by the
transform), pycocotools and h5py. It loads refdet's weights, so that both compute the same detections.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50, resnet101
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, roi_align

from refdet.detector.mask_rcnn import MaskRCNN

STRIDE, CELLS = 16, 7
NETWORKS = {18: resnet18, 50: resnet50, 101: resnet101}


class AlignedPool(nn.Module):
    """MultiScaleRoIAlign of a single map, with ``aligned=True``, which MultiScaleRoIAlign does not support."""

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        return roi_align(maps["0"], boxes, CELLS, 1 / STRIDE, sampling_ratio=2, aligned=True)


class MeanOfLayer4(nn.Module):
    """Box head of a C4 network: layer4 and average pooling."""

    def __init__(self, layer4: nn.Module) -> None:
        super().__init__()
        self.layer4 = layer4

    def forward(self, pooled: Tensor) -> Tensor:
        return self.layer4(pooled).mean((2, 3))


class TorchvisionC4(nn.Module):
    """C4 Mask R-CNN with full-size masks; pool5 and fc7 are taken from the inputs of the mask head.

    Args:
        ours: detector whose weights are loaded: a C4 ResNet-18, 50 or 101 with frozen norms and RoIAlign.
        score_threshold: minimum score of a detection.
        nms_threshold: IoU threshold of NMS per class.
        max_regions: maximum number of detections per image.
    """

    def __init__(self, ours: MaskRCNN, score_threshold: float, nms_threshold: float, max_regions: int) -> None:
        super().__init__()
        recipe, weights = ours.recipe, ours.state_dict()
        network = NETWORKS[recipe.model.depth](norm_layer=FrozenBatchNorm2d)
        strided = network.layer4[0].conv2 if recipe.model.depth >= 50 else network.layer4[0].conv1
        strided.stride = network.layer4[0].downsample[0].stride = (1, 1)
        map_channels, channels = network.fc.in_features // 2, network.fc.in_features
        names = {"backbone.": network, "head.conv5.": network.layer4}
        for prefix, part in names.items():
            part.load_state_dict(
                {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)},
                strict=prefix != "backbone.",
            )
        self.body = nn.Sequential(
            network.conv1, network.bn1, network.relu, network.maxpool, network.layer1, network.layer2, network.layer3
        )
        sizes, ratios = tuple(recipe.model.anchor_sizes), tuple(recipe.model.anchor_ratios)
        anchors = AnchorGenerator((sizes,), (ratios,))
        anchors.cell_anchors = [ours.rpn.anchors.get_buffer("cell0") + STRIDE / 2]
        head = RPNHead(map_channels, len(sizes) * len(ratios))
        rpn_channels = recipe.model.rpn_channels
        head.conv = nn.Sequential(nn.Conv2d(map_channels, rpn_channels, 3, padding=1), nn.ReLU(inplace=True))
        head.cls_logits = nn.Conv2d(rpn_channels, len(sizes) * len(ratios), 1)
        head.bbox_pred = nn.Conv2d(rpn_channels, len(sizes) * len(ratios) * 4, 1)
        options = recipe.proposals
        self.rpn = RegionProposalNetwork(
            anchors,
            head,
            fg_iou_thresh=options.positive_iou,
            bg_iou_thresh=options.negative_iou,
            batch_size_per_image=options.batch_size_per_image,
            positive_fraction=options.positive_fraction,
            pre_nms_top_n={"training": options.pre_nms_top_n_train, "testing": options.pre_nms_top_n_test},
            post_nms_top_n={"training": options.post_nms_top_n_train, "testing": options.post_nms_top_n_test},
            nms_thresh=options.nms_threshold,
        )
        predictor = FastRCNNPredictor(channels, ours.classes + 1)
        masks = MaskRCNNPredictor(channels, recipe.model.mask_channels, ours.classes + 1)
        self.heads = RoIHeads(
            AlignedPool(),
            MeanOfLayer4(network.layer4),
            predictor,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=512,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=max_regions,
            mask_roi_pool=AlignedPool(),
            mask_head=network.layer4,
            mask_predictor=masks,
        )
        for ours_name, layer in {
            "rpn.conv": head.conv[0],
            "rpn.score": head.cls_logits,
            "rpn.delta": head.bbox_pred,
            "head.box.score": predictor.cls_score,
            "head.box.delta": predictor.bbox_pred,
            "head.mask.hidden.0": masks.conv5_mask,
            "head.mask.logits": masks.mask_fcn_logits,
        }.items():
            layer.load_state_dict({k: weights[f"{ours_name}.{k}"] for k in ("weight", "bias")})
        mean, std = ([value / 255 for value in values] for values in (recipe.input.mean, recipe.input.std))
        self.transform = GeneralizedRCNNTransform(
            recipe.input.min_sizes[-1],
            recipe.input.max_size,
            mean,
            std,
            size_divisible=max(recipe.input.size_divisibility, 1),
        )
        self.features: dict[str, Tensor] = {}
        self.heads.mask_roi_pool.register_forward_hook(lambda _m, _i, out: self._keep("pool5", out))
        masks.register_forward_pre_hook(lambda _m, inputs: self._keep("fc7", inputs[0]))
        self.eval()

    def _keep(self, name: str, maps: Tensor) -> None:
        self.features[name] = maps.mean((2, 3))

    def of_boxes(self, inputs: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """pool5 (N, 1024) and fc7 (N, 2048) of boxes (N, 4), in pixels of the inputs (1, 3, H, W)."""
        pooled = self.heads.mask_roi_pool({"0": self.body(inputs)}, [boxes], [])
        return {"pool5": pooled.mean((2, 3)), "fc7": self.heads.box_head(pooled)}


class Stages:
    """Seconds spent in each stage; synchronizes the GPU at the end of a stage."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - start


def extract(model: TorchvisionC4, paths: list[Path], out: Path, stages: Stages, batch_size: int = 1) -> list[int]:
    """Write detections, masks and features of images to an HDF5 file; returns the number of regions per image."""
    device, counts = next(model.parameters()).device, []
    with torch.inference_mode(), h5py.File(out, "w") as file:
        for first in range(0, len(paths), batch_size):
            with stages("read"):
                pixels = [np.array(Image.open(path).convert("RGB")) for path in paths[first : first + batch_size]]
            with stages("resize"):
                given = [torch.from_numpy(p).to(device).permute(2, 0, 1).float() / 255 for p in pixels]
                images, _ = model.transform(given)
            with stages("backbone"):
                maps = {"0": model.body(images.tensors)}
            with stages("proposals"):
                proposals, _ = model.rpn(images, maps)
            with stages("RoI heads"):
                found, _ = model.heads(maps, proposals, images.image_sizes)
            with stages("paste"):
                results = model.transform.postprocess(found, images.image_sizes, [p.shape[:2] for p in pixels])
                masks = [(result["masks"][:, 0] > 0.5).cpu().numpy() for result in results]
            rows = [len(result["boxes"]) for result in results]
            features = {name: values.split(rows) for name, values in model.features.items()}
            for number, (result, of_image) in enumerate(zip(results, masks, strict=True)):
                with stages("RLE"):
                    rles = [coco_mask.encode(np.asfortranarray(m.astype(np.uint8)))["counts"] for m in of_image]
                with stages("write"):
                    group = file.create_group(str(first + number))
                    for name in ("boxes", "scores"):
                        group[name] = result[name].float().cpu().numpy()
                    group["labels"] = result["labels"].cpu().numpy()
                    for name, values in features.items():
                        group[name] = values[number].float().cpu().numpy()
                    group["masks"] = np.array(rles, dtype=h5py.string_dtype())
            counts += rows
    return counts
