"""Ray Tune's private names: the rungs of its ASHA, and what it does about a process that died."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

from rayfin.compat.private import PrivateName

_name = partial(PrivateName, __name__)

_RUNGS = partial(
    _name,
    "ray.tune.schedulers.async_hyperband",
    needed_to="give a resumed sweep's ASHA the rungs that its trials have reached",
    instead="a public way to tell a scheduler of results that it has not seen",
)
_BRACKETS = _RUNGS("AsyncHyperBandScheduler._brackets", on_instances=True)
_ON_RESULT = _RUNGS("_Bracket.on_result", parameters=("trial", "cur_iter", "cur_rew"))
_FAILED = _name(
    "ray.air.execution._internal.actor_manager",
    "RayActorManager._actor_task_failed",
    needed_to="count the death of a trial's process as that trial's failure, whatever ended it",
    instead="Tune treating every death of an actor as a failure of its trial",
    parameters=("tracked_actor_task", "exception"),
)


def record_rung(scheduler: Any, trial_id: str, time: float, value: float) -> None:
    """Tell an AsyncHyperBandScheduler what a trial had reached at `time`, in its time_attr.

    `value` is the metric, or its negative where less is better.
    """
    _ON_RESULT.get()
    trial = SimpleNamespace(trial_id=trial_id)
    _BRACKETS.of(scheduler)[0].on_result(trial, time, value)


def count_deaths_as_failures() -> None:
    """Have Tune count every death of a trial's process as a failure of that trial alone.

    It ends the whole sweep for a kind of death that it has no case for, such as that of a process
    which Ray's memory monitor ended. The change is to Tune's class, and stays.
    """
    from ray.exceptions import RayActorError, RayTaskError

    failed = _FAILED.get()
    if getattr(failed, "of_rayfin", False):
        return

    def any_failed(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if not isinstance(exception, RayActorError | RayTaskError):
            exception = RayActorError(error_msg=f"{type(exception).__name__}: {exception}")
        failed(self, tracked_actor_task, exception)

    any_failed.of_rayfin = True  # type: ignore[attr-defined]
    _FAILED.replace(any_failed)
