"""The record of one request, and the log that it may be written to."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.types import Scope

from rayfin.config.serving import ApiKey
from rayfin.errors import StorageError

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_MAX_WAITING = 64 * 2**20
_CLOSING_SECONDS = 10.0


def new_request_id() -> str:
    """Returns an id that no other request has."""
    return secrets.token_hex(12)


@dataclass
class RequestRecord:
    """What is measured of a request while it is answered; times are of a monotonic clock, in s."""

    path: str
    request_id: str = ""
    """What the client calls it, in `x-request-id`; else the same as `id`."""
    id: str = field(default_factory=new_request_id)
    """No other request's."""
    started: float = field(default_factory=time.perf_counter)
    key: ApiKey | None = None
    """The API key that it came with, while it is at work."""
    model: str | None = None
    """What the client asked for."""
    answered_by: str | None = None
    """`support@3`, or the base's name."""
    trial_id: str | None = None
    """The trial that made the version that answered."""
    adapter: str | None = None
    """The name that it is counted under: of an adapter that was found, or of the base."""
    status: int = 500
    prompt_tokens: int = 0
    completion_tokens: int = 0
    choices: int = 0
    first_token: float | None = None
    last_token: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    prompt: Any = None
    """The prompt as the client wrote it; kept, like `answers`, only where the log wants text."""
    answers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.request_id = self.request_id or self.id

    def took(self, tokens: int) -> None:
        """Counts tokens that have come now."""
        if tokens:
            self.last_token = time.perf_counter()
            self.first_token = self.first_token or self.last_token
            self.completion_tokens += tokens

    @property
    def seconds_to_first_token(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.started

    @property
    def later_tokens(self) -> int:
        """Return the number of tokens after each choice's first."""
        return max(0, self.completion_tokens - self.choices)

    @property
    def seconds_of_later_tokens(self) -> float:
        """Return the seconds from the first token of all to the last."""
        if self.first_token is None or self.last_token is None:
            return 0.0
        return self.last_token - self.first_token

    @property
    def seconds_per_token(self) -> float | None:
        """Return the mean seconds of a token after each choice's first."""
        if not self.later_tokens or self.first_token is None:
            return None
        return self.seconds_of_later_tokens / (self.later_tokens / self.choices)


def request_id_of(scope: Scope) -> str:
    """Return the client's `x-request-id` if it may stand in a header and a log, else a new one.

    Of several, which differ, none is the client's.
    """
    given = {bytes(value) for name, value in scope["headers"] if name == b"x-request-id"}
    if len(given) == 1 and _REQUEST_ID.fullmatch(value := given.pop()):
        return value.decode("ascii")
    return new_request_id()


def record_of(request: Request) -> RequestRecord:
    """Return the record that the middleware has put beside the request."""
    record: RequestRecord = request.state.record
    return record


class RequestLog:
    """Appends a line of JSON for each request, each in one write: replicas may share the file.

    A thread of its own writes, so that no request waits for a disk. Lines beyond `most_waiting`
    bytes, and those that can't be written, are lost: a warning says so when the first is, and
    another how many there were.
    """

    def __init__(self, path: str, *, text: bool, most_waiting: int = _MAX_WAITING) -> None:
        """Raises StorageError where the file can't be written."""
        self.text = text
        self._path = Path(path).expanduser()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Prompts are nobody else's business.
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(
                f"request_log '{path}' can't be written ({error.strerror or error}); "
                "give a file in a directory that you may write to"
            ) from error
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._room = most_waiting
        self._lost = 0
        """Lines of which no warning has said yet how many."""
        self._torn = False
        """Whether the file may end in the middle of a line."""
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    def write(self, record: RequestRecord) -> None:
        """Hands the line to the thread; never waits."""
        entry: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": record.request_id,
            "path": record.path,
            "model": record.model,
            "answered_by": record.answered_by,
            "status": record.status,
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "finish_reasons": record.finish_reasons,
            "seconds": round(time.perf_counter() - record.started, 6),
            "seconds_to_first_token": record.seconds_to_first_token,
        }
        if self.text:
            entry |= {"prompt": record.prompt, "answers": record.answers}
        line = json.dumps(entry).encode() + b"\n"
        with self._changed:
            if taken := len(line) <= self._room and not self._closing:
                self._room -= len(line)
                self._waiting.append(line)
                self._changed.notify()
        if not taken:
            self._lose("it takes no more now")

    def close(self) -> None:
        """Returns when all lines are written, or after a while where the disk takes none."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSING_SECONDS)
        if self._thread.is_alive():
            log.warning("request_log '%s': the disk is too slow for its last lines", self._path)

    def _run(self) -> None:
        while (line := self._next()) is not None:
            try:
                self._append(line)
            except OSError as error:  # a full disk is no reason to stop answering
                self._lose(error.strerror or str(error))
            else:
                if not self._waiting:
                    self._tell_lost()
            with self._changed:
                self._room += len(line)
        self._tell_lost()
        os.close(self._file)

    def _next(self) -> bytes | None:
        """Return the line that waits longest; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return self._waiting.popleft() if self._waiting else None

    def _append(self, line: bytes) -> None:
        """Append a line in one write, so that lines of other processes don't get into it."""
        # What a full disk has cut off must not take this line along.
        data = b"\n" + line if self._torn else line
        if (written := os.write(self._file, data)) < len(data):
            self._torn = True
            raise OSError(f"{written} of {len(data)} bytes were written")
        self._torn = False

    def _lose(self, why: str) -> None:
        with self._changed:
            self._lost += 1
            first = self._lost == 1
        if first:
            log.warning("request_log '%s' loses lines (%s); serving goes on", self._path, why)

    def _tell_lost(self) -> None:
        with self._changed:
            lost, self._lost = self._lost, 0
        if lost:
            log.warning("request_log '%s' lost %d lines", self._path, lost)
