"""Calls that may never return, such as reads of a disk that stalls, and how long they may take."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from rayfin.errors import Unavailable
from rayfin.heartbeat import whereabouts

log = logging.getLogger(__name__)


class BoundedCalls:
    """Runs calls on threads of its own, a few at a time; thread-safe.

    One that takes longer than `seconds` is given up: its future raises Unavailable, and the next
    one has its place. Python can't end the thread, which is left where it is stuck. When
    `most_stuck` of them are, nothing is begun until one comes back, and `ailment` says so.
    """

    def __init__(self, name: str, *, threads: int, seconds: float, most_stuck: int) -> None:
        self._name, self._threads, self._seconds = name, threads, seconds
        self._most_stuck = most_stuck
        self._changed = threading.Condition()
        self._waiting: deque[_Call] = deque()
        self._running: OrderedDict[_Call, None] = OrderedDict()  # in the order of their deadlines
        self._stuck: dict[_Call, None] = {}
        self._active = 0
        """Threads that take calls: those that are stuck do not."""
        self._watching = self._closed = False

    def submit(
        self, what: str, call: Callable[[], Any], keep: Callable[[Any], None] = lambda _: None
    ) -> Future[Any]:
        """`what` the call does, such as "adapter 'red@1' is read"; no other call says the same.

        `keep` gets what came in time, before anybody who waits for it. Where a call that said the
        same is stuck, or too many others are, the future fails at once.
        """
        call_ = _Call(what, call, keep)
        with self._changed:
            stuck = next((each for each in self._stuck if each.what == what), None)
            if stuck is not None:
                why = f"{what}, and that has not ended for {stuck.seconds:.0f} s"
            elif len(self._stuck) >= self._most_stuck:
                why = f"{len(self._stuck)} reads of the storage hang"
            else:
                self._waiting.append(call_)
                self._begin()
                return call_.future
        call_.future.set_exception(Unavailable(f"{why}; try again later"))
        return call_.future

    @property
    def ailment(self) -> str | None:
        """What is stuck, where no more calls are begun; None where they are."""
        with self._changed:
            stuck = list(self._stuck)
        if len(stuck) < self._most_stuck:
            return None
        first = stuck[0]
        where = whereabouts(first.thread)
        return f"{len(stuck)} reads hang, the first for {first.seconds:.0f} s in {where}"

    @property
    def stuck(self) -> int:
        """Threads that are left where a call was given up."""
        return len(self._stuck)

    def close(self) -> None:
        """Cancels what has not begun; waits for nothing."""
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for call in waiting:
            call.future.cancel()

    # --- with the lock held -------------------------------------------------------------------

    def _begin(self) -> None:
        """Starts what is lacking: threads for calls that wait, and the one that watches them."""
        if self._active < min(self._threads, len(self._waiting) + len(self._running)):
            self._active += 1
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        if not self._watching:
            self._watching = True
            threading.Thread(target=self._watch, name=f"{self._name}-watch", daemon=True).start()

    def _next(self) -> _Call | None:
        while self._waiting:
            call = self._waiting.popleft()
            if call.future.set_running_or_notify_cancel():
                call.thread, call.began = threading.get_ident(), time.monotonic()
                self._running[call] = None
                self._changed.notify_all()
                return call
        self._active -= 1
        return None

    # --- the threads --------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                call = self._next()
            if call is None:
                return
            result, error = None, None
            try:
                result = call.run()
            except BaseException as raised:  # noqa: BLE001  # for those who wait for it
                error = raised
            with self._changed:
                if call in self._stuck:  # given up, and its place taken
                    del self._stuck[call]
                    return
                del self._running[call]
            if error is None:
                call.keep(result)
                call.future.set_result(result)
            else:
                call.future.set_exception(error)

    def _watch(self) -> None:
        while True:
            with self._changed:
                call = next(iter(self._running), None)
                if call is None or (left := call.began + self._seconds - time.monotonic()) > 0:
                    if self._closed and call is None:
                        return
                    self._changed.wait(None if call is None else left)
                    continue
                del self._running[call]
                self._stuck[call] = None
                self._active -= 1
                given_up = [call]
                if len(self._stuck) < self._most_stuck:
                    self._begin()
                else:
                    given_up += self._waiting
                    self._waiting.clear()
            log.warning(
                "%s, and that has not ended in %g s: %s",
                call.what,
                self._seconds,
                whereabouts(call.thread),
            )
            for each in given_up:
                why = f"{each.what}, and that did not end in {self._seconds:g} s; try again later"
                if each is call or each.future.set_running_or_notify_cancel():
                    each.future.set_exception(Unavailable(why))


class _Call:
    def __init__(self, what: str, run: Callable[[], Any], keep: Callable[[Any], None]) -> None:
        self.what, self.run, self.keep = what, run, keep
        self.future: Future[Any] = Future()
        self.thread = 0
        self.began = 0.0

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began
