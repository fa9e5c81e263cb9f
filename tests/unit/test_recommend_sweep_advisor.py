"""The advisor in a sweep: where it starts, and how soon it leaves a past that misleads behind."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayfin.advisor import sweep_advisor as module
from rayfin.advisor.features import model_row
from rayfin.advisor.knowledge import Knowledge
from rayfin.advisor.practice import learning_rate
from rayfin.advisor.sweep_advisor import SweepAdvisor, advisor_for_sweep, scenario_of
from rayfin.advisor.trial_table import TrialTable
from rayfin.config import load_config
from rayfin.errors import ConfigError
from rayfin.history import History, TrialRecord
from rayfin.models import describe_model
from rayfin.paths import Storage
from rayfin.tuning.plan import SweepPlan
from rayfin.tuning.rows import started
from rayfin.tuning.search import EndedTrial, HistorySearch
from rayfin.tuning.sweep import run_sweep

NOW = datetime(2026, 1, 1, tzinfo=UTC)
BEST = 3e-3
MISLEADING = 3e-5
SIZE = model_row("mistral-0.8b", {})
"""The plan's model counts as one of this size: a toy would learn from itself alone."""
TASKS = ("one.jsonl", "two.jsonl", "three.jsonl")


def loss(rate: float, rank: int, best: float) -> float:
    """A bowl over the learning rate's logarithm, and a little less for larger ranks."""
    return 2.0 + 0.5 * math.log10(rate / best) ** 2 - 0.02 * math.log2(rank)


def past(best: float) -> list[TrialRecord]:
    """Two other models on each of three other tasks, whose best learning rate is `best`."""
    found = []
    for task, model in itertools.product(TASKS, ("llama-1b", "qwen3-0.6b")):
        for rate in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2):
            for rank in (2, 8, 32):
                found.append(
                    TrialRecord(
                        trial_id=f"{task}-{model}-{rate:g}-{rank}",
                        sweep_id="past",
                        fingerprint="f",
                        status="finished",
                        created_at=NOW,
                        updated_at=NOW,
                        spec={
                            "model": {"name": model},
                            "data": {"path": task},
                            "method": {"type": "lora", "r": rank, "lora_alpha": 16.0},
                            "train": {"learning_rate": rate, "max_steps": 60},
                        },
                        metrics={"eval_loss": loss(rate, rank, best)},
                    )
                )
    return found


@pytest.fixture
def plan(tmp_path: Path) -> SweepPlan:
    return plan_of(tmp_path)


def plan_of(folder: Path, *settings: str) -> SweepPlan:
    data = folder / "rows.jsonl"
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(8)]
    data.write_text("\n".join(map(json.dumps, rows)))
    config = load_config(
        {"model": {"name": "tiny"}, "method": {"type": "lora"}},
        [
            f"data.path={data}",
            f"storage={folder / 'runs'}",
            "sweep.search=advisor",
            "sweep.num_samples=12",
            "sweep.parameters.method.r=[2,8,32]",
            "sweep.parameters.train.learning_rate={space: loguniform, lower: 1.0e-5, upper: 0.03}",
            *settings,
        ],
    )
    return SweepPlan("sweep", config, Storage.open(config.storage))


def swept(
    plan: SweepPlan,
    advisor: SweepAdvisor | None,
    objective: Callable[[float, int], float | None],
    *,
    known: Sequence[TrialRecord] = (),
    trials: int = 12,
) -> list[TrialRecord]:
    """A sweep's rows, its objective computed and not trained."""
    search = HistorySearch(plan, known=known, advisor=advisor)
    rows = list(known)
    for number in range(trials):
        trial = search.suggest(str(number))
        if trial is None:
            break
        value = objective(trial.spec.train.learning_rate, trial.spec.method.rank)
        search.tell(str(number), value)
        row = started(trial)
        rows.append(
            row.updated(status="failed", error="diverged")
            if value is None
            else row.updated(status="finished", metrics={"eval_loss": value, "steps": 60})
        )
    return rows


def ours(rate: float, rank: int) -> float:
    return loss(rate, rank, BEST)


def losses(rows: Sequence[TrialRecord]) -> list[float]:
    return [row.metrics.get("eval_loss", math.inf) for row in rows]


def advisor_of(plan: SweepPlan, records: Sequence[TrialRecord], seed: int = 0) -> SweepAdvisor:
    knowledge = Knowledge.of(records, reference=False)
    return SweepAdvisor(knowledge, scenario_of(plan) | SIZE, "eval_loss", seed=seed)


