"""Trials of a sweep whose scores don't compare with those that the best was chosen from."""

from __future__ import annotations

from collections.abc import Sequence

from rayfin.errors import listed
from rayfin.history import TrialRecord
from rayfin.history.comparable import comparable, comparison_groups, decides_scored_tokens
from rayfin.history.record import finite
from rayfin.statuses import SCORED
from rayfin.tuning.space import SearchSpace


def comparison_notes(space: SearchSpace, rows: Sequence[TrialRecord]) -> list[str]:
    """Return a sentence for each group of trials that were scored on other tokens than the best.

    `rows` are in the order of their numbers.
    """
    metric = space.config.sweep.metric
    chosen = comparable(rows, metric)
    if not chosen:
        return []
    keys = comparison_groups(rows, metric)
    here = next(key for row, key in zip(rows, keys, strict=True) if row is chosen[0])
    groups: dict[str, list[int]] = {}
    for number, (row, key) in enumerate(zip(rows, keys, strict=True)):
        if row.status in SCORED and finite(row.metrics.get(metric)) is not None:
            groups.setdefault(key, []).append(number)
    lines = []
    for key, numbers in groups.items():
        if key == here:
            continue
        some = [rows[number] for number in numbers]
        settings = [
            f"{axis}={' or '.join(values)}"
            for axis in space.axes
            if decides_scored_tokens(axis, space.config.data)
            if (values := _values(space, axis, some)) != _values(space, axis, chosen)
        ]
        with_settings = f" with {', '.join(settings)}" if settings else ""
        which = listed([str(number + 1) for number in numbers])
        one = len(numbers) == 1
        lines.append(
            f"trial{'' if one else 's'} {which}{with_settings} "
            f"{'was' if one else 'were'} scored on other held-out tokens than the {len(chosen)} "
            f"among which the best was chosen: {'its' if one else 'their'} {metric} does not "
            "compare with theirs"
        )
    return lines


def _values(space: SearchSpace, axis: str, rows: Sequence[TrialRecord]) -> list[str]:
    found = (space.values_in(row.spec).get(axis) for row in rows)
    return list(dict.fromkeys(map(str, found)))
