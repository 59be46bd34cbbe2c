"""Mask kernels on extreme inputs: images of 2**31 pixels and more, boxes with NaN and inf, polygons in large images."""

import tracemalloc

import numpy as np
import pytest
import torch
from mask_problems import KERNEL_ARGUMENTS, compiled
from pycocotools import mask as coco_mask

from refdet.data.segmentations import to_rle
from refdet.ops import masks as mask_ops
from refdet.ops.masks import mask_coverage, masks_to_rle, masks_to_rle_plain

HUGE = [(65535, 65535), (65536, 32768), (46341, 46341)]


def run_lengths(counts: bytes) -> list[int]:
    """Decode COCO's compressed counts to run lengths."""
    found: list[int] = []
    value = shift = 0
    for byte in counts:
        group = byte - 48
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            value -= (group & 16) and 1 << shift
            found.append(value + (found[-2] if len(found) > 2 else 0))
            value = shift = 0
    assert shift == 0
    return found


@compiled
@pytest.mark.parametrize(("height", "width"), HUGE)
def test_a_small_box_in_an_image_of_more_than_2_to_the_31_pixels(height: int, width: int) -> None:
    """In the last corner, where positions need 32 bits. No array of the size of the image is allocated."""
    box = [width - 4, height - 3, width, height]
    (found,) = masks_to_rle(torch.ones(1, 2, 2), torch.tensor([box]).float(), height, width)
    lengths = run_lengths(found)
    assert sum(lengths) == height * width
    assert lengths[0] == box[0] * height + box[1]
    assert lengths[1::2] == [3] * 4 and lengths[2::2] == [height - 3] * 3


@compiled
@pytest.mark.parametrize(("height", "width"), [(2**31 + 11, 1), (1, 2**32 - 1)])
def test_a_side_of_more_than_2_to_the_31_pixels(height: int, width: int) -> None:
    (found,) = masks_to_rle(torch.ones(1, 2, 2), torch.tensor([[0.0, 0, 5, 5]]), height, width)
    assert run_lengths(found) == [0, 5, height * width - 5]


@compiled
@pytest.mark.parametrize(("height", "width"), HUGE)
def test_coverage_in_an_image_of_more_than_2_to_the_31_pixels(height: int, width: int) -> None:
    box = torch.tensor([[width - 40.0, height - 30, width, height]])
    rle = {"size": [height, width], "counts": masks_to_rle(torch.ones(1, 2, 2), box, height, width)[0]}
    wide = torch.tensor([[width - 80.0, height - 30, width, height]])
    found = mask_coverage([rle], torch.tensor([0]), wide, 4)
    assert found[0].tolist() == [[0, 0, 1, 1]] * 4


@compiled
def test_nan_inf_and_huge_boxes_give_what_the_fallback_gives() -> None:
    edges = [float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-45, 2.0**31, -(2.0**63), 5.0]
    boxes = torch.cartesian_prod(*[torch.tensor(edges)] * 4)[::7].contiguous()
    cells = torch.rand(len(boxes), 3, 3, generator=torch.Generator().manual_seed(0))
    assert masks_to_rle(cells, boxes, 11, 13) == masks_to_rle_plain(cells, boxes, 11, 13)
    rles = [coco_mask.encode(np.asfortranarray(np.eye(11, 13, dtype=np.uint8)))]
    objects = torch.zeros(len(boxes), dtype=torch.int64)
    found = mask_coverage(rles, objects, boxes, 3)
    assert found.equal(mask_ops.mask_coverage_plain(rles, objects, boxes.double(), 3))
    assert ((found >= 0) & (found <= 1)).all()


def test_coverage_in_an_image_of_one_pixel() -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [-1, 0, 1, 1], [5, 5, 9, 9], [0.5, 0.5, 0.5, 0.5]])
    for value in (0, 1):
        rle = coco_mask.encode(np.full((1, 1), value, np.uint8, order="F"))
        found = mask_coverage([rle], torch.zeros(4).long(), boxes, 2)
        assert found.tolist() == [[[value] * 2] * 2, [[0, value]] * 2, [[0, 0]] * 2, [[0, 0]] * 2]


def test_no_masks_and_no_boxes() -> None:
    assert mask_coverage([], torch.zeros(0).long(), torch.zeros(0, 4), 7).shape == (0, 7, 7)
    assert masks_to_rle(torch.zeros(0, 14, 14), torch.zeros(0, 4), 9, 9) == []
    assert masks_to_rle(torch.zeros(0, 14, 14), torch.zeros(0, 4), 65535, 65535) == []


def test_meta_tensors_are_refused() -> None:
    cells, boxes, *image = KERNEL_ARGUMENTS["masks_to_rle"]
    with pytest.raises(NotImplementedError, match="meta"):
        masks_to_rle(cells.to("meta"), boxes.to("meta"), *image)
    rles, objects = [coco_mask.encode(np.ones((5, 5), np.uint8, order="F"))], torch.zeros(5).long()
    for arguments in ((objects.to("meta"), boxes), (objects, boxes.to("meta"))):
        with pytest.raises(NotImplementedError, match="meta"):
            mask_coverage(rles, *arguments, 7)


@compiled
def test_coverage_of_a_polygon_never_decodes_the_whole_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of this image would have 400 MB."""

    def fail(*given: object) -> None:
        raise AssertionError("the whole mask was decoded")

    monkeypatch.setattr(coco_mask, "decode", fail)
    monkeypatch.setattr(mask_ops, "mask_coverage_plain", fail)
    square = [[10000.0, 10000, 10400, 10000, 10400, 10400, 10000, 10400]]
    tracemalloc.start()
    try:
        rle = to_rle(square, 20000, 20000)
        found = mask_coverage([rle], torch.tensor([0]), torch.tensor([[9800.0, 10000, 10200, 10400]]), 4)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found[0].tolist() == [[0, 0, 1, 1]] * 4
    assert peak < 10e6
