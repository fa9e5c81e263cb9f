"""Whatever a history holds: what makes no sense neither breaks a recommendation nor sways it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from rayfin.advisor import Scenario, practice
from rayfin.advisor.answer import Recommendation
from rayfin.advisor.knowledge import Knowledge
from rayfin.advisor.quality_model import (
    LEARNED,
    QualityModel,
    regret_quantiles,
    sample_regrets,
)
from rayfin.advisor.recommendation import ScenarioFacts, recommend
from rayfin.advisor.trial_table import TrialTable, group_by_scenario
from rayfin.config import build_config
from rayfin.errors import ConfigError
from rayfin.hardware import Hardware
from rayfin.history import SERVING, TrialRecord
from rayfin.models import ModelFacts

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CPU = Hardware("cpu", "x86_64", 0, 16 * 2**30, 2, 16 * 2**30, False)
SMOLLM2 = ModelFacts(
    name="smollm2-135m",
    identity="smollm2-135m@0.1.2",
    architecture="LlamaForCausalLM",
    parameters=134_515_008,
    linear_parameters=106_168_320,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    dtype="bfloat16",
)
LARGER = replace(SMOLLM2, name="smollm2-360m", identity="smollm2-360m@1", parameters=361_821_120)
OTHER = replace(SMOLLM2, name="qwen3-0.6b", identity="qwen3-0.6b@1", parameters=596_049_920)
MODELS = (SMOLLM2, LARGER, OTHER)
BETWEEN = replace(SMOLLM2, name="smollm2-250m", identity="smollm2-250m@1", parameters=250_000_000)
TASK = "0123456789abcdef"
DATA = {"digest": TASK, "rows_train": 1000}
RATES = (1e-4, 5e-4, 1e-3, 2e-3, 4e-3, 3e-2)
BEST_RATE = 4e-3
"""Eight times practice's, so that trials and rules disagree."""
RANKS = (2, 8, 32)


def place(facts: ModelFacts = SMOLLM2, task: str = TASK) -> ScenarioFacts:
    scenario = Scenario(
        hardware="cpu",
        data_scale="small",
        latency="normal",
        model_name=facts.name,
        model_size_b=facts.parameters / 1e9,
        dataset_rows=1000,
    )
    return ScenarioFacts(scenario, facts, CPU, DATA | {"digest": task})


def trial(trial_id: str, facts: ModelFacts = SMOLLM2, **changes: Any) -> TrialRecord:
    """A trial; `rate` and `r` set its settings, the rest replaces fields."""
    rate, rank = changes.pop("rate", 1e-3), changes.pop("r", 8)
    config = build_config(
        {"model": {"name": "tiny"}, "method": {"type": "lora"}},
        {"method.lora_alpha": 32, "train.max_steps": 60},
    ).model_dump(mode="json")
    spec = {name: config[name] for name in ("model", "data", "method", "train")}
    spec["model"]["name"], spec["data"]["path"] = facts.name, "pydocs"
    spec["method"]["r"], spec["train"]["learning_rate"] = rank, rate
    values: dict[str, Any] = {
        "trial_id": trial_id,
        "sweep_id": "s",
        "fingerprint": trial_id,
        "status": "finished",
        "created_at": AT,
        "updated_at": AT,
        "spec": spec,
        "scenario": {
            "model": facts.as_dict(),
            "data": dict(DATA),
            "hardware": CPU.as_dict() | {"num_workers": 1},
        },
        "metrics": {"eval_loss": 2.0, "base_eval_loss": 5.0, "steps": 60, "train_seconds": 6.0},
    }
    return TrialRecord(**(values | changes))


def loss(rate: float, rank: int) -> float:
    return 2.0 + 0.25 * math.log10(rate / BEST_RATE) ** 2 + 0.02 * abs(math.log2(rank / 32))


def failed(trial_id: str, error: str = "loss became nan at step 3", **changes: Any) -> TrialRecord:
    return trial(trial_id, status="failed", error=error, metrics={}, **changes)


