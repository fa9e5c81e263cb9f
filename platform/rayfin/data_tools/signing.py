"""Make signatures of many texts, in processes of their own where there are many."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from rayfin.data_tools.minhash import MinHasher, Signatures
from rayfin.errors import RayfinError

_BATCH, _BATCH_CHARACTERS = 1000, 2**22
"""The most texts of a batch, and the characters that end one."""
_MOST_PROCESSES = 8
"""Reading and matching, which are done by one, take longer than more would need to sign."""
_BATCHES_HERE = 20
"""The batches that take less time here than starting the processes does."""


class Signer:
    """Collects texts and makes their signatures, up to `processes` batches at the same time."""

    def __init__(self, threshold: float, processes: int) -> None:
        self._threshold, self._processes = threshold, min(processes, _MOST_PROCESSES)
        self._hasher = MinHasher(threshold)
        self._texts: list[str] = []
        self._characters = 0
        self._done: list[Signatures] = []
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._busy = deque[Connection]()
        """The connections with a batch under way, in the order of the batches."""

    def add(self, text: str) -> None:
        """Add a text."""
        self._texts.append(text)
        self._characters += len(text)
        if len(self._texts) == _BATCH or self._characters >= _BATCH_CHARACTERS:
            self._sign()

    def signatures(self) -> Signatures:
        """Return the signatures of all texts, in their order."""
        if self._texts or not self._done:
            self._sign()
        while self._busy:
            self._receive()
        self._done = [Signatures.joined(self._done)]
        self.close()
        return self._done[0]

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._workers:
            connection.close()  # which ends it
            process.join()
        self._workers = []

    def _sign(self) -> None:
        texts, self._texts, self._characters = self._texts, [], 0
        if self._processes == 1 or len(self._done) < _BATCHES_HERE:
            self._done.append(self._hasher.signatures(texts))
            return
        if not self._workers:
            for _ in range(self._processes):  # one by one, so that all that run are known
                self._workers.append(_start(self._threshold))
        # A process gets a batch only after its result was read, so that neither waits for the other
        # with a full pipe.
        if len(self._busy) == self._processes:
            connection = self._receive()
        else:
            connection = self._workers[len(self._busy)][1]
        try:
            connection.send(texts)
        except OSError as error:
            raise _ended() from error
        self._busy.append(connection)

    def _receive(self) -> Connection:
        connection = self._busy.popleft()
        try:
            self._done.append(connection.recv())
        except (EOFError, OSError) as error:
            raise _ended() from error
        return connection


def _start(threshold: float) -> tuple[BaseProcess, Connection]:
    # A fork would copy the threads' locks of the libraries that are loaded here.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, threshold), daemon=True)
    try:
        with _interrupts_ignored():
            process.start()
    except OSError as error:
        here.close()
        raise RayfinError(
            f"no process can be started that compares texts ({error.strerror or error}); end other "
            "processes, or give fewer rows at a time"
        ) from error
    finally:
        there.close()
    return process, here


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignore Ctrl-C where that can be set, which a process started meanwhile inherits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(connection: Connection, threshold: float) -> None:
    """Answer batches until the other end is closed, be it by a kill of its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hasher = MinHasher(threshold)
    with suppress(EOFError, OSError):
        while True:
            texts: Sequence[str] = connection.recv()
            connection.send(hasher.signatures(texts))


def _ended() -> RayfinError:
    return RayfinError(
        "a process that compares texts has ended, probably for want of memory; give fewer rows at "
        "a time"
    )
