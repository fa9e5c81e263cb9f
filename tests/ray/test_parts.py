"""The pieces of a sweep on their own, without a cluster: what is rare, or slow to bring about."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from rich.console import Console

from rayfin.config import Config, load_config
from rayfin.errors import ConfigError, HardwareError, HistoryError, RayfinError
from rayfin.history import History, TrialRecord
from rayfin.history.driver import DRIVER, this_driver
from rayfin.methods import MethodConfig
from rayfin.paths import Storage
from rayfin.training import TrialResult, trial
from rayfin.tuning import cluster, end_with_driver, tune, worker
from rayfin.tuning.cluster import even_share
from rayfin.tuning.early_stopping import scheduler
from rayfin.tuning.hooks import TuneRecorder
from rayfin.tuning.lost_nodes import LostNodeWatch
from rayfin.tuning.plan import RESULT, TRIAL, SweepPlan, find_resumable, new_plan
from rayfin.tuning.progress import ProgressDisplay
from rayfin.tuning.record import Recorder
from rayfin.tuning.rows import recalled, started, usable
from rayfin.tuning.search import HistorySearch
from rayfin.tuning.sweep import SweepOptions, run_sweep
from rayfin.tuning.tune import trial_resources

AXES = {"method.r": [2, 4, 8, 16], "train.seed": [0, 1, 2]}


@pytest.fixture
def config(lab: Any) -> Config:
    return load_config(
        {"sweep": {"parameters": AXES}}, [*lab.settings, "train.max_steps=8", "train.eval_steps=2"]
    )


@pytest.fixture
def plan(config: Config, lab: Any) -> SweepPlan:
    return new_plan(config, Storage.open(lab.storage))


def with_sweep(plan: SweepPlan, **changes: Any) -> SweepPlan:
    """The plan with other sweep settings."""
    return dataclasses.replace(plan, config=swept(plan.config, **changes))


def swept(config: Config, **changes: Any) -> Config:
    return Config.model_validate(
        config.model_dump(exclude_unset=True) | {"sweep": config.sweep.model_dump() | changes}
    )


def ended(plan: SweepPlan, r: int, loss: float = 1.0, **changes: Any) -> TrialRecord:
    row = started(plan.trial({"method.r": r, "train.seed": 0}))
    values = {"status": "finished", "metrics": {"eval_loss": loss, "steps": 8}}
    return row.updated(**(values | changes))


@pytest.fixture
def no_trials(lab: Any) -> Iterator[History]:
    with History.open(Storage.open(lab.storage).history_url) as history:
        yield history


# --- the search -------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["tpe", "random", "grid"])
def test_a_small_space_is_used_up_to_its_last_point(plan: SweepPlan, search: str) -> None:
    searcher = HistorySearch(with_sweep(plan, num_samples=50, search=search))
    suggested = []
    while (point := searcher.suggest(f"trial-{len(suggested)}")) is not None:
        suggested.append(point.fingerprint)
        searcher.tell(f"trial-{len(suggested) - 1}", float(point.values["method.r"]))
    assert len(suggested) == len(set(suggested)) == 12
    assert searcher.done


def test_what_the_history_knows_is_recalled_however_much_it_is(config: Config, lab: Any) -> None:
    wide = swept(config, num_samples=80, parameters={"train.seed": list(range(100))})
    plan = new_plan(wide, Storage.open(lab.storage))
    recalled: list[str] = []

    def recall(planned: Any) -> TrialRecord:
        recalled.append(planned.trial_id)
        return started(planned).updated(status="finished", metrics={"eval_loss": 1.0})

    assert not HistorySearch(plan, recall=recall).look_ahead()
    assert len(set(recalled)) == 80


def test_an_interrupted_trial_comes_first_whatever_its_method(config: Config, lab: Any) -> None:
    axes = {"method.type": ["ia3", "lora", "p_tuning"], "method.r": [2, 4, 8, 16]}
    plan = new_plan(swept(config, parameters=axes), Storage.open(lab.storage))
    interrupted = plan.trial({"method.type": "ia3"})
    searcher = HistorySearch(plan, first=[interrupted.values])
    point = searcher.suggest("trial")
    assert point is not None and point.trial_id == interrupted.trial_id


# --- ASHA -------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", [{}, {"eval_digest": "a"}])
@pytest.mark.parametrize(
    ("metric", "weak", "strong"),
    [("eval_loss", 9.0, 0.5), ("perplexity", 9.0, 0.5), ("exact_match", 0.1, 0.9)],
)
def test_asha_goes_on_with_the_rungs_of_known_trials(
    plan: SweepPlan,
    no_trials: History,
    metric: str,
    weak: float,
    strong: float,
    profile: dict[str, Any],
) -> None:
    """Rows of earlier versions tell of their held-out tokens only, or nothing."""
    plan = with_sweep(plan, metric=metric)
    curve = [{"step": step, "eval_loss": 1.0, "exact_match": 0.5} for step in (2, 4, 6, 8)]
    known = [ended(plan, r, curve=curve, scenario={"data": profile}) for r in (2, 4, 8)]
    asha = scheduler(plan, known, no_trials)
    assert heard(asha, plan, "weak", {"step": 2, metric: weak}) == "STOP"
    assert heard(asha, plan, "strong", {"step": 2, metric: strong}) == "CONTINUE"


def heard(asha: Any, plan: SweepPlan, name: str, result: dict[str, Any], on: str = "a") -> str:
    """What ASHA says to the result of a trial that was scored on the held-out tokens `on`."""
    planned = plan.trial({"method.r": 16, "train.seed": 0})
    found: Any = SimpleNamespace(trial_id=name, config={TRIAL: planned})
    told = TrialResult("running", scenario={"data": {"eval_digest": on, "eval_answers": f"{on}!"}})
    asha.on_trial_add(None, found)
    said: str = asha.on_trial_result(None, found, result | {RESULT: told})
    if said == "STOP":
        asha.on_trial_complete(None, found, result | {RESULT: told})
    return said


def test_asha_compares_only_trials_that_were_scored_on_the_same_tokens(
    plan: SweepPlan, no_trials: History
) -> None:
    curve = [{"step": 2, "eval_loss": 1.0}]
    known = [
        ended(plan, r, curve=curve, scenario={"data": {"eval_digest": "a"}}) for r in (2, 4, 8)
    ]
    asha = scheduler(plan, known, no_trials)
    for loss in (9.0, 8.0, 7.0):  # of other tokens than those before, and better and better
        assert heard(asha, plan, f"b {loss}", {"step": 2, "eval_loss": loss}, "b") == "CONTINUE"
    assert heard(asha, plan, "b 9.5", {"step": 2, "eval_loss": 9.5}, "b") == "STOP"
    assert heard(asha, plan, "a 2.0", {"step": 2, "eval_loss": 2.0}, "a") == "STOP"
    assert heard(asha, plan, "failed", {"step": 2}, "a") == "CONTINUE"


@pytest.mark.parametrize(
    ("train", "sweep", "unit", "rungs"),
    [
        ({"max_steps": 8}, {}, "step", [6, 2]),
        ({"max_steps": 8}, {"grace_period": 3}, "step", [3]),
        ({"max_steps": 8}, {"grace_period": 0.1}, "share", [0.9, 0.3, 0.1]),
        ({"num_train_epochs": 2}, {}, "share", [0.75, 0.25]),
        ({"num_train_epochs": 2, "eval_steps": 0.5}, {}, "share", [0.5]),
        ({"num_train_epochs": 2}, {"grace_period": 4}, "step", [12, 4]),
    ],
)
def test_asha_compares_trials_of_epochs_at_shares_of_their_own_steps(
    plan: SweepPlan,
    no_trials: History,
    train: dict[str, Any],
    sweep: dict[str, Any],
    unit: str,
    rungs: list[float],
) -> None:
    settings = plan.config.model_dump(exclude_unset=True)
    plan = dataclasses.replace(plan, config=Config.model_validate(settings | {"train": train}))
    plan = with_sweep(plan, **sweep)
    asha = scheduler(plan, [], no_trials).of("any")
    (bracket,) = asha._brackets
    assert (asha._time_attr, [at for at, _ in bracket._rungs]) == (unit, pytest.approx(rungs))


# --- early stopping by curves -----------------------------------------------------------------

FALLING = {2: 3.0, 4: 1.6, 6: 1.1, 8: 1.0}
"""A good trial's losses by its steps; the untrained model's is 6."""


def curves(plan: SweepPlan, **changes: Any) -> SweepPlan:
    return with_sweep(plan, scheduler="predictive", **changes)


def scored(
    stopping: Any, plan: SweepPlan, name: str, losses: dict[int, float], status: Any = "running"
) -> str:
    """What the scheduler says to a trial that was scored so until now, on the same tokens."""
    planned = plan.trial({"method.r": 16, "train.seed": 0})
    trial: Any = SimpleNamespace(trial_id=name, config={TRIAL: planned})
    step = max(losses)
    told = TrialResult(
        status,
        metrics={"base_eval_loss": 6.0, "eval_loss": losses[step], "steps": step},
        curve=[{"step": at, "eval_loss": loss} for at, loss in losses.items()],
        scenario={"data": {"eval_digest": "a"}},
        max_steps=8,
    )
    result = {"step": step, "share": step / 8, "eval_loss": losses[step], RESULT: told}
    if status == "running":
        return str(stopping.on_trial_result(None, trial, result))
    stopping.on_trial_complete(None, trial, result | {"done": True})
    return ""


def until(step: int, losses: dict[int, float]) -> dict[int, float]:
    return {at: loss for at, loss in losses.items() if at <= step}


def test_a_trial_that_will_end_worse_than_the_best_is_stopped(
    plan: SweepPlan, no_trials: History
) -> None:
    stopping = scheduler(curves(plan), [], no_trials)
    flat = {2: 5.9, 4: 5.85, 6: 5.83}
    assert scored(stopping, plan, "only", until(6, FALLING)) == "CONTINUE"
    assert scored(stopping, plan, "beside a better one", flat) == "STOP"
    scored(stopping, plan, "only", FALLING, "finished")
    assert scored(stopping, plan, "flat", flat) == "STOP"
    close = {step: loss + 0.01 for step, loss in FALLING.items()}
    assert scored(stopping, plan, "close", until(4, close)) == "CONTINUE"


def test_a_trial_that_failed_or_was_stopped_is_no_best(plan: SweepPlan, no_trials: History) -> None:
    stopping = scheduler(curves(plan), [], no_trials)
    flat = {2: 5.9, 4: 5.85, 6: 5.83}
    scored(stopping, plan, "failed", until(6, FALLING))
    gone: Any = SimpleNamespace(trial_id="failed")
    stopping.on_trial_error(None, gone)
    scored(stopping, plan, "stopped", until(6, FALLING), "stopped")
    assert scored(stopping, plan, "flat", flat) == "CONTINUE"


@pytest.mark.parametrize(("grace", "stopped_at"), [(None, 2), (4, 4), (0.6, 6)])
def test_a_resumed_sweep_knows_its_best_and_waits_for_the_grace_period(
    plan: SweepPlan, no_trials: History, grace: Any, stopped_at: int
) -> None:
    known = [ended(plan, 2, 1.0, scenario={"data": {"eval_digest": "a"}})]
    stopping = scheduler(curves(plan, grace_period=grace), known, no_trials)
    flat = {2: 5.98, 4: 5.97, 6: 5.965}
    said = {step: scored(stopping, plan, "flat", until(step, flat)) for step in (2, 4, 6)}
    assert min(step for step, word in said.items() if word == "STOP") == stopped_at


def test_trials_of_the_history_teach_curves(plan: SweepPlan, no_trials: History) -> None:
    """Here every trial drops at its last step, as none of rayfin's own curves does."""
    drop = {2: 5.9, 4: 5.85, 6: 5.83, 8: 0.5}
    assert scored(knowing(plan, no_trials), plan, "flat", until(6, drop)) == "STOP"
    points = [{"step": step, "eval_loss": loss} for step, loss in drop.items()]
    for number in range(60):
        row = ended(plan, 2, 0.5, curve=points)
        metrics = row.metrics | {"base_eval_loss": 6.0}
        no_trials.put(row.updated(trial_id=f"{row.trial_id}-{number}", metrics=metrics))
    assert scored(knowing(plan, no_trials), plan, "flat", until(6, drop)) == "CONTINUE"


