"""The self-contained HTML report of a run, a store and a model's answers."""

from refdet.report.inputs import Inputs, ReferPart, Step
from refdet.report.page import write

__all__ = ["Inputs", "ReferPart", "Step", "write"]
