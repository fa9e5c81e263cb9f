"""What a sweep does not start: trials that can't fit into this machine's memory."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from rayfin.config import load_config
from rayfin.hardware import Hardware, describe_hardware
from rayfin.history import History, TrialRecord
from rayfin.paths import Storage
from rayfin.recommend.fitting import MemoryCheck
from rayfin.tuning.plan import PlannedTrial, SweepPlan
from rayfin.tuning.rows import refused, started
from rayfin.tuning.search import HistorySearch

MIB = 2**20
LONG, SHORT = 1000, 30
"""Characters of a sample, which the tiny model takes for tokens."""


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History.open(f"sqlite:///{tmp_path / 'history.sqlite'}")


def plan_of(folder: Path, *settings: str, characters: int = LONG, rows: int = 400) -> SweepPlan:
    """A sweep over batch sizes; samples of so many characters."""
    letters = random.Random(0)
    data = folder / f"rows-{characters}-{rows}.jsonl"
    data.write_text(
        "".join(
            json.dumps({"text": "".join(letters.choices("abcdefgh ", k=characters))}) + "\n"
            for _ in range(rows)
        )
    )
    config = load_config(
        {"model": {"name": "tiny"}, "method": {"type": "lora"}},
        [
            f"data.path={data}",
            f"storage={folder / 'runs'}",
            "data.max_length=1024",
            "sweep.search=grid",
            "sweep.num_samples=2",
            "sweep.parameters.train.per_device_train_batch_size=[1,256]",
            *settings,
        ],
    )
    return SweepPlan("sweep", config, Storage.open(config.storage))


def trial_of(plan: SweepPlan, batch: int) -> PlannedTrial:
    return plan.trial({"train.per_device_train_batch_size": batch})


def machine(mebibytes: int) -> Hardware:
    return replace(describe_hardware(use_gpu=False), device_memory=mebibytes * MIB)


def test_what_cannot_fit_is_refused_and_all_else_is_not(tmp_path: Path, history: History) -> None:
    plan, check = plan_of(tmp_path), MemoryCheck(history, machine(2000))
    assert check(plan, trial_of(plan, 1)) is None
    reason = check(plan, trial_of(plan, 256))
    assert reason is not None
    assert reason.startswith("not started: by the estimate it needs ")
    assert "has 2.0 GiB" in reason and "rayfin estimate" in reason
    assert MemoryCheck(history, machine(100_000))(plan, trial_of(plan, 256)) is None


def test_a_trial_that_fits_however_long_its_samples_are_is_not_looked_at(tmp_path: Path) -> None:
    """Neither is the history read, nor the data tokenised: a closed history would be an error."""

    class Unread(History):
        def trials(self, **_: object) -> list[TrialRecord]:  # type: ignore[override]
            raise AssertionError("the history was read")

    with Unread.open(f"sqlite:///{tmp_path / 'history.sqlite'}") as unread:
        check = MemoryCheck(unread, machine(100_000))
        plan = plan_of(tmp_path)
        assert check(plan, trial_of(plan, 1)) is None
        with pytest.raises(AssertionError, match="was read"):
            MemoryCheck(unread, machine(1000))(plan, trial_of(plan, 256))


def test_the_samples_lengths_count_and_not_the_longest_that_is_allowed(
    tmp_path: Path, history: History
) -> None:
    check = MemoryCheck(history, machine(2000))
    short, long = (plan_of(tmp_path, characters=n) for n in (SHORT, LONG))
    assert check(short, trial_of(short, 256)) is None
    assert check(long, trial_of(long, 256)) is not None


def test_no_batch_is_larger_than_the_data(tmp_path: Path, history: History) -> None:
    check = MemoryCheck(history, machine(2000))
    few = plan_of(tmp_path, rows=12)
    assert check(few, trial_of(few, 256)) is None


def test_trials_at_the_same_time_share_the_memory(tmp_path: Path, history: History) -> None:
    check = MemoryCheck(history, machine(8000))
    alone = plan_of(tmp_path)
    assert check(alone, trial_of(alone, 256)) is None
    crowd = plan_of(tmp_path, "sweep.max_concurrent_trials=8")
    assert check(crowd, trial_of(crowd, 256)) is not None


def test_what_trials_measured_overrules_the_formula(tmp_path: Path, history: History) -> None:
    """They took a tenth of what it says, and so may this one, which it would have refused."""
    plan = plan_of(tmp_path)
    trial = trial_of(plan, 256)
    room = machine(2000)
    assert MemoryCheck(history, room)(plan, trial) is not None
    from rayfin.models import describe_model
    from rayfin.recommend.estimate import estimate
    from rayfin.recommend.fitting import sampled_profile
    from rayfin.tuning.space import trial_config

    config = trial_config(plan.config, trial.values)
    profile = sampled_profile(config, plan.corpus(config.data))
    facts = describe_model(config.model)
    expected = estimate(config, facts, room, profile=profile).parts.total
    for number in range(10):
        row = started(trial).updated(
            trial_id=f"past-{number}",
            status="finished",
            spec=trial.spec.model_dump(mode="json")
            | {"train": config.train.model_dump(mode="json") | {"seed": number}},
            scenario={
                "model": facts.as_dict() | {"identity": facts.identity},
                "hardware": room.as_dict() | {"num_workers": 1},
                "data": profile.as_dict(),
            },
            metrics={"eval_loss": 1.0, "peak_memory_bytes": expected / 10, "steps": 1},
        )
        history.put(row)
    assert MemoryCheck(history, room)(plan, trial) is None


def test_a_refused_trial_is_a_row_and_a_failure_to_the_search(
    tmp_path: Path, history: History
) -> None:
    plan, check = plan_of(tmp_path), MemoryCheck(history, machine(2000))
    rows: list[TrialRecord] = []

    def recall(trial: PlannedTrial) -> TrialRecord | None:
        if (reason := check(plan, trial)) is None:
            return None
        rows.append(refused(trial, reason))
        return rows[-1]

    search = HistorySearch(plan, recall=recall)
    asked = []
    while (config := search.suggest(str(len(asked)))) is not None:
        asked.append(config["values"]["train.per_device_train_batch_size"])
        search.tell(str(len(asked) - 1), 1.0, 5)
    assert asked == [1]
    assert [(row.status, row.metrics, row.directory) for row in rows] == [("oom", {}, None)]
    assert search.done
    # A resumed sweep knows it, and asks for it no more.
    assert not HistorySearch(plan, known=[*rows, started(trial_of(plan, 1))]).look_ahead()
