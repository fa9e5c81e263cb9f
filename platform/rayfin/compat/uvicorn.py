"""uvicorn's private names: its HTTP protocol, and where it looks that up.

It imports uvicorn's protocol: only what is part of a server's process may import it.
"""

from __future__ import annotations

from functools import partial

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rayfin.compat.private import PrivateName

_name = partial(PrivateName, __name__)

_LIMITS = "limits of uvicorn's own on a head's size and on slow clients"
_BOUND = partial(
    _name,
    "uvicorn.protocols.http.httptools_impl",
    needed_to="end connections that are held for nothing",
    instead=_LIMITS,
)
_OVERRIDDEN = (
    _BOUND("HttpToolsProtocol.connection_made", parameters=("transport",)),
    _BOUND("HttpToolsProtocol.connection_lost", parameters=("exc",)),
    _BOUND("HttpToolsProtocol.data_received", parameters=("data",)),
    _BOUND("HttpToolsProtocol.on_response_complete", parameters=()),
    _BOUND("HttpToolsProtocol.pause_writing", parameters=()),
    _BOUND("HttpToolsProtocol.resume_writing", parameters=()),
    _BOUND("HttpToolsProtocol.send_400_response", parameters=("msg",)),
)
_ATTRIBUTES = tuple(
    _BOUND(f"HttpToolsProtocol.{name}", on_instances=True)
    for name in ("client", "cycle", "flow", "loop", "transport", "ws_protocol_class")
)
_ANSWERED = _BOUND("RequestResponseCycle.response_complete", on_instances=True)
_PROTOCOLS = _name(
    "uvicorn.config",
    "HTTP_PROTOCOLS",
    needed_to="have Serve's proxies use a protocol of rayfin's",
    instead="a protocol for its proxies as an option of serve.start",
)

# What BoundedProtocol overrides: a method that was renamed would no longer be called.
for _one in _OVERRIDDEN:
    _one.check()

HttpProtocol = HttpToolsProtocol
"""uvicorn's protocol for an HTTP connection, to be extended; `refuse` and timers are rayfin's."""


def use_protocol(path: str) -> None:
    """Make the class at `module:name` the protocol of servers that ask for none by name."""
    _PROTOCOLS.get()["auto"] = path