def history() -> list[TrialRecord]:
    """Three models on one task, each over the same grid; the largest rate diverges on one."""
    records = []
    for facts, rate, rank in itertools.product(MODELS, RATES, RANKS):
        name = f"{facts.name}-{rate:g}-{rank}"
        if facts is OTHER and rate == RATES[-1]:
            records.append(failed(name, facts=facts, rate=rate, r=rank))
        else:
            score = {"eval_loss": loss(rate, rank), "base_eval_loss": 5.0, "steps": 60}
            metrics = score | {"train_seconds": 6.0}
            records.append(trial(name, facts, rate=rate, r=rank, metrics=metrics))
    return records


def answered(records: list[TrialRecord], where: ScenarioFacts | None = None, **options: Any) -> Any:
    return recommend(where or place(), Knowledge.of(records, reference=False), **options)


@pytest.fixture(scope="module")
def known() -> dict[str, Recommendation]:
    """What is recommended from the plain history, to a model in it and to one that is not."""
    return {facts.name: answered(history(), place(facts)) for facts in (SMOLLM2, BETWEEN)}


def test_trials_outweigh_the_rules_where_they_say_otherwise(
    known: dict[str, Recommendation],
) -> None:
    for name, answer in known.items():
        first = answer.choices[0]
        assert answer.source == "learned"
        assert answer.relevance > 2 * LEARNED  # they tried one method, and of that they say most
        assert first.method == "lora"
        assert first.settings["train.learning_rate"] == pytest.approx(BEST_RATE, rel=0.6)
        assert first.trials and all(basis.similarity <= 1.0 for basis in first.trials)
        assert first.trials[0].trial_id.startswith(
            "smollm2" if name == BETWEEN.name else SMOLLM2.name
        )
        assert first.predictions.shortfall.expected < 0.2
        shortfall = first.predictions.shortfall
        assert shortfall.low <= shortfall.expected <= shortfall.high


def test_what_never_diverged_is_not_said_to(known: dict[str, Recommendation]) -> None:
    # The worst setting of a scenario is charged in full, as if it had.
    assert known[SMOLLM2.name].choices[0].predictions.divergence < 0.1
    records = [record for record in history() if record.status == "finished"]
    model = QualityModel.of(TrialTable.of(records))
    near = model.posterior(place().columns())
    (group, *_) = model.groups.values()
    assert near.divergence(group.rows).max() < 1e-3  # what practice fears is forgotten, nearly
    assert group.regrets.max() == 1.0


def test_what_diverged_is_said_to() -> None:
    model = QualityModel.of(TrialTable.of(history()))
    group = model.groups[place(OTHER).columns()["group"]]
    chances = model.posterior(place(OTHER).columns()).divergence(group.rows)
    assert chances[group.diverged == 1.0].min() > 0.5
    assert chances[group.diverged == 0.0].max() < 0.3


# --- histories that say nothing -----------------------------------------------------------------


def assert_rules(answer: Recommendation) -> None:
    """The rules' first method with practice's settings, every interval wide."""
    assert answer.source == "rules"
    first = answer.choices[0]
    assert first.method == "lora"
    usual = practice.settings(place().scenario, "lora")
    assert first.settings == {**usual, "train.num_train_epochs": 3}
    for choice in answer.choices:
        shortfall = choice.predictions.shortfall
        assert shortfall.high - shortfall.low > 0.5
        assert choice.trials == []


def test_an_empty_history_leaves_it_to_the_rules() -> None:
    answer = answered([])
    assert_rules(answer)
    assert (answer.relevance, answer.trials) == (0.0, 0)
    assert answer.explanation.startswith("the rules: 0 trials")
    assert len({str(choice.settings) for choice in answer.choices}) == 3


def failures(*reasons: str) -> list[TrialRecord]:
    return [
        failed(f"failed-{n}", reason, rate=rate, r=rank)
        for n, (reason, rate, rank) in enumerate(itertools.product(reasons, RATES, RANKS))
    ]


FAULTLESS = ("no such file: finance.jsonl", "CUDA out of memory", "a worker was lost")
"""Why trials fail that say nothing about their settings' quality."""


def test_a_history_of_failures_alone_leaves_it_to_the_rules() -> None:
    records = failures("loss became nan at step 3", "diverged", *FAULTLESS)
    answer = answered(records)
    assert_rules(answer)
    assert answer.trials == len(records)
    assert answer.choices[0].settings == answered([]).choices[0].settings


