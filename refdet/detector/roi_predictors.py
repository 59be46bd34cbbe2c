"""Last layers of the second stage: class logits, box deltas and masks.

Shape shorthand in this module:

    K: RoIs of the batch
    C: channels of the input of the mask branch
    D: channels of fc7
    s: height and width of the input of the mask branch

`classes` is the number of object classes, without background. Deltas and masks have an output for the background, 0,
too, which no loss trains: so a label 1..classes is the index of its deltas and mask, as in torchvision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refdet.detector.conv2d import Conv2d
from refdet.detector.packed_layers import conv_relu
from refdet.ops.training_epilogue import bias_relu, is_fused_training


class BoxPredictor(nn.Module):
    """Two linear layers on fc7: class logits and per-class box deltas."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.score = nn.Linear(in_channels, classes + 1)
        self.delta = nn.Linear(in_channels, (classes + 1) * 4)
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.normal_(self.delta.weight, std=0.001)
        nn.init.zeros_(self.score.bias)
        nn.init.zeros_(self.delta.bias)

    def forward(self, fc7: Tensor) -> tuple[Tensor, Tensor]:
        """fc7 (K, D) -> logits (K, classes + 1) and deltas (K, classes + 1, 4), in float32."""
        fc7 = fc7.to(self.score.weight.dtype)
        deltas = self.delta(fc7).float()
        return self.score(fc7).float(), deltas.reshape(len(fc7), deltas.shape[1] // 4, 4)


class MaskPredictor(nn.Module):
    """3x3 convolutions, a 2x2 transposed convolution, and a 1x1 convolution with a mask per class.

    Args:
        in_channels: channels of the input, C.
        channels: output channels of the 3x3 and the transposed convolutions.
        classes: number of object classes, without background.
        convolutions: number of 3x3 convolutions, 0 or more.
    """

    def __init__(self, in_channels: int, channels: int, classes: int, convolutions: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(convolutions):
            layers += [Conv2d(in_channels, channels, 3, padding=1), nn.ReLU()]
            in_channels = channels
        layers += [nn.ConvTranspose2d(in_channels, channels, 2, 2), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.logits = Conv2d(channels, classes + 1, 1)
        for layer in (*self.hidden, self.logits):  # logits too, so that a seed gives the weights it always gave
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.logits.weight, std=0.001)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """X (K, C, s, s), labels (K,), 1..classes -> mask logits (K, 2s, 2s) of these classes, in float32."""
        upsampled = self._fused_hidden(x) if is_fused_training(x.device) else self.hidden(x)
        # the 1x1 convolution `logits`, but of each RoI only the output channel of its class
        weight = self.logits.weight[labels, :, 0, 0].to(upsampled.dtype)
        bias = self.logits.bias[labels].float()  # type: ignore[index]
        return torch.einsum("kchw,kc->khw", upsampled, weight).float() + bias[:, None, None]

    def _fused_hidden(self, x: Tensor) -> Tensor:
        """``self.hidden(x)`` in training, with the bias and ReLU of each convolution in one pass."""
        for layer in self.hidden:
            if isinstance(layer, nn.ConvTranspose2d) and layer.bias is not None:
                x = bias_relu(F.conv_transpose2d(x, layer.weight, None, layer.stride), layer.bias)
            elif not isinstance(layer, nn.ReLU):  # the ReLU is part of the fused pass
                x = conv_relu(layer, x)
        return x
