"""refdet: leak-free Mask R-CNN regions and features for referring expressions.

    detector = refdet.load_detector("runs/res101")
    regions = detector.detect("image.jpg")

The public names are imported when they are first used: ``import refdet`` alone imports neither torch nor NumPy.
"""

# `python -m refdet` runs this file before `__main__` removes the current folder from sys.path. So it must not import a
# module that Python has not loaded yet, not even typing or __future__.
from importlib import import_module

from refdet.files.version import __version__

TYPE_CHECKING = False  # type checkers take it for True
if TYPE_CHECKING:
    import typing

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

_EXPORTS = {  # public name -> "module:attribute"
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


def __getattr__(name: str) -> "typing.Any":
    """Import a public name when it is first used."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _EXPORTS[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
