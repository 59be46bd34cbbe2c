"""showRef, showMask, and what is not installed."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refer_examples import GREFS, refclef, write

from refer import REFER, ReferDataError, ReferError, ReferNotFoundError


class Recorder:
    """Stands for matplotlib's modules and axes: notes what is called with what."""

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


def test_show_a_ref(tmp_path: Path, pyplot: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
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
    with pytest.raises(ReferDataError, match="seg_box is 'mask'"):
        r.showRef(r.Refs[0], "mask")
    r.showMask(r.Refs[0])
    assert np.array_equal(pyplot.of("imshow")[-1][0], r.getMask(r.Refs[0])["mask"])


def test_show_a_ref_of_refclef(tmp_path: Path, pyplot: Recorder) -> None:
    r = REFER(refclef(tmp_path), "refclef", "unc")
    Image.new("RGB", (8, 6)).save(tmp_path / "3.jpg")
    r.IMAGE_DIR = str(tmp_path)
    r.showRef(r.Refs[0])
    veil = pyplot.of("imshow")[-1][0]
    assert veil.shape == (6, 8, 4) and np.array_equal(veil[..., 3] > 0, r.getMask(r.Refs[0])["mask"] > 0)


def test_showing_with_matplotlib_itself(tmp_path: Path) -> None:
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
    with pytest.raises(ReferDataError, match="cannot be read as an image"):
        r.showRef(r.Refs[0])


@pytest.mark.parametrize(("module", "ask"), [("matplotlib", "showMask"), ("pandas", "frame")])
def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, ask: str) -> None:
    r = REFER(write(tmp_path))
    for name in (module, f"{module}.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ReferError, match=f"pip install {module}"):
        getattr(r, ask)(*([r.Refs[0]] if ask == "showMask" else []))
