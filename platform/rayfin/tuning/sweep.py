"""A sweep: Optuna's proposals, Ray Tune's workers and ASHA, the history's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from rayfin.config import Config
from rayfin.errors import ConfigError
from rayfin.hardware import cluster_address, describe_hardware
from rayfin.history import History, TrialRecord
from rayfin.history.comparable import comparable
from rayfin.history.driver import mark_lost_trials
from rayfin.paths import Storage, StoragePath
from rayfin.statuses import ENDED, SCORED, UNFINISHED
from rayfin.training.precision import MIXED, in_mixed_precision, precision_note, with_precision
from rayfin.tuning.comparison import comparison_notes
from rayfin.tuning.driver_lock import driver_lock
from rayfin.tuning.edges import edge_notes
from rayfin.tuning.plan import PlannedTrial, SweepPlan, find_resumable, new_plan
from rayfin.tuning.preflight import check_run
from rayfin.tuning.progress import ProgressDisplay, few_settings
from rayfin.tuning.record import OnRecord
from rayfin.tuning.rows import ended, let_checkpoints_go, was_refused
from rayfin.tuning.run import SweepRun
from rayfin.tuning.search import Advisor, distinct_settings
from rayfin.tuning.space import Values
from rayfin.tuning.space_check import check_space, space_notes, variants

Advise = Callable[[SweepPlan], Advisor | None]
"""Makes the advisor of a sweep; None where it has nothing to say, and the search is auto."""

Refuse = Callable[[SweepPlan, PlannedTrial], str | None]
"""Returns why a trial can't run on this machine; None where it may."""


@dataclass(frozen=True)
class EndedSweep:
    """What a sweep leaves: its rows in the order of their creation, and the best of them.

    `rayfin.library.results.SweepResult` is this with what followed: the report, the adapter.
    """

    plan: SweepPlan
    trials: list[TrialRecord]
    best: TrialRecord | None
    interrupted: bool
    notes: tuple[str, ...] = ()
    """Lines on the space: settings that only some trials have, a space that has fewer settings than
    `sweep.num_samples`, trials whose scores don't compare, and a best value at the edge of its
    range."""

    @property
    def location(self) -> StoragePath:
        return self.plan.location


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is run; none of it changes what a trial computes."""

    resume: bool = False
    """Carry on with the newest sweep that the same configuration started, if there is one."""
    rerun: bool = False
    """Train also what the history already holds as finished; else the same command's trials come
    first, and are not trained again."""
    address: str | None = None
    """Address of a running Ray cluster; None starts Ray on this machine."""
    notes: tuple[str, ...] = ()
    """What is to be told when it starts, and in its result, beside the space's own notes."""
    advise: Advise | None = None
    """Makes the advisor that sweep.search=advisor needs, and auto takes if there is one."""
    refuse: Refuse | None = None
    """Asked before a trial starts on this machine; what it refuses becomes a row that ran out of
    memory, with the reason. A cluster's machines may be others, and are not judged."""
    progress: ProgressDisplay = field(default_factory=ProgressDisplay)
    on_record: OnRecord = lambda row: None
    """Takes each row as it is written to the history."""


def run_sweep(
    config: Config, history: History, storage: Storage, options: SweepOptions | None = None
) -> EndedSweep:
    """Run the sweep that `config` describes; every trial becomes a row of `history`.

    Raises UsageErrors before anything starts; Ctrl-C ends the sweep with `interrupted` set.
    """
    options = options or SweepOptions()
    check_space(new_plan(config, storage).space)
    cluster = cluster_address(options.address)
    config, precision = _in_precision(config, storage, options.resume, cluster)
    plan = new_plan(config, storage)
    earlier = find_resumable(config, storage)
    if options.resume and earlier is not None:
        plan = earlier
    check_run(plan, variants(plan.space), cluster)
    starts = [f"trials start from the adapter {one.name}" for one in plan.starts.values()]
    notes = (*options.notes, *precision, *starts, *space_notes(plan.space))
    options.progress.tell((*plan.notes, *notes))
    otherwise = "wait for its end, or leave --resume out to start another"
    with driver_lock(plan.location, f"--resume: sweep {plan.sweep_id}", otherwise):
        # Not before: another driver may have gone on with this sweep until now.
        mark_lost_trials(history)
        rows = history.trials(sweep_id=plan.sweep_id)
        _check_unchanged(plan, rows)
        plan.save()
        again = earlier is not None and not (options.resume or options.rerun)
        refuse = options.refuse
        run = SweepRun(
            plan=plan,
            history=history,
            known=tuple(row for row in rows if _has_ended(row)),
            unfinished=tuple(row for row in rows if not _has_ended(row)),
            first=tuple(_finished_points(earlier, history)) if earlier and again else (),
            advisor=_advisor(plan, options.advise),
            refuse=partial(refuse, plan) if refuse is not None and cluster is None else None,
            rerun=options.rerun,
            cluster=cluster,
            progress=options.progress,
            on_record=options.on_record,
        )
        result = _run(run)
        return replace(result, notes=(*notes, *result.notes))


