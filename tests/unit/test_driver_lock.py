"""One driver at a time for a sweep: a second is told who holds it, and a killed one bars nobody."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rayfin.config import load_config
from rayfin.errors import ConfigError
from rayfin.history import History
from rayfin.objects import ObjectPath
from rayfin.paths import Storage, StoragePath
from rayfin.tuning import driver_lock as lock_module
from rayfin.tuning import sweep, tune
from rayfin.tuning.driver_lock import driver_lock
from rayfin.tuning.plan import SweepPlan, new_plan
from rayfin.tuning.rows import started
from rayfin.tuning.sweep import SweepOptions, run_sweep

HOLD = """
import os, sys, threading
from rayfin.history import driver
from rayfin.paths import StoragePath
from rayfin.tuning.driver_lock import driver_lock
location, cache, host = sys.argv[1:]
os.environ["RAYFIN_CACHE"] = cache
if host:
    machine = driver._machine() | {"host": host}
    driver._machine = lambda: machine
with driver_lock(StoragePath.at(location), "", ""):
    print("holds", flush=True)
    threading.Event().wait()
"""


@contextmanager
def another_driver(location: StoragePath, cache: Path, host: str = "") -> Iterator[int]:
    """A process that holds `location` until it is killed, at the end of the block; its id.

    `cache`: its copies of what is in a bucket. `host`: the machine that it takes itself to be on.
    """
    command = [sys.executable, "-c", HOLD, str(location), str(cache), host]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "holds\n"
        yield process.pid
    finally:
        process.kill()
        process.communicate(timeout=540)


def plan_of(root: Path, *settings: str) -> SweepPlan:
    data = root / "rows.jsonl"
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(8)]
    data.write_text("\n".join(map(json.dumps, rows)))
    config = load_config(
        {"model": {"name": "tiny"}, "method": {"type": "lora"}},
        [f"data.path={data}", f"storage={root / 'runs'}", *settings],
    )
    return new_plan(config, Storage.open(config.storage))


def test_a_second_driver_of_a_sweep_is_told_who_holds_it_and_a_killed_one_bars_nobody(
    tmp_path: Path,
) -> None:
    axis = "sweep.parameters.method.r=[2,4]"
    plan = plan_of(tmp_path, axis, "sweep.num_samples=1")
    plan.save()
    saved = (plan.location.path / "config.yaml").read_bytes()
    more = plan_of(tmp_path, axis, "sweep.num_samples=2").config
    with (
        History.open(plan.storage.history_url) as history,
        another_driver(plan.location, tmp_path) as pid,
        pytest.raises(ConfigError) as told,
    ):
        run_sweep(more, history, plan.storage, SweepOptions(resume=True))
    said = str(told.value)
    assert f"sweep {plan.sweep_id} is running in another process (process {pid} on " in said
    assert f" on {socket.gethostname()}, since 20" in said
    assert "wait for its end, or leave --resume out" in said
    assert (plan.location.path / "config.yaml").read_bytes() == saved
    with driver_lock(plan.location, "", ""):
        pass


def test_what_another_driver_has_ended_by_the_time_it_leaves_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path, "sweep.parameters.method.r=[2]", "sweep.num_samples=1")
    plan.save()
    row = started(plan.trial({"method.r": 2}))
    with History.open(plan.storage.history_url) as history:
        history.put(row)

        @contextmanager
        def just_in_time(*args: Any) -> Iterator[None]:
            metrics = {"eval_loss": 1.0, "steps": plan.config.train.max_steps}
            history.put(row.updated(status="finished", metrics=metrics))
            with driver_lock(*args):
                yield

        monkeypatch.setattr(sweep, "driver_lock", just_in_time)
        monkeypatch.setattr(tune, "run_trials", lambda *_, **__: pytest.fail("it trains"))
        result = run_sweep(plan.config, history, plan.storage, SweepOptions(resume=True))
    assert [row.status for row in result.trials] == ["finished"]


def test_in_a_bucket_a_driver_on_another_machine_holds_it_until_it_is_silent_for_a_minute(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = StoragePath.at(bucket)
    with another_driver(location, tmp_path / "there", "elsewhere") as pid:
        with pytest.raises(ConfigError) as told, driver_lock(location, "sweep x", "wait"):
            pass
        assert f"sweep x is running in another process (process {pid} on elsewhere, since 20" in (
            str(told.value)
        )
        assert "if it was killed, the file counts for nothing 60 s later" in str(told.value)
    with pytest.raises(ConfigError, match="on elsewhere"), driver_lock(location, "sweep x", "wait"):
        pass
    monkeypatch.setattr(lock_module, "_FORGOTTEN_AFTER", -1.0)
    with driver_lock(location, "sweep x", "wait"):
        pass
    assert location.objects is not None
    assert (location.objects / "drivers").modification_times() == {}


def test_in_a_bucket_a_driver_of_this_machine_that_was_killed_bars_nobody(
    bucket: str, tmp_path: Path
) -> None:
    location = StoragePath.at(bucket)
    with (
        another_driver(location, tmp_path / "there"),
        pytest.raises(ConfigError, match=f" on {socket.gethostname()}, since"),
        driver_lock(location, "", ""),
    ):
        pass
    with driver_lock(location, "", ""):
        pass


def test_in_a_bucket_who_comes_while_another_looks_gives_way(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, written, came = StoragePath.at(bucket), ObjectPath.modification_times, []
    monkeypatch.setenv("RAYFIN_CACHE", str(tmp_path / "there"))
    there = StoragePath.at(bucket)

    def other_comes_first(drivers: ObjectPath) -> dict[str, float]:
        if not came:
            came.append(True)
            with pytest.raises(ConfigError), driver_lock(there, "", ""):
                pass
        return written(drivers)

    monkeypatch.setattr(ObjectPath, "modification_times", other_comes_first)
    with driver_lock(here, "", ""):
        assert came


def test_in_a_bucket_a_driver_renews_its_file(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "_RENEWED_EVERY", 0.01)
    location = StoragePath.at(bucket)
    assert location.objects is not None
    drivers = location.objects / "drivers"
    with driver_lock(location, "", ""):
        (own,) = drivers.modification_times()
        (drivers / own).remove()
        while own not in drivers.modification_times():
            pass
    assert drivers.modification_times() == {}
