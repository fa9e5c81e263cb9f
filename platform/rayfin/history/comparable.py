"""Which trials' scores compare: those of one objective on the same held-out tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from rayfin.history.record import finite
from rayfin.objectives import stage_of

R = TypeVar("R", bound=Any)


def evaluated_on(row: Any) -> str:
    """Return a text that two rows share if their scores compare.

    It names the objective and the held-out tokens. Two values of data.max_length may cut the
    held-out samples differently, and then a loss is the mean over other tokens. Rows that don't
    tell, of earlier versions or other programs, are taken to compare.
    """
    return json.dumps([stage_of(_mapping(row.spec)), eval_digest(row)])


def eval_digest(row: Any) -> Any:
    """Return the hash of the held-out tokens, or None for a row that does not tell."""
    return _mapping(_mapping(row.scenario).get("data")).get("eval_digest")


def comparable(rows: Sequence[R], metric: str, statuses: Sequence[str] = ("finished",)) -> list[R]:
    """Return the rows with a score whose scores compare, in order: the largest such group.

    Of groups of one size it is that with the larger data.max_length, which has more to predict.
    """
    groups: dict[str, list[R]] = {}
    for row in rows:
        if row.status in statuses and finite(row.metrics.get(metric)) is not None:
            groups.setdefault(evaluated_on(row), []).append(row)
    return max(groups.values(), key=lambda group: (len(group), _length(group[0])), default=[])


def _length(row: Any) -> float:
    return finite(_mapping(_mapping(row.spec).get("data")).get("max_length")) or 0.0


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
