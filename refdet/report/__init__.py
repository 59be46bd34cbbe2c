"""The self-contained HTML report of a run, a store and a model's answers."""

from refdet.report.inputs import PipelineStep, ReferPart, ReportInputs
from refdet.report.page import write

__all__ = ["ReportInputs", "ReferPart", "PipelineStep", "write"]
