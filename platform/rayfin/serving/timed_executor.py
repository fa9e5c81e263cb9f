"""Threads with a time limit, for calls that may never return, as reads of a disk that stalls."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from itertools import islice
from typing import Any

from rayfin.errors import Unavailable
from rayfin.heartbeat import thread_position

log = logging.getLogger(__name__)


class TimedExecutor:
    """Runs calls on threads of its own, a few at a time; thread-safe.

    Whoever asks for one waits no longer than `seconds`, also where others are before it: then its
    future raises Unavailable, and a call that has not begun is not made. One that runs for longer
    than `seconds` is stuck: its place is given to the next. Python can't end its thread, which
    stays where it is. When `most_stuck` of them are stuck, nothing is begun until one comes back,
    and `health_problem` says so.
    """

    def __init__(self, name: str, *, threads: int, seconds: float, most_stuck: int) -> None:
        self._name, self._threads, self._seconds = name, threads, seconds
        self._most_stuck = most_stuck
        self._changed = threading.Condition()
        self._waiting: deque[_Call] = deque()
        self._awaited: OrderedDict[_Call, None] = OrderedDict()
        """Calls whose futures are open, in the order in which they were asked for."""
        self._running: OrderedDict[_Call, None] = OrderedDict()
        """Calls that have begun and are not stuck, in the order in which they began."""
        self._stuck: dict[_Call, None] = {}
        self._active = 0
        """The number of threads that take calls; those that are stuck do not."""
        self._watching = self._closed = False

    def submit(
        self, what: str, call: Callable[[], Any], keep: Callable[[Any], None] = lambda _: None
    ) -> Future[Any]:
        """Returns the future of `call`.

        `what` says what the call does, such as "adapter 'red@1' is being read". `keep` gets what
        came before the call was taken for stuck, and before anybody who waits for it. The future
        fails at once where a call that said the same is late, or too many are stuck.
        """
        call_ = _Call(what, call, keep)
        with self._changed:
            late = self._late(what)
            if late is not None:
                why = f"{what}, and that has not ended for {late.seconds:.0f} s; try again later"
            elif len(self._stuck) >= self._most_stuck:
                why = self._storage_hangs(what)
            else:
                self._waiting.append(call_)
                self._awaited[call_] = None
                self._begin()
                return call_.future
        call_.future.set_exception(Unavailable(why))
        return call_.future

    @property
    def health_problem(self) -> str | None:
        """Return which calls are stuck, in words, once no more are begun for them; None before.

        For logs: it may name what is no business of a client.
        """
        with self._changed:
            stuck = list(self._stuck)
        if len(stuck) < self._most_stuck:
            return None
        first = stuck[0]
        where = thread_position(first.thread)
        return (
            f"{len(stuck)} reads of the storage hang, the first for {first.seconds:.0f} s "
            f"({first.what}), in {where}; mend the disk or network that it lies on"
        )

    @property
    def stuck(self) -> int:
        """Return the number of threads that were left in calls that were taken for stuck."""
        return len(self._stuck)

    def close(self) -> None:
        """Cancels what has not begun; waits for nothing."""
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            for call in waiting:
                self._awaited.pop(call, None)
            self._changed.notify_all()
        for call in waiting:
            call.future.cancel()

    # --- with the lock held -------------------------------------------------------------------

    def _late(self, what: str) -> _Call | None:
        """Returns the call that said the same, runs, and is not waited for any more, or None."""
        running = (call for call in self._running if call not in self._awaited)
        return next((call for call in (*self._stuck, *running) if call.what == what), None)

    def _storage_hangs(self, what: str) -> str:
        # What the others read may be none of the business of whoever asked for this.
        return (
            f"{what}, and that can't be begun: {len(self._stuck)} other reads of the server's "
            "storage hang; the disk or network that it lies on has to be mended, then try again"
        )

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
            self._awaited.pop(call, None)
        self._active -= 1
        return None

    def _left(self) -> float | None:
        """Returns the seconds until a call is late or stuck, or None without calls.

        They are 0 or less where one is so already.
        """
        since = [call.asked for call in islice(self._awaited, 1)]
        since += [call.began for call in islice(self._running, 1)]
        return min(since) + self._seconds - time.monotonic() if since else None

    def _take_late(self) -> tuple[list[tuple[_Call, str]], _Call | None]:
        """Returns calls to give up by now, each with why, and one that is stuck from now on."""
        before = time.monotonic() - self._seconds
        given_up: list[tuple[_Call, str]] = []
        asked, begun = next(iter(self._awaited), None), next(iter(self._running), None)
        if asked is not None and asked.asked <= before:
            del self._awaited[asked]
            if asked not in self._running:
                self._waiting.remove(asked)
            given_up.append((asked, self._too_late(asked.what)))
        if begun is None or begun.began > before:
            return given_up, None
        del self._running[begun]
        self._stuck[begun] = None
        self._active -= 1
        are_too_many = len(self._stuck) >= self._most_stuck
        for call in list(self._waiting):
            if are_too_many or call.what == begun.what:  # that would hang, too
                self._waiting.remove(call)
                del self._awaited[call]
                why = self._storage_hangs if are_too_many else self._too_late
                given_up.append((call, why(call.what)))
        if not are_too_many:
            self._begin()
        return given_up, begun

    def _too_late(self, what: str) -> str:
        return f"{what}, and that did not end in {self._seconds:g} s; try again later"

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
                if call in self._stuck:  # its place was given to another
                    del self._stuck[call]
                    return
                del self._running[call]
                is_awaited = call in self._awaited
                self._awaited.pop(call, None)
            if error is None:
                call.keep(result)
                if is_awaited:
                    call.future.set_result(result)
            elif is_awaited:
                call.future.set_exception(error)

    def _watch(self) -> None:
        while True:
            with self._changed:
                left = self._left()
                if left is None and self._closed:
                    return
                if left is None or left > 0:
                    self._changed.wait(left)
                    continue
                given_up, stuck = self._take_late()
            if stuck is not None:
                where = thread_position(stuck.thread)
                log.warning("%s, and that hangs for %.0f s: %s", stuck.what, stuck.seconds, where)
            for call, why in given_up:
                # One that runs was told so when it began; one that waited may have been cancelled.
                if call.thread or call.future.set_running_or_notify_cancel():
                    call.future.set_exception(Unavailable(why))


class _Call:
    def __init__(self, what: str, run: Callable[[], Any], keep: Callable[[Any], None]) -> None:
        self.what, self.run, self.keep = what, run, keep
        self.future: Future[Any] = Future()
        self.asked = time.monotonic()
        self.thread = 0
        """The identifier of the thread that it runs on; 0 before it has begun."""
        self.began = 0.0

    @property
    def seconds(self) -> float:
        """Return the seconds since the call began."""
        return time.monotonic() - self.began
