"""VGG-16 and MobileNet v1 detectors under the reference's parameter names, from torchvision and from formulas."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vgg

Tensors = dict[str, Tensor]

VGG_WIDTH, VGG_HIDDEN = 8, 48
MOBILENET_WIDTH = 8  # a depth multiplier of a quarter
# channels at a multiplier of 1, and stride, of Conv2d_0 to Conv2d_13
MOBILENET = (
    (32, 2), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1), (512, 1), (512, 1),
    (512, 1), (1024, 1), (1024, 1),
)  # fmt: skip


def torchvision_vgg(width: int = VGG_WIDTH, hidden: int = VGG_HIDDEN) -> vgg.VGG:
    """torchvision's VGG-16 with narrower layers and random weights."""
    layers = [item if item == "M" else item * width // 64 for item in vgg.cfgs["D"]]
    with torch.random.fork_rng():
        torch.manual_seed(6)
        features = vgg.make_layers(layers)
        with torch.device("meta"):  # its linear layers are replaced
            network = vgg.VGG(features, init_weights=False)
        network.classifier[0] = nn.Linear(8 * width * 49, hidden)
        network.classifier[3] = nn.Linear(hidden, hidden)
        network.classifier[6] = nn.Linear(hidden, 3)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.normal_(layer.bias, std=0.1)
        network.features[0].weight.data /= 60
    return network.eval()


def vgg_weights(classes: int = 4, anchors: int = 12) -> Tensors:
    """Weights of a Faster R-CNN with `torchvision_vgg`, under the names of lichengunc/mask-faster-rcnn."""
    own = torchvision_vgg().state_dict()
    backbone = {f"vgg.{name}": value for name, value in own.items() if not name.startswith("classifier.6.")}
    return backbone | _layers(8 * VGG_WIDTH, VGG_HIDDEN, classes, anchors)


def mobilenet_weights(classes: int = 4, anchors: int = 12, counters: bool = True) -> Tensors:
    """Weights of a Faster R-CNN with a MobileNet v1, under the names of pytorch-faster-rcnn."""
    found: Tensors = {}
    random = torch.Generator().manual_seed(7)

    def convolution(name: str, *shape: int) -> None:
        fan = shape[1] * shape[2] * shape[3]
        found[f"{name}.0.weight"] = torch.randn(shape, generator=random) * (2 / fan) ** 0.5
        for end, low, high in (("weight", 0.8, 1.2), ("bias", 0, 0.6), ("running_mean", -0.2, 0.2)):
            found[f"{name}.1.{end}"] = torch.rand(shape[0], generator=random) * (high - low) + low
        found[f"{name}.1.running_var"] = torch.rand(shape[0], generator=random) + 0.5
        if counters:
            found[f"{name}.1.num_batches_tracked"] = torch.tensor(3)

    inputs = 3
    for number, (channels, _) in enumerate(MOBILENET):
        channels = max(int(channels * MOBILENET_WIDTH / 32), 8)
        name = f"mobilenet.Conv2d_{number}"
        if number == 0:
            convolution(name, channels, inputs, 3, 3)
            found[f"{name}.0.weight"] /= 60
        else:
            convolution(f"{name}.depthwise", inputs, 1, 3, 3)
            convolution(f"{name}.pointwise", channels, inputs, 1, 1)
        inputs = channels
    return found | _layers(128, 256, classes, anchors)


def mobilenet_layers(weights: Tensors, x: Tensor, layers: range, eps: float) -> Tensor:
    """Layers of `mobilenet_weights`, from their formulas: a norm and ReLU6 after each convolution."""
    for number in layers:
        name, stride = f"mobilenet.Conv2d_{number}", MOBILENET[number][1]
        if number == 0:
            x = _norm_relu6(F.conv2d(x, weights[f"{name}.0.weight"], None, 2, 1), weights, name, eps)
            continue
        filters = weights[f"{name}.depthwise.0.weight"]
        x = F.conv2d(x, filters, None, stride, 1, groups=len(filters))
        x = _norm_relu6(x, weights, f"{name}.depthwise", eps)
        x = _norm_relu6(F.conv2d(x, weights[f"{name}.pointwise.0.weight"]), weights, f"{name}.pointwise", eps)
    return x


def crop_and_max(x: Tensor, boxes: Tensor) -> Tensor:
    """The reference's pooling of a map (1, C, H, W): 14x14 samples of inclusive boxes (K, 4), the maximum of 2x2."""
    steps = torch.linspace(0, 1, 14)
    across = (boxes[:, :1] + steps * (boxes[:, 2:3] - boxes[:, :1])) / 16
    down = (boxes[:, 1:2] + steps * (boxes[:, 3:] - boxes[:, 1:2])) / 16
    height, width = x.shape[2:]
    grid = torch.stack(
        ((across * 2 / (width - 1) - 1)[:, None, :].expand(-1, 14, -1),
         (down * 2 / (height - 1) - 1)[:, :, None].expand(-1, -1, 14)), dim=-1
    )  # fmt: skip
    samples = F.grid_sample(x.expand(len(boxes), -1, -1, -1), grid, align_corners=True)
    return samples.unflatten(2, (7, 2)).unflatten(4, (7, 2)).amax((3, 5))


def _norm_relu6(x: Tensor, weights: Tensors, name: str, eps: float) -> Tensor:
    weight, bias, mean, variance = (
        weights[f"{name}.1.{end}"][:, None, None] for end in ("weight", "bias", "running_mean", "running_var")
    )
    return ((x - mean) / (variance + eps).sqrt() * weight + bias).clamp(0, 6)


def _layers(channels: int, features: int, classes: int, anchors: int) -> Tensors:
    random = torch.Generator().manual_seed(8)
    layers = {"rpn_net": ((512, channels, 3, 3), 0.01), "rpn_cls_score_net": ((2 * anchors, 512, 1, 1), 0.05),
              "rpn_bbox_pred_net": ((4 * anchors, 512, 1, 1), 0.01), "cls_score_net": ((classes + 1, features), 0.2),
              "bbox_pred_net": ((4 * classes + 4, features), 0.02)}  # fmt: skip
    found = {f"{name}.weight": torch.randn(shape, generator=random) * std for name, (shape, std) in layers.items()}
    return found | {
        f"{name}.bias": torch.randn(shape[0], generator=random) * 0.1 for name, (shape, _) in layers.items()
    }
