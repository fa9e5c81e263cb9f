"""One line each on what a reader of a sweep's result should know besides its scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rayfin.config import Config

if TYPE_CHECKING:
    from rayfin.history.record import TrialRecord


def sweep_notes(trials: Sequence[TrialRecord], config: Config) -> list[str]:
    """Returns plain sentences, the most important first; the report escapes and lists them.

    `trials` are in the order in which they were started.
    """
    return list(dict.fromkeys(note for trial in trials for note in trial.notes))
