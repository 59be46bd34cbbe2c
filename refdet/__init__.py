"""refdet: leak-free Mask R-CNN regions and features for referring expressions."""

__version__ = "0.1.0"
