"""Which process writes a trial's row, so that others can tell whether it still does."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import psutil

from rayfin.errors import HistoryError
from rayfin.history.record import TrialRecord
from rayfin.history.store import History

DRIVER = "driver"
"""The key under a running row's scenario."""

_LOST = "its driver ended without a word"
_SAME_START_SECONDS = 30.0
"""A clock that is set moves the time at which a process began; a process id isn't given to another
so soon."""


def this_driver() -> dict[str, Any]:
    """This process, as `is_lost` compares it with those that run."""
    return _machine() | {"pid": os.getpid(), "started": psutil.Process().create_time()}


def is_lost(row: TrialRecord) -> bool:
    """Whether the row says `running` and the process that would say otherwise has ended.

    False for a row of another machine, or of another container on this one: nothing is known of
    the processes there.
    """
    driver = row.scenario.get(DRIVER)
    if row.status != "running" or not isinstance(driver, dict):
        return False
    here = _machine()
    if driver.get("host") != here["host"]:
        return False
    if driver.get("boot") != here["boot"]:
        return True  # the machine has been started anew since
    if driver.get("processes") != here["processes"]:
        return False
    try:
        started = psutil.Process(driver["pid"]).create_time()
    except psutil.NoSuchProcess:
        return True
    return abs(started - float(driver["started"])) > _SAME_START_SECONDS


def interrupted(row: TrialRecord, error: str | None = None) -> TrialRecord:
    """The row of a trial that ended before its time and that `--resume` goes on with."""
    scenario = {key: value for key, value in row.scenario.items() if key != DRIVER}
    return row.updated(status="interrupted", error=error, scenario=scenario)


def note_lost(history: History) -> list[TrialRecord]:
    """Makes the rows of drivers that are gone `interrupted`; returns those rows.

    One that can't be written stays as it is: looking at a history needs no right to write to it.
    """
    noted = []
    for lost in filter(is_lost, history.trials(status="running")):

        def change(row: TrialRecord, lost: TrialRecord = lost) -> TrialRecord | None:
            if row.updated_at != lost.updated_at:  # another driver goes on with it
                return None
            return interrupted(row, _LOST).model_copy(update={"updated_at": row.updated_at})

        try:
            row = history.change(lost.trial_id, change)
        except HistoryError:
            break
        if row is not None:
            noted.append(row)
    return noted


def _machine() -> dict[str, str]:
    """Name, start and process numbering of what this process runs on."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        processes = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # no Linux
        boot = processes = ""
    return {"host": socket.gethostname(), "boot": boot, "processes": processes}
