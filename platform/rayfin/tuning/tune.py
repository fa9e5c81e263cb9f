"""The part of a sweep that is Ray Tune's: workers, concurrency, ASHA, failures."""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from rayfin.collector import collector_paused
from rayfin.config import Config
from rayfin.errors import HardwareError, StorageError
from rayfin.heartbeat import busy
from rayfin.history import TrialRecord
from rayfin.training.strategies import WorkerLayout, needs_group
from rayfin.tuning.driver_watch import watched_driver
from rayfin.tuning.early_stopping import scheduler
from rayfin.tuning.plan import PlannedTrial, SweepPlan
from rayfin.tuning.record import Recorder
from rayfin.tuning.rows import recalled, refused, usable, was_refused
from rayfin.tuning.run import SweepRun
from rayfin.tuning.search import HistorySearch


def run_trials(run: SweepRun) -> bool:
    """Run what a sweep still lacks, the interrupted trials first; returns False after Ctrl-C."""
    _quiet_tune()
    plan, config, progress = run.plan, run.plan.config, run.progress
    before = {row.trial_id: row for row in run.unfinished}
    interrupted = [row for row in run.unfinished if not was_refused(row)]
    begun = {row.trial_id: row.created_at for row in interrupted}

    def on_record(row: TrialRecord) -> None:
        run.on_record(row)
        progress.update(row)

    recorder = Recorder(run.history, on_record, begun, progress.restart)

    def without_training(trial: PlannedTrial) -> TrialRecord | None:
        """Return the row of a trial that the history answers, or that can't run here."""
        with busy(f"looking trial {trial.trial_id} up in the history"):
            earlier = None if run.rerun else usable(run.history, trial, config.sweep.metric)
        if earlier is not None:
            row = recalled(trial, earlier)
        elif trial.trial_id in begun:  # and so it fits
            return None
        elif run.refuse is not None and (reason := run.refuse(trial)) is not None:
            row = refused(trial, reason, before.get(trial.trial_id))
        else:
            return None
        recorder.put(row)
        return row

    again = [plan.space.values_in(row.spec) for row in interrupted]
    search = HistorySearch(
        plan,
        known=run.known,
        first=[*again, *run.first],
        recall=without_training,
        advisor=run.advisor,
    )
    left = False
    minutes = config.scaling.hang_timeout_minutes
    with watched_driver(minutes, progress.say, "the same command with --resume goes on"):
        if search.look_ahead():  # a sweep that the history answers needs no Ray
            with _cluster_and_tune(run.cluster):
                try:
                    _fit(
                        plan,
                        search,
                        scheduler(plan, run.known, run.history),
                        recorder,
                        progress.say,
                    )
                finally:  # before Ray ends, which takes a moment in which we may be killed
                    left = recorder.interrupt()
        if recorder.storage_error is not None:
            raise StorageError(recorder.storage_error)
        recorder.flush()
    return search.done and not left


@contextmanager
def _cluster_and_tune(cluster: str | None) -> Iterator[None]:
    """Connect to Ray, and import Tune meanwhile, which is a second of work."""
    from rayfin.tuning.cluster import ray_cluster

    with ThreadPoolExecutor(1) as pool:
        importing = pool.submit(_import_tune)
        with ray_cluster(cluster):
            importing.result()
            yield


def _import_tune() -> None:
    with collector_paused():
        importlib.import_module("rayfin.tuning.hooks")