def knowing(plan: SweepPlan, history: History) -> Any:
    """The early stopping of a sweep whose best trial came to 1.0."""
    known = [ended(plan, 2, 1.0, scenario={"data": {"eval_digest": "a"}})]
    return scheduler(curves(plan), known, history)


# --- resources --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "wanted", "resources", "concurrent"),
    [
        ([{"CPU": 2}], "auto", {"CPU": 2, "GPU": 0}, 1),
        ([{"CPU": 2}], 8, {"CPU": 1, "GPU": 0}, 2),
        ([{"CPU": 4}, {"CPU": 4}], "auto", {"CPU": 4, "GPU": 0}, 2),
        # One trial over two machines would wait for ever for eight CPUs on one of them.
        ([{"CPU": 4}, {"CPU": 4}], 1, {"CPU": 4, "GPU": 0}, 1),
        ([{"CPU": 0}, {"CPU": 8}], "auto", {"CPU": 8, "GPU": 0}, 1),
        ([{"CPU": 16, "GPU": 4}], "auto", {"CPU": 4, "GPU": 1}, 4),
        ([{"CPU": 2, "GPU": 4}], "auto", {"CPU": 0, "GPU": 1}, 4),
        ([{"CPU": 16, "GPU": 1}], 4, {"CPU": 4, "GPU": 0.25}, 4),
        ([{"CPU": 12, "GPU": 4}], 6, {"CPU": 2, "GPU": 0.5}, 6),
    ],
)
def test_a_trial_fits_on_a_node(
    config: Config, nodes: Any, wanted: Any, resources: dict[str, float], concurrent: int
) -> None:
    limited = swept(config, max_concurrent_trials=wanted)
    assert trial_resources(limited, nodes) == (resources, concurrent)


