"""The Ray Serve application: the HTTP API in front, and replicas that each have an engine.

The API replica speaks HTTP, knows names and templates, and computes nothing; an engine replica
computes, and knows nothing of HTTP. One that dies takes its own requests with it and no others,
and the API goes on with those that are left.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from rayfin.adapters.served import ServedCatalog
from rayfin.config import load_serve_config
from rayfin.config.serving import ServeConfig
from rayfin.errors import ConfigError, ModelError, RayfinError
from rayfin.models import load_tokenizer, max_positions
from rayfin.paths import Storage, StoragePath
from rayfin.serving import proxy, shared
from rayfin.serving.api.app import create_app
from rayfin.serving.api.figures import Figures
from rayfin.serving.names import ModelNames
from rayfin.serving.placement import Placement, place_engines
from rayfin.serving.pool import SharedPool
from rayfin.serving.remote import RemoteEngine
from rayfin.serving.replica import EngineReplica
from rayfin.serving.router import AdapterRouter
from rayfin.tuning.cluster import ray_cluster

log = logging.getLogger(__name__)

APP = "rayfin"
"""The application's name in Serve."""

_STATS_SECONDS = 1.0
_ANSWER_SECONDS = 3.0
"""Time for a replica to answer a health check: one that misses three of them is replaced."""
_CONNECTIONS = 512
_RESERVED = 128
"""Places of an API replica for /health and /metrics."""
_CLOSING_SECONDS = 10.0
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
# Replicas write what goes wrong; a line for each request would cost more than it tells.
_LOGGING = LoggingConfig(enable_access_log=False, log_level="WARNING")


@serve.ingress()
class ApiReplica:
    """What the API deployment runs."""

    def __init__(self, config: ServeConfig, engines: DeploymentHandle[Any]) -> None:
        self._config, self._engines = config, engines

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this on the event loop that requests come on."""
        # It imports torch, which the process that starts a deployment can do without.
        from rayfin.serving.fit import served_names

        config = self._config
        engine = RemoteEngine(self._engines, config, load_tokenizer(config.model))
        # Not opened: a replica that starts while the disk is away must not make the directory anew.
        storage = Storage.at(config.storage)
        names = served_names(config, ServedCatalog(storage.adapters))
        figures = Figures(config.history or storage.history_url, engine)
        proxy.publish_limits(config.api)
        return create_app(
            engine, names, config, figures, pool=SharedPool, max_requests=_max_requests(config)
        )


def app(args: Mapping[str, Any], root: Path) -> serve.Application:
    """For Serve's own commands: `args` is the configuration, in sections or by dotted names.

    Its relative paths are taken from `root`, as Serve calls this wherever Ray was started.
    """
    sections = {key: value for key, value in args.items() if "." not in key}
    overrides = [f"{key}={value}" for key, value in args.items() if "." in key]
    config = load_serve_config(sections, overrides).anchored(root)
    # Serve keeps what it was told as the desired state, and nodes may come after it was.
    return _application(*_planned(config, may_grow=True))


def build_app(config: ServeConfig) -> serve.Application:
    """The application that `serve.run` takes; looks at the connected cluster for its size.

    Raises HardwareError where its engines don't fit there.
    """
    return _application(*_planned(config))


def _planned(config: ServeConfig, *, may_grow: bool = False) -> tuple[ServeConfig, Placement]:
    """Returns `config` with its defaults decided for the connected cluster, and where engines run.

    What a user might not expect of that is logged as a warning.
    """
    config = config.named()
    missing = not StoragePath.at(config.storage).path.exists()
    catalog = ServedCatalog(Storage.open(config.storage).adapters)
    if missing:
        log.warning("storage=%s was not there, and is empty now; is that its path?", config.storage)
    catalog.make()
    ModelNames(catalog, config.served_name).check()
    running = ray.is_initialized() and _is_served()
    placement = place_engines(config, running=running, may_grow=may_grow)
    try:
        positions = max_positions(config.model)
    except ModelError:  # it is where the engines are
        positions = None
    engine = config.engine.fitted(placement.gpus, positions)
    for note in placement.notes:
        log.warning("%s", note)
    return config.model_copy(update={"engine": engine}), placement


def _is_served() -> bool:
    """Whether the application has replicas, which hold some of the cluster's resources."""
    served = serve.status().applications.get(APP)
    return served is not None and bool(served.deployments)


