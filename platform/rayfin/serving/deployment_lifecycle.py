"""Start a deployment on a Ray cluster, watch it, and take it down when it is to end."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray import serve
from ray.exceptions import RayError

from rayfin.compat.ray_serve import delete_application
from rayfin.config.serving import ServeConfig
from rayfin.errors import ConfigError, RayfinError
from rayfin.serving import kv_store, proxy
from rayfin.serving.deployment import APP, CLOSING_SECONDS, LOGGING, application, planned
from rayfin.serving.placement import Placement
from rayfin.tuning.cluster import ray_cluster

_POLL_SECONDS = 0.1
_PROXY_SECONDS = 55
"""Patience with a proxy that starts; Serve's driver waits for one for 60 s."""
_WATCH_SECONDS = 2.0
_LOST_SECONDS = 10.0
_AWAY_SECONDS = 45.0
_CONTROLLER = {
    # A replica that hangs ends no request: to wait for them would be to wait in vain.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # A proxy that has died is found at the third look; Serve's own period is 10 s.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
}
"""What Serve's controller reads of its environment when it starts."""


@dataclass(frozen=True)
class RunningDeployment:
    """A deployment that answers requests."""

    url: str
    config: ServeConfig
    """The configuration that its replicas have, with the defaults for their device."""
    placement: Placement


@contextmanager
def serving(config: ServeConfig, address: str | None) -> Iterator[RunningDeployment]:
    """Run the application for the time of the block, on the cluster at `address` or one of our own.

    At the end, requests that are at work have deployment.drain_seconds. Raises ConfigError for a
    port that is taken, HardwareError for engines that don't fit, RayfinError for replicas that
    don't start.
    """
    deployment = config.deployment
    if address is None:
        _check_port(deployment.host, deployment.port)
        # Ray's workers give way to all else on a machine, which is no place for a server.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # A proxy that imports for longer than Serve's 5 s, on a busy machine, is killed for it.
        os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", str(_PROXY_SECONDS))
        for name, value in _CONTROLLER.items():
            os.environ.setdefault(name, value)
        os.environ |= proxy.ENVIRONMENT
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with ray_cluster(address):
        try:
            serve.start(
                http_options={"host": deployment.host, "port": deployment.port},
                logging_config=LOGGING,
                # For the proxies of a cluster where Serve does not run yet.
                controller_options=None
                if address is None
                else {"runtime_env": {"env_vars": proxy.ENVIRONMENT}},
            )
        except (RayError, TimeoutError) as error:
            raise _no_proxy(error) from error
        if APP in serve.status().applications:
            raise ConfigError(
                f"application '{APP}' is served on this cluster already; stop that one first, or "
                "use another cluster"
            )
        # Serve sets up the logging of this process too.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        kv_store.clear()
        try:
            config, placement = planned(config)
            serve.run(application(config, placement), name=APP, route_prefix="/")
        except BaseException as error:
            if address is not None:  # a cluster of our own takes it along
                delete_application(APP)
            if isinstance(error, RuntimeError):
                raise RayfinError(_reason(error)) from error
            if isinstance(error, TimeoutError):
                raise _no_proxy(error) from error
            raise
        host = "localhost" if deployment.host == "0.0.0.0" else deployment.host
        lost = False
        try:
            yield RunningDeployment(f"http://{host}:{deployment.port}", config, placement)
        except _ClusterLostError:
            lost = True  # there is nobody left to drain, and Serve would wait for it
            raise
        finally:
            if not lost:
                _drain(deployment.drain_seconds)


class _ClusterLostError(RayfinError):
    pass


def watch(stop: threading.Event, address: str | None) -> None:
    """Returns when `stop` is set; raises RayfinError when the Ray cluster is out of reach before.

    `address` as `serving` had it. Ray itself would end this process, a minute later and without a
    word to the user.
    """
    ours = address is None
    if address is None or address == "auto":
        address = ray.get_runtime_context().gcs_address
    where = str(address)
    host, _, port = where.removeprefix("ray://").rpartition(":")
    # A head may be away for a moment, and come back with all that it had.
    patience = _LOST_SECONDS if ours else _AWAY_SECONDS
    seen = time.monotonic()
    while not stop.wait(_WATCH_SECONDS):
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=_WATCH_SECONDS):
                seen = time.monotonic()
        except OSError as error:
            if time.monotonic() - seen > patience:
                what = (
                    "is gone, and the deployment with it; adapters and history are as they were: "
                    "serve again"
                    if ours
                    else "can't be reached any more; what it serves may go on: look with "
                    "`serve status` where it runs"
                )
                reason = error.strerror or error
                raise _ClusterLostError(f"the Ray cluster at {where} {what} ({reason})") from error


def _drain(seconds: float) -> None:
    """Takes the application down while Serve's proxies still hand its answers on."""
    delete_application(APP)
    deadline = time.monotonic() + seconds + 2 * CLOSING_SECONDS
    while APP in serve.status().applications and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        other_host = error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror)
        setting = "host=127.0.0.1" if other_host else "port=8001"
        raise ConfigError(
            f"deployment.{setting.partition('=')[0]}: {host}:{port} can't be used "
            f"({error.strerror or error}); give another, deployment.{setting}"
        ) from error


def _reason(error: RuntimeError) -> str:
    """Return what a replica of ours said, if one did; else the last line of Serve's own message."""
    application = serve.status().applications.get(APP)
    told = [d.message for d in application.deployments.values()] if application else []
    ours = re.findall(r"rayfin\.errors\.\w+: (.+)", "\n".join([*told, str(error)]))
    why = ours[-1].strip() if ours else _last_line(error)
    return f"the deployment did not start: {why}"


def _no_proxy(error: Exception) -> RayfinError:
    return RayfinError(
        f"Ray Serve's HTTP proxy did not start ({_last_line(error)}); the machine "
        "may be very busy or short of memory; start it again"
    )


def _last_line(error: Exception) -> str:
    """Return the last line of a message, before which Ray puts a stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