@pytest.mark.parametrize(
    ("nodes", "wanted", "each", "concurrent"),
    [
        ([{"CPU": 2}], "auto", {"CPU": 1, "GPU": 0}, 1),
        ([{"CPU": 8}], 3, {"CPU": 1, "GPU": 0}, 3),
        ([{"CPU": 8}], 99, {"CPU": 1, "GPU": 0}, 4),
        ([{"CPU": 8}] * 5, "auto", {"CPU": 8, "GPU": 0}, 2),
        ([{"CPU": 16, "GPU": 8}], "auto", {"CPU": 2, "GPU": 1}, 4),
        # No two workers share a GPU, however many trials are asked for.
        ([{"CPU": 16, "GPU": 5}], 99, {"CPU": 4, "GPU": 1}, 2),
        ([{"CPU": 2, "GPU": 4}], "auto", {"CPU": 0, "GPU": 1}, 2),
    ],
)
def test_a_trial_of_two_workers_fits_on_nodes(
    config: Config, nodes: Any, wanted: Any, each: dict[str, float], concurrent: int
) -> None:
    scaling = config.scaling.model_copy(update={"num_workers": 2})
    limited = swept(config, max_concurrent_trials=wanted).model_copy(update={"scaling": scaling})
    assert trial_resources(limited, nodes) == (each, concurrent)


