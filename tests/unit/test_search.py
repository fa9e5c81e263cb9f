"""What the search proposes, and what the history saves it from training."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from rayfin.config import Config, load_config
from rayfin.errors import ConfigError
from rayfin.history import History, TrialRecord
from rayfin.paths import Storage
from rayfin.training import TrialSpec
from rayfin.tuning.plan import PlannedTrial, SweepPlan, alone, new_plan
from rayfin.tuning.progress import Progress
from rayfin.tuning.rows import recalled, started
from rayfin.tuning.search import HistorySearch
from rayfin.tuning.sweep import run_sweep


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def plan_of(data: Path, *settings: str) -> SweepPlan:
    config = load_config(
        {"model": {"name": "tiny"}, "method": {"type": "lora"}},
        [f"data.path={data}", f"storage={data.parent / 'runs'}", *settings],
    )
    return SweepPlan("sweep", config, Storage.open(config.storage))


def finished(trial: PlannedTrial, config: Config) -> TrialRecord:
    return started(trial).updated(
        status="finished", metrics={"eval_loss": 1.0, "steps": config.train.max_steps}
    )


def test_a_grid_is_tried_whole_although_many_of_its_points_compute_the_same(data: Path) -> None:
    """ia3 has no rank: of its 56 points only 8 differ, and they come first."""
    rates = [round(0.001 * n, 4) for n in range(1, 9)]
    plan = plan_of(
        data,
        "sweep.search=grid",
        "sweep.num_samples=1000",
        "sweep.parameters.method.type=[ia3,lora]",
        "sweep.parameters.method.r=[1,2,3,4,5,6,7]",
        f"sweep.parameters.train.learning_rate={rates}",
    )
    search = HistorySearch(plan)
    proposed = []
    while isinstance(config := search.suggest(str(len(proposed))), dict):
        proposed.append(config)
        search.tell(str(len(proposed) - 1), 1.0)
    kinds = [config["spec"]["method"]["type"] for config in proposed]
    assert (kinds.count("ia3"), kinds.count("lora")) == (8, 56)
    assert len({config["fingerprint"] for config in proposed}) == 64


def test_trials_that_the_history_holds_are_recalled_and_count(data: Path) -> None:
    plan = plan_of(data, "sweep.num_samples=4", "sweep.parameters.method.r=[2,4,8,16]")
    seen: list[str] = []

    def recall(trial: PlannedTrial) -> TrialRecord | None:
        seen.append(trial.fingerprint)
        return recalled(trial, finished(trial, plan.config)) if len(seen) <= 3 else None

    search = HistorySearch(plan, recall=recall)
    assert isinstance(search.suggest("a"), dict)
    assert search.suggest("b") is None
    assert len(set(seen)) == 4


def test_a_recalled_row_has_the_settings_of_the_sweep_that_recalls_it(data: Path) -> None:
    """Batches of 4 in one go compute what 2 batches of 2 do: one fingerprint, two specs."""
    axis = "sweep.parameters.method.r=[2,4]"
    one = plan_of(data, axis, "train.per_device_train_batch_size=4").trial({"method.r": 2})
    two = plan_of(
        data,
        axis,
        "train.per_device_train_batch_size=2",
        "train.gradient_accumulation_steps=2",
    ).trial({"method.r": 2})
    assert one.fingerprint == two.fingerprint
    row = recalled(two, finished(one, load_config()))
    assert row.spec["train"]["gradient_accumulation_steps"] == 2
    assert row.scenario["recalled_from"] == one.trial_id


def test_local_paths_enter_a_trial_absolute(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's own directory is not the one that the command was given in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    spec = TrialSpec.of(load_config({}, ["data.path=rows.jsonl", "model.name=./model"]))
    assert (spec.data.path, spec.model.name) == (str(data), str(tmp_path / "model"))
    spec = TrialSpec.of(load_config({}, ["data.path=pydocs", "model.name=tiny"]))
    assert (spec.data.path, spec.model.name) == ("pydocs", "tiny")


def test_an_error_with_brackets_is_shown_as_it_is(data: Path) -> None:
    plan = plan_of(data, "sweep.parameters.method.r=[2,4]")
    out = io.StringIO()
    progress = Progress(Console(file=out, width=200))
    progress.begin(plan, [])
    row = started(plan.trial({"method.r": 2}))
    progress.update(row.updated(status="failed", error="[/lib/pair.cc:534] closed [enforce x]"))
    assert "[/lib/pair.cc:534] closed [enforce x]" in out.getvalue()


def test_a_sweep_that_runs_is_not_resumed_by_a_second_driver(data: Path) -> None:
    plan = plan_of(data, "sweep.parameters.method.r=[2,4]")
    plan = new_plan(plan.config, plan.storage)
    plan.save()
    with (
        History.open(plan.storage.history_url) as history,
        alone(plan.place, ""),
        pytest.raises(ConfigError, match="is running in another process"),
    ):
        run_sweep(plan.config, history=history, storage=plan.storage, resume=True)


def test_the_saved_configuration_holds_no_password(data: Path) -> None:
    plan = plan_of(
        data, "sweep.parameters.method.r=[2]", "history=postgresql+psycopg://u:secret@db/x"
    )
    plan.save()
    assert "secret" not in (plan.place.path / "config.yaml").read_text()
