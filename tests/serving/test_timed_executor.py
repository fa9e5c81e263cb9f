"""Calls that may hang: whoever asks is told in time, and the rest goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rayfin.errors import Unavailable
from rayfin.serving.timed_executor import TimedExecutor

PATIENCE = 540.0
NEVER = 3600.0
SOON = 0.1


@pytest.fixture
def leave() -> Iterator[threading.Event]:
    """Ends the calls that hang."""
    event = threading.Event()
    yield event
    event.set()


def test_a_call_behind_those_that_hang_is_given_up_from_when_it_was_asked_for(
    leave: threading.Event,
) -> None:
    calls, begun = TimedExecutor("disk", threads=1, seconds=NEVER, most_stuck=9), threading.Event()
    ran: list[str] = []

    def hang() -> None:
        begun.set()
        leave.wait(PATIENCE)

    hangs = calls.submit("'a' is being read", hang)
    assert begun.wait(PATIENCE)
    behind = calls.submit("'b' is being read", lambda: ran.append("b"))
    first, second = calls._awaited
    make_late(calls, "asked", first, second)
    for future, name in ((hangs, "a"), (behind, "b")):
        with pytest.raises(Unavailable, match=f"^'{name}' is being read, and that did not end in"):
            future.result(PATIENCE)
    make_late(calls, "began", first)
    wait_until(lambda: calls.stuck == 1)
    assert calls.submit("'b' is being read", lambda: "red").result(PATIENCE) == "red"
    assert not ran, "nobody waited for it any more"


def test_what_comes_too_late_is_kept_for_the_next(leave: threading.Event) -> None:
    calls, kept = TimedExecutor("disk", threads=1, seconds=NEVER, most_stuck=1), []
    begun = threading.Event()

    def slow() -> str:
        begun.set()
        leave.wait(PATIENCE)
        return "red"

    asked = calls.submit("'a' is being read", slow, kept.append)
    assert begun.wait(PATIENCE)
    make_late(calls, "asked", *calls._awaited)  # it has waited for its turn so long
    with pytest.raises(Unavailable, match="did not end"):
        asked.result(PATIENCE)
    with pytest.raises(Unavailable, match=r"'a' is being read, and that has not ended for \d+ s"):
        calls.submit("'a' is being read", slow).result(PATIENCE)
    assert calls.stuck == 0 and calls.health_problem is None, "it has run for a moment only"
    leave.set()
    wait_until(lambda: kept)
    assert kept == ["red"]
    assert calls.submit("'a' is being read", lambda: "again").result(PATIENCE) == "again"


def test_what_is_refused_while_too_many_hang_says_what_and_why(leave: threading.Event) -> None:
    calls = TimedExecutor("disk", threads=1, seconds=SOON, most_stuck=2)
    for number, name in enumerate("ab", start=1):
        calls.submit(f"adapter '{name}@1' is being read", lambda: leave.wait(PATIENCE))
        wait_until(lambda: calls.stuck == number)  # noqa: B023
    with pytest.raises(Unavailable) as refused:
        calls.submit("adapter 'c@1' is being read", lambda: None).result(PATIENCE)
    assert str(refused.value) == (
        "adapter 'c@1' is being read, and that can't be begun: 2 other reads of the server's "
        "storage hang; the disk or network that it lies on has to be mended, then try again"
    )
    assert "'a@1'" in (calls.health_problem or ""), "the log says which"
    leave.set()
    wait_until(lambda: calls.health_problem is None)
    assert calls.submit("adapter 'c@1' is being read", lambda: 3).result(PATIENCE) == 3


def test_errors_and_cancelled_calls(leave: threading.Event) -> None:
    calls = TimedExecutor("disk", threads=1, seconds=NEVER, most_stuck=1)
    with pytest.raises(KeyError):
        calls.submit("'a' is being read", lambda: {}["a"]).result(PATIENCE)
    hangs = calls.submit("'a' is being read", lambda: leave.wait(PATIENCE))
    behind = calls.submit("'b' is being read", lambda: None)
    last = calls.submit("'c' is being read", lambda: None)
    assert behind.cancel()
    leave.set()
    assert hangs.result(PATIENCE) is True and last.result(PATIENCE) is None
    assert not calls._awaited and not calls._running
    calls.close()


def make_late(calls: TimedExecutor, since: str, *late: Any) -> None:
    """As if they had been asked for, or had begun, too long ago."""
    with calls._changed:
        for call in late:
            setattr(call, since, getattr(call, since) - 2 * NEVER)
        calls._changed.notify_all()


def wait_until(true: Callable[[], Any]) -> None:
    give_up = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < give_up, "it did not come about"
        time.sleep(0.01)
