"""One trial: a specification in, a result out, the same code in every place that trains."""

from rayfin.training.spec import TrialResult, TrialSpec

__all__ = ["TrialResult", "TrialSpec"]
