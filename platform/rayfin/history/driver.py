"""Identify the process (the driver) that writes a trial's row, and tell whether it still runs."""

from __future__ import annotations

import hashlib
import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from rayfin.errors import HistoryError, TrialHung
from rayfin.heartbeat import hang_position
from rayfin.history.record import TrialRecord
from rayfin.history.store import History

DRIVER = "driver"
"""The key of the driver in a running row's scenario."""

_LOST = "its driver ended without a word"
_SAME_START_SECONDS = 30.0
"""The tolerance of a process' start time, which moves when the clock is set; a process id is not
reused so soon."""
_NO_CONTAINER = "pid:[4026531836]"
"""The initial namespace of process ids, which has this number on every Linux machine."""


def this_driver() -> dict[str, Any]:
    """Return a description of this process, for `has_ended`."""
    return _machine() | {"pid": os.getpid(), "started": psutil.Process().create_time()}


def is_lost(row: TrialRecord) -> bool:
    """Whether a row says `running` although its driver has ended."""
    driver = row.scenario.get(DRIVER)
    return row.status == "running" and isinstance(driver, dict) and has_ended(driver)


def has_ended(driver: Mapping[str, Any]) -> bool:
    """Whether a process of this machine, as `this_driver` described it, has ended.

    False for a process of another machine or container, of which nothing is known. A restarted
    container can't be told from a container of another machine.
    """
    here = _machine()
    if any(driver.get(part) != here[part] for part in ("host", "processes")):
        return False
    same = bool(here["machine"]) and driver.get("machine") == here["machine"]
    if driver.get("boot") != here["boot"]:
        # The machine has been started anew since; but containers of one image, which may have one
        # name on several machines, share the image's identity.
        return same and here["processes"] == _NO_CONTAINER
    if not here["boot"] and not same:
        return False
    try:
        process = psutil.Process(driver["pid"])
        started, status = process.create_time(), process.status()
    except psutil.ZombieProcess:
        return True
    except psutil.NoSuchProcess:
        return not _exists(driver["pid"])
    except psutil.AccessDenied:
        return False
    other = abs(started - float(driver["started"])) > _SAME_START_SECONDS
    return other or status == psutil.STATUS_ZOMBIE


def without_driver(row: TrialRecord) -> dict[str, Any]:
    """Return the scenario of a row without its driver, as a row that no longer runs has it."""
    return {key: value for key, value in row.scenario.items() if key != DRIVER}


def interrupted(row: TrialRecord, error: str | None = None) -> TrialRecord:
    """Return the row with status `interrupted`, which `--resume` continues."""
    return row.updated(status="interrupted", error=error, scenario=without_driver(row))


def mark_lost_trials(history: History) -> list[TrialRecord]:
    """Set the rows of drivers that have ended to `interrupted`, and return them.

    Where a driver hung and was ended from outside, its row says where it hung. A history that can't
    be written stays as it is, as reading one needs no right to write it.
    """
    noted = []
    for lost in filter(is_lost, history.trials(status="running")):

        def change(row: TrialRecord, lost: TrialRecord = lost) -> TrialRecord | None:
            if row.updated_at != lost.updated_at:  # another driver goes on with it
                return None
            where = hang_position(row.trial_id)
            why = _LOST if where is None else str(TrialHung.ended_at(where))
            return interrupted(row, why).model_copy(update={"updated_at": row.updated_at})

        try:
            row = history.change(lost.trial_id, change)
        except HistoryError:
            break
        if row is not None:
            noted.append(row)
    return noted


def _exists(pid: int) -> bool:
    """Whether a process of this id runs, even if /proc hides it from other users (hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _machine() -> dict[str, str]:
    """Return what identifies this machine, its boot and its namespace of process ids.

    The keys are `host`, `machine` (empty where Linux has no identity), `boot` and `processes`.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        processes = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # no Linux
        identity, boot, processes = f"{uuid.getnode():x}", "", ""
    else:
        try:
            identity = Path("/etc/machine-id").read_text().strip()
        except OSError:
            identity = ""
    # The machine's id is confidential (man machine-id), and histories are shared.
    machine = hashlib.sha256(f"rayfin {identity}".encode()).hexdigest()[:16] if identity else ""
    return {"host": socket.gethostname(), "machine": machine, "boot": boot, "processes": processes}
