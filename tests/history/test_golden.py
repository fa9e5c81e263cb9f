"""A history that an earlier rayfin wrote loads for ever; the files here are never regenerated."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from rayfin.history import History, export_history, import_history
from rayfin.paths import StoragePath
from rayfin.training.checkpoint import latest_checkpoint

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture
def v1(tmp_path):
    path = tmp_path / "history_v1.sqlite"
    shutil.copy(GOLDEN / path.name, path)
    with History.open(f"sqlite:///{path}", create=False) as history:
        yield history


def test_version_1_loads(v1, record):
    trials = v1.trials()
    assert [trial.status for trial in trials] == [
        *("finished", "finished", "stopped", "failed", "oom", "running", "finished"),
    ]
    second = v1.get("trial-2")
    assert second.metrics["eval_loss"] == 1.3
    assert second.spec["method"]["type"] == "qlora"
    assert second.created_at.isoformat() == "2026-01-02T03:06:05.678901+00:00"
    assert v1.get("trial-4").error.endswith("(损失为 NaN)")
    assert v1.finished("0000000000000001").directory == "sweeps/sweep-a/trials/trial-1"
    assert [sweep.sweep_id for sweep in v1.sweeps()] == ["sweep-a", "sweep-b", "table"]


def test_version_1_is_still_written_to(v1, record):
    v1.put(record())
    assert v1.get("trial-001") == record()


def test_version_1_exports_to_its_twin(v1, tmp_path, history):
    twin = GOLDEN / "history_v1.jsonl"
    export_history(v1, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == twin.read_bytes()
    assert import_history(history, twin).skipped == []
    assert history.trials() == v1.trials()


def test_the_history_of_a_storage_directory_exports_to_its_twin(storage_v1, tmp_path, history):
    # As it was made: the fixture has changed the paths.
    with tarfile.open(GOLDEN / "storage_v1.tar.xz") as archive:
        archive.extract("./runs/history.sqlite", tmp_path / "made", filter="data")
    made = f"sqlite:///{tmp_path / 'made' / 'runs' / 'history.sqlite'}"
    with History.open(made, create=False) as held:
        trials = held.trials()
        export_history(held, tmp_path / "out.jsonl")
    twin = storage_v1 / "history.jsonl"
    assert (tmp_path / "out.jsonl").read_bytes() == twin.read_bytes()
    assert import_history(history, twin).skipped == []
    assert history.trials() == trials

    statuses = [trial.status for trial in trials]
    assert statuses == ["finished"] * 7 + ["failed"] + ["finished"] * 2 + ["interrupted", "running"]
    assert "lower train.learning_rate (1e+30)" in trials[7].error
    assert trials[-1].scenario["driver"]["host"] == "golden"
    (sweep,) = {trial.sweep_id for trial in trials} - {"train"}
    assert [trial.sweep_id for trial in trials[8:11]] == [sweep] * 3


def test_where_an_earlier_rayfin_left_its_trials_is_found_by_its_history(storage_v1):
    with History.open(f"sqlite:///{storage_v1 / 'runs' / 'history.sqlite'}") as held:
        interrupted, running = held.trials()[-2:]
    for row in (interrupted, running):
        directory = Path(row.directory)
        assert directory.is_relative_to(storage_v1 / "runs")
        assert latest_checkpoint(StoragePath(directory / "checkpoints")) is not None
