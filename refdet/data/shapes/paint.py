"""Painting of scenes: a muted textured background, and shaded shapes with a dark rim."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image

from refdet.data.shapes.scene import Scene

TEXTURES = ("gradient", "clouds", "stripes", "checks")


def _random_muted_color(rng: np.random.Generator) -> np.ndarray:
    rgb = colorsys.hsv_to_rgb(float(rng.random()), float(rng.uniform(0.05, 0.28)), float(rng.uniform(0.36, 0.62)))
    return 255 * np.array(rgb)


def paint_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Paint a background (height, width, 3), float64 in 0..255: two muted colors blended by a texture, with noise."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    texture = TEXTURES[int(rng.integers(len(TEXTURES)))]
    angle = float(rng.uniform(0, 2 * np.pi))
    along = x * np.cos(angle) + y * np.sin(angle)
    if texture == "gradient":
        mix = (along - along.min()) / (along.max() - along.min())
    elif texture == "clouds":
        coarse = Image.fromarray(rng.random((6, 8)).astype(np.float32))
        mix = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    elif texture == "stripes":
        mix = (np.sin(along * 2 * np.pi / float(rng.uniform(7, 22))) > 0).astype(np.float64)
    else:
        side = float(rng.uniform(7, 20))
        across = y * np.cos(angle) - x * np.sin(angle)
        mix = ((np.floor(along / side) + np.floor(across / side)) % 2).astype(np.float64)
    first, second = _random_muted_color(rng), _random_muted_color(rng)
    # sharp textures have half the contrast
    second = first + (second - first) * (0.5 if texture in ("stripes", "checks") else 1.0)
    grain = rng.normal(0, float(rng.uniform(1, 6)), (height, width, 1))
    return first + np.clip(mix, 0, 1)[..., None] * (second - first) + grain


def paint(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Paint a scene; returns an image of mode RGB, or L if the scene is grayscale."""
    picture = paint_background(rng, scene.height, scene.width)
    padded = np.pad(scene.owner, 1, mode="edge")
    rim = np.zeros(scene.owner.shape, dtype=bool)
    for neighbor in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        rim |= neighbor != scene.owner
    for i, thing in enumerate(scene.things):
        if thing.crowd:
            rim &= scene.owner != i  # its shapes are too small for a rim
    slope = np.linspace(1.05, 0.92, scene.height)[:, None]  # brighter at the top
    grain = rng.normal(1.0, 0.025, scene.owner.shape)
    shade = np.where(rim, 0.62, slope * grain)  # factor of a shape's color
    for i, thing in enumerate(scene.things):
        visible = scene.owner == i
        picture[visible] = shade[visible][:, None] * np.array(thing.rgb, dtype=np.float64)
    image = Image.fromarray(np.clip(picture + 0.5, 0, 255).astype(np.uint8))
    return image.convert("L") if scene.gray else image
