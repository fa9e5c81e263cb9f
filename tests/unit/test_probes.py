"""Probes: the first steps of a few learning rates, and the answer that they change."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import rayfin
from rayfin.advisor import knowledge
from rayfin.advisor.probes import STEP, Probe, best_probe, next_rate, probe_rates
from rayfin.cli import main
from rayfin.config import load_config
from rayfin.errors import ConfigError
from rayfin.history import TrialRecord
from rayfin.library.probing import ProbeBudget
from rayfin.tuning import probe as tuning_probe
from rayfin.tuning.curve_bank import CurveBank
from rayfin.tuning.curves import Curve, reference_curves
from rayfin.tuning.probe import PROBES, Prober, probe_steps

GIVEN = (
    *("model.name=tiny", "data.path=pydocs", "data.max_samples=24", "data.max_length=192"),
    *("train.max_steps=20", "method.type=lora"),
)
BANK = CurveBank(reference_curves())


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(knowledge, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path


# --- which rates --------------------------------------------------------------------------------


def tried(*scores: float) -> list[Probe]:
    """Probes of such scores, each at the rate that follows from those before."""
    found: list[Probe] = []
    for value in scores:
        rate = next_rate(1e-3, found)
        found.append(Probe(rate, value, None))
    return found


@pytest.mark.parametrize(
    ("scores", "steps"),
    [
        ((1.0, 0.9, 0.8, 0.7), [0, 1, 2, 3]),
        ((1.0, 1.1, 0.9, 0.8), [0, 1, -1, -2]),
        ((1.0, 1.1, 1.2, 0.8), [0, 1, -1, 0.5]),
        ((1.0, 0.9, 1.2, 0.8), [0, 1, 2, 0.5]),
        ((1.0, math.inf, 0.9, math.inf), [0, 1, -1, -2]),
    ],
)
def test_probes_climb_and_then_look_closer(scores: tuple[float, ...], steps: list[float]) -> None:
    found = [math.log(probe.rate / 1e-3) / math.log(STEP) for probe in tried(*scores)]
    assert found == pytest.approx(steps, abs=0.03)


def test_the_best_is_the_one_with_the_best_score_and_none_where_all_failed() -> None:
    best = best_probe(tried(1.0, 0.8, 0.9))
    assert best is not None and best.rate == 3.2e-3
    assert best_probe(tried(math.inf, math.inf)) is None
    assert best_probe([]) is None


def test_no_rate_is_probed_twice() -> None:
    def train(rate: float) -> Curve:
        return Curve("t", (0.1,), (abs(math.log(rate / 2.5e-4)),))

    rates = [probe.rate for probe in probe_rates(2e-4, train, BANK, lambda count: count < 40)]
    assert len(rates) == len(set(rates)) < 20


def test_a_longer_probe_counts_up_to_the_length_of_the_others() -> None:
    curve = Curve("t", (0.1, 0.2), (2.0, 1.0), base=4.0)
    assert curve.up_to(0.2) == curve and curve.up_to(0.1).values == (2.0,)
    assert curve.up_to(0.15).values == (2.0,)
    assert curve.up_to(0.05).values == (3.0,)  # on the line from the untrained model's


def test_probes_are_a_share_of_the_advised_epochs(
    places: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [each for each in GIVEN if not each.startswith("train.max_steps")]
    assert main(["recommend", *given, "-k", "1", "--json", "--probe", "2"]) == 0
    answer = json.loads(capfd.readouterr().out)
    (choice,) = answer["choices"]
    assert choice["config"]["train"]["num_train_epochs"] > 1
    assert answer["probes"]["of_steps"] == choice["predictions"]["steps"]
    assert len(answer["probes"]["rates"]) == 2


def test_a_probe_that_has_not_moved_has_a_score_and_no_prediction() -> None:
    standing = Curve("t", (0.05, 0.1), (3.0, 3.0), base=3.0)
    (probe,) = probe_rates(1e-3, lambda rate: standing, BANK, lambda count: count < 1)
    assert (probe.score, probe.ending) == (3.0, None)


@pytest.mark.parametrize("data", sorted({c.task.split(" on ")[1] for c in reference_curves()}))
def test_probes_find_a_better_rate_than_one_that_is_far_too_low(data: str) -> None:
    """Replayed on real trainings, from curves of other data sets alone."""
    ladder = [c for c in reference_curves() if c.task == f"rates 160 on {data}"]
    bank = CurveBank(c for c in reference_curves() if not c.task.endswith(f" on {data}"))

    def curve(rate: float) -> Curve:
        return min(ladder, key=lambda one: abs(math.log((one.learning_rate or 1.0) / rate)))

    def early(rate: float) -> Curve:
        whole = curve(rate)
        return whole.until(sum(share <= 0.1 + 1e-6 for share in whole.shares))

    low = 3.16e-4
    best = best_probe(probe_rates(low, early, bank, lambda count: count < 4))
    ends = [one.values[-1] for one in ladder]
    assert best is not None
    assert curve(low).values[-1] - curve(best.rate).values[-1] > 0.1 * (max(ends) - min(ends))


# --- how many, and how long ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "count", "seconds"),
    [("4", 4, None), (2, 2, None), ("90s", None, 90), ("5m", None, 300), ("1.5h", None, 5400)],
)
def test_a_budget_is_a_number_or_a_time(
    written: int | str, count: int | None, seconds: float | None
) -> None:
    assert ProbeBudget.parse(written) == ProbeBudget(count, seconds)


@pytest.mark.parametrize("written", ["1", 0, "-4", "5 minutes", "0m", "4.5", "", "101"])
def test_a_budget_that_means_nothing_is_refused(written: int | str) -> None:
    with pytest.raises(ConfigError, match=r"probe=.* must be a number of probes from 2 to 100"):
        ProbeBudget.parse(written)


def test_probes_are_shorter_where_the_time_would_not_do() -> None:
    assert ProbeBudget(count=4).share(1e6, 0.1) == 0.1
    assert ProbeBudget(seconds=300).share(100, 0.1) == 0.1
    assert ProbeBudget(seconds=300).share(7500, 0.1) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("total", "share", "steps"),
    [(60, 0.1, 6), (20, 0.1, 2), (5, 0.1, 2), (1, 0.1, 1), (70, 0.1, 8)],
)
def test_a_probe_ends_at_an_evaluation(total: int, share: float, steps: int) -> None:
    assert probe_steps(total, share) == steps


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model-size-b", "8"], "model_size_b=8"),
        (["model.name=tiny", "--hardware", "cpu"], "hardware=cpu"),
        (["model.name=tiny", "--gpu-memory-gb", "24"], "gpu_memory_gb=24"),
    ],
)
def test_what_is_only_described_cannot_be_probed(
    arguments: list[str], words: str, places: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["recommend", "data.path=pydocs", *arguments, "--probe", "2"]) == 2
    _, err = capfd.readouterr()
    assert words in err and "this machine" in err
    assert not (places / "runs").exists()


# --- trained, recorded, recalled ----------------------------------------------------------------


def rows() -> list[TrialRecord]:
    with rayfin.open_history() as history:
        return history.trials()


def test_probes_are_recorded_and_paid_for_once(
    places: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["recommend", *GIVEN, "-k", "2", "--json", "--probe"]
    kept = Prober._train
    calls = iter([None, KeyboardInterrupt])

    def interrupted(*arguments: Any) -> Any:
        if (error := next(calls)) is not None:
            raise error
        return kept(*arguments)

    monkeypatch.setattr(Prober, "_train", interrupted)
    assert main([*asked, "3"]) == 130
    (first,) = rows()
    monkeypatch.setattr(Prober, "_train", kept)
    capfd.readouterr()

    assert main([*asked, "3"]) == 0
    answer = json.loads(capfd.readouterr().out)
    probes, found = answer["probes"], rows()
    assert found[0] == first and len(found) == 3
    assert {(row.sweep_id, row.status, row.metrics["steps"]) for row in found} == {
        (PROBES, "stopped", 2)
    }
    assert [len(row.curve) > 1 and row.scenario["probe"] for row in found] == [2, 2, 2]
    assert [one["recalled"] for one in probes["rates"]] == [True, False, False]
    assert [one["trial_id"] for one in probes["rates"]] == [row.trial_id for row in found]
    assert (probes["steps"], probes["of_steps"]) == (2, 20)
    rates = {one["learning_rate"] for one in probes["rates"]}
    assert probes["chosen"] in rates and probes["advised"] in rates
    chosen = answer["choices"][0]
    assert chosen["settings"]["train.learning_rate"] == probes["chosen"]
    assert chosen["config"]["train"]["learning_rate"] == probes["chosen"]
    if probes["chosen"] != probes["advised"]:
        assert chosen["reasons"][0] == probes["summary"]
    assert [one["rank"] for one in answer["choices"]] == [1, 2]

    assert main([*asked, "3"]) == 0
    again = json.loads(capfd.readouterr().out)
    assert rows() == found and again["probes"]["seconds"] == 0.0
    assert [one["recalled"] for one in again["probes"]["rates"]] == [True] * 3
    assert again["probes"]["chosen"] == probes["chosen"]
    assert again["choices"][0]["settings"] == chosen["settings"]

    longer = load_config(None, [*GIVEN, f"train.learning_rate={probes['advised']}"])
    with rayfin.open_history() as history:
        prober = Prober(history, tuning_probe.Storage.open("runs"))
        assert not prober.probe(longer, 4).recalled


def test_probes_that_diverge_keep_the_rate_and_say_so(
    places: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(self: Prober, plan: Any, trial: Any, row: TrialRecord, steps: int) -> TrialRecord:
        told = row.updated(status="failed", error="the loss is nan")
        self.history.put(told)
        return told

    monkeypatch.setattr(Prober, "_train", failed)
    assert main(["recommend", *GIVEN, "--probe", "2", "--json", "--lang", "zh"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["probes"]["chosen"] == answer["probes"]["advised"]
    assert [one["predicted"] for one in answer["probes"]["rates"]] == [None, None]
    assert "失败" in answer["probes"]["summary"]


def test_the_advisor_does_not_take_a_probe_for_a_whole_trial(places: Path) -> None:
    from rayfin.advisor.trial_table import TrialTable

    def row(**changes: Any) -> TrialRecord:
        (one, *_) = knowledge.reference_trials()
        return one.updated(**changes)

    stopped = row(status="stopped")
    probe = stopped.updated(scenario=stopped.scenario | {"probe": 2})
    assert len(TrialTable.of([stopped])) == 1
    assert len(TrialTable.of([probe])) == 0
