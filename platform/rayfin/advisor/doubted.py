"""Name the trials that an answer sets aside or counts for less, and say why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rayfin.advisor.answer import DoubtedTrial
from rayfin.advisor.knowledge import Knowledge
from rayfin.advisor.quality_model import ScenarioPosterior, is_informative_row
from rayfin.language import localized

_SCATTERS = 2.0
"""From how many times the usual noise, as a standard deviation, a source is named."""
_NAMED = 5
"""The most ids in a sentence; `doubted` has all."""


def doubted_trials(
    knowledge: Knowledge, posterior: ScenarioPosterior, scenario: Mapping[str, float]
) -> list[DoubtedTrial]:
    """Return the doubted trials among those that could say something about `scenario`."""
    found = [
        DoubtedTrial(
            trial_id=trial_id,
            doubt="impossible",
            summary=knowledge.summary_of(trial_id),
        )
        for trial_id, row in knowledge.set_aside.items()
        if is_informative_row(row, scenario)
    ]
    for index, outlier, scatter in zip(
        posterior.trials, posterior.outliers, posterior.scatter, strict=True
    ):
        if outlier or scatter >= _SCATTERS:
            trial_id = str(knowledge.ids[index])
            found.append(
                DoubtedTrial(
                    trial_id=trial_id,
                    doubt="outlier" if outlier else "noisy",
                    summary=knowledge.summary_of(trial_id),
                )
            )
    return found


def doubt_notes(doubted: Sequence[DoubtedTrial]) -> list[str]:
    """Return a sentence for each reason for which trials are doubted."""
    notes = []
    if named := _named(doubted, "impossible"):
        notes.append(
            localized(
                "set aside: {trials}; a score that can't be, or far below all near it",
                trials=named,
            )
        )
    if named := _named(doubted, "outlier"):
        notes.append(
            localized(
                "count for little: {trials}; they contradict the trials around them",
                trials=named,
            )
        )
    if named := _named(doubted, "noisy"):
        notes.append(
            localized(
                "count for less: {trials}; the trials of their source scatter more than their "
                "settings explain",
                trials=named,
            )
        )
    return notes


def _named(doubted: Sequence[DoubtedTrial], doubt: str) -> str:
    """Return `3 trials (a, b, c)`, or an empty text where none is doubted for that reason."""
    ids = [one.trial_id for one in doubted if one.doubt == doubt]
    if not ids:
        return ""
    named = ", ".join(ids[:_NAMED]) + ", …" * (len(ids) > _NAMED)
    plural = "s" * (len(ids) > 1)
    return localized("{count} trial{plural} ({named})", count=len(ids), plural=plural, named=named)
