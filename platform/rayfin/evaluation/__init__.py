"""What a sweep found: which settings mattered, and the report people open."""

from rayfin.evaluation.importance import parameter_importance
from rayfin.evaluation.report import Sample, write_sweep_report
from rayfin.evaluation.verdict import SweepOutcome

__all__ = ["Sample", "SweepOutcome", "parameter_importance", "write_sweep_report"]
