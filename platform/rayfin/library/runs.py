"""Turn trials and sweeps into runs, as trackers (`report_to`) show them, without secrets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfin.config.load import saved
from rayfin.history.record import finite, now
from rayfin.metrics import METRICS, Score
from rayfin.redaction import redact, redacted
from rayfin.trackers import Point, Run
from rayfin.tuning.generations import generations_of
from rayfin.tuning.progress import settings
from rayfin.tuning.single import RUNS

if TYPE_CHECKING:
    from rayfin.config import Config
    from rayfin.evaluation.verdict import SweepOutcome
    from rayfin.history import TrialRecord
    from rayfin.paths import Storage
    from rayfin.statuses import Status

Figures = Mapping[int, Mapping[str, float]]
"""Step -> measurements by their names in trackers."""

SYSTEM = ("tokens_per_second", "peak_memory_bytes")
"""The metrics of a trial that say how it uses its machine."""
_ERROR = 500
"""Characters of a trial's error that a tag has."""


def system_figures(row: TrialRecord) -> dict[int, dict[str, float]]:
    """Return how a trial used its machine, at the step at which its row stands."""
    step = row.metrics.get("steps")
    found = ((f"system/{name}", finite(row.metrics.get(name))) for name in SYSTEM)
    values = {name: value for name, value in found if value is not None}
    return {step: values} if isinstance(step, int) and values else {}


def run_of_trial(row: TrialRecord, config: Config, storage: Storage, system: Figures) -> Run:
    """Return a trial as a run; `system` has what its rows said earlier of its machine, too."""
    hardware = row.scenario.get("hardware")
    tags = {
        "rayfin.trial_id": row.trial_id,
        "rayfin.sweep_id": row.sweep_id,
        "rayfin.fingerprint": row.fingerprint,
        "rayfin.status": row.status,
        "rayfin.recalled_from": row.scenario.get("recalled_from"),
        "rayfin.device": hardware.get("device") if isinstance(hardware, Mapping) else None,
        "rayfin.error": redact(row.error)[:_ERROR] if row.error else "",  # none any more
    }
    return Run(
        run_id=row.trial_id,
        title=redact(settings(config, row)) or row.trial_id,
        place=storage.trial(row.sweep_id, row.fingerprint[:8]),
        status=row.status,
        began=row.created_at,
        changed=row.updated_at,
        sweep=None if row.sweep_id == RUNS else run_of_sweep(row.sweep_id, [row], config, storage),
        begins=row.status == "running" and not row.curve,
        settings=_flat(row.spec),
        tags={key: str(value) for key, value in tags.items() if value is not None},
        points=_points(row, system),
        answers=[(step, redacted(answers)) for step, answers in generations_of(row.curve)],
        figures={} if row.status == "running" else _figures(row),
    )


def run_of_sweep(
    sweep_id: str, rows: Sequence[TrialRecord], config: Config, storage: Storage
) -> Run:
    """Return a sweep that is running as a run."""
    return Run(
        run_id=sweep_id,
        title=sweep_id,
        place=storage.sweep(sweep_id),
        status="running",
        began=min((row.created_at for row in rows), default=now()),
        changed=max((row.updated_at for row in rows), default=now()),
        is_sweep=True,
        settings=_flat(saved(config)),
        tags={"rayfin.sweep_id": sweep_id},
    )


def run_of_ended_sweep(run: Run, outcome: SweepOutcome, report: Path) -> Run:
    """Return the run of a sweep as it ended, with its best trial's metrics and its report."""
    best = outcome.best
    ended: Status = "failed" if best is None else "finished"
    tags = {
        "rayfin.best_trial": best.trial_id if best is not None else None,
        "rayfin.adapter": outcome.adapter,
    }
    return replace(
        run,
        status="interrupted" if outcome.interrupted else ended,
        tags={**run.tags, **{key: value for key, value in tags.items() if value is not None}},
        figures=_figures(best) if best is not None else {},
        files=(report,),
    )


def _flat(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by their dotted names; lists are JSON."""

    def walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, Mapping) and value:
                yield from walk(value, f"{prefix}{key}.")
            else:
                simple = value is None or isinstance(value, str | int | float)
                yield f"{prefix}{key}", value if simple else json.dumps(value, ensure_ascii=False)

    # As messages, so that what looks like a secret anywhere in a value goes, too.
    return dict(walk(redacted(section), ""))


def _points(row: TrialRecord, system: Figures) -> list[Point]:
    found: dict[int, dict[str, float]] = {step: dict(values) for step, values in system.items()}
    for point in row.curve:
        values = {key: number for key, it in point.items() if (number := finite(it)) is not None}
        if (step := values.pop("step", None)) is None:
            continue
        for score in METRICS.values():
            if isinstance(score, Score) and score.exponential_of in values:
                values[score.name] = score.at(values) or 0.0
        named = {_name(key): value for key, value in values.items()}
        found.setdefault(int(step), {}).update(named)
    return sorted(found.items())


def _name(key: str) -> str:
    """Return a measurement's name as Transformers gives it to trackers."""
    group = "eval" if isinstance(METRICS.get(key), Score) else "train"
    return f"{group}/{key.removeprefix('eval_')}"


def _figures(row: TrialRecord) -> dict[str, float]:
    found = ((name, finite(value)) for name, value in row.trained_metrics.items())
    return {name: value for name, value in found if value is not None}
