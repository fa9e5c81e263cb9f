"""What the search proposes, and what the history saves it from training."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from rich.console import Console

from rayfin.config import Config, load_config
from rayfin.history import History, TrialRecord
from rayfin.paths import Storage
from rayfin.training import TrialSpec
from rayfin.tuning.plan import PlannedTrial, SweepPlan, find_resumable, new_plan
from rayfin.tuning.progress import ProgressDisplay, trials_table
from rayfin.tuning.rows import recalled, started
from rayfin.tuning.search import HistorySearch, distinct_settings
from rayfin.tuning.space import SearchSpace
from rayfin.tuning.sweep import SweepOptions, run_sweep


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
    while (trial := search.suggest(str(len(proposed)))) is not None:
        proposed.append(trial)
        search.tell(str(len(proposed) - 1), 1.0)
    kinds = [trial.spec.method.type for trial in proposed]
    assert (kinds.count("ia3"), kinds.count("lora")) == (8, 56)
    assert len({trial.fingerprint for trial in proposed}) == 64


CONDITIONAL = (
    "sweep.parameters.method.type=[lora,ia3,p_tuning]",
    "sweep.parameters.method.r=[2,4]",
    "sweep.parameters.method.num_virtual_tokens={space: randint, lower: 4, upper: 6}",
)
RATES = "sweep.parameters.train.learning_rate={space: loguniform, lower: 1e-5, upper: 1e-1}"


def proposed_by(search: HistorySearch) -> list[PlannedTrial]:
    """All that a search proposes, each told to be as good as its learning rate is near 1e-3."""
    proposed: list[PlannedTrial] = []
    while (trial := search.suggest(str(len(proposed)))) is not None:
        rate = trial.spec.train.learning_rate
        search.tell(str(len(proposed)), abs(math.log10(rate / 1e-3)))
        proposed.append(trial)
    return proposed


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_each_trial_takes_the_axes_of_its_method(data: Path, search: str) -> None:
    plan = plan_of(data, *CONDITIONAL, RATES, f"sweep.search={search}", "sweep.num_samples=30")
    rates: dict[str, list[float]] = {}
    for trial in proposed_by(HistorySearch(plan)):
        values, spec = trial.values, trial.spec.model_dump(mode="json")
        kind = spec["method"]["type"]
        own = {"lora": {"method.r"}, "p_tuning": {"method.num_virtual_tokens"}, "ia3": set()}[kind]
        assert values.keys() == own | {"method.type", "train.learning_rate"}
        assert plan.space.values_in(spec) == values
        rates.setdefault(kind, []).append(values["train.learning_rate"])
    assert sum(map(len, rates.values())) == 30
    assert rates.keys() == {"lora", "ia3", "p_tuning"}
    if search == "tpe":  # it learned of all methods' trials
        late = [rate for found in rates.values() for rate in found[-3:]]
        assert sum(1e-4 < rate < 1e-2 for rate in late) >= 7


@pytest.mark.parametrize("search", ["grid", "tpe", "random"])
def test_settings_that_compute_the_same_are_one_trial(data: Path, search: str) -> None:
    """What an MLP encoder ignores, LoRA over 4 bits by two names, one rate in two ways."""
    plan = plan_of(
        data,
        "method.quantization_bit=4",
        "sweep.parameters.method.type=[lora,qlora,p_tuning]",
        "sweep.parameters.method.encoder_num_layers=[1,2,3]",
        "sweep.parameters.train.learning_rate=[1e-3,0.001]",
        "sweep.parameters.train.eval_steps=[5,10]",
        f"sweep.search={search}",
    )
    assert plan.space.size == 20
    assert distinct_settings(plan) == 2
    assert len(proposed_by(HistorySearch(plan))) == 2


def test_a_resumed_sweep_tells_the_sampler_what_each_row_says(data: Path) -> None:
    plan = plan_of(data, *CONDITIONAL, RATES, "sweep.search=tpe", "sweep.num_samples=30")
    points = list(grid_without_rates(plan))
    for number, point in enumerate(points):
        point["train.learning_rate"] = 1e-3 * (number + 1)
    rows = [finished(plan.trial(point), plan.config) for point in points]
    resumed = HistorySearch(plan, known=rows)
    learned = [set(trial.params) for trial in resumed._study.trials]
    assert learned == [set(point) for point in points]
    proposed = proposed_by(resumed)
    assert len(proposed) == 30 - len(points)
    assert {trial.fingerprint for trial in proposed}.isdisjoint(row.fingerprint for row in rows)
    # What was interrupted comes first, as it was.
    interrupted = [plan.space.values_in(row.spec) for row in rows]
    again = proposed_by(HistorySearch(plan, first=interrupted))
    assert [trial.values for trial in again[: len(points)]] == points


@pytest.mark.parametrize("resumed", [False, True])
def test_a_search_learns_how_a_trial_stands_among_those_that_it_compares_with(
    data: Path, resumed: bool
) -> None:
    """Shorter samples have the smaller losses here, of other tokens; rates near 1e-3 are better."""
    axes = (RATES, "sweep.parameters.data.max_length=[40,128]", "sweep.search=tpe")
    plan = plan_of(data, *axes, "sweep.num_samples=40")
    told: list[TrialRecord] = []

    def go_on(search: HistorySearch, trials: int) -> list[PlannedTrial]:
        found = []
        for number in range(trials):
            trial = search.suggest(str(number))
            assert trial is not None
            length = trial.spec.data.max_length
            loss = length / 10 + abs(math.log10(trial.spec.train.learning_rate / 1e-3))
            scenario = {"data": {"eval_digest": str(length)}}
            search.tell(str(number), loss, 60, scenario)
            row = finished(trial, plan.config)
            told.append(row.updated(metrics={"eval_loss": loss, "steps": 60}, scenario=scenario))
            found.append(trial)
        return found

    search = HistorySearch(plan)
    go_on(search, 24)
    if resumed:
        search = HistorySearch(plan, known=told)
    values = {t.number: t.value for t in search._study.trials if t.value is not None}
    assert len(values) == 24
    by_length: dict[int, list[float]] = {}
    for row, value in zip(told, values.values(), strict=True):
        by_length.setdefault(row.spec["data"]["max_length"], []).append(value)
    assert median(by_length[40]) == pytest.approx(median(by_length[128]))
    late = go_on(search, 16)
    assert {trial.spec.data.max_length for trial in late} == {40, 128}
    assert sum(1e-4 < trial.spec.train.learning_rate < 1e-2 for trial in late) >= 9


def test_scores_that_compare_are_told_as_they_are(data: Path) -> None:
    plan = plan_of(data, RATES, "sweep.search=tpe", "sweep.num_samples=9")
    search = HistorySearch(plan)
    first = search._study
    assert len(proposed_by(search)) == 9
    assert search._study is first and [t.value for t in first.trials if t.value is not None] == [
        one.value for one in search._ended
    ]


def test_a_score_that_was_told_otherwise_is_told_as_it_is_where_it_stands_so(data: Path) -> None:
    """With B's third score both medians are 0, as if nothing was centred; .1 was told before."""
    search = HistorySearch(plan_of(data, RATES, "sweep.search=tpe", "sweep.num_samples=9"))
    told = []
    for number, (group, value) in enumerate([("A", 0.0), ("B", 0.2), ("B", 0.0), ("B", 0.0)]):
        search.suggest(str(number))
        search.tell(str(number), value, 60, {"data": {"eval_digest": group}})
        told.append([trial.value for trial in search._study.trials])
    assert told[2] == [0.1, 0.2, 0.0]
    assert told[3] == [0.0, 0.2, 0.0, 0.0]