def test_a_trial_of_more_workers_than_there_is_room_for_is_refused(config: Config) -> None:
    scaling = config.scaling.model_copy(update={"num_workers": 3})
    with pytest.raises(HardwareError, match="the cluster has 2 CPUs; use at most 2 workers"):
        trial_resources(config.model_copy(update={"scaling": scaling}), [{"CPU": 2}])


def test_a_group_does_not_go_to_the_cpus_where_there_are_too_few_gpus(config: Config) -> None:
    """It would train for days beside machines that are paid for by the hour."""
    scaling = config.scaling.model_copy(update={"num_workers": 2})
    nodes = [{"CPU": 4, "GPU": 1}]
    with pytest.raises(HardwareError, match=r"has 1 GPU; use at most 1 worker, .*use_gpu=false"):
        trial_resources(config.model_copy(update={"scaling": scaling}), nodes)
    scaling = scaling.model_copy(update={"use_gpu": False})
    each = trial_resources(config.model_copy(update={"scaling": scaling}), nodes)[0]
    assert each == {"CPU": 2, "GPU": 0}


def test_no_cpu_at_all_is_refused(config: Config) -> None:
    with pytest.raises(HardwareError, match="has no CPU to train on"):
        trial_resources(config, [{"CPU": 0}])


def test_workers_share_nodes_evenly() -> None:
    assert even_share([{"CPU": 1}, {"CPU": 3}], 2) == {"CPU": 1.0, "GPU": 0.0}
    assert even_share([{"CPU": 1}, {"CPU": 5}], 2) == {"CPU": 2.0, "GPU": 0.0}
    assert even_share([{"CPU": 4, "GPU": 1}, {"CPU": 4}], 2, gpu=1.0) is None