def _in_precision(
    config: Config, storage: Storage, resume: bool, cluster: str | None
) -> tuple[Config, list[str]]:
    """Return `config` in the precision of its trials, and what is to be told of it.

    A sweep that another machine, or an earlier version, began goes on in the precision in which it
    began. Raises ConfigError where this machine can't go on in it.
    """
    chosen = with_precision(config) if cluster is None else config
    if not resume or find_resumable(chosen, storage) is not None:
        return chosen, precision_note(chosen)
    if chosen != config and find_resumable(config, storage) is not None:
        return config, []
    mixed = in_mixed_precision(config)
    if mixed is None or (begun := find_resumable(mixed, storage)) is None:
        return chosen, precision_note(chosen)
    if cluster is None and describe_hardware(config.scaling.use_gpu).device == "cuda":
        raise ConfigError(
            f"--resume: sweep {begun.sweep_id} began on a processor, in model.dtype={MIXED}, and "
            "this would run on a GPU; use scaling.use_gpu=false, or leave --resume out to start "
            "anew"
        )
    return mixed, [f"model.dtype={MIXED}: sweep {begun.sweep_id} began in it"]


def _advisor(plan: SweepPlan, advise: Advise | None) -> Advisor | None:
    search = plan.config.sweep.search
    if search == "advisor" and advise is None:
        raise ConfigError("sweep.search=advisor: no advisor was given; use tpe, random or grid")
    return advise(plan) if advise is not None and search in ("advisor", "auto") else None


def _finished_points(earlier: SweepPlan, history: History) -> list[Values]:
    """Return what the same command finished before: first, so that the history answers it again.

    A search that has learned from those trials would ask for others.
    """
    rows = history.trials(sweep_id=earlier.sweep_id, status="finished")
    return [earlier.space.values_in(row.spec) for row in rows]


def _run(run: SweepRun) -> EndedSweep:
    plan, history = run.plan, run.history
    completed, distinct = True, distinct_settings(plan)
    run.progress.begin(plan, run.known, distinct)
    try:
        if len(run.known) < distinct:
            from rayfin.tuning.tune import run_trials

            completed = run_trials(run)
    finally:
        run.progress.end()
    if completed:
        _tidy(plan, history)
    rows = history.trials(sweep_id=plan.sweep_id)
    best = best_trial(rows, plan.config.sweep.metric, plan.config.sweep.direction)
    few = few_settings(plan.config, distinct)
    notes = [few] if few else []
    notes += comparison_notes(plan.space, rows) + edge_notes(plan.space, rows)
    return EndedSweep(plan, rows, best, not completed, tuple(notes))


def _has_ended(row: TrialRecord) -> bool:
    """Return whether a resumed sweep leaves a row as it is; a refused one is judged again."""
    return row.status in ENDED and not was_refused(row)


def best_trial(rows: Sequence[TrialRecord], metric: str, mode: str) -> TrialRecord | None:
    """Return the finished trial with the best metric; the earlier one where two are equal.

    It is chosen among trials that were scored on the same tokens: see `comparable`.
    """
    sign = 1.0 if mode == "min" else -1.0
    return min(
        comparable(rows, metric), key=lambda row: sign * float(row.metrics[metric]), default=None
    )


def _check_unchanged(plan: SweepPlan, rows: Sequence[TrialRecord]) -> None:
    """Raise ConfigError where a resumed sweep's trials computed something else than now."""
    for row in rows:
        if plan.trial(plan.space.values_in(row.spec)).fingerprint != row.fingerprint:
            raise ConfigError(
                f"--resume: the data, the model or the adapter of method.init_from changed since "
                f"sweep {plan.sweep_id} began, or an "
                "earlier version of rayfin began it, and its trials can't be compared with new "
                "ones; leave --resume out to start anew"
            )


def _tidy(plan: SweepPlan, history: History) -> None:
    """End the rows for which a resumed sweep, asked for fewer trials, had no use any more, and
    remove the checkpoints of trials that will not be carried on.
    """
    for row in history.trials(sweep_id=plan.sweep_id):
        if row.status in UNFINISHED:
            history.put(ended(row, "stopped", "interrupted, and not carried on"))
    for row in history.trials(sweep_id=plan.sweep_id):
        if row.status in SCORED:
            let_checkpoints_go(row)
