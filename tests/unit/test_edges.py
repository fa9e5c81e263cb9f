"""A sweep whose best trials lie at the edge of its space says so."""

from __future__ import annotations

from typing import Any

import pytest

from rayfin.config import load_config
from rayfin.history import TrialRecord
from rayfin.tuning.edges import edge_notes
from rayfin.tuning.space import SearchSpace

RATES = "{space: loguniform, lower: 1.0e-5, upper: 3.0e-3}"


def notes(axis: str, choices: str, values: list[Any], *settings: str, **row: Any) -> list[str]:
    """Of trials that took `values`, the first the best, the next the second best, and so on."""
    config = load_config(
        None, ["model.name=tiny", f"sweep.parameters={{{axis}: {choices}}}", *settings]
    )
    section, _, leaf = axis.partition(".")
    sign = 1 if config.sweep.direction == "min" else -1
    rows = []
    for number, value in enumerate(values):
        spec = config.model_dump(mode="json")
        spec[section][leaf] = value
        fields = {
            "trial_id": f"a-{number}",
            "sweep_id": "a",
            "fingerprint": f"f{number}",
            "status": "finished",
            "created_at": "2026-01-02T03:04:05Z",
            "updated_at": "2026-01-02T03:04:05Z",
            "spec": spec,
            "scenario": {},
            "metrics": {"eval_loss": 1.0, config.sweep.metric: sign * (1.0 + number)},
            "curve": [],
            "versions": {},
        }
        rows.append(TrialRecord(**(fields | row)))
    return edge_notes(SearchSpace(config), rows[::-1])  # their order in the history is another


def test_three_of_the_four_best_at_the_upper_edge() -> None:
    rates = [3e-3, 2.9e-3, 2e-4, 2.6e-3, 1e-4, 2e-5, 3e-4, 1e-5]
    assert notes("train.learning_rate", RATES, rates) == [
        "3 of the 4 best trials have train.learning_rate at the upper edge of its range (0.003): "
        "widen it"
    ]


@pytest.mark.parametrize("metric", ["eval_loss", "exact_match"])
def test_the_better_half_of_a_small_sweep(metric: str) -> None:
    rates = [1e-5, 1.1e-5, 2e-4, 3e-3]
    [note] = notes("train.learning_rate", RATES, rates, f"sweep.metric={metric}")
    assert note.startswith("both of the 2 best trials have train.learning_rate at the lower edge")


def test_a_list_of_numbers_has_edges_too() -> None:
    [note] = notes("method.r", "[4, 8, 16]", [16, 16, 8, 4, 8, 4])
    assert "method.r at the upper edge of its list of values (16)" in note


@pytest.mark.parametrize(
    ("axis", "choices", "values"),
    [
        # The best is not at the edge, however many others are.
        ("train.learning_rate", RATES, [2e-4, 3e-3, 3e-3, 3e-3, 1e-4, 1e-4, 1e-5, 1e-5]),
        # No more than half of the best are.
        ("train.learning_rate", RATES, [3e-3, 2e-4, 3e-3, 2e-4, 1e-4, 1e-4, 1e-5, 1e-5]),
        # Those at the edge are the worst.
        ("train.learning_rate", RATES, [2e-4, 2e-4, 2e-4, 2e-4, 3e-3, 3e-3, 3e-3, 3e-3]),
        # Too few trials to say anything.
        ("train.learning_rate", RATES, [3e-3, 3e-3, 1e-5]),
        # What can't go further: a dropout below 0, a rank below 1.
        ("method.lora_dropout", "{space: uniform, lower: 0, upper: 0.3}", [0.0] * 4),
        ("method.r", "[1, 2, 4]", [1, 1, 4, 2]),
        # Without an order, or with two values, nothing is an edge.
        ("method.target_modules", "[all-linear, [q_proj], [k_proj]]", ["all-linear"] * 4),
        ("method.r", "[4, 8]", [8, 8, 4, 4]),
        ("train.packing", "[true, false]", [True, True, False, False]),
    ],
)
def test_nothing_is_said_without_ground(axis: str, choices: str, values: list[Any]) -> None:
    assert notes(axis, choices, values) == []


def test_failed_trials_and_such_without_the_metric_do_not_count() -> None:
    rates = [3e-3] * 8
    assert notes("train.learning_rate", RATES, rates, status="failed", error="no luck") == []
    asked = ("train.learning_rate", RATES, rates, "sweep.metric=exact_match")
    assert notes(*asked, metrics={"eval_loss": 1.0}) == []
    assert len(notes("train.learning_rate", RATES, rates)) == 1
