"""One trial outside a sweep: in this process, or in a Ray Train worker group."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from rayfin.config import Config
from rayfin.errors import HardwareError, HistoryError, StorageError, TrialHung
from rayfin.hardware import cluster_address, describe_hardware
from rayfin.heartbeat import busy, watched
from rayfin.history import History, TrialRecord
from rayfin.history.driver import interrupted, mark_lost_trials
from rayfin.objectives import main_metric, objective_of
from rayfin.paths import Storage
from rayfin.statuses import UNFINISHED
from rayfin.training.checkpoint import clear_checkpoints, resume_line
from rayfin.training.combination import check_combination
from rayfin.training.precision import MIXED, in_mixed_precision, precision_note, with_precision
from rayfin.training.schedules import idle_patience, idle_warmup
from rayfin.training.spec import TrialResult, TrialSpec
from rayfin.training.strategies import WorkerLayout, check_scaling, needs_group
from rayfin.tuning.driver_lock import driver_lock
from rayfin.tuning.driver_watch import watched_driver
from rayfin.tuning.generations import generation_lines
from rayfin.tuning.plan import PlannedTrial, SweepPlan
from rayfin.tuning.preflight import check_run
from rayfin.tuning.progress import evaluation_line
from rayfin.tuning.record import OnRecord
from rayfin.tuning.rows import end_line, ended, let_checkpoints_go, started, usable, with_result
from rayfin.watchdog import WHERE

RUNS = "train"
"""The sweep that all single runs belong to."""

_LAST_WORDS_SECONDS = 10.0
"""The row and the message of a trial that hangs may take so long."""


@dataclass(frozen=True)
class _Say:
    """What takes a training's lines for the user."""

    show: Callable[[str], None]
    """Takes those that say how far it is."""
    note: Callable[[str], None]
    """Takes those that a user should know."""
    record: OnRecord
    """Takes each row as it is written to the history."""


def train_once(
    config: Config,
    *,
    history: History,
    storage: Storage,
    rerun: bool = False,
    address: str | None = None,
    show: Callable[[str], None] = print,
    note: Callable[[str], None] | None = None,
    on_record: OnRecord = lambda row: None,
) -> TrialRecord:
    """Train `config` as it stands and record it; the same run is carried on where it was killed.

    A run that the history holds as finished is returned as it is, unless `rerun`. `show` gets lines
    that say how far the training is, `note` those that a user should know; it is `show` by default.
    `on_record` gets each row that is written to the history.
    """
    say = _Say(show, note or show, on_record)
    with _collector_as_it_was():
        return _train_once(config, history, storage, rerun, address, say)


@contextlib.contextmanager
def _collector_as_it_was() -> Iterator[None]:
    """Give back to the garbage collector what the block hides from it (`TrialCache.base`).

    The process may be a notebook's, which goes on with its own work.
    """
    frozen = gc.get_freeze_count()
    try:
        yield
    finally:
        if not frozen:  # else they are the process's own, too, and can't be told apart
            gc.unfreeze()


def _train_once(
    config: Config,
    history: History,
    storage: Storage,
    rerun: bool,
    address: str | None,
    say: _Say,
) -> TrialRecord:
    check_combination(config)
    check_scaling(config)
    in_group = needs_group(config.scaling)
    others: list[Config] = []
    if not in_group:  # a group may be on other machines
        chosen, mixed = with_precision(config), in_mixed_precision(config)
        others = [one for one in (config, mixed) if one is not None and one != chosen]
        config = chosen
        for line in precision_note(config):
            say.note(line)
    plan = SweepPlan(RUNS, config, storage)
    # A cluster that is to read the data must be there before it is looked through.
    cluster = cluster_address(address) if in_group or config.data.streaming else None
    if config.data.streaming:
        from rayfin.tuning.cluster import ray_cluster

        with ray_cluster(cluster):
            return _train(plan, others, history, rerun, cluster, say)
    return _train(plan, others, history, rerun, cluster, say)


