"""Operators of the detector: wrappers of the kernels in csrc/, with fallbacks in plain PyTorch."""
