"""The epilogue of a convolution on a GPU: bias, shortcut and ReLU, in one pass or in the convolution itself.

As separate operators these are up to three passes over the output, which in bfloat16 together take as long as the
convolution itself. There are three ways to avoid these passes, besides plain PyTorch:

    kernel: a convolution without bias, then `bias_relu`, which reads and writes the output once. In float32, bfloat16
        and float16 (other dtypes use plain PyTorch); in float32 the same numbers as plain PyTorch.
    library: 1x1 convolutions as matrix products fused with bias and ReLU (cuBLASLt), and the last convolution of a
        bottleneck fused with bias, shortcut and ReLU (cuDNN). For bfloat16 and float16, as cuDNN may have no engine for
        exact float32. The ReLU of these libraries turns NaN into 0. Other convolutions use the kernel, as cuDNN's
        fusion with ReLU alone adds 0 times its uninitialized output, which can be NaN.
    products: like library, but without cuDNN's fusion, for which cuDNN may compile code for each new size of a feature
        map. Costs one more pass per bottleneck. `make gpu-check` compares the two.

Shape shorthand in this module:

    N: images or RoIs
    C, K: input and output channels
    H, W: height and width of a feature map (H', W' of the output)
    h, w: height and width of a filter
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F

from refdet.ops._library import DEVICES

HALF_DTYPES = (torch.bfloat16, torch.float16)
KERNEL_DTYPES = (torch.float32, *HALF_DTYPES)


class Epilogue(Enum):
    """How bias, shortcut and ReLU are applied after a convolution, as described above; PLAIN is plain PyTorch."""

    PLAIN = "plain"
    KERNEL = "kernel"
    LIBRARY = "library"
    PRODUCTS = "products"


def best_epilogue(device: torch.device, dtype: torch.dtype) -> Epilogue:
    """The fastest epilogue on a device: on a GPU, library for bfloat16 and float16 and kernel for float32; else plain.

    If cuDNN fails a small trial convolution with a shortcut, it is the kernel for bfloat16 and float16 too. Without
    compiled CUDA kernels, it is plain PyTorch in place of the kernel.
    """
    if device.type != "cuda":
        return Epilogue.PLAIN
    kernel = Epilogue.KERNEL if "cuda" in DEVICES else Epilogue.PLAIN
    return Epilogue.LIBRARY if dtype in HALF_DTYPES and _cudnn_fuses_shortcut(device, dtype) else kernel


def _cudnn_fuses_shortcut(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether cuDNN computes a convolution with bias, shortcut and ReLU, and does so correctly."""
    x = torch.ones((1, 64, 4, 4), dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.full((64, 64, 1, 1), 1 / 64, dtype=dtype, device=device).contiguous(
        memory_format=torch.channels_last
    )
    try:
        y = _cudnn_conv_add_relu(x, weight, torch.full((64,), -0.5, dtype=dtype, device=device), x.clone())
    except (RuntimeError, AttributeError):
        return False
    return bool((y == 1.5).all())  # 64 / 64 - 0.5 + 1


def bias_relu(x: Tensor, bias: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """``relu(x + bias + shortcut)``, by the kernel if it is compiled and accepts the tensors, else in plain PyTorch.

    Args:
        x: (N, K, H, W); overwritten if it is contiguous in channels_last.
        bias: (K,) float32.
        shortcut: (N, K, H, W) in the dtype of x; may be a slice of a tensor with more channels.

    Returns:
        (N, K, H, W) in the dtype of x, channels_last.
    """
    in_place = x.is_contiguous(memory_format=torch.channels_last)
    out = x if in_place else torch.empty_like(x, memory_format=torch.channels_last)
    if x.device.type == "cuda" and "cuda" in DEVICES and supports(x, shortcut):
        torch.ops.refdet.bias_relu(x, bias, shortcut, out)
        return out
    return bias_relu_plain(x, bias, shortcut, out)


def bias_relu_plain(x: Tensor, bias: Tensor, shortcut: Tensor | None, out: Tensor) -> Tensor:
    """`bias_relu` into `out`, in plain PyTorch; computed in the dtype of the bias."""
    total = x.to(bias.dtype) + bias[:, None, None]
    return out.copy_(torch.relu(total if shortcut is None else total + shortcut.to(bias.dtype)))


def supports(x: Tensor, shortcut: Tensor | None = None) -> bool:
    """Whether the kernel of `bias_relu` accepts tensors of these dtypes and memory layouts."""
    if x.dtype not in KERNEL_DTYPES or not _has_kernel_layout(x):
        return False
    return shortcut is None or (shortcut.dtype == x.dtype and _has_kernel_layout(shortcut))


def _has_kernel_layout(x: Tensor) -> bool:
    """Whether the channels of a position are contiguous and positions have a constant stride, as the kernel needs."""
    images, channels, height, width = x.shape
    # from one position to the next, in the first dimension with more than one, as that of a dimension of 1 is arbitrary
    stride = x.stride(3) if width > 1 else x.stride(2) if height > 1 else x.stride(0) if images > 1 else channels
    dimensions = (  # size, actual stride and expected stride
        (channels, x.stride(1), 1),
        (height, x.stride(2), width * stride),
        (images, x.stride(0), height * width * stride),
    )
    return stride >= channels and all(size == 1 or actual == expected for size, actual, expected in dimensions)


def conv1x1_bias(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """A 1x1 convolution as one matrix product, fused with bias and ReLU on a GPU.

    Args:
        x: (N, C, H, W), channels_last; other layouts are copied.
        weight: (K, C) in the dtype of x.
        bias: (K,) in the dtype of x; None for neither bias nor ReLU.
        relu: apply ReLU.

    Returns:
        (N, K, H, W) in the dtype of x, channels_last.
    """
    images, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
    if bias is None:
        y = torch.mm(rows, weight.t())
    elif relu:
        y = torch.ops.aten._addmm_activation(bias, rows, weight.t())  # the activation is ReLU by default
    else:
        y = torch.addmm(bias, rows, weight.t())
    return y.view(images, height, width, len(weight)).permute(0, 3, 1, 2)


def conv_add_relu(
    x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """``relu(F.conv2d(x, weight, bias, stride, padding) + shortcut)``, on a GPU in one operator of cuDNN.

    Args:
        x: (N, C, H, W), channels_last.
        weight: (K, C, h, w) in the dtype of x, channels_last.
        bias: (K,) in the dtype of x.
        shortcut: (N, K, H', W') in the dtype of x.
        stride: stride of the convolution.
        padding: padding of the convolution.

    Returns:
        (N, K, H', W') in the dtype of x, channels_last.
    """
    if x.device.type != "cuda":
        return torch.relu(F.conv2d(x, weight, bias, stride, padding) + shortcut)
    return _cudnn_conv_add_relu(x, weight, bias, shortcut, stride, padding)


def _cudnn_conv_add_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shortcut: Tensor,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
) -> Tensor:
    # 1.0 is the factor of the shortcut, (1, 1) the dilation, 1 the number of groups
    return torch.ops.aten.cudnn_convolution_add_relu(x, weight, shortcut, 1.0, bias, stride, padding, (1, 1), 1)


if DEVICES:

    @torch.library.register_fake("refdet::bias_relu")
    def _bias_relu_fake(x: Tensor, bias: Tensor, shortcut: Tensor | None, out: Tensor) -> None:
        return None  # the operator writes into `out`