def test_one_trial_is_not_enough() -> None:
    assert_rules(answered([trial("only")]))


def test_trials_that_say_little_leave_it_to_the_rules() -> None:
    elsewhere = {"model": OTHER.as_dict(), "data": {"digest": "elsewhere"}}
    answer = answered(
        [
            trial(f"few-{n}", OTHER, rate=rate, scenario=elsewhere, metrics={"eval_loss": loss})
            for n, (rate, loss) in enumerate([(1e-1, 2.0), (3e-1, 3.0)])
        ]
    )
    assert 0.0 < answer.relevance < LEARNED
    assert_rules(answer)


def test_a_history_of_nonsense_alone_leaves_it_to_the_rules() -> None:
    assert_rules(answered(absurd_settings() + absurd_scores()))


# --- rows that make no sense among others -------------------------------------------------------


def absurd_settings() -> list[TrialRecord]:
    """Settings that can't have run, with the best of all scores."""
    rates: list[Any] = [1e308, -1e-3, 0, 10**400, "fast", True, [1e-3]]
    ranks: list[Any] = [-3, 0, 10**400, 0.1, "8", False, {}]
    settings = [(rate, 8) for rate in rates] + [(1e-3, rank) for rank in ranks]
    best = {"eval_loss": 1e-3, "steps": 60}
    return [
        trial(f"setting-{n}", metrics=best, rate=rate, r=rank)
        for n, (rate, rank) in enumerate(settings)
    ]


def absurd_scores() -> list[TrialRecord]:
    scores: list[Any] = [-1e300, -5.0, -1e-9, 1e300, 1e7, 10**400]
    found = [
        trial(f"score-{n}", rate=5e-4, metrics={"eval_loss": score, "steps": 60})
        for n, score in enumerate(scores)
    ]
    wrong: list[Any] = [None, "low", True, [2.0]]
    for n, value in enumerate(wrong):
        metrics = {"eval_loss": value, "exact_match": value, "steps": value}
        found.append(trial(f"metric-{n}", status="stopped", metrics=metrics))
    return found


def absurd_facts() -> list[TrialRecord]:
    """Other models and tasks, of which nothing can be that is said of them."""
    records = []
    values: list[Any] = [1e300, -1e300, 10**400, 0, "many", True, [7]]
    for value, rate, rank in itertools.product(values, RATES, RANKS):
        task = f"task-{values.index(value)}"
        names = ("parameters", "hidden_size")
        scenario = {
            "model": dict.fromkeys(names, value) | {"identity": task},
            "data": {"digest": task, "rows_train": value, "completion_share": value},
            "hardware": {"device": value},
        }
        metrics = {"eval_loss": loss(rate, rank), "steps": value, "train_seconds": value}
        name = f"{task}-{rate:g}-{rank}"
        records.append(trial(name, rate=rate, r=rank, scenario=scenario, metrics=metrics))
    return records


def mistyped() -> list[TrialRecord]:
    """Sections that are missing or of the wrong type; the scores are as they should be."""
    wrong: list[Any] = [None, [], [1], "text", 3, True, {}, {"type": ["lora"]}, {"name": {"a": 1}}]
    whole = trial("whole", metrics={"eval_loss": loss(1e-3, 8), "steps": 60}, rate=1e-3)
    records = [whole.updated(trial_id="nothing", spec={}, scenario={})]
    for name, value in itertools.product(("model", "data", "method", "train"), wrong):
        changes = {"trial_id": f"spec-{len(records)}", "spec": whole.spec | {name: value}}
        records.append(whole.updated(**changes))
    for name, value in itertools.product(("model", "data", "hardware"), wrong):
        changes = {
            "trial_id": f"scenario-{len(records)}",
            "scenario": whole.scenario | {name: value},
        }
        records.append(whole.updated(**changes))
    return records


