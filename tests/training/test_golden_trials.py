"""A trial that an earlier rayfin was training, or has trained, is the same trial to this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayfin.cli import main
from rayfin.history import History, TrialRecord
from rayfin.training.trainer import TrialTrainer


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that trials in this process take."""
    taken: list[int] = []
    compute_loss = TrialTrainer.compute_loss

    def counted(self: TrialTrainer, *args: Any, **kwargs: Any) -> Any:
        taken.append(self.state.global_step)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(TrialTrainer, "compute_loss", counted)
    return taken


def rows(storage: Path) -> dict[str, TrialRecord]:
    with History.open(f"sqlite:///{storage / 'runs' / 'history.sqlite'}") as history:
        return {row.trial_id: row for row in history.trials()}


@pytest.mark.numeric
def test_a_trial_that_an_earlier_rayfin_did_not_end_goes_on_to_the_same_end(
    lab: Any, storage_v1: Path, steps_taken: list[int]
) -> None:
    whole = json.loads((storage_v1 / "expected.json").read_text())["whole"]
    before = rows(storage_v1)
    assert before[whole["trial"]].status == "running"
    assert main(whole["words"]) == 0
    assert steps_taken == list(range(6, 12)), "it goes on from the checkpoint"
    after = rows(storage_v1)
    ended = after.pop(whole["trial"])
    assert ended.status == "finished" and ended.fingerprint == before[ended.trial_id].fingerprint
    assert after == {key: row for key, row in before.items() if key != ended.trial_id}
    assert [point["step"] for point in ended.curve] == [point["step"] for point in whole["curve"]]
    for mine, other in zip(ended.curve, whole["curve"], strict=True):
        assert set(other) <= set(mine)
        for name in ("loss", "eval_loss"):
            assert name not in other or mine[name] == lab.rounded(other[name]), (name, mine)
    for name, value in whole["metrics"].items():
        expected = lab.rounded(value) if name.endswith("loss") else value
        assert ended.metrics[name] == expected, name


def test_what_an_earlier_rayfin_has_trained_is_known_and_not_trained_again(
    storage_v1: Path, steps_taken: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The fingerprints of all methods are what they were."""
    finished = json.loads((storage_v1 / "expected.json").read_text())["finished"]
    before, found = rows(storage_v1), set()
    for words in finished:
        assert main(words) == 0
        told = capsys.readouterr()
        (line,) = (one for one in told.err.splitlines() if "already in the history as" in one)
        found.add(line.partition("already in the history as ")[2].partition(";")[0])
    assert found == {row.trial_id for row in list(before.values())[:7]}
    assert not steps_taken and rows(storage_v1) == before


def test_trials_of_an_earlier_sweep_answer_another_one(
    storage_v1: Path, steps_taken: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is left to train in the half of the space that the sweep had come through."""
    before = rows(storage_v1)
    words = ["sweep", "sweep.yaml", "sweep.parameters.method.r=[1]", "sweep.num_samples=2"]
    assert main(words) == 0
    assert not steps_taken and capsys.readouterr().err.count("from the history (") == 2
    after = rows(storage_v1)
    assert {key: after[key] for key in before} == before
