"""Trials as rows of numbers, and how their scores become charges."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayfin.advisor.features import (
    COLUMNS,
    code,
    data_row,
    model_row,
    row_of,
    setting_row,
)
from rayfin.advisor.model_names import facts_from_name
from rayfin.advisor.trial_table import (
    ScenarioTrials,
    TrialTable,
    group_by_scenario,
    has_diverged,
    regrets_of,
)
from rayfin.config import build_config
from rayfin.errors import HistoryError
from rayfin.history import History, TrialRecord, import_history
from rayfin.methods import METHODS

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
MODEL = {
    "name": "smollm2-135m",
    "identity": "smollm2-135m@0.1.2",
    "parameters": 134_515_008,
    "hidden_size": 576,
}
DATA = {
    "digest": "d1",
    "rows_train": 1000,
    "tokens_per_sample_mean": 128.0,
    "completion_share": 0.25,
}


def trial(
    number: int,
    rate: float = 1e-3,
    loss: float | None = 2.0,
    *,
    r: int = 8,
    task: str = "d1",
    model: str = "smollm2-135m",
    **changes: Any,
) -> TrialRecord:
    """A finished trial, or with loss=None one that diverged."""
    metrics = {} if loss is None else {"eval_loss": loss, "steps": 60}
    values: dict[str, Any] = {
        "trial_id": f"t{number}",
        "sweep_id": "s",
        "fingerprint": f"f{number}",
        "status": "failed" if loss is None else "finished",
        "error": "eval_loss became nan at step 9" if loss is None else None,
        "created_at": AT,
        "updated_at": AT,
        "spec": {
            "model": {"name": model},
            "data": {"path": "pydocs"},
            "method": {"type": "lora", "r": r, "lora_alpha": 2 * r, "target_modules": "all-linear"},
            "train": {
                "learning_rate": rate,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "max_steps": 64,
            },
        },
        "scenario": {
            "model": MODEL | {"name": model, "identity": f"{model}@1"},
            "data": DATA | {"digest": task},
            "hardware": {"device": "cpu"},
        },
        "metrics": metrics,
    }
    return TrialRecord(**(values | changes))


def row(record: TrialRecord) -> dict[str, float]:
    found = row_of(record)
    assert found is not None
    assert found.keys() == set(COLUMNS.names)
    return found


def only_group(*records: TrialRecord, metric: str | None = None) -> ScenarioTrials:
    (group,) = group_by_scenario(TrialTable.of(records), metric).values()
    return group


def regret_of(group: ScenarioTrials) -> dict[float, float]:
    """Learning rate -> charge."""
    place = COLUMNS.names.index("learning_rate")
    rates = 2e-4 * 10 ** group.rows[:, place]
    return {
        float(f"{rate:.3g}"): float(regret)
        for rate, regret in zip(rates, group.regrets, strict=True)
    }


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "active", "brand", "generation", "tuned"),
    [
        ("Qwen/Qwen3-30B-A3B-Base", 30, 3, "qwen", "qwen3", False),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507", 235, 22, "qwen", "qwen3", True),
        ("Qwen/Qwen3.5-397B-A17B", 397, 17, "qwen", "qwen3.5", None),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", 30, 3, "qwen", "qwen3", True),
        ("Qwen/Qwen3-Next-80B-A3B-Thinking", 80, 3, "qwen", "qwen3", True),
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.5, 0.5, "qwen", "qwen2.5", True),
        ("/data/models/qwen3-0.6b/", 0.6, 0.6, "qwen", "qwen3", None),
        ("qwen3_4b", 4, 4, "qwen", "qwen3", None),
        ("meta-llama/Llama-3.1-8B-Instruct", 8, 8, "llama", "llama3.1", True),
        ("meta-llama/Meta-Llama-3-8B", 8, 8, "llama", "llama3", None),
        ("meta-llama/Llama-2-7b-chat-hf", 7, 7, "llama", "llama2", True),
        ("nvidia/Llama-3_3-Nemotron-Super-49B-v1", 49, 49, "llama", "llama3.3", None),
        ("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16", 120, 12, "nemotron", "nemotron3", None),
        ("mistralai/Mistral-7B-v0.3", 7, 7, "mistral", "mistral", None),
        ("google/gemma-2b", 2, 2, "gemma", "gemma", None),
        ("google/gemma-3-270m-it", 0.27, 0.27, "gemma", "gemma3", True),
        ("google/gemma-3-1b-pt", 1, 1, "gemma", "gemma3", False),
        ("HuggingFaceTB/SmolLM2-135M", 0.135, 0.135, "smollm", "smollm2", None),
        ("HuggingFaceTB/SmolLM3-3B-Base", 3, 3, "smollm", "smollm3", False),
        ("smollm-135m", 0.135, 0.135, "smollm", "smollm", None),
        ("smollm2-135m@0.1.2", 0.135, 0.135, "smollm", "smollm2", None),
        ("stabilityai/stablelm-2-1_6b", 1.6, 1.6, "stablelm", "stablelm2", None),
        ("microsoft/phi-1_5", None, None, "phi", "phi1.5", None),
        ("microsoft/phi-2", None, None, "phi", "phi2", None),
        ("EleutherAI/pythia-1.4b", 1.4, 1.4, "pythia", "pythia", None),
        ("bigscience/bloom-560m", 0.56, 0.56, "bloom", "bloom", None),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1.1, 1.1, "tinyllama", "tinyllama", True),
        ("ibm-granite/granite-3.1-1b-a400m-instruct", 1, 0.4, "granite", "granite3.1", True),
        ("TheBloke/Llama-2-7B-4bit", 7, 7, "llama", "llama2", None),
        ("openai/gpt-oss-20b", 21, 3.6, "gpt", "gpt", None),
        ("openai-community/gpt2", None, None, "gpt", "gpt2", None),
        ("deepseek-ai/DeepSeek-V3.1-Base", 671, 37, "deepseek", "deepseek3.1", False),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7, 7, "deepseek", "deepseek", None),
        ("moonshotai/Kimi-K2.5", 1000, 32, "kimi", "kimi", None),
        ("tiny", 90_688 / 1e9, 90_688 / 1e9, "tiny", "tiny", None),
        ("tinyllama-1.1b", 1.1, 1.1, "tinyllama", "tinyllama", None),
        ("local@0123456789abcdef", None, None, "local", "local", None),
        ("模型", None, None, "模型", "模型", None),
        ("", None, None, "", "", None),
    ],
)
def test_what_a_name_says(
    name: str,
    size: float | None,
    active: float | None,
    brand: str,
    generation: str,
    tuned: bool | None,
) -> None:
    said = facts_from_name(name)
    assert (said.size_b, said.active_b) == (pytest.approx(size), pytest.approx(active))
    assert (said.brand, said.generation, said.tuned) == (brand, generation, tuned)


def test_facts_of_a_model_win_over_its_name() -> None:
    found = model_row("org/Foo2-7B", {"name": "org/Foo2-7B", "parameters": 10**8})
    assert found["parameters"] == found["active"] == pytest.approx(8.0)
    mixture = model_row("Qwen3-30B-A3B", {"parameters": 31 * 10**9})
    assert mixture["parameters"] == pytest.approx(math.log10(31e9))
    assert mixture["active"] == pytest.approx(math.log10(3e9))
    usual = (12 * 12 * 1536**2) ** (1 / 3)  # not the width that the formula calls usual
    assert math.isfinite(model_row("", {"parameters": 1e9, "hidden_size": usual})["width"])


def test_the_width_is_zero_for_the_usual_shape() -> None:
    layers, width = 16, 16 * 128
    facts = {"parameters": 12 * layers * width**2, "hidden_size": width}
    assert model_row("m", facts)["width"] == pytest.approx(0.0)
    assert model_row("m", facts | {"hidden_size": 2 * width})["width"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "facts",
    [
        {"parameters": 0, "hidden_size": 64},
        {"parameters": -7, "hidden_size": 64},
        {"parameters": 1e308, "hidden_size": 1e308},
        {"parameters": 10**400, "hidden_size": 10**400},
        {"parameters": "many", "hidden_size": [64]},
        {"parameters": True, "hidden_size": None},
        {"name": "zero-0b", "hidden_size": 64},
    ],
)
def test_absurd_facts_of_a_model_are_unknown_or_far_and_never_break(facts: dict[str, Any]) -> None:
    found = model_row("m", facts)
    assert all(math.isnan(value) or math.isfinite(value) for value in found.values())


def test_absurd_profiles_are_unknown() -> None:
    profile = {"rows_train": -1, "tokens_per_sample_mean": "x", "completion_share": 1e300}
    assert all(math.isnan(value) for value in data_row(profile).values())


# --- settings -----------------------------------------------------------------------------------


def setting(method: Any, train: Any = None) -> dict[str, float] | None:
    return setting_row({"method": method, "train": {} if train is None else train})


LORA = {"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


@pytest.mark.parametrize("kind", list(METHODS))
def test_every_method_has_a_place_and_its_usual_rate_is_zero(kind: str) -> None:
    from rayfin.advisor.practice import learning_rate

    config = build_config({"method": {"type": kind}}, {"train.learning_rate": learning_rate(kind)})
    found = setting_row(config.model_dump(mode="json"))
    assert found is not None
    assert found["learning_rate"] == pytest.approx(0.0)
    assert found["steps"] == pytest.approx(math.log2(60))


def test_what_changes_how_lora_learns_has_a_place_of_its_own() -> None:
    plain = setting(LORA)
    assert plain is not None
    idle = {"loraplus_lr_ratio": 1, "rank_pattern": {}, "init_lora_weights": True}
    assert setting(LORA | idle) == pytest.approx(plain, nan_ok=True)
    changes: list[dict[str, Any]] = [
        *({"init_lora_weights": init} for init in ("pissa", "olora", "loftq", "eva")),
        {"loraplus_lr_ratio": 16},
        {"modules_to_save": ["lm_head"]},
        {"exclude_modules": ["k_proj"]},
        {"layers_to_transform": [1]},
        {"rank_pattern": {"k_proj": 4}},
        {"alpha_pattern": {"k_proj": 4}},
    ]
    places = {(row["method_x"], row["method_y"]) for c in changes if (row := setting(LORA | c))}
    others = {method.coordinates for method in METHODS.values()}
    assert len(places) == len(changes) and not places & others
    assert all(max(map(abs, place)) < 1.5 for place in places), "whose rate is a share of LoRA's"
    assert setting(LORA | {"init_lora_weights": [], "loraplus_lr_ratio": "x"}) is not None


def test_no_two_sets_of_settings_have_the_same_coordinates() -> None:
    """What one setting moves, others must not move back: LoRA+ would be learned from as LoRA."""
    settings: dict[str, Any] = {
        "loraplus_lr_ratio": 16,
        "modules_to_save": ["lm_head"],
        "exclude_modules": ["k_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {"k_proj": 4},
        "alpha_pattern": {"k_proj": 4},
    }
    inits = (True, "pissa", "olora", "loftq", "eva")
    places: dict[tuple[float, ...], list[Any]] = {}
    few: list[tuple[float, float]] = []
    for kind, method in METHODS.items():
        own = {name: value for name, value in settings.items() if name in method.model_fields}
        chosen = inits if "init_lora_weights" in method.model_fields else (True,)
        for number, init in itertools.product(range(len(own) + 1), chosen):
            for names in itertools.combinations(own, number):
                x, y = method.coordinates_of(
                    {"init_lora_weights": init} | {name: own[name] for name in names}
                )
                places.setdefault((round(x, 3), round(y, 3)), []).append((kind, init, *names))
                if number + (init is not True) <= 2:
                    few.append((x, y))
                assert (max(x, y) < 1.5) == (max(method.coordinates) < 1.5)
    assert not [same for same in places.values() if len(same) > 1]
    assert len(places) > 4 * len(inits) * 2 ** len(settings)
    points = np.array(few)
    apart = np.linalg.norm(points[:, None] - points[None], axis=2) + 9 * np.eye(len(points))
    assert apart.min() > 0.009, "with at most two such settings"
    assert METHODS["lora"].coordinates_of({}) == (0.0, 0.0)


def test_the_columns_of_a_setting() -> None:
    train = {"learning_rate": 2e-3, "per_device_train_batch_size": 4, "max_steps": 64}
    found = setting(LORA | {"lora_dropout": 0.1}, train)
    assert found == pytest.approx(
        {
            "learning_rate": 1.0,
            "capacity": 3.0,
            "scaling": 1.0,
            "dropout": 0.1,
            "targets": 1.0,
            "samples_per_step": 2.0,
            "steps": 6.0,
            "method_x": 0.0,
            "method_y": 0.0,
        }
    )
    rslora = setting(LORA | {"type": "rslora", "r": 16, "lora_alpha": 8})
    assert rslora is not None and rslora["scaling"] == pytest.approx(1.0)
    partly = setting(LORA | {"target_modules": ["q_proj", "v_proj"]})
    assert partly is not None and partly["targets"] == pytest.approx(2 / 7)
    tokens = setting({"type": "p_tuning", "num_virtual_tokens": 16})
    assert tokens is not None and tokens["capacity"] == 4.0 and math.isnan(tokens["scaling"])


ABSURD = [1e308, -1e-3, 0, 0.0, 1e-300, 10**400, math.nan, math.inf, True, "1e-3", [1e-3], {}]


@pytest.mark.parametrize("value", ABSURD)
def test_absurd_settings_are_refused(value: Any) -> None:
    assert setting(LORA, {"learning_rate": value}) is None
    assert setting(LORA | {"r": value}) is None
    assert setting({"type": "p_tuning", "num_virtual_tokens": value}) is None


@pytest.mark.parametrize("value", [-3, 0.5, 10**6])
def test_absurd_ranks_are_refused(value: Any) -> None:
    assert setting(LORA | {"r": value}) is None


@pytest.mark.parametrize("dropout", [-0.1, 1e300, "none", True])
def test_absurd_dropouts_are_refused(dropout: Any) -> None:
    assert setting(LORA | {"lora_dropout": dropout}) is None


@pytest.mark.parametrize("method", [None, [], "lora", 3, {}, {"type": "boft"}, {"type": ["lora"]}])
def test_a_method_that_is_none_of_ours_is_refused(method: Any) -> None:
    assert setting(method) is None


@pytest.mark.parametrize("train", [[], "fast", 3, {}, {"learning_rate": None}])
def test_what_is_left_out_or_of_the_wrong_type_is_unknown(train: Any) -> None:
    found = setting(LORA, train)
    assert found is not None
    assert math.isnan(found["learning_rate"]) and math.isnan(found["steps"])
    assert found["capacity"] == 3.0


@pytest.mark.parametrize("value", [-1, 0, 1e308, 10**400, "4", True])
def test_other_absurd_numbers_are_unknown_or_finite(value: Any) -> None:
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps")
    found = setting(LORA | {"lora_alpha": value}, dict.fromkeys(names, value))
    assert found is not None
    assert not any(math.isinf(number) for number in found.values())


# --- rows ---------------------------------------------------------------------------------------


def test_a_row_of_an_own_trial() -> None:
    found = row(trial(1, 2e-4))
    assert found["learning_rate"] == pytest.approx(0.0)
    assert found["samples_per_step"] == pytest.approx(3.0)
    assert found["parameters"] == pytest.approx(math.log10(134_515_008))
    assert (found["rows"], found["tokens"]) == (pytest.approx(3.0), pytest.approx(7.0))
    assert found["brand"] == code("smollm") and found["generation"] == code("smollm2")
    assert found["task"] == code("d1")
    assert found["group"] == code("d1\nsmollm2-135m@1")


def test_a_stopped_trial_stands_for_as_far_as_it_went() -> None:
    stopped = trial(1, metrics={"eval_loss": 2.0, "steps": 16}, status="stopped")
    assert row(stopped)["steps"] == pytest.approx(4.0)
    assert row(trial(1, metrics={"eval_loss": 2.0, "steps": 16}))["steps"] == pytest.approx(6.0)
    unknown = trial(1, metrics={"eval_loss": 2.0}, status="stopped")
    assert row(unknown)["steps"] == pytest.approx(6.0)


@pytest.fixture
def history(tmp_path: Path) -> Any:
    with History.open(f"sqlite:///{tmp_path / 'history.sqlite'}") as opened:
        yield opened


def test_rows_of_an_imported_table(history: History, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(
        "model,learning_rate,lora_rank,test_nll,diverged\n"
        "org/Small2-1B,2e-4,8,0.61,0\norg/Small2-1B,2e-3,8,,1\nOther-3B,2e-4,16,0.5,0\n"
    )
    import_history(history, path)
    table = TrialTable.of(history.trials())
    assert len(table) == 3
    assert sorted(table.column("parameters")) == pytest.approx([9.0, 9.0, math.log10(3e9)])
    assert len(set(table.column("task"))) == 1  # of one file
    assert len(set(table.column("group"))) == 2
    assert np.isnan(table.column("steps")).all()
    assert table.diverged.sum() == 1
    assert np.isnan(table.scores[table.diverged]).all()
    (group,) = group_by_scenario(table).values()  # one setting alone compares with nothing
    assert regret_of(group) == {2e-4: 0.0, 2e-3: 1.0}
    assert group.diverged.tolist() == [0.0, 1.0]


def test_rows_of_pefts_results(history: History, tmp_path: Path) -> None:
    for rank, accuracy in ((16, 0.25), (32, 0.5)):
        result = {
            "run_info": {
                "created_at": "2026-01-02T03:04:05+00:00",
                "experiment_name": f"lora/rank{rank}",
                "train_config": {
                    "model_id": "meta-llama/Llama-3.2-3B",
                    "batch_size": 4,
                    "max_steps": 128,
                    "optimizer_kwargs": {"lr": 2e-4},
                },
                "peft_config": {
                    "peft_type": "LORA",
                    "r": rank,
                    "lora_alpha": 64,
                    "lora_dropout": 0.0,
                    "target_modules": ["v_proj", "q_proj"],
                },
                "error_msg": "",
            },
            "train_info": {
                "status": "success",
                "metrics": [{"step": 128, "train loss": 1.5, "test accuracy": accuracy}],
            },
            "meta_info": {"dataset_info": {"sums": {"sha": "x"}}},
        }
        (tmp_path / f"{rank}.json").write_text(json.dumps(result))
    import_history(history, tmp_path)
    table = TrialTable.of(history.trials())
    assert sorted(table.column("capacity")) == [4.0, 5.0]
    assert table.column("targets") == pytest.approx([2 / 7, 2 / 7])
    assert table.column("steps") == pytest.approx([7.0, 7.0])
    (group,) = group_by_scenario(table).values()
    best = group.regrets.argmin()
    assert group.rows[best][COLUMNS.names.index("capacity")] == 5.0  # the larger accuracy
    assert group.regrets[best] == 0.0 and group.regrets.max() == 1.0


@pytest.mark.parametrize(
    ("status", "error", "counts"),
    [
        ("failed", "loss became nan at step 3; lower train.learning_rate", True),
        ("failed", "eval_loss became inf at step 3", True),
        ("failed", "diverged", True),
        ("failed", "Diverged: train loss is NaN", True),
        ("failed", "FileNotFoundError: finance.jsonl", False),
        ("failed", "model nano-1b is not at hand", False),
        ("failed", "info: the disk is full", False),
        ("oom", "the loss is nan, and memory is full", False),
    ],
)
def test_only_a_loss_that_ran_away_is_a_settings_fault(
    status: str, error: str, counts: bool
) -> None:
    record = trial(1, status=status, error=error, metrics={})
    assert has_diverged(record) is counts
    assert len(TrialTable.of([record])) == counts


def test_trials_that_say_nothing_are_left_out() -> None:
    running = trial(1, status="running")
    mistaken = trial(2, 1e308)
    unscored = trial(3, status="stopped", metrics={"steps": 3})
    assert len(TrialTable.of([running, mistaken, unscored])) == 0
    assert group_by_scenario(TrialTable.of([])) == {}


# --- groups -------------------------------------------------------------------------------------


def test_scores_are_compared_within_a_task_and_a_model_only() -> None:
    records = [
        *(trial(n, 1e-4 * 2**n, 2.0 + n / 10) for n in range(3)),
        *(trial(n, 1e-4 * 2**n, 900.0 - 100 * n, task="d2") for n in range(3, 6)),
        *(trial(n, 1e-4 * 2**n, 0.1 * n, model="other") for n in range(6, 9)),
    ]
    groups = group_by_scenario(TrialTable.of(records))
    assert len(groups) == 3
    for found, group in groups.items():
        assert group.code == found
        assert sorted(group.regrets) == pytest.approx([0.0, 0.5, 1.0])
    alone = group_by_scenario(TrialTable.of(records[:3]))
    (key,) = alone
    assert groups[key].regrets == pytest.approx(alone[key].regrets)


def test_scores_of_other_held_out_tokens_are_another_scenario_s() -> None:
    """Trials that differ there in nothing keep the code that they had before."""

    def scored(n: int, loss: float, digest: str | None, **data: Any) -> TrialRecord:
        plain = trial(n, 1e-4 * 2**n, loss)
        told = DATA if digest is None else DATA | {"eval_digest": digest}
        spec = plain.spec | {"data": plain.spec["data"] | data}
        return plain.updated(spec=spec, scenario=plain.scenario | {"data": told})

    long = [scored(n, 2.0 + n / 10, "long") for n in range(3)]
    old = scored(3, 2.3, None)  # of an earlier version, with the settings of `long`
    short = [scored(n, 0.5 - n / 100, "short", max_length=40) for n in range(4, 6)]
    plain = TrialTable.of(trial(n, 1e-4 * 2**n, 2.0) for n in range(4)).column("group")
    assert TrialTable.of([*long, old]).column("group").tolist() == plain.tolist()
    table = TrialTable.of([*long, old, *short])
    assert table.column("group")[:4].tolist() == plain.tolist()
    assert len({*table.column("group")}) == 2 and len({*table.column("task")}) == 1
    groups = group_by_scenario(table)
    assert groups[plain[0]].regrets == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
    (other,) = (group for code, group in groups.items() if code != plain[0])
    assert other.regrets == pytest.approx([1.0, 0.0])


def test_samples_of_one_data_set_are_one_task_and_their_scores_are_kept_apart() -> None:
    whole, some, other = (
        row(trial(1, scenario=trial(1).scenario | {"data": DATA | {"digest": d, "source": s}}))
        for d, s in (("d1", "one"), ("d2", "one"), ("d3", "two"))
    )
    assert whole["task"] == some["task"] != other["task"]
    assert len({found["group"] for found in (whole, some, other)}) == 3


def test_workers_share_the_samples_of_a_step() -> None:
    one, four = (
        row(trial(1, scenario=trial(1).scenario | {"hardware": {"num_workers": count}}))
        for count in (1, 4)
    )
    assert (one["samples_per_step"], four["samples_per_step"]) == pytest.approx((3.0, 3.0))


def test_charges_are_shares_of_the_way_from_best_to_worst() -> None:
    group = only_group(trial(1, 1e-4, 2.0), trial(2, 2e-4, 2.5), trial(3, 4e-4, 3.0))
    assert regret_of(group) == pytest.approx({1e-4: 0.0, 2e-4: 0.5, 4e-4: 1.0})
    assert (group.spread, group.best) == (pytest.approx(1.0), 2.0)


def test_one_absurd_score_does_not_make_the_others_alike() -> None:
    plain = [trial(n, 1e-4 * 2**n, 2.0 + 0.2 * n) for n in range(5)]
    regrets = only_group(*plain, trial(9, 1e-1, 9e5)).regrets
    assert sorted(regrets)[:3] == pytest.approx([0.0, 0.1, 0.2])
    assert regrets.max() == 1.0


@pytest.mark.parametrize("score", [-1e5, -0.5, 1e9, 10**400, "low", True, None])
def test_scores_that_no_trial_can_have_count_for_nothing(score: Any) -> None:
    plain = [trial(n, 1e-4 * 2**n, 2.0 + 0.2 * n) for n in range(5)]
    absurd = trial(9, 1e-1, metrics={"eval_loss": score, "perplexity": 3.0}, status="stopped")
    one, other = only_group(*plain), only_group(*plain, absurd)
    assert other.regrets == pytest.approx(one.regrets)


def test_worse_than_the_untrained_model_is_as_bad_as_it_gets() -> None:
    base = {"base_eval_loss": 2.4}
    losses = (2.0, 2.2, 2.4, 2.6, 3.5)
    records = [
        trial(n, 1e-4 * 2**n, metrics={"eval_loss": loss} | base) for n, loss in enumerate(losses)
    ]
    assert sorted(only_group(*records).regrets) == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0])


def test_an_accuracy_is_the_better_the_larger_it_is() -> None:
    records = [
        trial(
            n,
            1e-4 * 2**n,
            metrics={"exact_match": 0.2 + n / 10},
            scenario=trial(0).scenario | {"source": "csv"},
        )
        for n in range(3)
    ]
    group = only_group(*records)
    assert regret_of(group) == pytest.approx({1e-4: 1.0, 2e-4: 0.5, 4e-4: 0.0})


def test_the_metric_is_the_one_asked_for_or_that_of_most_settings() -> None:
    def both(n: int, loss: float, match: float) -> TrialRecord:
        return trial(n, 1e-4 * 2**n, metrics={"eval_loss": loss, "exact_match": match})

    records = [both(0, 1.0, 0.1), both(1, 2.0, 0.9), trial(2, 4e-4, 1.5)]
    assert regret_of(only_group(*records))[1e-4] == 0.0
    asked = regret_of(only_group(*records, metric="exact_match"))
    assert asked == {1e-4: 1.0, 2e-4: 0.0}
    assert regret_of(only_group(*records, metric="perplexity"))[1e-4] == 0.0
    # One setting that was run often does not decide for the others.
    foreign = trial(0).scenario | {"source": "csv"}
    often = [trial(n, 0.1, metrics={"exact_match": 0.5}, scenario=foreign) for n in range(100, 150)]
    assert regret_of(only_group(*records, *often)) == regret_of(only_group(*records))


def test_a_diverged_trial_is_charged_in_full() -> None:
    group = only_group(trial(1, 1e-4, 2.0), trial(2, 2e-4, 2.1), trial(3, 0.1, None))
    assert regret_of(group)[0.1] == 1.0
    assert sorted(group.diverged) == [0.0, 0.0, 1.0]
    # The worst of those that did not diverge is as bad, and still did not.
    assert sorted(group.regrets) == [0.0, 1.0, 1.0]
    halves = only_group(trial(1, 1e-4, 2.0), trial(2, 0.1, 3.0), trial(3, 0.1, None))
    assert sorted(halves.diverged) == [0.0, 0.5]


def test_a_group_of_failures_alone_says_nothing_about_settings() -> None:
    assert group_by_scenario(TrialTable.of([trial(1, 0.1, None), trial(2, 0.2, None)])) == {}


def test_a_setting_that_was_run_often_is_one_setting() -> None:
    plain = [trial(n, 1e-4 * 2**n, 2.0 + 0.2 * n) for n in range(5)]
    for often in range(5):
        again = [trial(100 + n, 1e-4 * 2**often, 2.0 + 0.2 * often) for n in range(50)]
        one, other = only_group(*plain), only_group(*plain, *again)
        assert other.regrets == pytest.approx(one.regrets)
        assert (other.spread, other.best) == (one.spread, one.best)
        assert sorted(other.counts) == [1.0, 1.0, 1.0, 1.0, 4.0]


def test_seeds_of_one_setting_are_averaged() -> None:
    group = only_group(trial(1, 1e-4, 2.0), trial(2, 1e-4, 2.4), trial(3, 2e-4, 3.0))
    assert regret_of(group) == pytest.approx({1e-4: 0.2, 2e-4: 1.0})


def test_nearly_equal_scores_are_equal() -> None:
    group = only_group(trial(1, 1e-4, 2.0), trial(2, 2e-4, 2.001), trial(3, 4e-4, 2.0005))
    assert group.regrets.max() == pytest.approx(0.05)  # chance is 1 % of the loss


def test_first_names_the_trial_in_the_table() -> None:
    records = [trial(n, 1e-4 * 2**n, 2.0 + n) for n in range(4)] + [trial(9, 2e-4, 3.0)]
    table = TrialTable.of(records)
    (group,) = group_by_scenario(table).values()
    place = COLUMNS.names.index("learning_rate")
    for values, first in zip(group.rows, group.first, strict=True):
        assert table.rows[first][place] == values[place]
    assert "t9" not in table.ids[group.first]


def test_charges_of_a_sweeps_values() -> None:
    regrets = regrets_of(np.array([2.0, np.nan, 3.0]), "eval_loss")
    assert regrets is not None and regrets.tolist() == [0.0, 1.0, 1.0]
    accuracies = regrets_of(np.array([0.1, 0.5]), "exact_match")
    assert accuracies is not None and accuracies.tolist() == [1.0, 0.0]
    assert regrets_of(np.array([np.nan, np.nan]), "eval_loss") is None


# --- files --------------------------------------------------------------------------------------


@pytest.fixture
def table() -> TrialTable:
    return TrialTable.of([*(trial(n, 1e-4 * 2**n, 2.0 + n) for n in range(4)), trial(9, 0.1, None)])


def equal(one: TrialTable, other: TrialTable) -> bool:
    return all(
        np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f")
        for mine, theirs in zip(vars(one).values(), vars(other).values(), strict=True)
    )


def test_a_table_is_read_back_as_it_was_saved(table: TrialTable, tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    table.save(path)
    assert equal(TrialTable.load(path), table)
    assert [file.name for file in tmp_path.iterdir()] == ["table.npz"]
    nothing = TrialTable.of([])
    nothing.save(path)
    assert equal(TrialTable.load(path), nothing)


def test_tables_are_taken_apart_and_joined(table: TrialTable) -> None:
    parts = table.take(table.diverged), table.take(~table.diverged)
    assert [len(part) for part in parts] == [1, 4]
    assert sorted(parts[0].joined(parts[1]).ids) == sorted(table.ids)


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_nothing_in_a_file_is_executed(tmp_path: Path, table: TrialTable) -> None:
    path, sprung = tmp_path / "table.npz", tmp_path / "sprung"
    path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(HistoryError, match="is no table of trials"):
        TrialTable.load(path)
    parts = vars(table) | {"ids": np.array([Trap(sprung)] * len(table), dtype=object)}
    with path.open("wb") as file:
        np.savez(file, **parts, columns=np.array(COLUMNS.names), allow_pickle=True)
    with pytest.raises(HistoryError, match="is no table of trials"):
        TrialTable.load(path)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # it would have


def test_files_that_are_no_table_are_refused(tmp_path: Path, table: TrialTable) -> None:
    path = tmp_path / "table.npz"
    table.save(path)
    whole = path.read_bytes()
    np.save(tmp_path / "one.npy", np.zeros(3))
    broken = [b"", b"{}", b"PK", (tmp_path / "one.npy").read_bytes()]
    broken += [whole[:length] for length in range(1, len(whole), 97)]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(HistoryError, match="is no table of trials"):
            TrialTable.load(path)
    path.unlink()
    with pytest.raises(HistoryError, match="is no table of trials"):
        TrialTable.load(path)
    with pytest.raises(HistoryError, match="is no table of trials"):
        TrialTable.load(tmp_path)


def test_a_flipped_bit_is_noticed_or_harmless(tmp_path: Path, table: TrialTable) -> None:
    path = tmp_path / "table.npz"
    table.save(path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for place in random.integers(len(whole), size=320):
        changed = bytearray(whole)
        changed[place] ^= 1 << random.integers(8)
        path.write_bytes(changed)
        try:
            assert equal(TrialTable.load(path), table)
        except HistoryError:
            refused += 1
    assert refused > 200


def test_another_versions_tables_are_refused(tmp_path: Path, table: TrialTable) -> None:
    path = tmp_path / "table.npz"

    def save(columns: Any, found: TrialTable) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, **vars(found), columns=np.array(columns))

    wrong = [
        (COLUMNS.names[::-1], table),
        ((*COLUMNS.names, "new"), table),
        (COLUMNS.names, replace(table, rows=table.rows[:, :-1])),
        (COLUMNS.names, replace(table, rows=table.rows[:-1])),
        (COLUMNS.names, replace(table, rows=table.rows.astype(np.str_))),
        (COLUMNS.names, replace(table, diverged=table.rows)),
    ]
    for columns, found in wrong:
        save(columns, found)
        with pytest.raises(HistoryError, match="another version; remove it"):
            TrialTable.load(path)
