"""showRef, showMask, and errors if matplotlib or pandas is not installed."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refer_examples import GREFS, INSTANCES, refclef, write

from refer import REFER, ReferDataError, ReferError, ReferNotFoundError


class Recorder:
    """Replaces matplotlib's modules and axes, and records all calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, dict]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.calls.append((name, args, options))
            return {"gca": self}.get(name, name)

        return call

    def of(self, name: str) -> list[tuple]:
        return [args for called, args, _ in self.calls if called == name]


@pytest.fixture
def pyplot(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    for name in ("pyplot", "collections", "patches"):
        monkeypatch.setitem(sys.modules, f"matplotlib.{name}", recorder)  # type: ignore[arg-type]
    return recorder


def test_show_ref_draws_outlines_or_a_box(tmp_path: Path, pyplot: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    r = REFER(write(tmp_path), "refcoco", "unc")
    with pytest.raises(ReferNotFoundError, match="no such folder; set IMAGE_DIR"):
        r.showRef(r.Refs[0])
    r.IMAGE_DIR = str(tmp_path)
    with pytest.raises(ReferNotFoundError, match=r"3\.jpg: no such image \(no file of that name\); set IMAGE_DIR"):
        r.showRef(r.Refs[0])
    Image.new("RGB", (8, 6)).save(tmp_path / "3.jpg")
    r.showRef(r.Refs[0])
    assert capsys.readouterr().out == "1. red dog\n"
    outlines = [args[0] for args in pyplot.of("PolyCollection")]
    assert len(outlines) == 2 and len(pyplot.of("add_collection")) == 2
    assert outlines[0][1].tolist() == [[0, 0], [2, 0], [2, 4], [0, 4]] and pyplot.of("Rectangle") == []
    r.showRef(r.Refs[0], seg_box="box")
    assert pyplot.of("Rectangle") == [([1, 0], 4, 2)] and len(pyplot.of("add_patch")) == 1
    with pytest.raises(ReferDataError, match="seg_box 'mask'"):
        r.showRef(r.Refs[0], "mask")
    r.showMask(r.Refs[0])
    assert np.array_equal(pyplot.of("imshow")[-1][0], r.getMask(r.Refs[0])["mask"])


def test_show_ref_of_refclef_overlays_its_mask(tmp_path: Path, pyplot: Recorder) -> None:
    r = REFER(refclef(tmp_path), "refclef", "unc")
    Image.new("RGB", (8, 6)).save(tmp_path / "3.jpg")
    r.IMAGE_DIR = str(tmp_path)
    r.showRef(r.Refs[0])
    overlay = pyplot.of("imshow")[-1][0]
    assert overlay.shape == (6, 8, 4) and np.array_equal(overlay[..., 3] > 0, r.getMask(r.Refs[0])["mask"] > 0)


def test_show_ref_with_real_matplotlib(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    r = REFER(write(tmp_path, GREFS, "grefs(unc).json", "grefcoco"), "grefcoco", "unc")
    r.IMAGE_DIR = str(tmp_path)
    Image.new("RGB", (8, 6)).save(tmp_path / "3.jpg")
    axes = plt.figure().gca()
    r.showRef(r.Refs[0])
    r.showRef(r.Refs[0], "box")
    r.showRef(r.Refs[1])  # nothing but the image
    assert len(axes.collections) == 4 and len(axes.patches) == 2 and len(axes.images) == 3
    axes.figure.canvas.draw()
    (tmp_path / "3.jpg").write_bytes(b"no image")
    with pytest.raises(ReferDataError, match="not a readable image"):
        r.showRef(r.Refs[0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_show_ref_shows_the_pixels_as_stored(tmp_path: Path, pyplot: Recorder, kind: str, orientation: int) -> None:
    r = REFER(write(tmp_path), "refcoco", "unc")
    r.IMAGE_DIR = str(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(pixels).save(tmp_path / r.Imgs[3]["file_name"], kind, exif=exif)
    r.showRef(r.Refs[0])
    np.testing.assert_array_equal(pyplot.of("imshow")[0][0], pixels)


def shown_pixel(root: Path, pyplot: Recorder, names: list[str]) -> Any:
    """First pixel value of image 3 as drawn by showRef, if the dataset's three images have these names."""
    images = [{**image, "file_name": name} for image, name in zip(INSTANCES["images"], names, strict=True)]
    r = REFER(write(root, instances={**INSTANCES, "images": images}), "refcoco", "unc")
    r.IMAGE_DIR = str(root / "images")
    pyplot.calls.clear()
    r.showRef(r.Refs[0])
    return int(pyplot.of("imshow")[0][0][0, 0, 0])


def test_show_ref_finds_images_by_the_same_rule_as_extraction(tmp_path: Path, pyplot: Recorder) -> None:
    for name, value in (("a/x.png", 1), ("b/x.png", 2), ("000000000009.jpg", 3), ("c/y.png", 4), ("../z.png", 5)):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (value, value, value)).save(path, quality=100)
    for name, value in (
        ("a/x.png", 1),
        ("data\\b\\x.png", 2),
        ("COCO_train2014_000000000009.jpg", 3),
        ("y.png", 4),
        ("../images/a/x.png", 1),
    ):
        assert shown_pixel(tmp_path, pyplot, [name, "4.jpg", "5.jpg"]) == value, name
    for name, why in (
        ("x.png", "ambiguous file name: a/x.png, b/x.png"),
        ("../z.png", "no file of that name"),
        (str(tmp_path / "z.png"), "no file of that name"),
        ("c/../../z.png", "no file of that name"),
        ("9.jpg", "no file of that name"),
    ):
        with pytest.raises(ReferNotFoundError, match=why):
            shown_pixel(tmp_path, pyplot, [name, "4.jpg", "5.jpg"])
    with pytest.raises(ReferNotFoundError, match=r"the best match, c/y\.png, is the file of another image"):
        shown_pixel(tmp_path, pyplot, ["d/y.png", "c/y.png", "5.jpg"])


def test_images_of_another_size_or_format_are_refused(tmp_path: Path, pyplot: Recorder) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.full((6, 8), 7 << 8, np.uint16)).save(folder / "deep.png")
    assert shown_pixel(tmp_path, pyplot, ["deep.png", "4.jpg", "5.jpg"]) == 7
    Image.new("L", (8, 7)).save(folder / "high.png")
    with pytest.raises(ReferDataError, match=r"high\.png: is 8x7, but instances\.json says 8x6"):
        shown_pixel(tmp_path, pyplot, ["high.png", "4.jpg", "5.jpg"])
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\nshowpage\n%%EOF\n"
    for name, data in (("a.eps", postscript), ("b.jpg", postscript), ("c.png", b""), ("d.png", b"no image")):
        (folder / name).write_bytes(data)
        with pytest.raises(ReferDataError, match=f"{name}: not a readable image .no known image format"):
            shown_pixel(tmp_path, pyplot, [name, "4.jpg", "5.jpg"])
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(ReferNotFoundError, match="no file of that name"):
        shown_pixel(tmp_path, pyplot, ["pipe.png", "4.jpg", "5.jpg"])


@pytest.mark.parametrize(("module", "method"), [("matplotlib", "showMask"), ("pandas", "to_dataframe")])
def test_errors_name_the_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, method: str
) -> None:
    r = REFER(write(tmp_path))
    for name in (module, f"{module}.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ReferError, match=f"pip install {module}"):
        getattr(r, method)(*([r.Refs[0]] if method == "showMask" else []))