# --- the history ------------------------------------------------------------------------------


class Failing:
    """A history that can't be written while `broken`."""

    def __init__(self) -> None:
        self.broken = True
        self.rows: dict[str, TrialRecord] = {}

    def put(self, row: TrialRecord) -> None:
        if self.broken:
            raise HistoryError("the database is away")
        self.rows[row.trial_id] = row


def test_a_history_that_fails_for_a_moment_misses_nothing(plan: SweepPlan) -> None:
    history: Any = Failing()
    shown: list[TrialRecord] = []
    recorder = Recorder(history, shown.append)
    one, two = ended(plan, 2), ended(plan, 4)
    checkpoint = Path(one.directory or "", "checkpoints", "checkpoint-4")
    checkpoint.mkdir(parents=True)
    recorder.put(one)
    with pytest.raises(HistoryError, match="away"):
        recorder.flush()
    assert checkpoint.exists(), "a resume would train it anew"
    history.broken = False
    recorder.put(two)
    assert history.rows == {one.trial_id: one, two.trial_id: two}
    assert shown == [one, two]
    assert not checkpoint.exists()


DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: with_resources.<locals>.ResourceTrainable
\tpid: 3970
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"""
TRACE = """ray::LocalTrainable.__init__() (pid=3970, ip=127.0.0.1)
  File "worker.py", line 115, in setup
