"""A sweep: Optuna's proposals, Ray Tune's workers and ASHA, the history's memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rayfin.config import Config
from rayfin.errors import HardwareError
from rayfin.hardware import cluster_address
from rayfin.history import History, TrialRecord
from rayfin.paths import Storage
from rayfin.tuning.plan import PlannedTrial, SweepPlan, find_resumable, new_plan
from rayfin.tuning.preflight import check_run
from rayfin.tuning.progress import Progress
from rayfin.tuning.rows import recalled
from rayfin.tuning.space import Values, check_space, values_in, variants

_ENDED = ("finished", "stopped", "failed", "oom")


@dataclass(frozen=True)
class SweepResult:
    """What a sweep leaves: its rows in the order of their creation, and the best of them."""

    plan: SweepPlan
    trials: list[TrialRecord]
    best: TrialRecord | None
    interrupted: bool

    @property
    def directory(self) -> Path:
        return self.plan.directory


def run_sweep(
    config: Config,
    *,
    history: History,
    storage: Storage,
    resume: bool = False,
    rerun: bool = False,
    address: str | None = None,
    first: Sequence[Values] = (),
    progress: Progress | None = None,
) -> SweepResult:
    """Runs the sweep that `config` describes; every trial becomes a row of `history`.

    - `resume`: carry on with the newest sweep that the same configuration started, if there is one.
    - `rerun`: train also what the history already holds as finished.
    - `address`: of a running Ray cluster; None starts Ray on this machine.
    - `first`: points to try before the sampler's own, an advisor's for example.

    Raises UsageErrors before anything starts; Ctrl-C ends the sweep with `interrupted` set.
    """
    check_space(config)
    cluster = cluster_address(address)
    plan = (find_resumable(config, storage) if resume else None) or new_plan(config, storage)
    check_run(plan, variants(config), cluster)
    plan.save()
    progress = progress or Progress()

    rows = history.trials(sweep_id=plan.sweep_id)
    known = [row for row in rows if row.status in _ENDED]
    interrupted = [values_in(config, row.spec) for row in rows if row.status not in _ENDED]
    progress.begin(plan, known)
    try:
        if len(known) < config.sweep.num_samples:
            _tune(
                plan,
                history,
                known=known,
                first=[*interrupted, *first],
                rerun=rerun,
                cluster=cluster,
                progress=progress,
            )
    finally:
        progress.end()
    return sweep_result(plan, history)


def sweep_result(plan: SweepPlan, history: History) -> SweepResult:
    """The sweep as the history has it."""
    rows = history.trials(sweep_id=plan.sweep_id)
    ended = sum(row.status in _ENDED for row in rows)
    return SweepResult(
        plan=plan,
        trials=rows,
        best=best_trial(rows, plan.config.sweep.metric, plan.config.sweep.direction),
        interrupted=ended < len(rows),
    )


def best_trial(rows: Sequence[TrialRecord], metric: str, mode: str) -> TrialRecord | None:
    """The finished trial with the best metric; the earlier one where two are equal."""
    finished = [row for row in rows if row.status == "finished" and metric in row.metrics]
    sign = 1.0 if mode == "min" else -1.0
    return min(finished, key=lambda row: sign * float(row.metrics[metric]), default=None)


def _tune(
    plan: SweepPlan,
    history: History,
    *,
    known: Sequence[TrialRecord],
    first: Sequence[Values],
    rerun: bool,
    cluster: str | None,
    progress: Progress,
) -> None:
    _quiet_tune()
    import ray.tune

    from rayfin.training.workers import ray_cluster
    from rayfin.tuning.record import Recorder
    from rayfin.tuning.search import HistorySearch
    from rayfin.tuning.worker import WarmTrial

    recorder = Recorder(history, progress.update)

    def recall(trial: PlannedTrial) -> TrialRecord | None:
        earlier = None if rerun else history.finished(trial.fingerprint)
        if earlier is None or plan.config.sweep.metric not in earlier.metrics:
            return None
        if not (earlier.directory and Path(earlier.directory, "adapter").is_dir()):
            return None
        row = recalled(trial, earlier)
        history.put(row)
        progress.update(row)
        return row

    with ray_cluster(cluster):
        resources, concurrent = _resources(plan.config)
        sweep = plan.config.sweep
        trainable = ray.tune.with_parameters(
            WarmTrial,
            corpora=plan.corpora,
            use_gpu="gpu" in resources and resources["gpu"] > 0,
            num_threads=max(1, int(resources["cpu"])),
        )
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(trainable, resources),
            tune_config=ray.tune.TuneConfig(
                search_alg=HistorySearch(plan, known=known, first=first, recall=recall),
                scheduler=_scheduler(plan.config, known),
                num_samples=-1,  # the search ends the sweep, as it alone knows what is left
                max_concurrent_trials=concurrent,
                reuse_actors=True,
            ),
            run_config=ray.tune.RunConfig(
                name=plan.sweep_id,
                storage_path=str(plan.storage.ray),
                callbacks=[recorder],
                checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=ray.tune.FailureConfig(max_failures=sweep.max_failures),
                verbose=0,
            ),
        )
        tuner.fit()


def _resources(config: Config) -> tuple[dict[str, float], int]:
    """What one trial holds, and how many run at a time.

    On CPU one trial takes the whole machine: two halves train no faster than one whole, and hold
    two base models.
    """
    import ray

    total = ray.cluster_resources()
    gpus, cpus = total.get("GPU", 0.0), total.get("CPU", 1.0)
    wanted = config.sweep.max_concurrent_trials
    use_gpu = gpus >= 1 if config.scaling.use_gpu == "auto" else config.scaling.use_gpu
    if use_gpu and gpus < 1:
        raise HardwareError(
            "scaling.use_gpu: true, but the Ray cluster has no GPU; set scaling.use_gpu=false"
        )
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    concurrent = (int(gpus) if use_gpu else nodes) if wanted == "auto" else wanted
    cpu = max(1, int(cpus // concurrent))
    if use_gpu:
        share = 1.0 if concurrent <= gpus else gpus / concurrent
        return {"cpu": min(cpu, max(1, int(cpus // gpus))), "gpu": share}, concurrent
    return {"cpu": cpu}, min(concurrent, max(1, int(cpus)))


def _scheduler(config: Config, known: Sequence[TrialRecord]) -> Any:
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

    sweep, train = config.sweep, config.train
    if sweep.scheduler == "none":
        return FIFOScheduler()
    steps = sweep.parameters.get("train.max_steps")
    longest = train.max_steps
    if steps is not None:
        longest = int(max(steps) if isinstance(steps, tuple) else steps.upper)
    scheduler = AsyncHyperBandScheduler(
        time_attr="step",
        metric=sweep.metric,
        mode=sweep.direction,
        grace_period=min(sweep.grace_period or train.evaluate_every, longest),
        max_t=longest,
        reduction_factor=sweep.reduction_factor,
        stop_last_trials=False,
    )
    # The rungs as they stood before the sweep was interrupted: Tune would start them empty.
    sign = -1.0 if sweep.direction == "min" else 1.0
    for row in known:
        for point in row.curve:
            if sweep.metric in point:
                trial: Any = SimpleNamespace(trial_id=row.trial_id)
                scheduler._brackets[0].on_result(trial, point["step"], sign * point[sweep.metric])
    return scheduler


def _quiet_tune() -> None:
    """rayfin shows its own table and keeps its own records: Tune's are left out."""
    for name, value in {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial has no metric
        "TUNE_GLOBAL_CHECKPOINT_S": "86400",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }.items():
        os.environ.setdefault(name, value)