class First:
    """An advisor that takes the first of what it may choose from."""

    def choose(self, options: Any, ended: Any, running: Any) -> int:
        return 0


@pytest.mark.parametrize(("search", "advisor"), [("tpe", None), ("advisor", First())])
def test_whoever_chooses_a_resumed_sweep_goes_on_with_what_it_began(
    data: Path, search: str, advisor: First | None
) -> None:
    plan = plan_of(data, RATES, "sweep.num_samples=4", f"sweep.search={search}")
    before = HistorySearch(plan, advisor=advisor)
    ended, interrupted = before.suggest("one"), before.suggest("two")
    assert ended is not None and interrupted is not None
    rows = [finished(ended, plan.config)]
    resumed = HistorySearch(plan, known=rows, first=[interrupted.values], advisor=advisor)
    proposed = [trial.fingerprint for trial in proposed_by(resumed)]
    assert proposed[0] == interrupted.fingerprint
    assert len({ended.fingerprint, *proposed}) == 1 + len(proposed) == 4


def grid_without_rates(plan: SweepPlan) -> Iterator[dict[str, Any]]:
    axes = {k: v for k, v in plan.config.sweep.parameters.items() if k != "train.learning_rate"}
    sweep = plan.config.sweep.model_copy(update={"parameters": axes})
    return SearchSpace(plan.config.model_copy(update={"sweep": sweep})).grid()


