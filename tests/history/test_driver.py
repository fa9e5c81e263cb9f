"""A row that says `running` when nobody runs it any more."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayfin.cli import main
from rayfin.history import History, TrialRecord, driver, now
from rayfin.history.driver import DRIVER, is_lost, mark_lost_trials, this_driver


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def running(by: dict[str, Any]) -> TrialRecord:
    return TrialRecord(
        trial_id="sweep-1", sweep_id="sweep", fingerprint="f", status="running",
        created_at=now(), updated_at=now(), scenario={DRIVER: by, "hardware": {"device": "cpu"}},
    )  # fmt: skip


def stands(storage: Path, row: TrialRecord, capsys: pytest.CaptureFixture[str]) -> str:
    """What `rayfin history list` says of the row's status, also where it is asked for by it."""
    with History.open(f"sqlite:///{storage / 'history.sqlite'}") as history:
        history.put(row)
    assert main(["history", "list", f"storage={storage}", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (
        main(["history", "list", f"storage={storage}", "--status", told["status"], "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out) == [told]
    return str(told["status"])


def test_a_driver_that_is_gone_is_noticed(
    tmp_path: Path, dead: int, capsys: pytest.CaptureFixture[str]
) -> None:
    row = running(this_driver() | {"pid": dead})
    assert stands(tmp_path, row, capsys) == "interrupted"
    with History.open(f"sqlite:///{tmp_path / 'history.sqlite'}") as history:
        (noted,) = history.trials()
    assert noted.updated_at == row.updated_at, "when it was last heard of"
    assert noted.scenario == {"hardware": {"device": "cpu"}} and "driver" in (noted.error or "")


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "running"),  # this process
        ({"started": 0.0}, "interrupted"),  # its id has been given to another since
        ({"host": "elsewhere", "pid": -1}, "running"),  # of which nothing is known here
        ({"processes": "pid:[of another container]", "pid": -1}, "running"),
    ],
)
def test_only_what_is_known_to_be_gone_is_interrupted(
    changes: dict[str, Any], status: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stands(tmp_path, running(this_driver() | changes), capsys) == status


def test_machines_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(here: dict[str, str], there: dict[str, str]) -> bool:
        known = {"host": "ubuntu", "boot": "now", "machine": "m", "processes": "pid:[4026531836]"}
        monkeypatch.setattr(driver, "_machine", lambda: known | here)
        return is_lost(running(this_driver() | {"boot": "before"} | there))

    assert lost({}, {}), "it was started anew"
    assert not lost({}, {"machine": "another"})
    assert not lost({}, {"machine": None}), "an earlier version's row"
    assert not lost({"machine": ""}, {})
    assert not lost({"processes": "pid:[4026532000]"}, {}), "containers of one image"


def test_a_driver_that_proc_hides_is_not_gone(
    tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, gone = running(this_driver()), running(this_driver() | {"pid": dead})
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))  # as under hidepid
    assert not is_lost(hidden) and is_lost(gone)


def test_a_driver_that_ended_and_was_not_waited_for_is_gone() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    started = psutil.Process(process.pid).create_time()
    assert is_lost(running(this_driver() | {"pid": process.pid, "started": started}))
    process.wait()


def test_a_row_that_another_driver_goes_on_with_meanwhile_is_left_to_it(
    tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with History.open(f"sqlite:///{tmp_path / 'history.sqlite'}") as history:
        lost = running(this_driver() | {"pid": dead})
        history.put(lost)
        resumed = lost.updated(scenario={DRIVER: this_driver()})
        change = history.change

        def after_it_resumed(*arguments: Any) -> TrialRecord | None:
            history.put(resumed)
            return change(*arguments)

        monkeypatch.setattr(history, "change", after_it_resumed)
        assert mark_lost_trials(history) == []
        assert history.trials() == [resumed]


def test_the_row_of_a_driver_that_hung_says_where_it_stood(
    tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYFIN_CACHE", str(tmp_path))
    lost = running(this_driver() | {"pid": dead})
    words = tmp_path / "hangs" / f"{lost.trial_id}.txt"
    words.parent.mkdir()
    words.write_text(
        'Thread 0x1 (most recent call first):\n  File "/a/b.py", line 7 in run_trial\n'
    )
    with History.open(f"sqlite:///{tmp_path / 'history.sqlite'}") as history:
        history.put(lost)
        (noted,) = mark_lost_trials(history)
    assert noted.status == "interrupted"
    assert noted.error == (
        "no progress, and its process hung in run_trial (b:7); look at the disk or network that it "
        "waits for, or raise scaling.hang_timeout_minutes"
    )
