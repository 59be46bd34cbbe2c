import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refdet.config.recipe import InputOptions
from refdet.data.coco import ImageRecord
from refdet.data.image_source import ImageError, ImageSource
from refdet.data.transforms import input_size, network_input
from refdet.errors import InputError
from refdet.structures.box_convention import InputSize


def write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="PNG")


def random_pixels(height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("on_disk", "given"),
    [
        ("a.png", "a.png"),
        ("sub/a.png", "a.png"),
        ("000000000009.jpg", "COCO_train2014_000000000009.jpg"),
        ("COCO_train2014_000000000009.jpg", "000000000009.jpg"),
        ("COCO_val2014_000000000009.jpg", ""),
        ("a.png", "elsewhere/a.png"),
    ],
)
def test_an_image_is_found_in_a_folder_and_in_a_zip(tmp_path: Path, on_disk: str, given: str) -> None:
    pixels, record = random_pixels(), ImageRecord(9, given, 6, 9)
    write_png(tmp_path / "images" / on_disk, pixels)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "images" / on_disk, f"train2014/{on_disk}")
    for path in (tmp_path / "images", tmp_path / "images.zip"):
        source = ImageSource.open(path)
        np.testing.assert_array_equal(source.read(record), pixels)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).read(record), pixels)


def test_grayscale_becomes_rgb(tmp_path: Path) -> None:
    gray = random_pixels()[:, :, 0]
    write_png(tmp_path / "a.png", gray)
    found = ImageSource.open(tmp_path).read(ImageRecord(1, "a.png", 6, 9))
    np.testing.assert_array_equal(found, np.stack([gray] * 3, axis=2))


def test_errors_name_the_unreadable_image(tmp_path: Path) -> None:
    write_png(tmp_path / "whole.png", random_pixels(60, 90))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
    source = ImageSource.open(tmp_path)
    for name in ("cut.png", "empty.png", "text.png"):
        with pytest.raises(ImageError, match=f"{name}: not a readable image"):
            source.read(ImageRecord(1, name, 60, 90))
    with pytest.raises(ImageError, match="is 90x60, but the instances file says 100x60"):
        source.read(ImageRecord(1, "whole.png", 60, 100))
    with pytest.raises(ImageError, match="no file for image 12, none.png: no file of that name"):
        source.read(ImageRecord(12, "none.png", 60, 90))


def test_errors_name_the_unreadable_source(tmp_path: Path) -> None:
    (tmp_path / "broken.zip").write_bytes(b"PK no zip")
    for name, problem in {"broken.zip": "not a readable zip", "missing": "no such file or folder"}.items():
        with pytest.raises(InputError, match=f"{name}: {problem}"):
            ImageSource.open(tmp_path / name)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(480, 640, (600, 800)), (640, 480, (800, 600)), (300, 1000, (300, 1000)), (100, 2000, (50, 1000))],
)
def test_input_size_limits_the_long_side(height: int, width: int, expected: tuple[int, int]) -> None:
    size = input_size(height, width, InputOptions(min_sizes=(600,), max_size=1000))
    assert (size.height, size.width) == expected
    assert size.scale == (size.width / width, size.height / height)


def test_an_input_is_at_least_one_pixel_high() -> None:
    assert input_size(1, 5000, InputOptions()).height == 1


def test_pixels_are_normalized_by_mean_and_std() -> None:
    options = InputOptions(mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 8.0))
    pixels = random_pixels()
    found = network_input(pixels, InputSize(6, 9, 1.0, 1.0, 6, 9), options)
    expected = (pixels.astype(np.float64) - [1, 2, 3]) / [2, 4, 8]
    np.testing.assert_allclose(found.numpy(), expected.transpose(2, 0, 1), rtol=1e-6)


def test_resizing_keeps_a_linear_ramp_linear() -> None:
    ramp = np.repeat(np.arange(0, 200, 10, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(8, axis=0)
    options = InputOptions(mean=(0, 0, 0), std=(1, 1, 1))
    found = network_input(ramp, InputSize(16, 40, 2.0, 2.0, 8, 20), options)
    assert found.shape == (3, 16, 40)
    torch.testing.assert_close(found[0, 0, 2:-2].diff(), torch.full((35,), 5.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (427, 640), (333, 500), (200, 900), (1, 7)])
def test_opencv_sizes_and_scales_are_those_of_the_reference(height: int, width: int) -> None:
    options = InputOptions(min_sizes=(600,), max_size=1000, resize="opencv")
    scale = 600 / min(height, width)
    if np.round(scale * max(height, width)) > 1000:
        scale = 1000 / max(height, width)
    size = input_size(height, width, options)
    assert size.scale == (scale, scale)
    assert (size.height, size.width) == (max(round(height * scale), 1), max(round(width * scale), 1))


def test_opencv_resize_is_bilinear_at_the_exact_scale() -> None:
    """Against a float64 loop: output i samples (i + 1/2) / scale - 1/2, clamped to the image; BGR minus the mean."""
    options = InputOptions(
        min_sizes=(23,), max_size=1000, mean=(10.5, 20.25, 30.125), std=(1, 1, 1), order="bgr", resize="opencv"
    )
    pixels = np.random.default_rng(0).integers(0, 255, (17, 29, 3), dtype=np.uint8)
    size = input_size(17, 29, options)
    assert size.width / 29 != size.scale_x  # so sampling by the ratio of the sizes would differ
    found = network_input(pixels, size, options).numpy()
    source = pixels[:, :, ::-1].astype(np.float64) - [10.5, 20.25, 30.125]
    for y in range(size.height):
        for x in range(size.width):
            v = min(max((y + 0.5) / size.scale_y - 0.5, 0), 16)
            u = min(max((x + 0.5) / size.scale_x - 0.5, 0), 28)
            top, left = int(v), int(u)
            below, right = min(top + 1, 16), min(left + 1, 28)
            upper = source[top, left] * (1 - u + left) + source[top, right] * (u - left)
            lower = source[below, left] * (1 - u + left) + source[below, right] * (u - left)
            np.testing.assert_allclose(found[:, y, x], upper * (1 - v + top) + lower * (v - top), atol=1e-4)
