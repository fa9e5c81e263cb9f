"""Which process writes a trial's row, so that others can tell whether it still does."""

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
from rayfin.heartbeat import last_words
from rayfin.history.record import TrialRecord
from rayfin.history.store import History

DRIVER = "driver"
"""The key under a running row's scenario."""

_LOST = "its driver ended without a word"
_SAME_START_SECONDS = 30.0
"""A clock that is set moves the time at which a process began; a process id isn't given to another
so soon."""
_NO_CONTAINER = "pid:[4026531836]"
"""The first namespace of process ids; Linux gives it this number on every machine."""


def this_driver() -> dict[str, Any]:
    """This process, as `has_ended` compares it with those that run."""
    return _machine() | {"pid": os.getpid(), "started": psutil.Process().create_time()}


def is_lost(row: TrialRecord) -> bool:
    """Whether the row says `running` and the process that would say otherwise has ended."""
    driver = row.scenario.get(DRIVER)
    return row.status == "running" and isinstance(driver, dict) and has_ended(driver)


def has_ended(driver: Mapping[str, Any]) -> bool:
    """Whether a process of this machine, as `this_driver` described it, runs no more.

    False for one of another machine, or of another container on this one: nothing is known of
    the processes there. A container's restart is not told from another machine's container.
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


def undriven(row: TrialRecord) -> dict[str, Any]:
    """The row's scenario without its driver, as a row that no longer runs has it."""
    return {key: value for key, value in row.scenario.items() if key != DRIVER}


def interrupted(row: TrialRecord, error: str | None = None) -> TrialRecord:
    """The row of a trial that ended before its time and that `--resume` goes on with."""
    return row.updated(status="interrupted", error=error, scenario=undriven(row))


def note_lost(history: History) -> list[TrialRecord]:
    """Makes the rows of drivers that are gone `interrupted`; returns those rows.

    Where the driver hung and had to be ended from outside, the row says where it stood.

    One that can't be written stays as it is: looking at a history needs no right to write to it.
    """
    noted = []
    for lost in filter(is_lost, history.trials(status="running")):

        def change(row: TrialRecord, lost: TrialRecord = lost) -> TrialRecord | None:
            if row.updated_at != lost.updated_at:  # another driver goes on with it
                return None
            where = last_words(row.trial_id)
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
    """Whether a process of this id runs, also one that /proc hides (hidepid) from its others."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _machine() -> dict[str, str]:
    """Returns what tells this machine, its start and its process ids from any others.

    `host`, `machine` (identity; empty where a Linux has none), `boot` and `processes` (the
    namespace of process ids).
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
    # It is to be told to nobody (man machine-id), and histories are shared.
    machine = hashlib.sha256(f"rayfin {identity}".encode()).hexdigest()[:16] if identity else ""
    return {"host": socket.gethostname(), "machine": machine, "boot": boot, "processes": processes}
