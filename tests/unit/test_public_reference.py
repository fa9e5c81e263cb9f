"""Public results that come with rayfin: their origin, counted once, unseen where they must be."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from rayfin.advisor import knowledge as module
from rayfin.advisor.knowledge import Knowledge, measured_trials, reference_trials
from rayfin.advisor.quality_model import QualityModel
from rayfin.advisor.trial_table import TrialTable
from rayfin.history import TrialRecord
from rayfin.history.csv_table import read_csv
from rayfin.library.advice import recommend

PUBLISHED = """model,learning_rate,lora_rank,test_nll,train_nll,wall_minutes,diverged
nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16,4e-05,1,0.609,0.6195,331.0,0
nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16,4e-05,2,0.6107,0.622,360.0,0
"""
"""The first lines of the public sweep's table."""


@pytest.fixture(scope="module")
def public() -> list[TrialRecord]:
    return [row for row in reference_trials() if "origin" in row.scenario]


@pytest.fixture
def imported(tmp_path: Path) -> list[TrialRecord]:
    path = tmp_path / "mine.csv"
    path.write_text(PUBLISHED)
    rows = list(read_csv(path, datetime.now(UTC)))
    assert all(isinstance(row, TrialRecord) for row in rows)
    return [row for row in rows if isinstance(row, TrialRecord)]


def test_each_row_says_where_it_comes_from(public: list[TrialRecord]) -> None:
    assert len({row.spec["model"]["name"] for row in public}) == 22
    for row in public:
        assert row.scenario["licence"] == "Apache-2.0"
        assert row.scenario["reference"] is True
        assert row.scenario["source"] in ("csv", "peft")
    assert len(list(reference_trials(public=False))) == len(list(reference_trials())) - len(public)


def test_times_of_machines_without_a_name_are_left_out(public: list[TrialRecord]) -> None:
    timed = [row for row in public if "train_seconds" in row.metrics]
    assert {row.scenario["hardware"]["device_name"] for row in timed} == {"NVIDIA L40S"}
    models = {trial.facts.name for trial in measured_trials(None)}
    assert models.isdisjoint(row.spec["model"]["name"] for row in public)


def test_who_imports_them_has_them_once(imported: list[TrialRecord]) -> None:
    shipped, both = Knowledge.of([]), Knowledge.of(imported)
    assert sorted(both.ids) == sorted(shipped.ids)
    assert set(both.quality_model.groups) == set(shipped.quality_model.groups)
    assert both.trials == len(imported) == 2


def test_who_learns_without_them_does_not_see_them(
    imported: list[TrialRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the benchmarks do, which leave out models that the public trials have."""

    def read() -> bytes:
        raise AssertionError("the reference was read")

    monkeypatch.setattr(module, "_reference", read)
    monkeypatch.setattr(module, "reference_parameters", read)
    knowledge = Knowledge.of(imported, reference=False)
    assert sorted(knowledge.ids) == sorted(row.trial_id for row in imported)
    assert len(QualityModel.of(TrialTable.of(imported)).groups) == 1
    with pytest.raises(AssertionError, match="was read"):
        Knowledge.of(imported)


def test_an_answer_names_origin_and_licence(public: list[TrialRecord]) -> None:
    knowledge = Knowledge.of([])
    for row in (public[0], public[-1]):
        summary = knowledge.summary_of(row.trial_id)
        assert row.scenario["origin"] in summary
        assert "Apache-2.0" in summary


@pytest.mark.parametrize("billions", [3, 8, 70])
def test_large_models_get_rates_that_practice_knows(
    billions: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = recommend(
        {}, model_size_b=billions, rows=5000, tokens_per_sample=300.0,
        hardware="single_gpu", gpu_memory_gb=80.0, progress=False,
    )  # fmt: skip
    assert answer.choices
    for choice in answer.choices:
        if choice.method in ("lora", "qlora", "dora", "rslora"):
            assert 5e-5 <= choice.settings["train.learning_rate"] <= 1e-3
    for trial in (trial for choice in answer.choices for trial in choice.trials):
        assert "tiny on" not in trial.summary


def test_another_optimiser_and_another_lora_count_for_themselves(
    public: list[TrialRecord],
) -> None:
    named = {row.spec.get("extra", {}).get("experiment_name"): row for row in public}
    other = named["lora/llama-3.2-3B-rank32-lorafa"]
    assert other.spec["train"]["optim"] == "lora-fa"
    blocks = named["lora/llama-3.2-3B-rank14-target-mlp-bdlora"]
    assert blocks.spec["method"]["type"] == "bdlora"
    learned = set(TrialTable.of(public).ids.tolist())
    assert learned.isdisjoint({other.trial_id, blocks.trial_id})
    assert named["lora/llama-3.2-3B-rank32"].trial_id in learned
    assert named["oft/llama-3.2-3B-rank32"].spec["method"]["type"] == "oft"
