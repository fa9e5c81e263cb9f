"""Trials in a Ray Train worker group: several processes that take an optimizer step together."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayfin.compat.ray_train import (
    LeanTorchTrainer,
    TorchOnRaysNetwork,
    found_no_room,
    set_group_timeouts,
)
from rayfin.config import DataConfig
from rayfin.config import ScalingConfig as ScalingSettings
from rayfin.data import Corpus
from rayfin.errors import StorageError, TrialError, TrialHung
from rayfin.heartbeat import busy, hang_position
from rayfin.paths import StoragePath
from rayfin.statuses import SCORED, Status
from rayfin.training.member import trace_of, work
from rayfin.training.spec import MEMORY_MONITOR, Report, TrialResult, TrialSpec
from rayfin.training.strategies import WorkerLayout
from rayfin.training.trial_queue import GroupEnded, Job, TrialQueue, WorkerReport

log = logging.getLogger(__name__)

_PREEMPTIONS = 20
"""How often a trial starts again because its machines were taken away; Ray has no limit."""

_ANSWER_SECONDS = 120
"""Seconds without an answer after which a worker counts as hanging; Ray's default is 600."""
_START_SECONDS = 30
"""Seconds until Ray Train says that there is no room; Ctrl-C may wait as long for an answer."""


class WorkerGroup:
    """Processes on the connected Ray cluster that train one trial after another, all on each.

    They start with the first trial and stay until `close`: the process group, the imports, the
    tokenised data and, where the strategy leaves it whole, the base model are there for the next.
    A trial that fails ends them, and the next one has them start anew.
    """

    def __init__(
        self,
        group: WorkerLayout,
        *,
        resources: Mapping[str, float],
        corpora: Mapping[DataConfig, Corpus],
        hang_minutes: float = ScalingSettings().hang_timeout_minutes,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the `resources` of each process; one without progress for `hang_minutes` ends all.

        `waiting` is called twice a minute while the cluster has no room for all of them, and raises
        where that has lasted for too long.
        """
        set_group_timeouts(answer=_ANSWER_SECONDS, start=_START_SECONDS)
        self._group, self._resources, self._waiting = group, resources, waiting
        self._hang_minutes = hang_minutes
        # Where the caller is: on any other node it could be lost alone.
        here = ray.get_runtime_context().get_node_id()
        placed: Any = NodeAffinitySchedulingStrategy(here, soft=False)
        self._queue: Any = ray.remote(num_cpus=0, scheduling_strategy=placed)(TrialQueue).remote(
            group.size
        )
        self._corpora = ray.put(dict(corpora))
        self._jobs = 0
        self._processes: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def train(
        self, spec: TrialSpec, report: Report, *, location: StoragePath, max_failures: int = 1
    ) -> TrialResult:
        """Run a trial on all processes, as `run_trial` does on one.

        Everything that `run_trial` promises holds: errors become a result, `report` may stop the
        trial, and a group that lost a worker, or Ray Train's controller, starts again
        (`max_failures` times) from the newest checkpoint, which must lie on storage that all nodes
        see. Where a node is about to be taken away, a checkpoint is saved at once. Raise whatever
        `report` or `waiting` raises, and TrialError where the actor through which they speak dies:
        the processes end where they stand then, and the trial stays as its checkpoints have it.
        """
        job = Job(self._jobs, spec, location)
        self._jobs += 1
        _give_back(job.held)  # what a caller that was killed amid the trial could not
        try:
            ray.get(self._queue.give.remote(job))
            return self._result(job, report, max_failures)
        except BaseException as error:  # also Ctrl-C
            self.close(held=job.held)
            if not isinstance(error, RayError):
                raise
            raise TrialError(
                "the process between the workers and this one died; the same command goes on from "
                f"the newest checkpoint ({_one_line(error)})"
            ) from error
        finally:
            self._queue.give.remote(None)
            with suppress(StorageError), busy("removing what says what the workers held"):
                job.held.remove_file()

    def close(self, held: StoragePath | None = None) -> None:
        """End the processes when they are done, or at once where a file says what they hold."""
        with suppress(RayError):  # it has died: so will the workers, who ask it
            ray.get(self._queue.close.remote())
        if held is not None:
            _give_back(held)
        if self._processes is not None:
            self._processes.join()
            self._processes = None

    def _result(self, job: Job, report: Report, max_failures: int) -> TrialResult:
        failures = 0
        result: TrialResult | None = None
        hopeless = False
        warm = self._processes is not None
        while True:
            if self._processes is None:
                self._start(job.location.path)
            event: WorkerReport | GroupEnded = ray.get(self._queue.next_event.remote())
            if isinstance(event, GroupEnded):
                self._ended(job)
                if event.no_room:  # its nodes were taken away, or others hold them
                    self._waiting()
                    continue
                # It may have died before, of nothing that is this trial's.
                failures += event.at_work or not warm
                warm = False
                if hopeless or failures > max_failures:
                    status: Status = "oom" if event.out_of_memory else "failed"
                    why = self._last_words(job) or f"worker group died: {event.error}"
                    return result or TrialResult(status, error=why)
                result = None  # of this attempt; the next one has reasons of its own
                log.warning("the worker group died; the trial goes on from its checkpoint")
            elif event.result.status == "running":
                go_on = report(event.result) is not False
                self._queue.answer.remote(event.ticket, go_on)
            else:
                self._queue.answer.remote(event.ticket, True)
                if event.result.status in SCORED:
                    return event.result
                # What follows is its consequence, but for the memory that ran out beside it.
                if result is None or "oom" == event.result.status != result.status:
                    result = event.result
                hopeless = hopeless or event.hopeless

    def _last_words(self, job: Job) -> str | None:
        """Return where a worker stood that had to be ended from outside; None if none had to."""
        for rank in range(self._group.size):
            if (where := hang_position(trace_of(job, rank))) is not None:
                return f"worker {rank}: {TrialHung.ended_at(where)}"
        return None

    def _start(self, directory: Path) -> None:
        self._processes = threading.Thread(target=self._run, args=(directory,), daemon=True)
        self._processes.start()

    def _ended(self, job: Job) -> None:
        assert self._processes is not None
        self._processes.join()
        self._processes = None
        _give_back(job.held)  # what a controller that was killed could not

    def _run(self, directory: Path) -> None:
        """Run the processes, in a thread of its own, until all of them have ended."""
        error: str | None = None
        how: dict[str, bool] = {}
        try:
            self._trainer(directory).fit()
        except Exception as failed:  # noqa: BLE001  # whatever it is, who waits must hear of it
            error = _one_line(failed)
            how["no_room"] = found_no_room(failed)
            how["out_of_memory"] = MEMORY_MONITOR in str(failed)
        with suppress(RayError):  # who waits has heard of its death
            ray.get(self._queue.ended.remote(error, **how))

    def _trainer(self, directory: Path) -> LeanTorchTrainer:
        return LeanTorchTrainer(
            work,
            train_loop_config={
                "hang_minutes": self._hang_minutes,
                "group": self._group,
                "corpora": self._corpora,
                "queue": self._queue,
            },
            torch_config=TorchOnRaysNetwork(),
            scaling_config=ScalingConfig(
                num_workers=self._group.size,
                use_gpu=self._resources.get("GPU", 0.0) > 0,
                resources_per_worker={k: v for k, v in self._resources.items() if v > 0},
            ),
            run_config=RunConfig(
                name="group",
                storage_path=str(directory / "ray"),
                # `train` counts failures, of each trial its own.
                failure_config=FailureConfig(
                    max_failures=0,
                    controller_failure_limit=0,
                    max_preemption_failures=_PREEMPTIONS,
                ),
            ),
        )


def _give_back(held: StoragePath) -> None:
    with busy("reading what the workers held"):
        give_back(held)


def give_back(held: StoragePath) -> None:
    """Give back the resources that the file names, which ends what still runs on them.

    Ray takes a placement group from whom its controller's death left it only when the whole
    program ends, and the next group would wait until then.
    """
    with suppress(StorageError):  # what this machine has written is here
        held.download_file()
    with suppress(FileNotFoundError, StorageError):
        for name in json.loads(held.path.read_text()):
            # In a Ray of another time there is none of this name, which is no error.
            group_id = ray.PlacementGroupID(bytes.fromhex(name))
            ray.util.remove_placement_group(PlacementGroup(group_id))
        held.remove_file()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