def _application(config: ServeConfig, placement: Placement) -> serve.Application:
    deployment, engine = config.deployment, config.engine
    capacity = engine.max_rows + engine.max_queue
    growing = deployment.max_replicas is not None
    engines = serve.deployment(
        name="engine",
        num_replicas=None if growing else deployment.replicas,
        autoscaling_config=AutoscalingConfig(
            min_replicas=deployment.replicas,
            max_replicas=deployment.most_replicas,
            # Before requests wait for a row.
            target_ongoing_requests=max(1.0, 0.75 * engine.max_rows),
        )
        if growing
        else None,
        ray_actor_options=placement.options,
        # The engine has a queue of its own, and refuses with the time to wait: Serve must not
        # keep requests from it, of which it would say nothing.
        max_ongoing_requests=4 * capacity,
        request_router_config={
            "request_router_class": AdapterRouter,
            "request_router_kwargs": {
                "slots": engine.slots,
                "loading": engine.max_rows / 2,
                "capacity": capacity,
            },
            "request_routing_stats_period_s": _STATS_SECONDS,
        },
        health_check_period_s=deployment.health_check_seconds,
        health_check_timeout_s=_ANSWER_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=deployment.drain_seconds + _CLOSING_SECONDS,
        logging_config=_LOGGING,
    )(EngineReplica)
    api = serve.deployment(
        name="api",
        num_replicas=deployment.api_replicas,
        ray_actor_options={"num_cpus": 0},
        # What is beyond the engines' capacity is refused by the API in a moment; beyond this, and
        # what waits for it, Serve refuses.
        max_ongoing_requests=_max_requests(config) + _RESERVED,
        max_queued_requests=_CONNECTIONS,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        health_check_period_s=deployment.health_check_seconds,
        health_check_timeout_s=_ANSWER_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=deployment.drain_seconds + _CLOSING_SECONDS,
        logging_config=_LOGGING,
    )(ApiReplica)
    return api.bind(config, engines.bind(config, placement.gpus > 0))


def _max_requests(config: ServeConfig) -> int:
    """Requests that one API replica has at work; /health and /metrics don't count."""
    capacity = config.engine.max_rows + config.engine.max_queue
    return max(_CONNECTIONS, 2 * capacity * config.deployment.most_replicas)


@dataclass(frozen=True)
class Deployed:
    """A deployment that answers requests."""

    url: str
    config: ServeConfig
    """The configuration that its replicas have, with the defaults for their device."""
    placement: Placement


@contextmanager
def serving(config: ServeConfig, address: str | None) -> Iterator[Deployed]:
    """The application for the time of the block, on the cluster at `address` or one of our own.

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
                logging_config=_LOGGING,
                # For the proxies of a cluster where Serve does not run yet.
                controller_options=None
                if address is None
                else {"runtime_env": {"env_vars": proxy.ENVIRONMENT}},
            )
        except (RayError, TimeoutError) as error:
            raise RayfinError(
                f"Ray Serve's HTTP proxy did not start ({_last_line(error)}); the machine "
                "may be very busy or short of memory; start it again"
            ) from error
        if APP in serve.status().applications:
            raise ConfigError(
                f"application '{APP}' is served on this cluster already; stop that one first, or "
                "use another cluster"
            )
        # Serve sets up the logging of this process too.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        shared.clear()
        try:
            config, placement = _planned(config)
            serve.run(_application(config, placement), name=APP, route_prefix="/")
        except BaseException as error:
            if address is not None:  # a cluster of our own takes it along
                serve.delete(APP, _blocking=False)
            if isinstance(error, RuntimeError):
                raise RayfinError(_reason(error)) from error
            raise
        host = "localhost" if deployment.host == "0.0.0.0" else deployment.host
        lost = False
        try:
            yield Deployed(f"http://{host}:{deployment.port}", config, placement)
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
    serve.delete(APP, _blocking=False)
    deadline = time.monotonic() + seconds + 2 * _CLOSING_SECONDS
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
    """What a replica of ours said, if one did; else the last line of Serve's own message."""
    application = serve.status().applications.get(APP)
    told = [d.message for d in application.deployments.values()] if application else []
    ours = re.findall(r"rayfin\.errors\.\w+: (.+)", "\n".join([*told, str(error)]))
    why = ours[-1].strip() if ours else _last_line(error)
    return f"the deployment did not start: {why}"


def _last_line(error: Exception) -> str:
    """What a message that Ray has put a stack trace before is about."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