OSError: no torch"""
FULL = """1 worker(s) were killed due to the node running low on memory. 9GB used / 10GB limit
OOM kill reason: Memory usage exceeded threshold"""


@pytest.mark.parametrize(
    ("told", "status", "recorded"),
    [
        (
            DIED,
            "failed",
            r": The actor died unexpectedly .* task\. The actor is dead .* SYSTEM_ERROR$",
        ),
        (TRACE, "failed", r": OSError: no torch$"),
        (FULL, "oom", r"low on memory\. 9GB .* limit; lower train\.per_device"),
        (None, "failed", r": its process ended$"),
    ],
    ids=["died", "trace", "memory", "nothing"],
)
def test_a_worker_that_dies_before_its_trial_starts_leaves_a_row_with_the_reason(
    plan: SweepPlan, tmp_path: Path, told: str | None, status: str, recorded: str
) -> None:
    """The newest one of those that Tune noted, as it notes them."""
    history: Any = Failing()
    history.broken = False
    restarted: list[str] = []
    shown: list[TrialRecord] = []
    recorder = Recorder(
        history, shown.append, on_restart=lambda row, error: restarted.append(error)
    )
    planned = plan.trial({"method.r": 2, "train.seed": 0})
    notes = tmp_path / "error.txt"
    tune_trial: Any = SimpleNamespace(trial_id="t", config={TRIAL: planned}, error_file=str(notes))
    hooks = TuneRecorder(recorder, LostNodeWatch({}, print))
    hooks.on_trial_recover(0, [], tune_trial)
    assert [row.status for row in shown] == ["running"], "who shows it must know it"
    if told is not None:
        earlier = "Failure # 1 (occurred at 2026-11-27_21-42-47)\nsomething else\n"
        notes.write_text(f"{earlier}Failure # 2 (occurred at 2026-11-27_21-43-01)\n{told}\n")
    hooks.on_trial_error(0, [], tune_trial)
    (row,) = history.rows.values()
    assert row.status == status and re.search(recorded, row.error or ""), row.error
    assert not recorder.interrupt() and len(restarted) == 1


# --- resume -----------------------------------------------------------------------------------


def test_resume_passes_over_what_it_cannot_read(plan: SweepPlan) -> None:
    plan.save()
    newer = plan.storage.sweep("newer").path
    for name, text in (("torn", b"model: {na"), ("other", b"\xff\xfe"), ("odd", b"- 1\n")):
        (newer.with_name(name)).mkdir()
        (newer.with_name(name) / "config.yaml").write_bytes(text)
    (newer / "config.yaml").mkdir(parents=True)
    found = find_resumable(plan.config, plan.storage)
    assert found is not None and found.sweep_id == plan.sweep_id


def test_resume_refuses_other_data_under_the_same_name(plan: SweepPlan, lab: Any) -> None:
    plan.save()
    with History.open(plan.storage.history_url) as history:
        history.put(ended(plan, 2))
        lab.data.write_text(lab.data.read_text().replace("say", "tell"))
        with pytest.raises(ConfigError, match="or an earlier version of rayfin began it"):
            run_sweep(plan.config, history, plan.storage, SweepOptions(resume=True))


def test_resume_for_fewer_trials_ends_the_interrupted_ones(plan: SweepPlan) -> None:
    plan.save()
    fewer = swept(plan.config, num_samples=1)
    interrupted = started(plan.trial({"method.r": 4, "train.seed": 0}))
    checkpoint = Path(interrupted.directory or "", "checkpoints", "checkpoint-2")
    checkpoint.mkdir(parents=True)
    with History.open(plan.storage.history_url) as history:
        history.put(ended(plan, 2))
        history.put(interrupted)
        quiet = ProgressDisplay(Console(file=io.StringIO()))
        options = SweepOptions(resume=True, progress=quiet)
        result = run_sweep(fewer, history, plan.storage, options)
    assert not result.interrupted
    assert sorted(row.status for row in result.trials) == ["finished", "stopped"]
    assert not checkpoint.exists()


def test_the_next_sweep_notices_the_rows_of_a_driver_that_is_gone(plan: SweepPlan) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    plan.save()
    lost = started(plan.trial({"method.r": 4, "train.seed": 0})).updated(
        trial_id="other-1", sweep_id="other", scenario={DRIVER: this_driver() | {"pid": gone.pid}}
    )
    with History.open(plan.storage.history_url) as history:
        history.put(ended(plan, 2))
        history.put(lost)
        quiet, one = ProgressDisplay(Console(file=io.StringIO())), swept(plan.config, num_samples=1)
        run_sweep(one, history, plan.storage, SweepOptions(resume=True, progress=quiet))
        assert history.get("other-1").status == "interrupted"


def test_a_sweep_that_is_done_ends_well_whatever_becomes_of_checkpoints(plan: SweepPlan) -> None:
    """Those of a trial that was only recalled are not its own: another may be training there."""
    plan.save()
    kept = Path(ended(plan, 2).directory or "", "checkpoints", "checkpoint-4")
    kept.mkdir(parents=True)
    recalled = ended(plan, 2, scenario={"recalled_from": "train-1"})
    unreachable = ended(plan, 4, directory="elsewhere://bucket/trial")
    with History.open(plan.storage.history_url) as history:
        history.put(recalled)
        history.put(unreachable)
        Recorder(history, lambda _: None).put(recalled)
        quiet = ProgressDisplay(Console(file=io.StringIO()))
        both = swept(plan.config, num_samples=2)
        result = run_sweep(both, history, plan.storage, SweepOptions(resume=True, progress=quiet))
    assert result.best is not None and not result.interrupted
    assert kept.exists()


@pytest.mark.parametrize("rerun", [False, True])
def test_what_the_history_holds_is_trained_again_when_asked(
    plan: SweepPlan, rerun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[bool] = []
    monkeypatch.setattr(tune, "_fit", lambda *_: trained.append(True))
    monkeypatch.setattr(cluster, "ray_cluster", lambda _: contextlib.nullcontext())
    row = ended(plan, 2)
    Path(row.directory or "", "adapter").mkdir(parents=True)
    one = swept(plan.config, num_samples=1, parameters={"method.r": [2]})
    with History.open(plan.storage.history_url) as history:
        history.put(row)
        quiet = ProgressDisplay(Console(file=io.StringIO()))
        result = run_sweep(one, history, plan.storage, SweepOptions(rerun=rerun, progress=quiet))
    assert trained == [True] * rerun
    assert [r.scenario["recalled_from"] for r in result.trials] == [row.trial_id] * (not rerun)


def test_a_trial_of_others_that_can_t_be_reached_is_trained_here(
    plan: SweepPlan, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a bucket to which this machine has no way; the history is shared."""
    with History.open(plan.storage.history_url) as history:
        history.put(ended(plan, 2, directory="elsewhere://bucket/trial"))
        assert usable(history, plan.trial({"method.r": 2, "train.seed": 0}), "eval_loss") is None
    assert "can't be taken from the history: storage: 'elsewhere://bucket/trial'" in caplog.text


