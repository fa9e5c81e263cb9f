"""The Ray Serve application: the HTTP API in front, and replicas that each have an engine.

The API replica speaks HTTP, knows names and templates, and computes nothing; an engine replica
computes, and knows nothing of HTTP. One that dies takes its own requests with it and no others,
and the API goes on with those that are left.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from rayfin.adapters.served_catalog import ServedCatalog
from rayfin.config import load_serve_config
from rayfin.config.serving import ServeConfig
from rayfin.errors import ModelError
from rayfin.models import load_tokenizer, max_positions
from rayfin.paths import Storage, StoragePath
from rayfin.serving import proxy
from rayfin.serving.api.app import create_app
from rayfin.serving.api.history_metrics import HistoryMetrics
from rayfin.serving.compatibility import served_names
from rayfin.serving.engine_replica import EngineReplica
from rayfin.serving.model_names import ModelNames
from rayfin.serving.placement import Placement, place_engines
from rayfin.serving.remote_engine import RemoteEngine
from rayfin.serving.replica_metrics import RayMetricsAggregator
from rayfin.serving.router import AdapterRouter

log = logging.getLogger(__name__)

APP = "rayfin"
"""The application's name in Serve."""

_STATS_SECONDS = 1.0
_ANSWER_SECONDS = 3.0
"""Time for a replica to answer a health check: one that misses three of them is replaced."""
_CONNECTIONS = 512
_RESERVED = 128
"""Places of an API replica for /health and /metrics."""
CLOSING_SECONDS = 10.0
# Replicas write what goes wrong; a line for each request would cost more than it tells.
LOGGING = LoggingConfig(enable_access_log=False, log_level="WARNING")


@serve.ingress()
class ApiReplica:
    """A replica of the API deployment."""

    def __init__(self, config: ServeConfig, engines: DeploymentHandle[Any]) -> None:
        self._config, self._engines = config, engines

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the API; Serve calls this on the event loop that requests come on."""
        config = self._config
        engine = RemoteEngine(self._engines, config, load_tokenizer(config.model))
        # Not opened: a replica that starts while the disk is away must not make the directory anew.
        storage = Storage.at(config.storage)
        names = served_names(config, ServedCatalog(storage.adapters))
        history_metrics = HistoryMetrics(config.history or storage.history_url, engine)
        proxy.publish_limits(config.api)
        return create_app(
            engine,
            names,
            config,
            history_metrics,
            aggregator=RayMetricsAggregator,
            max_requests=_max_requests(config),
        )


def app(args: Mapping[str, Any], root: Path) -> serve.Application:
    """Return the application for Serve's own commands, from the configuration `args`, in sections
    or by dotted names.

    Its relative paths are taken from `root`, as Serve calls this wherever Ray was started.
    """
    sections = {key: value for key, value in args.items() if "." not in key}
    overrides = [f"{key}={value}" for key, value in args.items() if "." in key]
    config = load_serve_config(sections, overrides).anchored(root)
    # Serve keeps what it was told as the desired state, and nodes may come after it was.
    return application(*planned(config, may_grow=True))


def build_app(config: ServeConfig) -> serve.Application:
    """Return the application that `serve.run` takes; looks at the connected cluster for its size.

    Raises HardwareError where its engines don't fit there.
    """
    return application(*planned(config))


def planned(config: ServeConfig, *, may_grow: bool = False) -> tuple[ServeConfig, Placement]:
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
    """Return whether the application has replicas, which hold some of the cluster's resources."""
    served = serve.status().applications.get(APP)
    return served is not None and bool(served.deployments)


def application(config: ServeConfig, placement: Placement) -> serve.Application:
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
        graceful_shutdown_timeout_s=deployment.drain_seconds + CLOSING_SECONDS,
        logging_config=LOGGING,
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
        graceful_shutdown_timeout_s=deployment.drain_seconds + CLOSING_SECONDS,
        logging_config=LOGGING,
    )(ApiReplica)
    return api.bind(config, engines.bind(config, placement.gpus > 0))


def _max_requests(config: ServeConfig) -> int:
    """Return the most requests that an API replica works on, besides /health and /metrics."""
    capacity = config.engine.max_rows + config.engine.max_queue
    return max(_CONNECTIONS, 2 * capacity * config.deployment.most_replicas)
