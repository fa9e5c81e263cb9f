"""Curves that are extrapolated: what is predicted of data sets that no curve of the bank is of."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayfin.config import load_config
from rayfin.errors import ConfigError
from rayfin.tuning.curve_bank import CurveBank, Ending
from rayfin.tuning.curves import (
    REFERENCE,
    Curve,
    pack,
    read_curves,
    reference_curves,
)
from rayfin.tuning.predictive import PredictiveStopping
from rayfin.tuning.space import SearchSpace
from rayfin.tuning.space_check import space_notes

CURVES = reference_curves()


def data_of(curve: Curve) -> str:
    return curve.task.split(" on ")[1]


@pytest.fixture(scope="module")
def endings() -> list[tuple[Curve, int, Ending]]:
    """Endings of curves, each predicted after so many of its points from other data sets."""
    found = []
    for data in sorted({data_of(curve) for curve in CURVES}):
        bank = CurveBank(curve for curve in CURVES if data_of(curve) != data)
        for curve in (one for one in CURVES if data_of(one) == data):
            for count in (2, 4, 8, 12):
                ending = bank.ending(curve.until(count))
                if ending is not None:
                    found.append((curve, count, ending))
    return found


def test_intervals_hold_what_they_say_on_other_data_sets(
    endings: list[tuple[Curve, int, Ending]],
) -> None:
    """Those of 80 % may hold some more: neighbours are unlike the curve in ways of their own."""
    inside = [e.quantile(0.1) <= c.values[-1] <= e.quantile(0.9) for c, _, e in endings]
    assert 0.75 <= sum(inside) / len(inside) <= 0.95


def test_what_is_said_to_be_improbable_is(endings: list[tuple[Curve, int, Ending]]) -> None:
    wrong = [
        curve.values[-1] < other.values[-1]
        for curve, _, ending in endings
        for other in CURVES
        if other.task == curve.task and ending.below(other.values[-1]) < 0.05
    ]
    assert len(wrong) > 1000
    assert sum(wrong) / len(wrong) <= 0.05


def test_a_later_look_errs_less(endings: list[tuple[Curve, int, Ending]]) -> None:
    def error(after: int) -> float:
        found = [
            abs(ending.quantile(0.5) - curve.values[-1]) / (max(curve.values) - min(curve.values))
            for curve, count, ending in endings
            if count == after
        ]
        return sum(found) / len(found)

    assert error(12) < error(8) < error(4) < error(2)


def moved(curve: Curve, factor: float, shift: float) -> Curve:
    assert curve.base is not None
    values = tuple(factor * value + shift for value in curve.values)
    return replace(curve, values=values, base=factor * curve.base + shift)


@pytest.mark.parametrize(("zero", "factor", "shift"), [(0, 7.0, 0.0), (-100, 0.01, -3.0)])
def test_the_unit_of_a_score_does_not_matter(zero: float, factor: float, shift: float) -> None:
    """Where scores are below 0, as those are of which more is better, nor does their zero."""
    bank, early = CurveBank(CURVES), moved(CURVES[0].until(5), 1.0, zero)
    one, other = bank.ending(early), bank.ending(moved(early, factor, shift))
    assert one is not None and other is not None
    assert other.quantile(0.3) == pytest.approx(factor * one.quantile(0.3) + shift)


def test_a_loss_is_never_predicted_below_zero() -> None:
    bank = CurveBank(CURVES)
    plunging = Curve("t", (0.05, 0.1), (2.0, 0.5), base=6.0)
    ending = bank.ending(plunging)
    assert ending is not None and ending.quantile(0.0) > 0


def test_a_kept_best_never_rises() -> None:
    overfitted = Curve("t", (0.25, 0.5, 0.75, 1.0), (2.0, 1.0, 1.5, 3.0), base=4.0)
    assert overfitted.best_so_far().values == (2.0, 1.0, 1.0, 1.0)
    bank = CurveBank([overfitted, *CURVES], keeps_best=True)
    ending = bank.ending(overfitted.until(3))
    assert ending is not None and ending.quantile(1.0) <= 1.0 + 1e-9


def test_few_curves_say_nothing() -> None:
    assert CurveBank(CURVES[:10]).ending(CURVES[0].until(4)) is None
    cut = [curve.until(8) for curve in CURVES]
    assert CurveBank(cut).count == 0
    standing = Curve("t", (0.1, 0.2), (3.0, 3.0), base=3.0)
    assert CurveBank(CURVES).ending(standing) is None


def test_a_trial_at_its_end_is_certain() -> None:
    ending = CurveBank(CURVES).ending(CURVES[0])
    assert ending is not None
    assert (ending.below(CURVES[0].values[-1]), ending.below(math.inf)) == (0.0, 1.0)


def test_a_trial_that_is_ahead_at_the_same_share_is_not_stopped() -> None:
    late = Curve("t", (0.25, 0.5, 0.75, 1.0), (5.9, 5.5, 2.0, 1.0), base=6.0)
    early = Curve("t", (0.25, 0.5), (5.2, 5.15), base=6.0)
    for known, stopped in ((None, True), (late, False)):
        scheduler = PredictiveStopping(CurveBank(CURVES), "eval_loss", rate=0.05, grace=0.0)
        scheduler.finished(1.0, known)
        assert scheduler.stops("early", early, 4) is stopped


def record(**changes: Any) -> dict[str, Any]:
    points = [{"step": 4, "eval_loss": 2.0, "exact_match": 0.2}, {"step": 3, "loss": 2.5}]
    return {
        "spec": {"train": {"max_steps": 8, "lr_scheduler_type": "linear"}},
        "metrics": {"base_eval_loss": 3.0, "base_exact_match": 0.0},
        "curve": [*points, {"step": 8, "eval_loss": 1.0, "exact_match": 0.5}],
    } | changes


def test_a_curve_is_read_from_a_trial_whatever_its_score() -> None:
    loss = Curve.of(record(), "eval_loss")
    assert loss == Curve("", (0.5, 1.0), (2.0, 1.0), 3.0, "linear")
    share = Curve.of(record(), "exact_match")
    assert share is not None and share.values == (-0.2, -0.5)
    factor = Curve.of(record(metrics={"base_perplexity": "unknown"}), "perplexity")
    assert factor is not None and factor.base is None
    assert factor.values == pytest.approx((math.exp(2), math.exp(1)))


@pytest.mark.parametrize(
    "changes",
    [
        {"curve": []},
        {"curve": [{"step": 4, "eval_loss": 2.0}]},
        {"curve": [{"step": "8", "eval_loss": 2.0}, {"step": 8, "eval_loss": float("nan")}]},
        {"spec": {"train": {}}},
        {"spec": {}},
    ],
)
def test_what_is_no_whole_curve_teaches_nothing(changes: dict[str, Any]) -> None:
    assert Curve.of(record(**changes), "eval_loss") is None


def test_the_shipped_file_is_what_pack_writes(tmp_path: Path) -> None:
    pack(list(reversed(CURVES)), tmp_path / "again.jsonl.gz")
    assert read_curves((tmp_path / "again.jsonl.gz").read_bytes()) == CURVES
    assert (tmp_path / "again.jsonl.gz").read_bytes() == REFERENCE.read_bytes()
    assert REFERENCE.stat().st_size < 100_000


@pytest.mark.parametrize("rate", [0, 0.5, -0.1])
def test_a_rate_of_wrong_stops_is_below_a_half(rate: float) -> None:
    with pytest.raises(ConfigError, match="wrong_stop_rate"):
        load_config(None, ["data.path=pydocs", f"sweep.wrong_stop_rate={rate}"])


@pytest.mark.parametrize(
    ("scheduler", "without_effect"),
    [
        ("none", ["grace_period", "reduction_factor", "wrong_stop_rate"]),
        ("asha", ["wrong_stop_rate"]),
        ("predictive", ["reduction_factor"]),
    ],
)
def test_a_setting_of_another_scheduler_is_named(scheduler: str, without_effect: list[str]) -> None:
    written = {"grace_period": 4, "reduction_factor": 2, "wrong_stop_rate": 0.1}
    sweep = {"scheduler": scheduler, "parameters": {"method.r": [4, 8]}}
    config = load_config({"data": {"path": "pydocs"}, "sweep": sweep | written})
    named = [line.split(" ")[0] for line in space_notes(SearchSpace(config))]
    assert named == [f"sweep.{name}" for name in without_effect]
    assert space_notes(SearchSpace(load_config({"data": {"path": "pydocs"}, "sweep": sweep}))) == []
