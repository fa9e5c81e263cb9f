"""The program of each process of a worker group."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
import ray.train
from ray.exceptions import GetTimeoutError, RayError

from rayfin.collector import collector_paused
from rayfin.errors import TrialError, TrialHung
from rayfin.hardware import Hardware, describe_hardware
from rayfin.heartbeat import pause, watched
from rayfin.statuses import FAILED
from rayfin.training.companions import companion_facts
from rayfin.training.sharding import frozen_bytes
from rayfin.training.spec import TrialResult, TrialSpec
from rayfin.training.strategies import WorkerLayout, choose
from rayfin.training.streams import read_on_ray
from rayfin.training.trial import run_trial
from rayfin.training.trial_cache import TrialCache
from rayfin.training.trial_queue import Job

_LAST_WORDS_SECONDS = 10.0


def work(config: dict[str, Any]) -> None:
    """Runs on every worker: trains what the queue has, until that has no more."""
    import torch

    queue = config["queue"]
    placement_group = ray.util.get_current_placement_group()
    assert placement_group is not None  # Ray Train runs every worker in one
    ray.get(queue.begin.remote(placement_group.id.hex()))
    resources = ray.get_runtime_context().get_assigned_resources()
    torch.set_num_threads(max(1, int(resources.get("CPU", 1))))
    hardware = describe_hardware(resources.get("GPU", 0) > 0)
    warm = TrialCache(ray.get(config["corpora"]), read_on_ray)
    group, minutes = config["group"], config["hang_minutes"]
    done = -1
    while (job := ray.get(queue.next_job.remote(done))) is not None:
        done = job.number
        _train(job, queue, group=group, hardware=hardware, warm=warm, hang_minutes=minutes)


def trace_of(job: Job, rank: int) -> str:
    """Returns the name under which a worker that hangs says where it stands; see `watched`."""
    return f"{job.location.path.parent.parent.name}-{job.location.path.name}-{rank}"


def _train(
    job: Job,
    queue: Any,
    *,
    group: WorkerLayout,
    hardware: Hardware,
    warm: TrialCache,
    hang_minutes: float,
) -> None:
    """Runs one trial on this worker; rank 0 reports for all."""
    rank = ray.train.get_context().get_world_rank()

    def hand_in(result: TrialResult) -> bool:
        worker = {"base_loads": warm.loads}
        scenario = result.scenario | {"worker": worker} if result.scenario else {}
        result = replace(result, scenario=scenario)
        pause()  # for the sweep's word
        return bool(ray.get(queue.hand_in.remote(rank, result)))

    def hang(where: str) -> None:
        """Hands in why the trial failed, and ends the process.

        It runs on another thread: the one that trains can only be ended with its process.
        """
        error = f"worker {rank}: {TrialHung.while_at(where, hang_minutes)}"
        with suppress(RayError, GetTimeoutError):
            last = queue.hand_in.remote(rank, TrialResult("failed", error=error))
            ray.get(last, timeout=_LAST_WORDS_SECONDS)
        os._exit(1)

    # The others wait for the first one wherever it reads or writes for all of them.
    with watched(hang_minutes * 60, hang, bulk=rank == 0, trace=trace_of(job, rank)):
        with collector_paused():
            group = decided(group, job.spec, warm, hardware)
        result = run_trial(
            job.spec,
            lambda result: rank != 0 or hand_in(result),
            location=job.location,
            hardware=hardware,
            warm=warm,
            group=group,
            warned=lambda: ray.train.get_preemption_info() is not None,
        )
    failed = result.status in FAILED
    if rank == 0 or failed:
        hand_in(result)
    if failed:
        # The other workers may wait for this one in a collective operation: end them too.
        raise TrialError(result.error or result.status)


def decided(
    group: WorkerLayout, spec: TrialSpec, warm: TrialCache, hardware: Hardware
) -> WorkerLayout:
    """Returns `group` with a strategy; where it is `auto`, the first worker chooses for all."""
    if group.strategy != "auto":
        return group
    import torch.distributed as dist

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    facts, dtype = warm.facts(spec.model), spec.model.dtype
    companions = companion_facts(spec.train, spec.model)
    beside = sum(frozen_bytes(one, dtype, hardware.device) for one in companions)
    chosen = [
        choose(
            spec.method,
            facts,
            hardware,
            workers=group.size,
            here=here,
            train=spec.train,
            dtype=dtype,
            beside=beside,
        )
    ]
    if group.size > 1:
        dist.broadcast_object_list(chosen, src=0)
    strategy, why = chosen[0]
    return replace(group, strategy=strategy, why=why)
