"""What a sweep does not start: trials that can't fit into this machine's memory."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rayfin.advisor import knowledge, memory_check
from rayfin.advisor.memory_check import MemoryCheck
from rayfin.config import load_config
from rayfin.hardware import Hardware, describe_hardware
from rayfin.history import History, TrialRecord
from rayfin.paths import Storage
from rayfin.tuning import tune
from rayfin.tuning.plan import PlannedTrial, SweepPlan
from rayfin.tuning.progress import ProgressDisplay
from rayfin.tuning.rows import refused, started, was_refused
from rayfin.tuning.run import SweepRun
from rayfin.tuning.search import HistorySearch
from rayfin.tuning.tune import trial_resources

MIB = 2**20


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the trials that come with rayfin, the formulas are what they are."""
    monkeypatch.setattr(knowledge, "_reference", lambda: b"")


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


def test_a_trial_that_fits_however_long_its_samples_are_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is the history read, nor the data tokenised."""

    class Unread(History):
        def trials(self, **_: object) -> list[TrialRecord]:  # type: ignore[override]
            raise AssertionError("the history was read")

    def tokenised(*_: object) -> None:
        raise AssertionError("the data was tokenised")

    monkeypatch.setattr(memory_check, "sampled_profile", tokenised)
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
    held = plan_of(tmp_path, "train.per_device_eval_batch_size=4096", rows=40)
    assert check(held, trial_of(held, 1)) is None


def test_each_worker_of_a_group_is_judged_by_its_strategy(tmp_path: Path, history: History) -> None:
    """39 samples to train on, of which no two workers can have the half."""
    group = ("scaling.num_workers=2", "model.name=smollm2-135m", "method.type=full")
    check = MemoryCheck(history, machine(2 * 2200))
    plans = [
        plan_of(tmp_path, *group, f"scaling.strategy={strategy}", rows=43, characters=SHORT)
        for strategy in ("ddp", "fsdp")
    ]
    assert len(plans[0].corpus(plans[0].config.data).train) % 2
    whole, parts = (check(plan, trial_of(plan, 256)) for plan in plans)
    assert whole is not None and parts is None
    assert "each of its 2 workers (ddp) needs" in whole and "has 2.1 GiB" in whole


def test_groups_at_the_same_time_share_the_memory_of_a_machine(
    tmp_path: Path, history: History
) -> None:
    settings = ("scaling.num_workers=2", "sweep.max_concurrent_trials=4", "sweep.num_samples=8")
    plan = plan_of(tmp_path, *settings)
    assert trial_resources(plan.config, [{"CPU": 4.0}])[1] == 2
    reason = MemoryCheck(history, replace(machine(4000), cpu_count=4))(plan, trial_of(plan, 256))
    assert reason is not None and "each of its 2 workers (ddp)" in reason
    assert "has 1.0 GiB" in reason


@pytest.mark.parametrize(
    ("concurrent", "trials", "cpus", "running"),
    [("auto", 8, 16, 1), (8, 8, 16, 8), (8, 8, 2, 2), (8, 1, 16, 1), (3, 8, 16, 3)],
)
def test_trials_at_the_same_time_share_the_memory(
    tmp_path: Path, history: History, concurrent: object, trials: int, cpus: int, running: int
) -> None:
    """Those that do run at the same time, as tune.trial_resources has it."""
    plan = plan_of(
        tmp_path, f"sweep.max_concurrent_trials={concurrent}", f"sweep.num_samples={trials}"
    )
    nodes = [{"CPU": float(cpus)}]
    assert min(trial_resources(plan.config, nodes)[1], trials) == running
    trial = trial_of(plan, 256)
    for room, fits in ((4500 * running, True), (2500 * running, False)):
        check = MemoryCheck(history, replace(machine(room), cpu_count=cpus))
        assert (check(plan, trial) is None) is fits


def test_trials_share_gpus(tmp_path: Path, history: History) -> None:
    plan = plan_of(tmp_path, "sweep.max_concurrent_trials=4", "sweep.num_samples=8")
    two = Hardware("cuda", "NVIDIA A10", 2, 24 * 2**30, 8, 2**36, True)
    trial = trial_of(plan, 256)
    assert MemoryCheck(history, two)(plan, trial) is None
    reason = MemoryCheck(history, replace(two, device_memory=2 * 2**30))(plan, trial)
    assert reason is not None and "has 1.0 GiB on NVIDIA A10" in reason


def test_what_trials_measured_overrules_the_formula(tmp_path: Path, history: History) -> None:
    """They took a tenth of what it says, and so may this one, which it would have refused."""
    plan = plan_of(tmp_path)
    trial = trial_of(plan, 256)
    room = machine(2000)
    assert MemoryCheck(history, room)(plan, trial) is not None
    from rayfin.advisor.estimate import estimate
    from rayfin.advisor.memory_check import sampled_profile
    from rayfin.models import describe_model

    config = plan.space.config_of(trial.values)
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
    while (trial := search.suggest(str(len(asked)))) is not None:
        asked.append(trial.spec.train.per_device_train_batch_size)
        search.tell(str(len(asked) - 1), 1.0, 5)
    assert asked == [1]
    assert [(row.status, row.metrics, row.directory) for row in rows] == [("oom", {}, None)]
    assert search.done


def test_a_resumed_sweep_judges_anew_what_was_refused(tmp_path: Path, history: History) -> None:
    """With the same verdict its row stays as it was; what has begun is never refused."""
    plan = plan_of(tmp_path)
    trial = trial_of(plan, 256)
    row = refused(trial, "not started: too large")
    assert was_refused(row)
    assert refused(trial, "not started: too large", row) is row
    other = refused(trial, "not started: much too large", row)
    assert (other.created_at, other.error) == (row.created_at, "not started: much too large")
    small = started(trial_of(plan, 1)).updated(
        status="finished", metrics={"eval_loss": 1.0, "steps": 1}
    )
    began = started(trial).updated(metrics={"eval_loss": 2.0, "steps": 1})
    for unfinished, asked in ((row, ["large"]), (began, [])):
        verdicts: list[str] = []
        progress = ProgressDisplay(Console(quiet=True))
        progress.begin(plan, [small])

        def refuse(_: PlannedTrial, said: list[str] = verdicts) -> str:
            said.append("large")
            return "not started: too large"

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tune, "_cluster_and_tune", lambda _: nullcontext())
            patch.setattr(tune, "_fit", lambda *_: None)
            known, left = (small,), (unfinished,)
            tune.run_trials(SweepRun(plan, history, known, left, refuse=refuse, progress=progress))
        assert verdicts == asked
