"""network_inputs: resizing images of one shape together equals resizing each alone."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from refdet.config.recipe import InputOptions
from refdet.data import transforms
from refdet.data.transforms import input_size, network_input, network_inputs

SHAPES = [(60, 80), (120, 160), (60, 80), (30, 40), (120, 160), (60, 80)]


def images_of(shapes: list[tuple[int, int]]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[:1], [(60, 80)] * 4, [(60, 80), (30, 40)]])
@pytest.mark.parametrize(("resize", "order"), [("antialias", "rgb"), ("opencv", "bgr")])
def test_batched_inputs_equal_single_inputs(
    monkeypatch: pytest.MonkeyPatch, resize: str, order: str, shapes: list[tuple[int, int]]
) -> None:
    options = InputOptions(min_sizes=(90,), max_size=400, resize=resize, order=order)
    images = images_of(shapes)
    images[0] = images[0][:, ::-1]  # mirrored
    sizes = [input_size(*image.shape[:2], options) for image in images]
    group_by_shape = transforms._group_by_shape
    monkeypatch.setattr(
        transforms, "_group_by_shape", lambda images, device: group_by_shape(images, torch.device("cuda"))
    )
    found = network_inputs(images, sizes, options)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for image, size, one in zip(images, sizes, found, strict=True):
        torch.testing.assert_close(one, network_input(image, size, options), rtol=0, atol=1e-5)


def test_on_a_gpu_each_shape_is_copied_and_resized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class ResizeCounter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            self.calls += func.overloadpacket.__name__ == "_upsample_bilinear2d_aa"
            return func(*args, **(kwargs or {}))

    # Everything runs on the CPU; only the grouping of images is made to believe that the device is a GPU.
    options, images = InputOptions(min_sizes=(90,), max_size=400), images_of(SHAPES)
    sizes = [input_size(*image.shape[:2], options) for image in images]
    group_by_shape, counts, copy = transforms._group_by_shape, [], transforms.to_device
    copies: list[torch.Tensor] = []
    monkeypatch.setattr(transforms, "to_device", lambda values, *device: copies.append(values) or copy(values, *device))
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(
            transforms, "_group_by_shape", lambda images, _, d=device: group_by_shape(images, torch.device(d))
        )
        with torch.inference_mode(), ResizeCounter() as counter:
            network_inputs(images, sizes, options)
        counts.append((counter.calls, sum(values.dtype == torch.uint8 for values in copies)))
        copies.clear()
    # (resizes, copied images): one per image on the CPU, one per shape on the GPU
    assert counts == [(len(SHAPES), len(SHAPES)), (len(set(SHAPES)), len(set(SHAPES)))]