def test_what_was_written_of_the_method_is_part_of_the_sweep(data: Path) -> None:
    """Where methods are swept, 4 bits that were asked for make it another sweep."""
    axis = "sweep.parameters.method.type=[lora,dora]"
    plan = plan_of(data, axis, "method.quantization_bit=4")
    plan = new_plan(plan.config, plan.storage)
    plan.save()
    found = find_resumable(plan.config, plan.storage)
    assert found is not None and found.sweep_id == plan.sweep_id
    assert find_resumable(plan_of(data, axis).config, plan.storage) is None
    dora = found.trial({"method.type": "dora"})
    assert dora.spec.method.quantization_bit == 4
    # As the saved file is run, so is the command.
    again = load_config(plan.location.path / "config.yaml")
    assert SweepPlan("x", again, plan.storage).trial({"method.type": "dora"}).spec == dora.spec


def test_fewer_settings_than_trials_are_said_and_not_every_method_s_settings(data: Path) -> None:
    plan = plan_of(
        data,
        "method.lora_alpha=32",
        "sweep.parameters.method.type=[lora,ia3]",
        "sweep.parameters.method.r=[2,4,8]",
        "sweep.num_samples=5",
        "sweep.search=grid",
    )
    trials = [plan.trial(values) for values in plan.space.grid()]
    with History.open(plan.storage.history_url) as history:
        for trial in trials:
            row = finished(trial, plan.config).updated(sweep_id="before")
            adapter = trial.location.path / "adapter"
            adapter.mkdir(parents=True)
            history.put(row)
        out = io.StringIO()
        progress = ProgressDisplay(Console(file=out, width=80))
        result = run_sweep(plan.config, history, plan.storage, SweepOptions(progress=progress))
    assert "4 distinct settings of 5 trials; each is trained once\n" in out.getvalue()
    assert "method.r is for lora; ia3 has no such setting\n" in out.getvalue()
    assert "method.lora_alpha is for lora; ia3 has no such setting\n" in out.getvalue()
    assert "trial 4/4 finished  type=ia3  " in out.getvalue()
    assert result.notes[-1] == "4 distinct settings of 5 trials"
    assert not result.interrupted and len(result.trials) == 4
    table = io.StringIO()
    Console(file=table, width=120).print(trials_table(plan.config, result.trials))
    (ia3,) = [line for line in table.getvalue().splitlines() if "ia3" in line]
    assert ia3.split()[2:5] == ["ia3", "–", "60/60"]


def test_a_sweep_ends_with_the_axes_whose_best_trials_lie_at_an_edge(data: Path) -> None:
    axes = "sweep.parameters={method.r: [2, 4, 8], train.seed: [1, 2, 3]}"
    plan = plan_of(data, axes, "sweep.search=grid", "sweep.num_samples=9")
    with History.open(plan.storage.history_url) as history:
        for values in plan.space.grid():
            trial = plan.trial(values)
            (trial.location.path / "adapter").mkdir(parents=True)
            metrics = {"eval_loss": 1.0 / values["method.r"]}
            row = finished(trial, plan.config)
            history.put(row.updated(sweep_id="before", metrics={**row.metrics, **metrics}))
        result = run_sweep(plan.config, history, plan.storage)
    assert result.notes == (
        "3 of the 4 best trials have method.r at the upper edge of its list of values (8): "
        "widen it",
    )


def test_trials_that_the_history_holds_are_recalled_and_count(data: Path) -> None:
    plan = plan_of(data, "sweep.num_samples=4", "sweep.parameters.method.r=[2,4,8,16]")
    seen: list[str] = []

    def recall(trial: PlannedTrial) -> TrialRecord | None:
        seen.append(trial.fingerprint)
        return recalled(trial, finished(trial, plan.config)) if len(seen) <= 3 else None

    search = HistorySearch(plan, recall=recall)
    assert search.suggest("a") is not None
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
    progress = ProgressDisplay(Console(file=out, width=200))
    progress.begin(plan, [])
    row = started(plan.trial({"method.r": 2}))
    progress.update(row.updated(status="failed", error="[/lib/pair.cc:534] closed [enforce x]"))
    assert "[/lib/pair.cc:534] closed [enforce x]" in out.getvalue()


def test_the_saved_configuration_holds_no_password(data: Path) -> None:
    plan = plan_of(
        data, "sweep.parameters.method.r=[2]", "history=postgresql+psycopg://u:secret@db/x"
    )
    plan.save()
    assert "secret" not in (plan.location.path / "config.yaml").read_text()
