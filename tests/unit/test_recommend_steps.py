"""How long a recommended training is: epochs by the rows, steps by the budget, or what is given."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import rayfin
from rayfin.advisor import knowledge
from rayfin.advisor.steps import advised_epochs, advised_length, within_budget
from rayfin.cli import main
from rayfin.errors import ConfigError

GPU: Mapping[str, Any] = {"hardware": "single_gpu", "gpu_memory_gb": 24}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(knowledge, "cache_dir", lambda: tmp_path / "cache")


def recommended(settings: Mapping[str, Any] | None = None, **told: Any) -> Any:
    known = {"model_size_b": 8.0, "rows": 5000, "tokens_per_sample": 300.0, **GPU, **told}
    return rayfin.recommend(settings, **known)


@pytest.mark.parametrize(
    ("rows", "epochs"),
    [
        (1, 15),
        (1000, 3),
        (9_209, 3),  # QLoRA on OASST1
        (52_002, 3),  # Alpaca
        (100_000, 2),
        (200_000, 1),  # Zephyr
    ],
)
def test_epochs_follow_from_the_rows_as_in_published_trainings(rows: int, epochs: int) -> None:
    assert advised_epochs(rows) == epochs


def test_more_rows_are_never_passed_more_often_nor_trained_on_less() -> None:
    found = [(rows, advised_epochs(rows)) for rows in range(1, 300_000, 97)]
    for (_, before), (_, after) in itertools.pairwise(found):
        assert after <= before
    assert all(rows * epochs >= 100_000 for rows, epochs in found if rows >= 60_000)
    assert all(-(-rows // 16) * epochs >= 100 for rows, epochs in found if rows > 97)


def test_a_budget_leaves_the_steps_that_end_in_it_or_all() -> None:
    assert within_budget(900, 200.0, 1000.0, 500.0) == (450, True)
    assert within_budget(900, 200.0, 1000.0, 1000.0) == (900, True)
    assert within_budget(900, 200.0, 1000.0, 10.0) == (30, True)  # expected: 45
    assert within_budget(900, 200.0, 1000.0, 5.0) == (900, False)  # expected: 22, no training
    assert advised_length(None, {}) == {}
    assert advised_length(100, {"train.max_steps": 60}) == {}


def test_a_large_and_a_small_data_set_get_epochs_and_the_time_is_that_of_their_steps() -> None:
    for rows, epochs, steps in ((180_000, 1, 11_250), (1000, 3, 189)):
        answer = recommended(rows=rows)
        one = recommended({"train": {"max_steps": 1}}, rows=rows)
        for choice in answer.choices:
            assert choice.settings["train.num_train_epochs"] == epochs
            assert "train.max_steps" not in choice.settings
            assert choice.predictions.steps == steps
            assert choice.config["train"]["max_steps"] is None
        assert any(f"{epochs} epoch" in note for note in answer.notes)
        first, single = answer.choices[0], one.choices[0]
        same = {k: v for k, v in first.settings.items() if k != "train.num_train_epochs"}
        assert single.settings == same
        each = single.predictions.train_seconds.expected
        assert first.predictions.train_seconds.expected == pytest.approx(steps * each, rel=1e-6)


def test_steps_end_in_the_budget_by_the_upper_estimate_and_the_rest_is_said() -> None:
    answer = recommended(budget_hours=2.0)
    for choice in answer.choices:
        steps = choice.config["train"]["max_steps"]
        assert choice.settings["train.max_steps"] == steps < 939
        assert "train.num_train_epochs" not in choice.settings
        seconds = choice.predictions.train_seconds
        assert seconds.high <= 2 * 3600 < seconds.high * (steps + 1) / steps
        assert choice.feasibility.budget is True
        assert any(f"{steps} steps" in risk and "939" in risk for risk in choice.risks)
    assert not any("changes no choice" in note for note in answer.notes)
    assert recommended(budget_hours=1e5).choices[0].settings["train.num_train_epochs"] == 3


def test_a_budget_too_small_for_any_training_says_what_would_do() -> None:
    answer = recommended(budget_hours=0.01)
    assert answer.nothing_fits is not None
    hours = float(answer.nothing_fits.rpartition("allow ")[2].removesuffix(" hours"))
    assert recommended(budget_hours=1.06 * hours).choices[0].config["train"]["max_steps"] >= 30


@pytest.mark.parametrize("given", [{"max_steps": 77}, {"num_train_epochs": 0.5}])
def test_a_given_length_is_kept_whatever_the_budget(given: dict[str, float]) -> None:
    for told in ({}, {"budget_hours": 3.0}):
        answer = recommended({"train": given}, **told)
        assert answer.choices[0].predictions.steps == given.get("max_steps", 157)
        assert not {"train.max_steps", "train.num_train_epochs"} & answer.choices[0].settings.keys()
        assert not any("epoch" in note for note in answer.notes)


def test_both_lengths_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="both say how long"):
        recommended({"train": {"max_steps": 77, "num_train_epochs": 2}})


def test_settings_of_a_method_keep_all_methods_that_have_them() -> None:
    answer = recommended({"method": {"r": 16}}, k=3)
    methods = {point.method for point in answer.points}
    assert {"lora", "qlora", "dora"} <= methods
    assert not methods & {"ia3", "p_tuning"}
    assert all(choice.config["method"]["r"] == 16 for choice in answer.choices)
    one = recommended({"method": {"type": "lora", "r": 16}})
    assert {point.method for point in one.points} == {"lora"}


def test_what_is_scaffolded_says_epochs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(40)]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    told = ["model.name=tiny", "data.path=rows.jsonl", "history=null", "--scaffold", "mine"]
    assert main(["recommend", *told, "-k", "1"]) == 0
    assert "15 epochs" in capfd.readouterr().out
    written = (tmp_path / "mine" / "train.yaml").read_text(encoding="utf-8")
    assert "num_train_epochs: 15" in written
    assert "max_steps" not in written
