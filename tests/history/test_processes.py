"""Several processes write one history, and some of them die."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rayfin.history import History

_WRITER = """
import sys
from rayfin.history import History, TrialRecord, now

url, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
with History.open(url) as history:
    for number in range(count):
        at = now()
        record = TrialRecord(
            trial_id=f"{name}-{number}", sweep_id=name, fingerprint="f", status="running",
            created_at=at, updated_at=at, curve=[{"step": step} for step in range(200)],
        )
        history.put(record)
        history.put(record.updated(status="finished", metrics={"eval_loss": float(number)}))
        print(record.trial_id, flush=True)
"""


@contextmanager
def writer(url: str, name: str, count: int) -> Iterator[subprocess.Popen[str]]:
    """A process that has imported everything and writes when it gets a line."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, url, name, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_processes_open_a_new_history_at_once_and_lose_nothing(url):
    with (
        writer(url, "a", 25) as a,
        writer(url, "b", 25) as b,
        writer(url, "c", 25) as c,
        writer(url, "d", 25) as d,
    ):
        for process in (a, b, c, d):
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in (a, b, c, d):
            process.communicate(timeout=540)
            assert process.returncode == 0
    with History.open(url) as history:
        found = history.trials()
    assert len(found) == 100
    assert {trial.status for trial in found} == {"finished"}


def test_a_killed_writer_leaves_what_it_wrote(url, record):
    with writer(url, "a", 10_000) as process:
        process.stdin.write("go\n")
        process.stdin.flush()
        written = [process.stdout.readline().strip() for _ in range(15)]
        process.kill()
        rest, _ = process.communicate(timeout=540)
    # The last line may have been cut off by the kill.
    written += [line.strip() for line in rest.splitlines(keepends=True) if line.endswith("\n")]
    with History.open(url) as history:
        held = {trial.trial_id: trial for trial in history.trials()}
        history.put(record())
        assert history.get("trial-001") == record()
    assert set(written) <= set(held)
    assert {held[trial_id].status for trial_id in written} == {"finished"}
    assert all(len(trial.curve) == 200 for trial in held.values())


def test_a_reader_does_not_wait_for_a_writer(url, record):
    with History.open(url) as one, History.open(url) as other:
        one.put(record(1))

        def records():
            # Inside the transaction of `merge`.
            assert [trial.trial_id for trial in other.trials()] == ["trial-001"]
            yield record(2)

        one.merge(records())
        assert len(other.trials()) == 2
