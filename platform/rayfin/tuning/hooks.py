"""The search and the recorder in the shapes that Ray Tune calls; they themselves know no Ray."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from rayfin.compat.ray_tune import count_deaths_as_failures
from rayfin.tuning.lost_nodes import LostNodeWatch
from rayfin.tuning.plan import RESULT, TRIAL
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
        self._search.tell(trial_id, last.get(self._search.metric), last.get("step"))

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a sweep is resumed from the history, never from Tune's pickles."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing; see `save`."""


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
