"""The heavy operations of the detector: Python faces of csrc/, each with a plain PyTorch fallback."""