def _train(
    plan: SweepPlan,
    others: Sequence[Config],
    history: History,
    rerun: bool,
    cluster: str | None,
    say: _Say,
) -> TrialRecord:
    config = plan.config
    if config.data.streaming:
        from rayfin.training.streams import survey_on_ray

        say.show(f"looking through {config.data.title}")
        data = TrialSpec.of(config).data
        plan.corpora[data] = plan.corpora[config.data] = survey_on_ray(
            data, objective_of(config.train)
        )
    check_run(plan, [config], cluster)
    mark_lost_trials(history)
    trial = plan.trial({})
    train = trial.spec.train
    for note in (*plan.notes, *idle_warmup(train, train.max_steps), *idle_patience(train)):
        say.note(note)
    if (start := plan.start(trial.spec.method)) is not None:
        corpus = plan.corpus(trial.spec.data, objective_of(config.train))
        say.note(start.note(trial.spec.course(corpus.digest)))
    metric = main_metric(config.train.stage)
    if not rerun and (earlier := usable(history, trial, metric)) is not None:
        say.note(f"already in the history as {earlier.trial_id}; --rerun trains it again")
        return earlier
    if not history.trials(sweep_id=RUNS, fingerprint=trial.fingerprint):
        plan, trial = _begun(plan, others, history, say)
    otherwise = "wait for its end, or change the configuration: train.seed=1, say, is another run"
    with driver_lock(trial.location, trial.trial_id, otherwise):
        return _train_locked(plan, trial, history, cluster, say)


def _begun(
    plan: SweepPlan, others: Sequence[Config], history: History, say: _Say
) -> tuple[SweepPlan, PlannedTrial]:
    """Return the plan and its trial, in another precision where that was interrupted in it.

    `others` are the plan's configuration in the precisions that another machine may have chosen.
    """
    for config in others:
        other = replace(plan, config=config)
        trial = other.trial({})
        before = history.trials(sweep_id=RUNS, fingerprint=trial.fingerprint)
        if not before or before[0].status not in UNFINISHED:
            continue
        begun = f"{trial.trial_id} was interrupted in model.dtype={config.model.dtype}"
        gpu = describe_hardware(config.scaling.use_gpu).device == "cuda"
        if gpu and config.model.dtype == MIXED:
            say.note(f"{begun}, which is for processors; scaling.use_gpu=false goes on with it")
            continue
        say.note(f"{begun}, on another machine or by an earlier version, and goes on in it")
        return other, trial
    return plan, plan.trial({})


def _train_locked(
    plan: SweepPlan,
    trial: PlannedTrial,
    history: History,
    cluster: str | None,
    say: _Say,
) -> TrialRecord:
    before = history.trials(sweep_id=RUNS, fingerprint=trial.fingerprint)
    if before and before[0].status == "finished":
        # Else a run that is to be made anew would go on from them.
        clear_checkpoints(trial.location / "checkpoints")
    elif before and (words := resume_line(trial.location / "checkpoints")) is not None:
        say.show(words)
    row = started(trial, before[0].created_at if before else None)
    _put(row, history, say)
    try:
        return _train_row(row, plan, trial, history, cluster, say)
    except BaseException as error:  # also Ctrl-C: the same command goes on
        with contextlib.suppress(HistoryError):
            changed = history.change(trial.trial_id, _interrupted)
            if changed is not None:
                say.record(changed)
        if isinstance(error, KeyboardInterrupt):
            again = resume_line(trial.location / "checkpoints") or "starts again"
            say.note(f"the same command {again}")
        raise


def _put(row: TrialRecord, history: History, say: _Say) -> None:
    history.put(row)
    say.record(row)


def _interrupted(row: TrialRecord) -> TrialRecord | None:
    return interrupted(row) if row.status == "running" else None


