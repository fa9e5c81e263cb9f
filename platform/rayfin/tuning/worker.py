"""Tune's side of trials, one after another in a process, or a group of them, that lives on."""

from __future__ import annotations

import os
import queue
import socket
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import ray
import ray.tune

from rayfin.collector import collector_paused
from rayfin.compat.ray import draining_nodes
from rayfin.config import DataConfig, ScalingConfig
from rayfin.config.steps import share_of_steps
from rayfin.data import Corpus
from rayfin.errors import TrialError, TrialHung
from rayfin.hardware import describe_hardware
from rayfin.heartbeat import pause, watched
from rayfin.statuses import FAILED
from rayfin.training.spec import Report, TrialLeft, TrialResult
from rayfin.training.strategies import WorkerLayout
from rayfin.tuning.plan import RESULT, TRIAL, PlannedTrial

if TYPE_CHECKING:
    from rayfin.training.trial_cache import TrialCache

_Order = Literal["go on", "stop", "leave"]

# Lives as long as the process: Tune resets the trainable for each trial, this stays.
_CACHE: TrialCache | None = None


class _TrialTrainable(ray.tune.Trainable):
    """A trainable that trains in a thread and hands Tune one evaluation at each `step`.

    The trial waits at each evaluation for Tune's word, so that nothing is computed for a trial
    that the scheduler has already stopped.
    """

    _waiting: bool
    _results: queue.Queue[TrialResult | BaseException]
    _hung: TrialHung | None = None
    """The error that says what the thread is stuck in; it ends with its process alone."""

    def step(self) -> dict[str, Any]:
        if self._waiting:
            self._orders.put("go on")
        result = self._results.get()
        if isinstance(result, TrialError):
            raise result
        if isinstance(result, BaseException):
            raise TrialError(f"the trial's thread ended: {result!r}")
        self._waiting = result.status == "running"
        step = result.metrics.get("steps", 0)
        flat = {"step": step, "done": not self._waiting}
        if result.max_steps is not None:
            flat["share"] = share_of_steps(step, result.max_steps)
        if result.scenario:
            worker = self.facts() | result.scenario.get("worker", {})
            result = replace(result, scenario=result.scenario | {"worker": worker})
        return flat | _numbers(result) | {RESULT: result}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        # Tune has no answer to a reset that fails, and would never start the trial anew.
        if self._end("stop"):
            self._start(new_config)
        else:
            self._waiting = False
            self._results = queue.Queue()
            before = f"its process hung as trial {self._trial_id} was ended"
            self._results.put(TrialHung(f"{before}: {self._hung}"))
        return True

    def cleanup(self) -> None:
        # The sweep ends, perhaps by Ctrl-C: what the trial has saved is there for a resume.
        if not self._end("leave"):
            os._exit(1)

    def facts(self) -> dict[str, Any]:
        """Return which process had the trial."""
        return {"host": socket.gethostname(), "pid": os.getpid()}

    def train_trial(self, trial: PlannedTrial, report: Report) -> TrialResult:
        """Train, in the thread; `report` raises TrialLeft where the trial is left as it is."""
        raise NotImplementedError

    def _start(self, config: dict[str, Any]) -> None:
        self._results = queue.Queue()
        self._orders: queue.Queue[_Order] = queue.Queue()
        self._waiting = False
        self._over = threading.Event()
        trial: PlannedTrial = config[TRIAL]
        self._trial_id = trial.trial_id
        self._thread = threading.Thread(target=self._run, args=(trial,), daemon=True)
        self._thread.start()

    def _end(self, order: _Order) -> bool:
        """End the trial at its next evaluation, and wait until what it used is free again.

        Returns False where the trial hangs, before or meanwhile.
        """
        self._orders.put(order)
        self._over.wait()
        if self._hung is not None:
            return False
        self._thread.join()
        return True

    def _hangs(self, error: TrialHung) -> None:
        """Tell whoever waits for the trial's result or end; runs on a thread of its own."""
        self._hung = error
        self._results.put(error)
        self._over.set()

    def _run(self, trial: PlannedTrial) -> None:
        try:
            result = self.train_trial(trial, self._report)
        except TrialLeft:
            return
        except BaseException as error:  # the other thread must hear of it, or wait for ever
            self._results.put(error)
            raise
        else:
            self._results.put(result)
        finally:
            self._over.set()

    def _report(self, result: TrialResult) -> bool:
        self._results.put(result)
        pause()  # for Tune's word
        order = self._orders.get()
        if order == "leave":
            raise TrialLeft
        return order == "go on"


