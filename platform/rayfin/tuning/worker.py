"""A Tune worker that stays warm: one process, one base model, one trial after another."""

from __future__ import annotations

import os
import queue
import socket
import threading
from typing import TYPE_CHECKING, Any, Literal

import ray.tune

from rayfin.collector import collector_paused
from rayfin.config import DataConfig
from rayfin.data import Corpus
from rayfin.errors import TrialError
from rayfin.hardware import describe_hardware
from rayfin.training.spec import TrialResult
from rayfin.tuning.plan import PlannedTrial

if TYPE_CHECKING:
    from rayfin.training.warm import Warm

_Order = Literal["go on", "stop", "leave"]

# Lives as long as the process: Tune resets the trainable for each trial, this stays.
_WARM: Warm | None = None


class WarmTrial(ray.tune.Trainable):
    """Runs `run_trial` in a thread and hands Tune one evaluation at each `step`.

    The trial waits at each evaluation for Tune's word, so that nothing is computed for a trial
    that the scheduler has already stopped.
    """

    _waiting: bool

    def setup(
        self,
        config: dict[str, Any],
        corpora: dict[DataConfig, Corpus] | None = None,
        use_gpu: bool | Literal["auto"] = "auto",
        num_threads: int = 1,
    ) -> None:
        global _WARM  # noqa: PLW0603
        # Here, and not above: the driver, which only names this class, needs no torch.
        with collector_paused():
            import torch

            from rayfin.training.streams import read_on_ray
            from rayfin.training.warm import Warm

        # Ray sets OMP_NUM_THREADS from the actor's CPUs before torch is loaded; tell torch too.
        torch.set_num_threads(num_threads)
        if _WARM is None:
            _WARM = Warm(corpora, read_on_ray)
        self._use_gpu = use_gpu
        self._start(config)

    def step(self) -> dict[str, Any]:
        if self._waiting:
            self._orders.put("go on")
        result = self._results.get()
        if isinstance(result, BaseException):
            raise TrialError(f"the trial's thread ended: {result!r}")
        self._waiting = result.status == "running"
        flat = {"step": result.metrics.get("steps", 0), "done": not self._waiting}
        outcome = result.as_dict()
        if result.scenario:
            outcome["scenario"] = result.scenario | {"worker": _worker_facts()}
        return flat | _numbers(result) | {"outcome": outcome}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end("stop")
        self._start(new_config)
        return True

    def cleanup(self) -> None:
        # The sweep ends, perhaps by Ctrl-C: what the trial has saved is there for a resume.
        self._end("leave")

    def _start(self, config: dict[str, Any]) -> None:
        self._results: queue.Queue[TrialResult | BaseException] = queue.Queue()
        self._orders: queue.Queue[_Order] = queue.Queue()
        self._waiting = False
        trial = PlannedTrial.from_tune_config(config)
        self._thread = threading.Thread(target=self._run, args=(trial,), daemon=True)
        self._thread.start()

    def _end(self, order: _Order) -> None:
        """Ends the trial at its next evaluation, and waits until the base model is free again."""
        self._orders.put(order)
        self._thread.join()

    def _run(self, trial: PlannedTrial) -> None:
        try:
            from rayfin.training.trial import run_trial

            result = run_trial(
                trial.spec,
                self._report,
                directory=trial.directory,
                hardware=describe_hardware(self._use_gpu),
                warm=_WARM,
            )
        except _Left:
            return
        except BaseException as error:  # the other thread must hear of it, or wait for ever
            self._results.put(error)
            raise
        self._results.put(result)

    def _report(self, result: TrialResult) -> bool:
        self._results.put(result)
        order = self._orders.get()
        if order == "leave":
            raise _Left
        return order == "go on"


class _Left(BaseException):
    """Ends a trial where it stands; no Exception, as those become failed trials."""


def _worker_facts() -> dict[str, Any]:
    """Which process trained, and how often it has loaded a base model so far."""
    loads = _WARM.loads if _WARM is not None else 0
    return {"host": socket.gethostname(), "pid": os.getpid(), "base_loads": loads}


def _numbers(result: TrialResult) -> dict[str, float]:
    """The metrics at the top level, where Tune's schedulers look; none for a failed trial."""
    if result.status in ("failed", "oom"):
        return {}
    return {k: v for k, v in result.metrics.items() if isinstance(v, (int, float))}
