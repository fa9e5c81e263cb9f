"""What a sweep and a training return, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayfin.adapters import AdapterVersion
    from rayfin.config import Config
    from rayfin.evaluation.verdict import Verdict
    from rayfin.history import TrialRecord


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to."""

    config: Config
    sweep_id: str
    trials: tuple[TrialRecord, ...]
    """All its trials as the history has them, in the order in which they began."""
    best: TrialRecord | None
    """The finished trial with the best sweep.metric; None where none finished."""
    verdict: Verdict
    """How the best trial stands against the base model, and what to do next."""
    report: str
    """Path or URL of the HTML report."""
    history: str
    """URL of the history that has the trials, without a password."""
    published: AdapterVersion | None = None
    """What the best trial was published as; None where publish is null, or that failed."""
    failed: tuple[str, ...] = ()
    """One line for each step after the training that failed: why, and what mends it."""
    notes: tuple[str, ...] = ()
    """What is to be known of the search space: settings that not every method has, a best value at
    the edge of its range."""
    interrupted: bool = False
    """Whether Ctrl-C ended it; the same sweep with `resume=True` goes on."""

    @property
    def not_comparable(self) -> tuple[str, ...]:
        """The ids of the trials whose scores don't compare with the best one's.

        They were scored on other held-out tokens; see `notes`.
        """
        from rayfin.history.comparable import not_comparable

        others = not_comparable(self.trials, self.config.sweep.metric, self.best)
        return tuple(row.trial_id for row, other in zip(self.trials, others, strict=True) if other)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as `rayfin sweep --json` prints them."""
        return {
            "sweep_id": self.sweep_id,
            "interrupted": self.interrupted,
            "trials": [row.model_dump(mode="json") for row in self.trials],
            "notes": list(self.notes),
            "best": self.best.trial_id if self.best else None,
            "not_comparable": list(self.not_comparable),
            "verdict": self.verdict.as_dict(),
            "adapter": self.published.as_dict() if self.published else None,
            "report": self.report,
            "history": self.history,
            "failed": list(self.failed),
        }


@dataclass(frozen=True)
class TrainResult:
    """What one training came to."""

    trial: TrialRecord
    """Its row in the history; `trial.status` is "finished", or says how it ended otherwise."""
    history: str
    """URL of the history that has the trial, without a password."""
    published: AdapterVersion | None = None
    """What it was published as; None where publish is null, or that or the training failed."""
    failed: tuple[str, ...] = ()
    """One line for each step after the training that failed: why, and what mends it."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as `rayfin train --json` prints them."""
        return {
            "trial": self.trial.model_dump(mode="json"),
            "adapter": self.published.as_dict() if self.published else None,
            "failed": list(self.failed),
        }
