"""A history that an earlier rayfin wrote loads for ever; the files here are never regenerated."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rayfin.history import History, export_history, import_history

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