def assert_same(answer: Recommendation, known: Recommendation, tolerance: float) -> None:
    assert answer.source == known.source == "learned"
    mine, theirs = answer.choices[0], known.choices[0]
    assert mine.settings == theirs.settings
    one, other = mine.predictions.shortfall, theirs.predictions.shortfall
    assert one.expected == pytest.approx(other.expected, abs=min(tolerance, 0.05))
    assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=tolerance)
    assert mine.predictions.divergence == pytest.approx(
        theirs.predictions.divergence, abs=tolerance
    )


@pytest.mark.parametrize("facts", [SMOLLM2, BETWEEN], ids=lambda facts: facts.name)
@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        (lambda: failures(*FAULTLESS), 0.0),
        (absurd_settings, 0.0),
        (absurd_scores, 0.0),
        (lambda: [trial("huge", rate=1e-4, metrics={"eval_loss": 9e5, "steps": 60})], 0.06),
        (absurd_facts, 0.3),  # tasks that agree with ours make the interval narrower
        (mistyped, 0.1),
    ],
    ids=["failures", "settings", "scores", "one-huge-score", "facts", "types"],
)
def test_rows_that_make_no_sense_do_not_sway(
    known: dict[str, Recommendation],
    more: Callable[[], list[TrialRecord]],
    tolerance: float,
    facts: ModelFacts,
) -> None:
    answer = answered([*more(), *history()], place(facts))
    assert_same(answer, known[facts.name], tolerance)


def other_tasks(scale: float) -> list[TrialRecord]:
    """Two other tasks, on which small rates are best; `scale` is what their losses span."""
    records = []
    for task, facts, rate, rank in itertools.product(("one", "two"), MODELS, RATES, RANKS):
        score = scale * (1.0 + 0.1 * math.log10(rate / RATES[0]))
        records.append(
            trial(
                f"{task}-{facts.name}-{rate:g}-{rank}",
                facts,
                rate=rate,
                r=rank,
                metrics={"eval_loss": score, "base_eval_loss": 2 * scale, "steps": 60},
                scenario={"model": facts.as_dict(), "data": {"digest": task}},
            )
        )
    return records


def test_how_large_other_tasks_scores_are_does_not_matter(
    known: dict[str, Recommendation],
) -> None:
    plain, huge = (answered(history() + other_tasks(scale)) for scale in (2.0, 2e5))
    assert_same(huge, plain, 1e-9)
    assert huge.choices[0].settings == known[SMOLLM2.name].choices[0].settings
    again, far = (answered(history() + other_tasks(scale), place(BETWEEN)) for scale in (2.0, 2e5))
    assert_same(far, again, 1e-9)


@pytest.mark.parametrize("which", ["best", "worst", "middle"])
def test_hundreds_of_copies_of_a_trial_do_not_sway(
    known: dict[str, Recommendation], which: str
) -> None:
    records = history()
    own = sorted(
        (record for record in records if record.scenario["model"]["name"] == SMOLLM2.name),
        key=lambda record: float(record.metrics["eval_loss"]),
    )
    copied = {"best": own[0], "worst": own[-1], "middle": own[8]}[which]
    copies = [copied.updated(trial_id=f"copy-{n}") for n in range(300)]
    assert_same(answered(records + copies), known[SMOLLM2.name], 0.05)


def test_a_million_rows_that_repeat_a_tables_do_not_sway_its_groups() -> None:
    table = TrialTable.of(history())
    once = group_by_scenario(table)
    copies = np.concatenate([np.arange(len(table)), np.full(1_000_000, 1)])
    often = group_by_scenario(table.take(copies))
    assert once.keys() == often.keys()
    for key, group in once.items():
        assert often[key].regrets == pytest.approx(group.regrets)
        assert np.array_equal(often[key].rows, group.rows, equal_nan=True)
        assert often[key].counts.max() <= 4


# --- scenarios unlike any that was seen ---------------------------------------------------------


