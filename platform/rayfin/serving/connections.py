"""Limits on HTTP connections: uvicorn's protocol, with timeouts and bounds for clients.

uvicorn waits without an end for a request's head, keeps what a head grows to, and waits without an
end for a client that takes nothing of its answer. Each of these holds a file descriptor, of which
a process has a few thousand.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rayfin.compat.uvicorn import HttpProtocol
from rayfin.serving.api.request_log import new_request_id

MAX_HEAD_BYTES = 64 * 2**10
"""The most bytes that a request line and its headers may have."""

_FEWEST_FILES = 128

Item = TypeVar("Item")


@dataclass
class ClientTimeouts:
    """How long, in seconds, this process waits for a client."""

    request: float = 30.0
    """Time for a request's head to come in, and then for its body: api.body_seconds."""
    answer: float = 60.0
    """Time for a client to take what is ready of its answer: api.write_seconds."""


TIMEOUTS = ClientTimeouts()
"""The times that hold in this process. The proxy sets them to the deployment's settings."""


class FairLimiter(Generic[Item]):
    """Bounds how much waits for its clients, in total and for each client.

    What is too much is taken from the client that has the most, its oldest item first. An item
    of the last `grace` seconds stays.
    """

    def __init__(
        self,
        most: int,
        most_of_one: int,
        grace: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most, self.most_of_one = most, most_of_one
        self._grace, self._clock = grace, clock
        self._held: dict[str, dict[Item, float]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, client: str, item: Item) -> list[Item]:
        """Counts an item; returns those that have to end for it, which are no longer counted."""
        mine = self._held.setdefault(client, {})
        self._count += item not in mine
        mine[item] = now = self._clock()
        ended: list[Item] = []
        while True:
            if len(mine) > self.most_of_one:
                greediest = client
            elif self._count > self.most:
                greediest = max(self._held, key=lambda one: len(self._held[one]))
            else:
                return ended
            oldest, since = next(iter(self._held[greediest].items()))
            if now - since < self._grace:
                return ended
            self.remove(greediest, oldest)
            ended.append(oldest)

    def remove(self, client: str, item: Item) -> None:
        """Counts an item no longer; one that isn't counted is no error."""
        mine = self._held.get(client, {})
        if item in mine:
            del mine[item]
            self._count -= 1
        if not mine:
            self._held.pop(client, None)


def client_of(address: tuple[str, int] | None) -> str:
    """Returns the client that a connection counts for.

    It is the address, or in IPv6 the network of 64 bits that a customer gets as a whole.
    """
    host = "" if address is None else address[0]
    try:
        found = ipaddress.ip_address(host)
    except ValueError:  # a socket of this machine, or a name
        return host
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return host


def _most_connections() -> int:
    """Returns how many connections may wait for clients; the rest of the process needs files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(_FEWEST_FILES, int(0.7 * files)) if files > 0 else 2**16


class BoundedProtocol(HttpProtocol):
    """uvicorn's HTTP protocol for one connection, with limits that hold for all clients alike.

    A head that has not come whole within `TIMEOUTS.request`, or is larger than `MAX_HEAD_BYTES`, is
    refused (408, 431). A client that does not take what is ready of its answer within
    `TIMEOUTS.answer` is disconnected. Where connections that wait for their clients use up the
    process's files, the oldest of the client with the most of them is closed for a new one.
    """

    _waiting: FairLimiter[BoundedProtocol] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ws_protocol_class = None  # another protocol, without these limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_to_wait()
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._end_write_timer()
        self._end_to_wait()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._idle:
            self._expect_head()
            self._head_bytes += len(data)
        super().data_received(data)
        if not self._idle:
            self._end_head()
            self._end_to_wait()
            if not self.flow.write_paused:  # the last answer was taken, or is about to be
                self._end_write_timer()
        elif self._head_bytes > MAX_HEAD_BYTES:
            self.refuse(431, f"the request's head is larger than {MAX_HEAD_BYTES} bytes; send less")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._start_write_timer()
        if self._idle and not self.transport.is_closing():
            self._begin_to_wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._end_write_timer()
        self._start_write_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_write_timer()

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, msg)

    def refuse(self, status: int, message: str) -> None:
        """Answers with an error in the API's envelope, and ends the connection."""
        if self.transport.is_closing():
            return
        kind = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = json.dumps({"error": kind}).encode()
        self.transport.write(
            b"HTTP/1.1 %d \r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"x-request-id: %s\r\nconnection: close\r\n\r\n%s"
            % (status, len(body), new_request_id().encode(), body)
        )
        self.transport.close()
        self._start_write_timer()

    @property
    def _idle(self) -> bool:
        """Return whether every request whose head has come whole has been answered."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(TIMEOUTS.request, self._no_head)

    def _no_head(self) -> None:
        self._head_timer = None
        if not self._head_bytes:
            self.transport.close()  # nothing was asked, so nothing is answered
            return
        self.refuse(
            408, f"the request did not come in within {TIMEOUTS.request:g} s; send it faster"
        )

    def _end_head(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _start_write_timer(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(TIMEOUTS.answer, self._not_taken)

    def _not_taken(self) -> None:
        self._write_timer = None
        # Closing would wait until the client has taken the rest.
        if self.flow.write_paused or self.transport.get_write_buffer_size():
            self.transport.abort()

    def _end_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _begin_to_wait(self) -> None:
        kind = type(self)
        if kind._waiting is None:
            most = _most_connections()
            kind._waiting = FairLimiter(most, most // 2)
        for other in kind._waiting.add(client_of(self.client), self):
            other.transport.abort()

    def _end_to_wait(self) -> None:
        if self._waiting is not None:
            self._waiting.remove(client_of(self.client), self)
