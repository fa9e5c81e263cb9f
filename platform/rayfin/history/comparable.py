"""Which trials' scores compare: those of one objective on the same held-out tokens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from rayfin.config import DataConfig, ModelConfig, Section
from rayfin.history.record import finite
from rayfin.objectives import stage_of

R = TypeVar("R", bound=Any)


def comparison_groups(rows: Sequence[Any]) -> list[str]:
    """Return for each row a text that it shares with the rows whose scores compare with its own.

    It names the objective and the held-out tokens. Two values of data.max_length may cut the
    held-out samples differently, and then a loss is the mean over other tokens.
    """
    stages = (stage_of(_mapping(row.spec)) for row in rows)
    found = zip(stages, eval_digests(rows), strict=True)
    return [json.dumps([stage, digest]) for stage, digest in found]


def eval_digests(rows: Sequence[Any]) -> list[Any]:
    """Return for each row the hash of its held-out tokens, as far as the rows tell.

    A row of an earlier version or another program does not tell. It is given the hash of a row of
    its objective with the same model and data settings or, where there is none, the hash that most
    rows of its objective have. None stands where no row of its objective tells.
    """
    read: list[tuple[str, str, Any]] = []
    told: dict[str, Counter[Any]] = {}
    alike: dict[str, Any] = {}
    for row in rows:
        spec, data = _mapping(row.spec), _mapping(_mapping(row.scenario).get("data"))
        stage, digest = stage_of(spec), data.get("eval_digest")
        sections = [
            written_settings(spec.get("model"), ModelConfig),
            written_settings(spec.get("data"), DataConfig),
        ]
        settings = json.dumps([stage, *sections], sort_keys=True)
        read.append((stage, settings, digest))
        if digest is not None:
            told.setdefault(stage, Counter())[digest] += 1
            alike.setdefault(settings, digest)
    usual = {stage: counts.most_common(1)[0][0] for stage, counts in told.items()}
    return [
        alike.get(settings, usual.get(stage)) if digest is None else digest
        for stage, settings, digest in read
    ]


def written_settings(section: Any, kind: type[Section]) -> Any:
    """Return a section without the settings at their defaults, which older records may lack."""
    defaults = kind().model_dump(mode="json")
    if not isinstance(section, dict):
        return section
    return {k: v for k, v in section.items() if k not in defaults or v != defaults[k]}


def comparable(rows: Sequence[R], metric: str, statuses: Sequence[str] = ("finished",)) -> list[R]:
    """Return the rows with a score whose scores compare, in order: the largest such group.

    Of groups of one size it is that with the larger data.max_length, which has more to predict.
    """
    groups: dict[str, list[R]] = {}
    for row, group in zip(rows, comparison_groups(rows), strict=True):
        if row.status in statuses and finite(row.metrics.get(metric)) is not None:
            groups.setdefault(group, []).append(row)
    return max(groups.values(), key=lambda group: (len(group), _length(group[0])), default=[])


def _length(row: Any) -> float:
    return finite(_mapping(_mapping(row.spec).get("data")).get("max_length")) or 0.0


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