def test_it_starts_where_past_sweeps_were_best(plan: SweepPlan) -> None:
    """Between practice's rate, where it starts without a past, and theirs."""
    first, *_ = swept(plan, advisor_of(plan, past(BEST)), ours, trials=1)
    alone, *_ = swept(plan, advisor_of(plan, []), ours, trials=1)
    usual = learning_rate("lora", 0.1)
    assert usual / 2 < alone.spec["train"]["learning_rate"] < usual * 2
    assert 1.5 * usual < first.spec["train"]["learning_rate"] < 2 * BEST


def test_a_past_that_misleads_is_left_behind_by_12_trials(tmp_path: Path) -> None:
    """Within noise of TPE, over five seeds; and the past did mislead at first."""
    best = ours(BEST, 32)
    regrets: dict[str, list[float]] = {"tpe": [], "advisor": []}
    starts = []
    knowledge = Knowledge.of(past(MISLEADING), reference=False)
    for seed in range(5):
        plan = plan_of(tmp_path, f"sweep.seed={seed}")
        advisor = SweepAdvisor(knowledge, scenario_of(plan) | SIZE, "eval_loss", seed=100 * seed)
        rows = swept(plan, advisor, ours)
        starts.append(rows[0].spec["train"]["learning_rate"])
        regrets["advisor"].append(min(losses(rows)) - best)
        tpe = plan_of(tmp_path, f"sweep.seed={seed}", "sweep.search=tpe")
        regrets["tpe"].append(min(losses(swept(tpe, None, ours))) - best)
    assert max(starts) < 3e-4
    mean = {name: float(np.mean(values)) for name, values in regrets.items()}
    assert mean["advisor"] <= mean["tpe"] + 0.02


def test_trials_that_diverge_are_kept_away_from(plan: SweepPlan) -> None:
    def half(rate: float, rank: int) -> float | None:
        return None if rate > 1e-3 else loss(rate, rank, 1e-3)

    rows = swept(plan, advisor_of(plan, past(BEST)), half)
    assert sum(row.status == "failed" for row in rows[:4]) >= 1
    assert sum(row.status == "failed" for row in rows[6:]) <= 2
    assert min(losses(rows)) - loss(1e-3, 32, 1e-3) < 0.05


def test_a_resumed_sweep_repeats_nothing_and_goes_on_from_what_it_knew(plan: SweepPlan) -> None:
    begun = swept(plan, advisor_of(plan, past(BEST)), ours, trials=5)
    rows = swept(plan, advisor_of(plan, past(BEST)), ours, known=begun)
    assert len(rows) == 12
    assert len({row.fingerprint for row in rows}) == 12
    assert min(losses(rows)) < min(losses(begun)) + 1e-9


