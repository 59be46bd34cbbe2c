"""The self-contained HTML report of a run."""

from refdet.report.page import Inputs, ReferPart, write
from refdet.report.sections import Step

__all__ = ["Inputs", "ReferPart", "Step", "write"]