def test_a_scenario_unlike_anything_gets_the_rules_or_wide_intervals(
    known: dict[str, Recommendation],
) -> None:
    size = 70_000_000_000
    facts = replace(SMOLLM2, name="llama-3.1-70b", identity="x@1", parameters=size)
    far = ScenarioFacts(
        Scenario(hardware="multi_gpu", num_gpus=8, data_scale="large", model_size_b=70.0),
        replace(
            facts,
            hidden_size=8192,
            intermediate_size=28672,
            num_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=128,
            linear_parameters=size,
        ),
        Hardware("cuda", "NVIDIA H100", 8, 80 * 2**30, 64, 2**40, True),
        {
            "digest": "another task",
            "rows_train": 5_000_000,
            "tokens_per_sample_mean": 3000.0,
            "completion_share": 0.9,
        },
    )
    answer = answered(history(), far)
    ranges = [choice.predictions.shortfall for choice in answer.choices]
    near = [choice.predictions.shortfall for choice in known[SMOLLM2.name].choices]
    assert answer.source == "rules"
    assert "is 117 times smaller" in answer.explanation  # than the largest that is known
    assert ranges[0].high - ranges[0].low > 2 * (near[0].high - near[0].low)
    assert answer.relevance < known[SMOLLM2.name].relevance


# --- what was measured --------------------------------------------------------------------------


def test_an_absurd_time_in_serving_does_not_move_the_time_to_the_first_token() -> None:
    name = f"{SERVING}time_to_first_token_seconds"
    times: list[Any] = [1e14, 1e-14, -1.0, "fast", True, 10**400]
    records = history()
    served = [
        record.updated(metrics=record.metrics | {name: value}, trial_id=f"served-{n}")
        for n, (record, value) in enumerate(zip(records, times, strict=False))
    ]
    one, other = (
        answered(found).choices[0].predictions.first_token_ms
        for found in (records, records + served)
    )
    assert other is one is None  # what nobody measured is not known
    real = [
        record.updated(metrics=record.metrics | {name: 0.5}, trial_id=f"served-{n}")
        for n, record in enumerate(records[:9])
    ]
    moved = answered(records + real).choices[0].predictions.first_token_ms
    assert moved is not None and moved.expected == pytest.approx(500, rel=0.3)
    assert moved.low > 300 and moved.high < 900
    for target, answers in ((2000.0, True), (100.0, None)):
        where = replace(place(), scenario=replace(place().scenario, latency_target_ms=target))
        answer = answered(records + real, where)
        assert [one.feasibility.latency for one in answer.choices[:1]] == [answers] * bool(answers)
        assert (answer.nothing_fits is None) is bool(answers)
    assert answer.nothing_fits is not None
    assert answer.nothing_fits.startswith("nothing answers in time: the first token takes ")


# --- what was asked for -------------------------------------------------------------------------


def test_given_settings_that_nothing_can_be_trained_with_are_one_clear_error() -> None:
    config = build_config(
        {"method": {"type": "p_tuning"}},
        {"method.num_virtual_tokens": 64, "data.max_length": 64},
    )
    with pytest.raises(ConfigError, match=r"the given settings leave nothing .*virtual_tokens=64"):
        answered([], config=config)


def test_what_ends_too_late_is_not_chosen_while_something_else_may_do(
    known: dict[str, Recommendation],
) -> None:
    slow = known[SMOLLM2.name].choices[0]
    assert slow.config["method"]["r"] > 4  # a faster one is left
    budget = 0.999 * slow.predictions.train_seconds.low / 3600
    within = replace(place(), scenario=replace(place().scenario, budget_hours=budget))
    answer = answered(history(), within)
    for choice in answer.choices:
        assert choice.feasibility.budget is not False
        assert choice.config != slow.config


def test_a_configuration_that_says_it_all_is_the_only_choice() -> None:
    given = build_config({"method": {"type": "lora", "r": 4}}, {})
    whole = build_config(given.model_dump(mode="json"), {})
    answer = answered(history(), config=whole)
    (choice,) = answer.choices
    assert choice.config == whole.model_dump(mode="json")
    assert choice.settings == {"method.type": "lora"}


def test_choices_of_a_process_that_saw_little_are_spread() -> None:
    near = QualityModel.of(TrialTable.of([])).posterior(place().columns())
    rows = next(iter(group_by_scenario(TrialTable.of(history())).values())).rows
    regrets = sample_regrets(near.process, rows)
    assert regrets.min() >= 0.0 and regrets.max() <= 1.0
    low, high = regret_quantiles(near.process, rows, (0.1, 0.9))
    assert low.min() >= 0.0 and high.max() <= 1.0
    assert high.min() > low.max()
