"""Ray Serve's private names: what `serve.delete` leaves out, and settings of its processes."""

from __future__ import annotations

from functools import partial

from rayfin.compat.private import PrivateName

_name = partial(PrivateName, __name__)

_DELETE = _name(
    "ray.serve",
    "delete",
    needed_to="drain an application while its proxies still answer",
    instead="a public argument of serve.delete that does not wait",
    parameters=("name", "_blocking"),
)
_SETTING = partial(_name, "ray.serve._private.constants")
# Serve reads them of the environment, under these names with RAY_SERVE_ before them.
_SETTINGS = (
    _SETTING(
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH",
        needed_to="put limits on clients into Serve's HTTP proxies",
        instead="middleware of Serve's proxies as an option of serve.start",
    ),
    _SETTING(
        "PROXY_READY_CHECK_TIMEOUT_S",
        needed_to="give a proxy time to start on a busy machine",
        instead="an option of serve.start",
    ),
    _SETTING(
        "PROXY_HEALTH_CHECK_PERIOD_S",
        needed_to="find a proxy that has died within seconds",
        instead="an option of serve.start",
    ),
    _SETTING(
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS",
        needed_to="replace a replica that hangs at once",
        instead="an option of a deployment",
    ),
)


def delete_application(name: str) -> None:
    """Begin to take an application down, without waiting for it."""
    _DELETE.get()(name, _blocking=False)
