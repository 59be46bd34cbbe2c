"""Evaluation: COCO AP, and the metrics of REFER."""