def test_a_resumed_sweep_does_not_take_its_own_trials_for_the_past(
    plan: SweepPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen twice, they would make a past that misleads look right."""
    begun = swept(plan, advisor_of(plan, past(MISLEADING)), ours, trials=5)
    seen: list[set[str]] = []

    def learned(rows: Iterable[TrialRecord], **_: Any) -> Knowledge:
        kept = list(rows)
        seen.append({row.sweep_id for row in kept})
        return real(kept, reference=False)

    real = Knowledge.of
    monkeypatch.setattr(module.Knowledge, "of", learned)
    with History.open(plan.storage.history_url) as history:
        history.merge([*past(MISLEADING), *begun])
        assert advisor_for_sweep(plan, history) is not None
    assert seen == [{"past"}]


def test_what_the_history_answers_proves_nothing(plan: SweepPlan) -> None:
    advisor = advisor_of(plan, past(MISLEADING))
    rows = swept(plan, advisor_of(plan, past(MISLEADING)), ours, trials=5)
    own = [EndedTrial(row.spec, row.metrics["eval_loss"]) for row in rows]
    known = [EndedTrial(row.spec, row.metrics["eval_loss"], recalled=True) for row in rows]
    assert len(advisor._regrets(own)[1]) == 5
    assert len(advisor._regrets(known)[1]) == 0
    assert len(advisor._regrets([*own, *known])[1]) == 5


@pytest.mark.parametrize("search", ["auto", "advisor"])
def test_axes_that_it_does_not_know_are_left_to_others(tmp_path: Path, search: str) -> None:
    plan = plan_of(
        tmp_path, f"sweep.search={search}", "sweep.parameters.train.weight_decay=[0.0,0.1]"
    )
    with History.open(plan.storage.history_url) as history:
        if search == "auto":
            assert advisor_for_sweep(plan, history) is None
            return
        with pytest.raises(ConfigError, match=r"nothing about sweep\.parameters\.train\.weight"):
            advisor_for_sweep(plan, history)


@pytest.mark.parametrize(
    "other",
    ["train.optim=lion_8bit", "train.lr_scheduler_type=polynomial", "train.adam_beta2=0.9"],
)
def test_what_was_trained_otherwise_than_by_adamw_is_not_taken_for_it(
    tmp_path: Path, other: str
) -> None:
    name, value = other.removeprefix("train.").split("=")
    rows = past(BEST)
    trained = [
        row.model_copy(update={"spec": {**row.spec, "train": {**row.spec["train"], name: value}}})
        for row in rows
    ]
    assert len(TrialTable.of([*rows, *trained])) == len(rows)
    plans = {search: plan_of(tmp_path, f"sweep.search={search}", other) for search in SEARCHES}
    with History.open(plans["auto"].storage.history_url) as history:
        for row in rows:
            history.put(row)
        assert advisor_for_sweep(plans["auto"], history) is None
        with pytest.raises(ConfigError, match=f"none with this train.{name}"):
            advisor_for_sweep(plans["advisor"], history)


SEARCHES = ("auto", "advisor")


def test_it_chooses_among_points_of_which_each_has_the_axes_of_its_method(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        "sweep.parameters.method.type=[lora,ia3,p_tuning]",
        "sweep.parameters.method.num_virtual_tokens=[5,10,20]",
    )
    advisor = advisor_of(plan, past(BEST))
    assert 0 <= advisor.relevance(plan.space) <= 1
    search = HistorySearch(plan, advisor=advisor)
    for number in range(6):
        trial = search.suggest(str(number))
        assert trial is not None
        kind = trial.spec.method.type
        own = {"lora": {"method.r"}, "p_tuning": {"method.num_virtual_tokens"}}.get(kind, set())
        assert trial.values.keys() == own | {"method.type", "train.learning_rate"}
        search.tell(str(number), ours(trial.spec.train.learning_rate, 8))


def test_interrupted_points_come_before_the_advisors(plan: SweepPlan) -> None:
    values = {"method.r": 2, "train.learning_rate": 1.2345e-5}
    search = HistorySearch(plan, first=[values], advisor=advisor_of(plan, past(BEST)))
    first, second = search.suggest("a"), search.suggest("b")
    assert first is not None
    assert second is not None
    assert first.values == values
    assert second.values["train.learning_rate"] > 1e-4


def test_two_at_a_time_are_not_the_same_point(plan: SweepPlan) -> None:
    search = HistorySearch(plan, advisor=advisor_of(plan, past(BEST)))
    asked = [search.suggest(str(number)) for number in range(4)]
    assert len({trial.fingerprint for trial in asked if trial}) == 4


def test_a_small_list_is_tried_whole(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "sweep.parameters.train.learning_rate=[0.001,0.003]")
    rows = swept(plan, advisor_of(plan, past(BEST)), ours)
    assert len(rows) == 6


@pytest.mark.parametrize(("search", "advised"), [("auto", False), ("advisor", True)])
def test_auto_takes_no_advisor_that_has_nothing_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: str, advised: bool
) -> None:
    plan = plan_of(tmp_path, f"sweep.search={search}")
    monkeypatch.setattr(module, "knowledge_of", lambda _: Knowledge.of([], reference=False))
    with History.open(plan.storage.history_url) as history:
        assert (advisor_for_sweep(plan, history) is not None) is advised


def test_auto_takes_the_advisor_where_the_past_is_relevant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path, "sweep.search=auto")
    near: list[TrialRecord] = []
    corpus = plan.corpus(plan.config.data)
    for row in past(BEST):  # the same task and model, swept before
        model = describe_model(plan.config.model).as_dict()
        data = {"digest": corpus.digest, "source": corpus.source, "rows_train": 8}
        near.append(row.model_copy(update={"scenario": {"model": model, "data": data}}))
    monkeypatch.setattr(module, "knowledge_of", lambda _: Knowledge.of(near, reference=False))
    with History.open(plan.storage.history_url) as history:
        assert advisor_for_sweep(plan, history) is not None


def test_a_sweep_that_was_given_no_advisor_says_so(plan: SweepPlan) -> None:
    with (
        History.open(plan.storage.history_url) as history,
        pytest.raises(ConfigError, match="use tpe, random or grid"),
    ):
        run_sweep(plan.config, history, plan.storage)
