"""refdet: leak-free Mask R-CNN regions and features for referring expressions.

    detector = refdet.load_detector("runs/res101")
    regions = detector.detect("image.jpg")

What the package offers is imported when it is used: ``import refdet`` alone brings neither torch nor NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from refdet.files.version import __version__

if TYPE_CHECKING:
    from refdet.detector.detector import Detector, load_detector
    from refdet.evaluation.refer_benchmark import evaluate_on_refer
    from refdet.extraction.extract import extract_features
    from refdet.extraction.image_list import ImageList
    from refdet.extraction.options import ExtractOptions
    from refdet.splits.build import build_split
    from refdet.splits.leak_audit import audit
    from refdet.store.dataset import RegionsDataset
    from refdet.store.reader import Store
    from refdet.store.reader import open as open_store
    from refdet.structures.regions import Regions
    from refdet.training.train import train

__all__ = [
    "Detector",
    "ExtractOptions",
    "ImageList",
    "Regions",
    "RegionsDataset",
    "Store",
    "__version__",
    "audit",
    "build_split",
    "evaluate_on_refer",
    "extract_features",
    "load_detector",
    "open_store",
    "train",
]

_PLACES = {
    "Detector": "refdet.detector.detector:Detector",
    "ExtractOptions": "refdet.extraction.options:ExtractOptions",
    "ImageList": "refdet.extraction.image_list:ImageList",
    "Regions": "refdet.structures.regions:Regions",
    "RegionsDataset": "refdet.store.dataset:RegionsDataset",
    "Store": "refdet.store.reader:Store",
    "audit": "refdet.splits.leak_audit:audit",
    "build_split": "refdet.splits.build:build_split",
    "evaluate_on_refer": "refdet.evaluation.refer_benchmark:evaluate_on_refer",
    "extract_features": "refdet.extraction.extract:extract_features",
    "load_detector": "refdet.detector.detector:load_detector",
    "open_store": "refdet.store.reader:open",
    "train": "refdet.training.train:train",
}


def __getattr__(name: str) -> Any:
    """A name of the API, imported when it is first used."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