def test_a_trial_that_kept_no_state_answers_for_none_that_keeps_it(plan: SweepPlan) -> None:
    def planned(only_model: bool, method: str = "lora") -> Any:
        one = plan.trial({"method.r": 2, "train.seed": 0})
        train = one.spec.train.model_copy(update={"save_only_model": only_model})
        kind = MethodConfig.model_validate({"type": method})
        update = {"train": train, "method": one.spec.method if method == "lora" else kind}
        return dataclasses.replace(one, spec=one.spec.model_copy(update=update))

    row = ended(plan, 2)
    Path(row.directory or "", "adapter").mkdir(parents=True)
    spec = row.spec | {"train": row.spec["train"] | {"save_only_model": True}}
    with History.open(plan.storage.history_url) as history:
        history.put(row.updated(spec=spec))
        assert usable(history, planned(False), "eval_loss") is None
        assert usable(history, planned(False, "adalora"), "eval_loss"), "nothing continues it"
        earlier = usable(history, planned(True), "eval_loss")
        assert earlier is not None
        history.put(row)
        assert usable(history, planned(True), "eval_loss"), "it has more than was asked for"
    assert recalled(planned(False), earlier).spec["train"]["save_only_model"] is True


# --- the cluster ------------------------------------------------------------------------------


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_ray_that_does_not_start_in_time_is_ended_and_tried_again(
    failures: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[subprocess.Popen[bytes]] = []
    program = str(Path(ray.__file__).parent / "core/src/ray/raylet/raylet")

    def sleep(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([name, "600"], executable=shutil.which("sleep"))

    def init(**_: Any) -> None:
        if len(begun) < failures:
            # What ray.init does on a machine too slow for it: it leaves its processes behind.
            begun.append(sleep(program))
            others.append(sleep("not-of-ray"))
            raise Exception("The current node timed out during startup. …")  # noqa: TRY002 as Ray

    place = Path(tempfile.mkdtemp(dir="/tmp"))  # a short one: Ray's sockets have long names
    logs = place / f"ray/session_2026-01-01_{os.getpid()}/logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text("No space left on device\n")
    monkeypatch.setenv("RAY_TMPDIR", str(place))
    others = [sleep(program)]  # of another Ray, before
    monkeypatch.setattr(ray, "init", init)
    expected = (
        pytest.raises(RayfinError, match="did not start")
        if failures == 3
        else contextlib.nullcontext()
    )
    try:
        with expected as told, cluster.ray_cluster(None):
            pass
        assert len(begun) == failures
        if told is not None:
            log = re.search(r"; log: (\S+); likeliest reasons: \(1\) .+; \(3\) ", str(told.value))
            assert log and "No space left on device" in Path(log.group(1)).read_text()
        assert not any(psutil.pid_exists(process.pid) for process in begun)
        assert all(process.poll() is None for process in others)
    finally:
        shutil.rmtree(place)
        for process in (*begun, *others):
            process.kill()
            process.wait(540)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "can't be written (Not a directory): set RAY_TMPDIR to another"),
        ("x" * 60, "is too long for Ray's sockets: set RAY_TMPDIR to another"),
    ],
)
def test_a_ray_that_cannot_start_is_one_line_with_reasons_and_a_log(
    name: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / name
    place.touch() if name == "file" else place.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(place))
    environment = dict(os.environ)
    with pytest.raises(RayfinError) as told, cluster.ray_cluster(None, num_cpus=1):
        pass
    line = str(told.value)
    assert "\n" not in line and capfd.readouterr().err == ""
    log = re.search(r"; log: (\S+); likeliest reasons: \(1\) (.+?); \(2\) .+; \(3\) .+: .+$", line)
    assert (log and reason in log.group(2)) or reason in line, line
    assert log and "Traceback" in Path(log.group(1)).read_text()
    assert dict(os.environ) == environment, "a Ray elsewhere is to be joined as the user set it"


