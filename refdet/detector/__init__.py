"""The detector: network, checkpoints and inference."""