def _fit(
    plan: SweepPlan,
    search: HistorySearch,
    scheduler: Any,
    recorder: Recorder,
    say: Callable[[str], None],
) -> None:
    import ray.tune

    from rayfin.tuning.cluster import nodes
    from rayfin.tuning.hooks import StorageStopper, TuneRecorder, TuneSearcher
    from rayfin.tuning.local_ray import ctrl_c_as_it_was
    from rayfin.tuning.lost_nodes import LostNodeWatch
    from rayfin.tuning.worker import GroupTrainable, LocalTrainable

    scaling = plan.config.scaling
    each, concurrent = trial_resources(plan.config, nodes())
    lost_nodes = LostNodeWatch(each, say, processes=scaling.num_workers)
    if needs_group(scaling):
        trainable = ray.tune.with_parameters(
            GroupTrainable,
            corpora=plan.corpora,
            group=WorkerLayout.of(scaling),
            resources=each,
            max_failures=plan.config.sweep.max_failures,
            hang_minutes=scaling.hang_timeout_minutes,
        )
        holds = _LISTENER
    else:
        trainable = ray.tune.with_parameters(
            LocalTrainable,
            corpora=plan.corpora,
            use_gpu=each["GPU"] > 0,
            num_threads=max(1, int(each["CPU"])),
            hang_minutes=scaling.hang_timeout_minutes,
        )
        holds = {name.lower(): amount for name, amount in each.items()}
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trainable, holds),
        tune_config=ray.tune.TuneConfig(
            search_alg=TuneSearcher(search),
            scheduler=scheduler,
            num_samples=-1,  # the search ends the sweep, as it alone knows what is left
            max_concurrent_trials=concurrent,
            reuse_actors=True,
        ),
        run_config=ray.tune.RunConfig(
            name=plan.sweep_id,
            storage_path=str(plan.storage.ray),
            callbacks=[TuneRecorder(recorder, lost_nodes)],
            stop=StorageStopper(recorder),
            checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=ray.tune.FailureConfig(max_failures=plan.config.sweep.max_failures),
            verbose=0,
        ),
    )
    with ctrl_c_as_it_was():
        tuner.fit()


_LISTENER = {"cpu": 0.0, "memory": 1.0}
"""What Tune reserves for a trial whose workers Ray Train places: one byte, as nothing is refused.

A CPU would be one too few for the workers, on the machine that has just enough for them.
"""


def trial_resources(
    config: Config, nodes: Sequence[Mapping[str, float]]
) -> tuple[dict[str, float], int]:
    """Return what each process of a trial holds, and how many trials run at a time, on `nodes`.

    On CPU one process takes a whole machine: two halves train no faster than one whole, and hold
    two base models. Raises HardwareError where not one trial fits: Ray would wait for ever.
    """
    from rayfin.tuning.cluster import even_share, worker_resources

    gpus = int(sum(node.get("GPU", 0.0) for node in nodes))
    cpus = int(sum(node.get("CPU", 0.0) for node in nodes))
    machines = sum(node.get("CPU", 0.0) >= 1 for node in nodes)
    wanted, workers = config.sweep.max_concurrent_trials, config.scaling.num_workers
    use_gpu = gpus >= 1 if config.scaling.use_gpu == "auto" else config.scaling.use_gpu
    if use_gpu and gpus < 1:
        raise HardwareError(
            "scaling.use_gpu: true, but the Ray cluster has no GPU; set scaling.use_gpu=false"
        )
    if not use_gpu and cpus < 1:
        raise HardwareError(
            "the Ray cluster has no CPU to train on; start a node with --num-cpus, or, where nodes "
            "come when they are asked for, run the command by cluster/with_workers.py"
        )
    if needs_group(config.scaling):
        one = worker_resources(config.scaling, nodes)  # raises where not one trial fits
        # Workers of one group can't share a GPU: NCCL refuses two on one.
        have = gpus if one["GPU"] else cpus
        places = max(1, (gpus if one["GPU"] else machines) // workers)
        most = places if wanted == "auto" else wanted
        for concurrent in range(min(most, have // workers), 1, -1):
            share = even_share(nodes, concurrent * workers, gpu=one["GPU"])
            if share is not None:
                return share, concurrent
        return one, 1
    if use_gpu:
        concurrent = gpus if wanted == "auto" else wanted
        gpu = 1.0 / math.ceil(concurrent / gpus)
    else:
        concurrent = min(machines if wanted == "auto" else wanted, cpus)
        gpu = 0.0
    return even_share(nodes, concurrent, gpu=gpu) or {"CPU": 1.0, "GPU": gpu}, concurrent


def _quiet_tune() -> None:
    """Leave out Tune's table and records: rayfin has its own."""
    for name, value in {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial has no metric
        "TUNE_GLOBAL_CHECKPOINT_S": "86400",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }.items():
        os.environ.setdefault(name, value)
    # Tune's own files are never read back: that a full disk took none is no news. And that a trial
    # lost its process, with a stack of Ray's own: it is in the trial's row, if it could not go on.
    for name in ("experiment_state", "tune_controller"):
        logging.getLogger(f"ray.tune.execution.{name}").setLevel(logging.CRITICAL)
