"""3x3 convolutions with gradients on the CPU, by Winograd's minimal filtering: `F.conv2d` in about half the time.

Shape shorthand in this module:

    N: images
    C, K: input and output channels
    H, W: height and width of a feature map
    P: evaluation points of a tile of 4x4 outputs, 36
    T: tiles

The output and the gradient of the input are convolutions by the kernel of `refdet.ops.convolution`; the weights are
transformed anew in each call, which takes as long as about 30 tiles. The gradient of the weights is the transpose of
the same bilinear algorithm, in plain PyTorch: input tiles and output gradients are transformed to the 36 points, and
multiplied there, one matrix product a point. Its rounding errors are up to five times those of PyTorch's convolution.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from refdet.ops.convolution import CHANNELS, OUTPUTS, POINTS, Packed, conv3x3, has_kernels, pack_conv3x3

TILE, TAPS = 4, 3
INPUTS = TILE + TAPS - 1  # on a side of a tile
WORTHWHILE = {"channels": 64, "tiles": 48}  # below, PyTorch's convolution is faster
CHUNK = 2**22  # numbers of a transformed chunk of tiles, so that it stays in the caches


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`F.conv2d` within rounding; faster where gradients are recorded, on the CPU and in float32, for 3x3 convolutions.

    Args:
        x: (N, C, H, W), fastest in channels_last.
        weight: (K, C / groups, kh, kw).
        bias: (K,) or None.
        stride: (down, across), like those below.
        padding: zeros on each side, or as of `F.conv2d`.
        dilation: distance of the taps.
        groups: of channels.

    Returns:
        (N, K, H', W').
    """
    plain = stride == padding == dilation == (1, 1) and groups == 1 and weight.shape[2:] == (TAPS, TAPS)
    if plain and torch.is_grad_enabled() and _is_faster(x, weight):
        return cast("Tensor", _Convolution.apply(x, weight, bias))
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    outputs, inputs = weight.shape[:2]
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and min(inputs, outputs) >= WORTHWHILE["channels"]
        and inputs % OUTPUTS[False] == outputs % OUTPUTS[False] == 0
        and x.shape[0] * -(-x.shape[2] // TILE) * -(-x.shape[3] // TILE) >= WORTHWHILE["tiles"]
        and has_kernels(x.device)
    )


class _Convolution(torch.autograd.Function):
    """A 3x3 convolution with stride 1 and padding 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        packed = _pack_weights(weight)
        return conv3x3(x, packed, torch.zeros_like(packed.scale) if bias is None else bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            packed = _pack_weights(weight.flip(2, 3).transpose(0, 1))
            of_x = conv3x3(gradient, packed, torch.zeros_like(packed.scale))
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient(x, gradient)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_x, of_weight, of_bias


def _pack_weights(weight: Tensor) -> Packed:
    """`pack_conv3x3` of weights (K, C, 3, 3), as one matrix product."""
    outputs, inputs = weight.shape[:2]
    panel = OUTPUTS[False]
    taps = weight.permute(2, 3, 0, 1).reshape(TAPS * TAPS, outputs // panel, panel, inputs).transpose(2, 3)
    at_points = _transforms().weight @ taps.reshape(TAPS * TAPS, -1)
    return Packed(at_points.view(POINTS, outputs // panel, inputs, panel), weight.new_ones(outputs))


def weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Gradient (K, C, 3, 3) of the weights of a 3x3 convolution with stride 1 and padding 1.

    Args:
        x: its input (N, C, H, W).
        gradient: of its output, (N, K, H, W).
    """
    (images, inputs, height, width), outputs = x.shape, gradient.shape[1]
    down, across = -(-height // TILE), -(-width // TILE)
    right, below = across * TILE - width, down * TILE - height
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, right + 1, 1, below + 1))
    wanted = F.pad(gradient.permute(0, 2, 3, 1), (0, 0, 0, right, 0, below))
    at_once = max(CHUNK // (POINTS * max(inputs, outputs)), 1)
    rows = down if down * across <= at_once else max(at_once // across, 1)
    several = max(at_once // (down * across), 1)
    transforms = _transforms()
    products = x.new_zeros(POINTS, outputs, inputs)
    for image in range(0, images, several):
        for row in range(0, down, rows):
            until = TILE * min(row + rows, down)
            source = padded[image : image + several, TILE * row : until + TAPS - 1]
            target = wanted[image : image + several, TILE * row : until]
            left = _at_points(target, TILE, transforms.output)
            products.baddbmm_(left.transpose(1, 2), _at_points(source, INPUTS, transforms.input))
    of_taps = transforms.weight.t() @ products.flatten(1)
    return of_taps.view(TAPS, TAPS, outputs, inputs).permute(2, 3, 0, 1)


def _at_points(maps: Tensor, side: int, transform: Tensor) -> Tensor:
    """Maps (N, H, W, C), cut into tiles of `side`, TILE apart, and transformed by (P, side * side): (P, T, C)."""
    images, height, width, channels = maps.shape
    down, across = (height - side) // TILE + 1, (width - side) // TILE + 1
    image, row, column, channel = maps.stride()
    tiles = maps.as_strided(
        (side, side, images, down, across, channels), (row, column, image, TILE * row, TILE * column, channel),
        maps.storage_offset(),
    )  # fmt: skip
    return (transform @ tiles.reshape(side * side, -1)).view(POINTS, -1, channels)


class _Transforms:
    """The matrices of both axes.

    Attributes:
        weight: (P, 9), of the weights.
        input: (P, 36), of the inputs of a tile.
        output: (P, 16), transpose of that of the results of a tile.
    """

    def __init__(self) -> None:
        unit = torch.zeros(OUTPUTS[False], CHANNELS, TAPS * TAPS)
        unit[0, : TAPS * TAPS] = torch.eye(TAPS * TAPS)
        self.weight = pack_conv3x3(unit.unflatten(2, (TAPS, TAPS))).weight[:, 0, : TAPS * TAPS, 0].clone()
        of_inputs, of_outputs = torch.zeros(INPUTS, INPUTS), torch.zeros(INPUTS, TILE)
        for place, point in enumerate(POINTS_OF_AXIS):
            factors = [other for index, other in enumerate(POINTS_OF_AXIS) if index != place and other is not None]
            product = [1.0]
            for root in factors:  # times (x - root); coefficients ascending
                shifted, scaled = [0.0, *product], [*(root * value for value in product), 0.0]
                product = [a - b for a, b in zip(shifted, scaled, strict=True)]
            of_inputs[place, : len(product)] = torch.tensor(product)
            powers = [0.0, 0.0, 0.0, 1.0] if point is None else [point**power for power in range(TILE)]
            of_outputs[place] = torch.tensor(powers)
        self.input, self.output = torch.kron(of_inputs, of_inputs), torch.kron(of_outputs, of_outputs)


POINTS_OF_AXIS = (0.0, 0.75, -0.75, 1.5, None, -1.5)  # None at infinity; as in csrc/conv/winograd.h


@functools.cache
def _transforms() -> _Transforms:
    with torch.no_grad():
        return _Transforms()
