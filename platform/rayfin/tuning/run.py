"""What the parts of a running sweep share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rayfin.history import History, TrialRecord
from rayfin.tuning.plan import PlannedTrial, SweepPlan
from rayfin.tuning.progress import ProgressDisplay
from rayfin.tuning.record import OnRecord
from rayfin.tuning.search import Advisor
from rayfin.tuning.space import Values


@dataclass(frozen=True)
class SweepRun:
    """A sweep that is ready to run: made once, and handed to whatever runs, shows or records it."""

    plan: SweepPlan
    history: History
    known: tuple[TrialRecord, ...] = ()
    """Rows of its trials that have ended, which a resumed sweep leaves as they are."""
    unfinished: tuple[TrialRecord, ...] = ()
    """Rows of trials that were interrupted, and of those that were refused."""
    first: tuple[Values, ...] = ()
    """Points to try before the sampler's own."""
    advisor: Advisor | None = None
    """Chooses the next trial in the sampler's place."""
    refuse: Callable[[PlannedTrial], str | None] | None = None
    """Why a trial can't run on this machine; None where it may."""
    rerun: bool = False
    """Whether what the history holds as finished is trained again."""
    cluster: str | None = None
    """Address of the Ray cluster; None for one of the sweep's own."""
    progress: ProgressDisplay = field(default_factory=ProgressDisplay.silent)
    on_record: OnRecord = lambda row: None
    """Takes each row as it is written to the history."""
