"""A trial's row in the history, from its start to its end."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from datetime import datetime
from typing import Any

from rayfin.errors import StorageError, TrialHung
from rayfin.heartbeat import hang_position
from rayfin.history import History, TrialRecord, now
from rayfin.history.driver import DRIVER, this_driver, without_driver
from rayfin.history.versions import package_versions
from rayfin.objectives import main_metric, stage_of
from rayfin.paths import StoragePath
from rayfin.statuses import Status
from rayfin.training.checkpoint import clear_checkpoints
from rayfin.training.spec import MEMORY_MONITOR, TrialResult
from rayfin.training.starting_adapter import saves_state
from rayfin.tuning.plan import PlannedTrial

log = logging.getLogger(__name__)

_HUNG = re.compile(rf"{TrialHung.__name__}: (.+)$", re.MULTILINE)


def started(planned: PlannedTrial, created_at: datetime | None = None) -> TrialRecord:
    """Return the row of a trial that starts; an interrupted one keeps the time of its creation."""
    return TrialRecord(
        trial_id=planned.trial_id,
        sweep_id=sweep_of(planned),
        fingerprint=planned.fingerprint,
        status="running",
        created_at=created_at or now(),
        updated_at=now(),
        spec=planned.spec.model_dump(mode="json"),
        scenario={DRIVER: this_driver()},
        metrics={},
        curve=[],
        error=None,
        versions=package_versions(),
        directory=str(planned.location),
    )


def usable(history: History, trial: PlannedTrial, metric: str) -> TrialRecord | None:
    """Return the finished trial of the history that makes training `trial` needless, or None.

    It has the score `metric`, and its adapter is there, with the state to continue it if `trial`
    would save one.
    """
    earlier = history.finished(trial.fingerprint)
    if earlier is None or earlier.directory is None or metric not in earlier.metrics:
        return None
    if _only_model(earlier) and saves_state(trial.spec.method, trial.spec.train):
        return None
    try:
        return earlier if adapter_place(earlier).exists() else None
    except StorageError as error:  # a bucket of others, who share the history; or not its own
        log.warning("trial %s can't be taken from the history: %s", earlier.trial_id, error)
        return None


def _only_model(row: TrialRecord) -> bool:
    return bool(row.spec.get("train", {}).get("save_only_model"))


def adapter_place(row: TrialRecord) -> StoragePath:
    """Return where the adapter of a trial lies; raises StorageError where the row names another's.

    Whoever may write to a shared history could have a row point to any adapter. A trial's own
    directory ends in its fingerprint, wherever the storage lies and whichever sweep it was of.
    """
    location = StoragePath.at(row.directory or "")
    if location.path.parts[-2:] != ("trials", row.fingerprint[:8]):
        raise StorageError(
            f"history: the row of trial {row.trial_id} names '{row.directory}', which is not that "
            f"trial's directory (its own ends in trials/{row.fingerprint[:8]}), so that nothing is "
            "taken from there; --rerun trains it again"
        )
    adapter = location / "adapter"
    if adapter.path.is_symlink():
        raise StorageError(
            f"history: '{adapter}' of trial {row.trial_id} is a link, and might be another's; "
            "put the directory itself there, or train it again with --rerun"
        )
    return adapter


def recalled(planned: PlannedTrial, earlier: TrialRecord) -> TrialRecord:
    """Return an earlier sweep's finished trial as a row of this one; nothing was trained for it."""
    # Its own spec: what does not enter the fingerprint (paths, batch split) may differ. But what
    # was saved is what lies in the directory.
    spec = planned.spec.model_dump(mode="json")
    spec["train"]["save_only_model"] = _only_model(earlier)
    return earlier.updated(
        trial_id=planned.trial_id,
        sweep_id=sweep_of(planned),
        created_at=now(),
        spec=spec,
        metrics=earlier.trained_metrics,
        scenario=earlier.scenario | {"recalled_from": earlier.trial_id},
    )


def refused(planned: PlannedTrial, reason: str, before: TrialRecord | None = None) -> TrialRecord:
    """Return the row of a trial that was not started, as it would run out of memory.

    `before` is its row in the sweep that is resumed.
    """
    if before is not None and before.error == reason:
        return before
    created_at = before.created_at if before is not None else None
    row = started(planned, created_at)
    return row.updated(status="oom", error=reason, directory=None, scenario={})


def was_refused(row: TrialRecord) -> bool:
    """Return whether a trial was never started.

    Another machine, or a longer history, may judge it anew.
    """
    return row.status == "oom" and row.directory is None and not row.metrics