def test_what_outlives_its_driver_is_ended_and_nobody_who_has_its_number_since() -> None:
    outliving, other = (subprocess.Popen(["sleep", "600"]) for _ in range(2))
    started = end_with_driver.start_of(outliving.pid)
    wrong = int(end_with_driver.start_of(other.pid)) - 1
    told = (f"{outliving.pid}:{started}", f"{other.pid}:{wrong}", f"{2**30}:")
    program = end_with_driver.__file__
    watcher = subprocess.Popen([sys.executable, "-S", "-E", program, *told], stdin=subprocess.PIPE)
    try:
        assert watcher.poll() is None and outliving.poll() is None
        watcher.communicate(timeout=540)  # the driver ends
        assert watcher.returncode == 0 and outliving.wait(540) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (outliving, other, watcher):
            process.kill()
            process.wait(540)


# --- the worker -------------------------------------------------------------------------------


def evaluations(*, saved: list[str]) -> Any:
    """A run_trial that only reports, and says how it was ended."""

    def run(spec: Any, report: Any, **_: Any) -> TrialResult:
        try:
            for step in range(1, 100):
                if report(TrialResult("running", {"steps": step})) is False:
                    saved.append("stopped")
                    return TrialResult("stopped", {"steps": step})
        except BaseException as left:
            saved.append(type(left).__name__)
            raise
        return TrialResult("finished", {"steps": 100})

    return run


def test_a_worker_ends_its_thread_whenever_tune_ends_the_trial(
    plan: SweepPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[str] = []
    monkeypatch.setattr(trial, "run_trial", evaluations(saved=ends))
    monkeypatch.setattr(worker, "_CACHE", None)
    one, two = ({TRIAL: plan.trial({"method.r": r, "train.seed": 0})} for r in (2, 4))
    before = threading.active_count()
    trainable: Any = worker.LocalTrainable.__new__(worker.LocalTrainable)
    trainable.setup(one)
    assert [trainable.step()["step"] for _ in range(3)] == [1, 2, 3]
    trainable.reset_config(two)  # ASHA has stopped the first
    trainable.reset_config(one)  # and the second before its first step
    assert trainable.step()["step"] == 1
    trainable.cleanup()  # the sweep ends: the trial leaves its checkpoints where they are
    assert ends == ["stopped", "stopped", "TrialLeft"]
    assert threading.active_count() == before


# --- progress ---------------------------------------------------------------------------------


def test_a_terminal_shows_a_table_that_is_redrawn(plan: SweepPlan) -> None:
    out = io.StringIO()
    progress = ProgressDisplay(Console(file=out, force_terminal=True, width=120))
    progress.begin(with_sweep(plan, num_samples=2), [])
    row = started(plan.trial({"method.r": 4, "train.seed": 0}))
    progress.update(row.updated(metrics={"steps": 4, "eval_loss": 1.25}))
    progress.end()
    assert "0.5/2 trials" in out.getvalue() and "ETA" in out.getvalue()
    assert "4/8" in out.getvalue() and "1.2500" in out.getvalue()
    assert "\x1b[" in out.getvalue()


def test_recalled_trials_promise_no_speed(plan: SweepPlan) -> None:
    progress = ProgressDisplay(Console(file=io.StringIO()))
    progress.begin(plan, [])
    progress.update(ended(plan, 2, scenario={"recalled_from": "elsewhere"}))
    assert progress.eta_seconds() is None
