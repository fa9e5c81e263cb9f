"""What unit tests share: sweeps whose trials are trained in this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest

from rayfin.hardware import describe_hardware
from rayfin.training.spec import TrialResult
from rayfin.tuning import tune
from rayfin.tuning.plan import PlannedTrial, SweepPlan
from rayfin.tuning.record import Recorder
from rayfin.tuning.search import HistorySearch


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep trains as Tune's workers do, one trial after the other in this process."""
    monkeypatch.setattr(tune, "_cluster_and_tune", lambda cluster: nullcontext())
    monkeypatch.setattr(tune, "scheduler", lambda plan, known, history: None)
    monkeypatch.setattr(tune, "_fit", train_here)


def train_here(
    plan: SweepPlan,
    search: HistorySearch,
    scheduler: object,
    recorder: Recorder,
    say: Callable[[str], None],
) -> None:
    from rayfin.training.trial import run_trial
    from rayfin.training.trial_cache import TrialCache

    hardware, warm = describe_hardware(False), TrialCache(plan.corpora)
    while (trial := search.suggest("it")) is not None:

        def report(result: TrialResult, trial: PlannedTrial = trial) -> None:
            recorder.reports(trial, result)

        recorder.starts(trial)
        result = run_trial(
            trial.spec, report, location=trial.location, hardware=hardware, warm=warm
        )
        recorder.reports(trial, result)
        search.tell("it", result.metrics.get("eval_loss"))
