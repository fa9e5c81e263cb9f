"""Choices that cover for past scenarios as they were."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from rayfin.advisor.features import COLUMNS
from rayfin.advisor.kernel import Hyperparameters
from rayfin.advisor.past_scenarios import past_regrets, past_scenarios
from rayfin.advisor.quality_model import QualityModel, choose_complementary, sample_regrets
from rayfin.advisor.trial_table import TrialTable, group_by_scenario
from rayfin.history import TrialRecord
from rayfin.history.csv_table import read_csv

LLAMA, QWEN = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B"
RATES = (1e-4, 3e-4, 1e-3, 3e-3)


def model_of(
    folder: Path, best: dict[str, float], ranks: tuple[int, ...] = (8, 32)
) -> QualityModel:
    """What is known of models whose best learning rates are given."""
    lines = ["model,learning_rate,lora_rank,test_nll,dataset"]
    for model, rate in best.items():
        for tried in RATES:
            loss = 1.0 + np.log10(tried / rate) ** 2
            lines += [f"{model},{tried},{rank},{loss},{model[:4]}" for rank in ranks]
    table = folder / "sweep.csv"
    table.write_text("\n".join(lines) + "\n")
    rows = [row for row in read_csv(table, datetime.now(UTC)) if isinstance(row, TrialRecord)]
    groups = group_by_scenario(TrialTable.of(rows))
    return QualityModel(groups, Hyperparameters.expected(COLUMNS))


def first_rate(model: QualityModel, at: int, *, known: bool) -> float:
    """The learning rate of the first choice in a scenario, with its own trials or without."""
    groups = list(model.groups.values())
    here = groups[at]
    others = {group.code: group for group in groups if known or group is not here}
    scenario = dict(zip(COLUMNS.names, here.rows[0].tolist(), strict=True))
    posterior = QualityModel(others, model.parameters).posterior(scenario)
    regrets = sample_regrets(posterior.process, here.rows)
    past = posterior.past_regrets(here.rows)
    chosen = choose_complementary(regrets, 1, past=past, relative=posterior.relative)
    decades = here.rows[chosen[0], COLUMNS.names.index("learning_rate")]
    return float(10.0**decades * 2e-4)


def test_own_trials_are_not_overruled_by_other_models(tmp_path: Path) -> None:
    best = {LLAMA: 1e-4, **{f"acme/Nova-{size}B": 1e-3 for size in (7, 9, 12)}}
    model = model_of(tmp_path, best)
    codes = [group.code for group in model.groups.values()]
    rates = [first_rate(model, at, known=True) for at in range(len(codes))]
    assert sorted(round(rate, 6) for rate in rates) == pytest.approx([1e-4, 1e-3, 1e-3, 1e-3])


def test_a_model_without_relatives_starts_as_the_others_were_best(tmp_path: Path) -> None:
    best = {QWEN: 1e-3, **{f"acme/Nova-{size}B": 3e-4 for size in (7, 9, 12)}}
    model = model_of(tmp_path, best)
    qwen = next(
        at
        for at, group in enumerate(model.groups.values())
        if group.regrets.argmin() in np.flatnonzero(group.rows[:, 0] > 0.5)
    )
    assert first_rate(model, qwen, known=False) == pytest.approx(3e-4)


def test_a_past_regret_is_that_of_the_nearest_setting_of_the_method(tmp_path: Path) -> None:
    model = model_of(tmp_path, {LLAMA: 3e-4, QWEN: 1e-3})
    llama, qwen = model.groups.values()
    scenario = dict(zip(COLUMNS.names, qwen.rows[0].tolist(), strict=True))
    (only,) = past_scenarios(model.groups.values(), scenario)
    assert only is llama
    rows = llama.rows + 0.0
    rows[:, COLUMNS.names.index("learning_rate")] += 0.05
    other = rows.copy()
    other[:, COLUMNS.names.index("method_x")] += 1.0
    expected = np.full(len(rows), 0.4)
    assert past_regrets([llama], rows, expected)[0].tolist() == llama.regrets.tolist()
    assert past_regrets([llama], other, expected)[0].tolist() == expected.tolist()


def test_a_scenario_of_few_settings_or_of_far_sizes_is_none_to_cover_for(tmp_path: Path) -> None:
    model = model_of(tmp_path, {LLAMA: 3e-4}, ranks=(8,))
    (few,) = model.groups.values()
    assert len(few) == 4
    scenario = dict(zip(COLUMNS.names, few.rows[0].tolist(), strict=True)) | {"group": 0.0}
    assert past_scenarios([few], scenario) == []
    whole = model_of(tmp_path, {LLAMA: 3e-4})
    assert len(past_scenarios(whole.groups.values(), scenario)) == 1
    assert past_scenarios(whole.groups.values(), scenario | {"parameters": 7.5}) == []
    assert past_scenarios(whole.groups.values(), scenario | {"parameters": np.nan}) == []