class LocalTrainable(_TrialTrainable):
    """A trainable whose trials share this process and one base model."""

    def setup(
        self,
        config: dict[str, Any],
        corpora: dict[DataConfig, Corpus] | None = None,
        use_gpu: bool | Literal["auto"] = "auto",
        num_threads: int = 1,
        hang_minutes: float = ScalingConfig().hang_timeout_minutes,
    ) -> None:
        global _CACHE  # noqa: PLW0603
        # Here, and not above: the driver, which only names this class, needs no torch.
        with collector_paused():
            import torch

            from rayfin.training.streams import read_on_ray
            from rayfin.training.trial_cache import TrialCache

        # Ray sets OMP_NUM_THREADS from the actor's CPUs before torch is loaded; tell torch too.
        torch.set_num_threads(num_threads)
        if _CACHE is None:
            _CACHE = TrialCache(corpora, read_on_ray)
        self._use_gpu, self._hang_minutes = use_gpu, hang_minutes
        self._start(config)

    def facts(self) -> dict[str, Any]:
        """Return which process had the trial, and how often it has loaded a base model so far."""
        return super().facts() | {"base_loads": _CACHE.loads if _CACHE is not None else 0}

    def train_trial(self, trial: PlannedTrial, report: Report) -> TrialResult:
        from rayfin.training.trial import run_trial

        def hang(where: str) -> None:
            self._hangs(TrialHung.while_at(where, self._hang_minutes))

        with watched(self._hang_minutes * 60, hang, trace=trial.trial_id):
            return run_trial(
                trial.spec,
                report,
                location=trial.location,
                hardware=describe_hardware(self._use_gpu),
                warm=_CACHE,
                warned=_draining,
            )


def _draining() -> bool:
    """Return whether somebody told Ray that this machine is about to be taken away."""
    here = ray.get_runtime_context().get_node_id()
    return here in draining_nodes()


class GroupTrainable(_TrialTrainable):
    """A trainable whose trials have several workers, in a Ray Train group; this process listens.

    It holds no CPU, and what its group holds Tune does not see: as many trials run at a time as
    have room for their groups.
    """

    def setup(
        self,
        config: dict[str, Any],
        corpora: dict[DataConfig, Corpus] | None = None,
        group: WorkerLayout | None = None,
        resources: dict[str, float] | None = None,
        max_failures: int = 0,
        hang_minutes: float = ScalingConfig().hang_timeout_minutes,
    ) -> None:
        assert corpora is not None
        assert group is not None
        assert resources is not None
        with collector_paused():
            from rayfin.training.workers import WorkerGroup

        self._leaving = threading.Event()
        self._workers = WorkerGroup(
            group,
            resources=resources,
            corpora=corpora,
            hang_minutes=hang_minutes,
            waiting=self._leave_if_asked,
        )
        self._max_failures, self._hang_minutes = max_failures, hang_minutes
        self._start(config)

    def _leave_if_asked(self) -> None:
        """Leave where the driver ends the sweep: it alone says how long a group waits."""
        if self._leaving.is_set():
            raise TrialLeft

    def cleanup(self) -> None:
        self._leaving.set()
        super().cleanup()
        self._workers.close()

    def train_trial(self, trial: PlannedTrial, report: Report) -> TrialResult:
        def hang(where: str) -> None:
            self._hangs(TrialHung.while_at(where, self._hang_minutes))

        with watched(self._hang_minutes * 60, hang):
            pause()  # for the workers, which are watched where they are
            return self._workers.train(
                trial.spec, report, location=trial.location, max_failures=self._max_failures
            )


def _numbers(result: TrialResult) -> dict[str, float]:
    """Return the metrics that Tune's schedulers look at; none for a failed trial."""
    if result.status in FAILED:
        return {}
    return {k: v for k, v in result.metrics.items() if isinstance(v, (int, float))}