def let_checkpoints_go(row: TrialRecord) -> None:
    """Remove the checkpoints of a trial whose end the history has: no resume needs them.

    Those of a trial that the row was only recalled from are not its own.
    """
    if row.directory is not None and "recalled_from" not in row.scenario:
        with contextlib.suppress(OSError, StorageError):  # they only take room
            clear_checkpoints(StoragePath.at(row.directory) / "checkpoints")


def sweep_of(planned: PlannedTrial) -> str:
    """Return the id of a trial's sweep: `<sweep_id>-<fingerprint>` without its end."""
    return planned.trial_id.rpartition("-")[0]


def early_stop(row: TrialRecord) -> str:
    """Return where early stopping ended a trial, and which evaluation's adapter was kept, if so."""
    stop, kept = row.scenario.get("early_stop"), row.scenario.get("kept_step")
    words = [f"early stop at step {stop}"] if stop is not None else []
    words += [f"kept the adapter of step {kept}, the best evaluation"] if kept is not None else []
    return ", ".join(words)


def end_line(row: TrialRecord) -> str:
    """Return why a finished trial ended before its last step, and which adapter was kept.

    It is empty where neither train.early_stopping_patience nor train.keep=best had a say.
    """
    train, stop = row.spec["train"], row.scenario.get("early_stop")
    metric, patience = row.spec.get("metric") or "score", train.get("early_stopping_patience")
    words = []
    if stop is not None:
        evaluations = f"{patience} evaluation{'' if patience == 1 else 's'}"
        words.append(f"early stop at step {stop}, after {evaluations} without a better {metric}")
    if train.get("keep") == "best" and row.status == "finished":
        kept, best = row.scenario.get("kept_step"), f"the best evaluation by {metric}"
        step = f"{row.metrics['steps']}, the last and" if kept is None else f"{kept},"
        words.append(f"kept the adapter of step {step} {best}")
    elif stop is not None:
        words.append(
            f"kept the adapter of step {stop}, the last (train.keep=best keeps that of the best "
            "evaluation)"
        )
    return "; ".join(words)


def with_result(row: TrialRecord, result: TrialResult) -> TrialRecord:
    """Return `row` with a trial's result in it; a finished one without its main score is failed."""
    status, error = result.status, result.error
    metrics = {k: v for k, v in result.metrics.items() if _sound(v)}
    score = main_metric(stage_of(row.spec))
    if status == "finished" and score not in metrics:
        status, error = "failed", f"{score} is {result.metrics.get(score)}"
    driver = {DRIVER: this_driver()} if status == "running" else {}
    spec = row.spec
    if result.max_steps is not None:  # samples without an answer left may have gone from the data
        spec = spec | {"train": spec["train"] | {"max_steps": result.max_steps}}
    return row.updated(
        status=status,
        spec=spec,
        metrics=metrics or row.metrics,
        curve=[p for p in result.curve if all(map(_sound, p.values()))] or row.curve,
        scenario=(result.scenario or without_driver(row)) | driver,
        error=error,
    )


def died(row: TrialRecord, reason: str | None) -> TrialRecord:
    """Return the row of a trial whose process died; `reason` is Ray's message, or a whole trace."""
    text = _COLOUR.sub("", reason or "its process ended")
    if (hung := _HUNG.search(text)) is not None:
        return ended(row, "failed", hung.group(1))
    if (where := hang_position(row.trial_id)) is not None:
        return ended(row, "failed", str(TrialHung.ended_at(where)))
    if not any(words in text for words in (MEMORY_MONITOR, "OutOfMemoryError")):
        return ended(row, "failed", f"worker process died: {_gist(text)}")
    remedy = "lower train.per_device_train_batch_size or sweep.max_concurrent_trials"
    return ended(row, "oom", f"worker process died: {_gist(text)}; {remedy}")


def ended(row: TrialRecord, status: Status, error: str | None = None) -> TrialRecord:
    """Return the row of a trial that ended without a result of its own."""
    return row.updated(status=status, error=error, scenario=without_driver(row))


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
"""Ray colours the first line of a trace, on a terminal or not."""


def _gist(text: str) -> str:
    """Return the error of a trace, or of a message of Ray's what is not about the process."""
    lines = [line for line in text.splitlines() if line.strip()]
    if any(line.startswith(("Traceback", "ray::")) for line in lines):
        lines = lines[-1:]
    elif MEMORY_MONITOR in text:  # a page on what else took memory follows
        lines = lines[:1]
    told = " ".join(line for line in lines if not line.startswith("\t"))
    return " ".join(told.split())[:400]


def _sound(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