def _train_row(
    row: TrialRecord,
    plan: SweepPlan,
    trial: PlannedTrial,
    history: History,
    cluster: str | None,
    say: _Say,
) -> TrialRecord:
    config = plan.config
    in_group = needs_group(config.scaling)
    strategies: list[str] = []
    told = set(plan.notes)

    def tell() -> None:
        """Show the notes that only the tokenised data has."""
        for note in row.notes:
            if note not in told:
                told.add(note)
                say.note(note)

    def show_answers(result: TrialResult) -> None:
        for line in generation_lines(result.curve):
            say.show(line)

    def record(result: TrialResult) -> None:
        nonlocal row
        if result.storage_failed:  # the same command goes on
            raise StorageError(result.error or "storage: it can't be written")
        row = with_result(row, result)
        with busy("recording the result"):
            _put(row, history, say)
        if result.status == "finished":
            say.show(evaluation_line(result, row.spec["train"]))
            show_answers(result)

    def report(result: TrialResult) -> None:
        nonlocal row  # a group that dies leaves what it had reported
        row = with_result(row, result)
        with busy("recording an evaluation"):
            _put(row, history, say)
        # Whoever reads what is shown may take their time.
        tell()
        hardware = result.scenario["hardware"]
        if in_group and not strategies:
            strategies.append(hardware["strategy"])
            say.show(f"strategy {hardware['strategy']}: {hardware['strategy_why']}")
        say.show(evaluation_line(result, row.spec["train"]))
        show_answers(result)

    minutes = config.scaling.hang_timeout_minutes
    if in_group:
        from rayfin.training.workers import WorkerGroup
        from rayfin.tuning.cluster import nodes, ray_cluster, worker_resources
        from rayfin.tuning.lost_nodes import LostNodeWatch

        try:
            with ray_cluster(cluster):
                each = worker_resources(config.scaling, nodes())
                group = WorkerLayout.of(config.scaling)
                lost_nodes = LostNodeWatch(each, say.note, processes=group.size)

                def waiting() -> None:
                    say.note(f"no room for {group.size} workers on the cluster; waiting")
                    lost_nodes.look()

                again = "the same command goes on"
                with (
                    watched_driver(minutes, say.note, again),
                    WorkerGroup(
                        group,
                        resources=each,
                        corpora=plan.corpora,
                        hang_minutes=minutes,
                        waiting=waiting,
                    ) as workers,
                ):
                    result = workers.train(
                        trial.spec,
                        report,
                        location=trial.location,
                        max_failures=config.sweep.max_failures,
                    )
                    record(result)
        except HardwareError as error:  # the cluster is too small: a failed trial is a row, too
            _put(ended(row, "failed", str(error)), history, say)
            raise
    else:
        from rayfin.training.trial import run_trial
        from rayfin.training.trial_cache import TrialCache

        hardware, warm = describe_hardware(config.scaling.use_gpu), TrialCache(plan.corpora)
        if config.data.streaming:
            from rayfin.training.streams import read_on_ray

            warm = TrialCache(plan.corpora, read_on_ray)

        def hang(where: str) -> None:
            """Record and say why the trial failed, and end the process.

            It runs on another thread: the one that is stuck can only be ended with its process.
            """
            error = str(TrialHung.while_at(where, minutes))

            def put() -> None:
                with contextlib.suppress(HistoryError):
                    history.put(ended(row, "failed", error))

            def tell_why() -> None:
                with contextlib.suppress(OSError):
                    say.note(f"failed: {error}")

            # The terminal or the history may be what the trial is stuck in.
            last = [threading.Thread(target=words, daemon=True) for words in (put, tell_why)]
            for thread in last:
                thread.start()
            for thread in last:
                thread.join(_LAST_WORDS_SECONDS)
            os._exit(1)

        notice = f"failed: {TrialHung.ended_at(WHERE)}"
        with watched(minutes * 60, hang, trace=trial.trial_id, notice=notice):
            result = run_trial(
                trial.spec, report, location=trial.location, hardware=hardware, warm=warm
            )
            record(result)
    tell()
    if words := end_line(row):
        say.show(words)
    if row.status == "finished":
        let_checkpoints_go(row)
    return row
