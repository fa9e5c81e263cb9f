"""The search and the recorder in the shapes that Ray Tune calls; they themselves know no Ray."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import ray.tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from rayfin.compat.ray_tune import count_deaths_as_failures
from rayfin.history.comparable import comparison_group
from rayfin.training.spec import TrialResult
from rayfin.tuning.lost_nodes import LostNodeWatch
from rayfin.tuning.plan import RESULT, TRIAL, PlannedTrial
from rayfin.tuning.record import Recorder
from rayfin.tuning.search import HistorySearch

_FAILURE = re.compile(r"^Failure # \d+ \(occurred at .*\)$", re.MULTILINE)

count_deaths_as_failures()


def _reason(trial: Trial) -> str | None:
    """Return what Tune noted of the trial's newest failure.

    It also pickles it, but into a file that comes to the storage, where it would look for it, much
    later, and that others may have put there.
    """
    try:
        notes = Path(trial.error_file or "").read_text(encoding="utf-8")
    except OSError:
        return None
    return _FAILURE.split(notes)[-1].strip() or None


class _Unpickled:
    """A part of Tune that is pickled as nothing: a sweep resumes from the history, and never by
    Tune's restore."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class TuneSearcher(_Unpickled, Searcher):
    """A searcher that hands Tune what the search proposes, and the search how trials ended."""

    def __init__(self, search: HistorySearch) -> None:
        super().__init__(metric=search.metric, mode=search.direction)
        self._search = search

    def suggest(  # type: ignore[override]  # Searcher.FINISHED is a str
        self, trial_id: str
    ) -> dict[str, Any] | str | None:
        trial = self._search.suggest(trial_id)
        return Searcher.FINISHED if trial is None else {TRIAL: trial}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Do nothing: the search learns from ended trials only."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        last = {} if error or result is None else result
        told: TrialResult | None = last.get(RESULT)
        scenario = {} if told is None else told.scenario
        self._search.tell(trial_id, last.get(self._search.metric), last.get("step"), scenario)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a sweep is resumed from the history, never from Tune's pickles."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing; see `save`."""


class EarlyStopping(Protocol):
    """What stops trials that compare with each other: a part of what Ray's schedulers do."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None: ...

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str: ...

    def on_trial_complete(
        self, tune_controller: Any, trial: Any, result: dict[str, Any]
    ) -> None: ...

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None: ...


S = TypeVar("S", bound=EarlyStopping)


class ComparableScheduler(_Unpickled, FIFOScheduler, Generic[S]):
    """Early stopping that compares trials only where they were scored on the same samples.

    Each such group of trials has a scheduler of its own; a trial joins one by its first evaluation.
    """

    def __init__(self, metric: str, new: Callable[[], S]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._score, self._new = metric, new
        self._by_group: dict[str, S] = {}
        self._joined: dict[str, S] = {}

    def of(self, group: str) -> S:
        """Return the scheduler of a group of trials, by its `comparison_group`."""
        if group not in self._by_group:
            self._by_group[group] = self._new()
        return self._by_group[group]

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        own = self._scheduler_of(tune_controller, trial, result)
        return str(own.on_trial_result(tune_controller, trial, result)) if own else self.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        if (own := self._scheduler_of(tune_controller, trial, result)) is not None:
            own.on_trial_complete(tune_controller, trial, result)
            del self._joined[trial.trial_id]

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        if (own := self._joined.pop(trial.trial_id, None)) is not None:
            own.on_trial_error(tune_controller, trial)

    def _scheduler_of(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> S | None:
        """Return the scheduler that a trial has joined; None for a result without a score."""
        if self._score not in result:
            return None
        if trial.trial_id not in self._joined:
            planned: PlannedTrial = trial.config[TRIAL]
            told: TrialResult = result[RESULT]
            stage, profile = planned.spec.train.stage, told.scenario.get("data", {})
            group = comparison_group(stage, profile, self._score)
            # Rows of earlier versions tell their tokens and not their answers, or neither, and are
            # taken for the first group's then.
            tokens = {"eval_digest": profile.get("eval_digest")}
            for known in (tokens, {}):
                earlier = comparison_group(stage, known, self._score)
                if group not in self._by_group and earlier in self._by_group:
                    self._by_group[group] = self._by_group.pop(earlier)
            own = self.of(group)
            own.on_trial_add(tune_controller, trial)
            self._joined[trial.trial_id] = own
        return self._joined[trial.trial_id]


class StorageStopper(_Unpickled, ray.tune.Stopper):
    """A stopper that ends the sweep once its storage can't be written: no further trial could."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._recorder.storage_error is not None


class TuneRecorder(_Unpickled, ray.tune.Callback):
    """A callback that tells the recorder how trials do, and looks for nodes where none runs."""

    def __init__(self, recorder: Recorder, lost_nodes: LostNodeWatch) -> None:
        self._recorder, self._lost_nodes = recorder, lost_nodes

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._lost_nodes.look(running=any(trial.status == Trial.RUNNING for trial in trials))

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._recorder.starts(trial.config[TRIAL])

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        self._recorder.reports(trial.config[TRIAL], result[RESULT])

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._recorder.completes(trial.config[TRIAL])

    def on_trial_recover(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._recorder.restarts(trial.config[TRIAL], _reason(trial))

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._recorder.dies(trial.config[TRIAL], _reason(trial))
