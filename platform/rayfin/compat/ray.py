"""Ray's private names: how a Ray of our own starts, what it tells its driver, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from rayfin.compat.private import PrivateName

_name = partial(PrivateName, __name__)

_PRINT = _name(
    "ray._private.worker",
    "print_to_stdstream",
    needed_to="keep Ray's messages off standard output, which is for results",
    instead="a setting like log_to_driver for Ray's errors, or a logger that gets them",
    parameters=("data", "ignore_prefix"),
)
_DRAINING = _name(
    "ray._private.state",
    "state.get_draining_nodes",
    needed_to="save a checkpoint before a node is taken away",
    instead="a public call that tells which nodes drain, as ray.train.get_preemption_info does",
    parameters=(),
)
_KEPT = partial(
    _name,
    "ray.experimental.internal_kv",
    needed_to="share what replicas have counted in a store that outlives them",
    instead="a public key-value store of the cluster",
)
_PUT = _KEPT("_internal_kv_put", parameters=("key", "value", "overwrite", "namespace"))
_GET = _KEPT("_internal_kv_get", parameters=("key", "namespace"))
_LIST = _KEPT("_internal_kv_list", parameters=("prefix", "namespace"))
_DELETE = _KEPT("_internal_kv_del", parameters=("key", "del_by_prefix", "namespace"))
_LOOPBACK = partial(
    _name,
    "ray._private.ray_constants",
    needed_to="start a Ray that listens on loopback alone",
    instead="an argument of ray.init that binds all of Ray's servers to an address",
)
_CLUSTERS = _LOOPBACK("ENABLE_RAY_CLUSTER")
_CLUSTERS_VARIABLE = _LOOPBACK("ENABLE_RAY_CLUSTERS_ENV_VAR")
_READ_AGAIN = partial(
    _name,
    "ray._raylet",
    needed_to="start a Ray with settings and a token of its own in a process that has imported Ray",
    instead="settings and token as arguments of ray.init",
)
_CONFIG = _READ_AGAIN("Config.initialize")
_TOKEN = _READ_AGAIN("AuthenticationTokenLoader.instance")
_FEW = partial(_name, needed_to="start Ray without processes that nobody needs here")
_PARAMETERS = _FEW(
    "ray._private.parameter",
    "RayParams",
    instead="arguments of ray.init for the monitor and the log monitor",
    keywords=("no_monitor", "include_log_monitor"),
)
_API_SERVER = _FEW(
    "ray._private.node",
    "Node.start_api_server",
    instead="include_dashboard=False starting no process",
    parameters=("include_dashboard", "raise_on_failure"),
)
_PAGE = _FEW(
    "ray._private.node",
    "Node._webui_url",
    instead="include_dashboard=False starting no process",
    on_instances=True,
)
_POPEN = _name(
    "ray._private.services",
    "ConsolePopen",
    needed_to="start Ray's processes in sessions of their own, which a signal to the command's "
    "group does not reach",
    instead="an argument of ray.init for it",
)


@contextmanager
def messages_to(handle: Callable[[Mapping[str, Any], bool], None]) -> Iterator[None]:
    """Hand what Ray tells its driver to `handle` within the block, and print none of it.

    The first argument has the messages under `lines`; the second is whether to leave out a prefix.
    """
    with _PRINT.replaced(handle):
        yield


def draining_nodes() -> set[str]:
    """Return the ids of the nodes that are about to be taken away; one question to Ray."""
    return set(_DRAINING.get()())


# --- the cluster's key-value store ------------------------------------------------------------


def put_value(key: str, value: bytes, namespace: str, *, overwrite: bool) -> bool:
    """Write a value, and return whether the key was there already."""
    return bool(_PUT.get()(key, value, overwrite, namespace=namespace))


def get_value(key: str, namespace: str) -> bytes | None:
    """Return the value of a key; None where there is none."""
    value: bytes | None = _GET.get()(key, namespace=namespace)
    return value


def list_keys(prefix: str, namespace: str) -> list[str]:
    """Return all keys that begin with `prefix`, sorted."""
    return sorted(key.decode() for key in _LIST.get()(prefix, namespace=namespace))


def delete_key(key: str, namespace: str) -> None:
    """Remove a key and its value; one that isn't there is no error."""
    _DELETE.get()(key, namespace=namespace)


# --- a Ray of our own -------------------------------------------------------------------------


def clusters_variable() -> str:
    """Return the environment variable by which Ray binds to loopback where it is "0".

    It is the one for macOS and Windows, where a firewall would ask otherwise. Ray's node then is
    127.0.0.1, which no other node can join.
    """
    name: str = _CLUSTERS_VARIABLE.get()
    return name


@contextmanager
def clusters_allowed(allowed: bool) -> Iterator[None]:
    """Have Ray bind to loopback within the block unless `allowed`, whatever it read on import."""
    with _CLUSTERS.replaced(allowed):
        yield


def read_settings_again() -> None:
    """Have Ray's compiled part read its settings and the token from the environment anew."""
    _CONFIG.get()("")
    _TOKEN.get()().reset_cache()


@contextmanager
def few_processes() -> Iterator[None]:
    """Have Ray start fewer processes within the block, and each in a session of its own.

    Nobody reads what its dashboard, autoscaler and log monitor offer here, and each is a Python
    process: of the 4.2 seconds of processor time that such a Ray takes to start they are 1.6.
    `ray.init` has no argument for the last two, and starts the dashboard's process with
    `include_dashboard=False`, too.

    A terminal that closes, and `timeout`, send their signal to the whole process group of a
    command. In that group, Ray would be gone before the command could end in order.
    """

    def no_dashboard(node: Any, **options: Any) -> None:
        node._webui_url = ""

    extras: dict[str, Any] = {"no_monitor": True, "include_log_monitor": False}
    with (
        _PARAMETERS.replaced(partial(_PARAMETERS.get(), **extras)),
        _API_SERVER.replaced(no_dashboard),
        _POPEN.replaced(partial(_POPEN.get(), start_new_session=True)),
    ):
        yield
