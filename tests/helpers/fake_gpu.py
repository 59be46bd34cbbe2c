"""Networks on a fake GPU that computes only shapes, to count the kernels they would launch."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VIEWS = {"view", "permute", "transpose", "t", "slice", "split", "as_strided", "detach", "alias", "expand", "select",
         "unsqueeze", "empty", "empty_like", "reshape", "device", "split_with_sizes", "unbind", "flatten", "movedim",
         "lift_fresh", "numpy_T", "new_empty"}  # fmt: skip
PRODUCTS = {"convolution", "convolution_backward", "_addmm_activation", "addmm", "cudnn_convolution_add_relu", "linear",
            "mm", "bmm"}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operators that start kernels on a GPU.

    Attributes:
        calls: number of calls by name; "bias" counts convolutions with a bias, which PyTorch 2.11 adds in a pass of
            its own.
        bytes_of_passes: bytes read and written by all operators but convolutions and matrix products, and by the
            shortcuts that these add.
        peak_bytes: peak size of the tensors created within the block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes_of_passes = 0
        self.peak_bytes = 0
        self._alive: Counter[int] = Counter()  # storage -> number of tensors
        self._alive_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.replace("conv2d", "convolution")
        y = self._fake(name, func, args, kwargs or {})
        for tensor in tree_leaves(y):
            if isinstance(tensor, Tensor):
                self._watch(tensor)
        copied = name == "reshape" and not args[0].is_contiguous()
        if (name in VIEWS and not copied) or (name == "to" and y.dtype == args[0].dtype):
            return y
        self.calls[name] += 1
        if name == "convolution":
            self.calls["bias"] += (biased := len(args) > 2 and args[2] is not None)
            self.bytes_of_passes += 2 * _size(y) * biased
        elif name == "cudnn_convolution_add_relu":
            self.bytes_of_passes += _size(args[2])
        elif name not in PRODUCTS:
            tensors = [value for value in [*args, y] if isinstance(value, Tensor)]
            self.bytes_of_passes += sum(map(_size, tensors))
        return y

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._alive_bytes += size * (self._alive[key] == 0)
        self._alive[key] += 1
        self.peak_bytes = max(self.peak_bytes, self._alive_bytes)

        def free() -> None:
            self._alive[key] -= 1
            self._alive_bytes -= size * (self._alive[key] == 0)

        weakref.finalize(tensor, free)

    def _fake(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if name == "_addmm_activation":  # the fake implementation calls other operators
            return args[1].new_empty((args[1].shape[0], args[2].shape[1]))
        if name == "cudnn_convolution_add_relu":  # has no fake implementation
            x, weight, shortcut = args[:3]
            assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight, shortcut))
            assert {t.dtype for t in (x, weight, shortcut, args[4])} == {torch.bfloat16}
            return torch.empty_like(shortcut)
        y = func(*args, **kwargs)
        # a fake bfloat16 convolution returns another memory layout than cuDNN
        return y.contiguous(memory_format=torch.channels_last) if name == "convolution" else y


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


@contextmanager
def on_fake_gpu(module: nn.Module) -> Iterator[Launches]:
    """Move a module to a fake GPU, in place, and count the operators called within the block."""
    with torch.inference_mode(), FakeTensorMode():
        _make_fake(module, "cuda")
        with Launches() as counted:
            yield counted


@contextmanager
def on_fake_cpu(module: nn.Module) -> Iterator[None]:
    """Replace the tensors of a module by fake ones, to train it within the block; autograd needs a device that exists.

    Memory layouts and autocast to bfloat16 are those of a GPU.
    """
    with FakeTensorMode():
        _make_fake(module, "cpu")
        yield


def fake_image(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cuda") -> Tensor:
    """A fake tensor (N, C, H, W), channels_last."""
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


def _make_fake(module: nn.Module, device: str) -> None:
    for parent in module.modules():
        for name, value in parent._parameters.items():
            if value is not None:
                trained = value.requires_grad and not torch.is_inference_mode_enabled()
                parent._parameters[name] = nn.Parameter(_fake_of(value, device), requires_grad=trained)
        for name, value in parent._buffers.items():
            if value is not None:
                parent._buffers[name] = _fake_of(value, device)


def _fake_of(value: Tensor, device: str) -> Tensor:
    layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
    return torch.empty(value.shape, dtype=value.dtype, device=device, memory_format=layout)
