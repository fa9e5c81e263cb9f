"""`rayfin.serve`: the adapters of a registry over HTTP, for the time of a block."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfin.library.process import prepare_process

if TYPE_CHECKING:
    from rayfin.config import ServeConfig
    from rayfin.serving.client import Client
    from rayfin.serving.deployment_lifecycle import RunningDeployment


@dataclass(frozen=True)
class Server:
    """A deployment that answers requests."""

    url: str
    """Where it answers: OpenAI's API is under `url` + "/v1"."""
    client: Client
    """Asks it, with the first of api.api_keys where there are any."""
    deployed: RunningDeployment
    """Its configuration as the replicas have it, and what they run on."""
    address: str | None
    """The Ray cluster that it was put on; None for one of its own."""

    def watch(self, stop: threading.Event) -> None:
        """Wait until `stop` is set; raises RayfinError when the Ray cluster is lost before."""
        from rayfin.serving.deployment_lifecycle import watch

        watch(stop, self.address)


@contextmanager
def serve(
    config: ServeConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    address: str | None = None,
) -> Iterator[Server]:
    """Answer over HTTP with any adapter of a registry, and with the base model, by name.

    - `config`: a ServeConfig, a mapping of its sections, or the path of a YAML file. Without
      model.name the base is the one that the registry's adapters name.
    - `address`: of a running Ray cluster; None is $RAY_ADDRESS, or Ray on this machine.

    At the end of the block requests that are at work have deployment.drain_seconds, and the server
    ends. Raises UsageErrors for what can't be served, before it starts, and RayfinError for
    replicas that don't start.
    """
    from rayfin.hardware import cluster_address

    prepare_process()
    address = cluster_address(address)
    config = serve_configuration(config, elsewhere=address is not None)

    from rayfin.serving.client import Client
    from rayfin.serving.deployment_lifecycle import serving
    from rayfin.serving.local_api import Endpoint

    with serving(config, address) as deployed:
        keys = deployed.config.api.api_keys
        key = keys[0].key if keys else None
        with Client(Endpoint(deployed.url, key)) as client:
            yield Server(deployed.url, client, deployed, address)


def serve_configuration(
    source: ServeConfig | Mapping[str, Any] | str | Path | None,
    overrides: Iterable[str] = (),
    *,
    elsewhere: bool = False,
    use: str | None = None,
    own: bool = True,
) -> ServeConfig:
    """Return a deployment's configuration, checked before any load, with its paths absolute.

    Without model.name the base is the one of adapter `use`, or with `own` of all adapters that are
    there. `elsewhere`: the engine runs on other machines, of whose packages nothing is known here.
    Raises UsageErrors for what can't be served.
    """
    from rayfin.config import ServeConfig, load_serve_config
    from rayfin.history.connect import parse_url
    from rayfin.models import check_model
    from rayfin.paths import Storage
    from rayfin.serving.base_model import with_adapters_base
    from rayfin.serving.engine.config_checks import check_length, require_vllm

    if not isinstance(source, ServeConfig):
        source = load_serve_config(source, overrides)
    config = source.anchored(Path.cwd())
    _ = Storage.at(config.storage).adapters  # refuses a bucket before anything is asked of it
    Storage.open(config.storage)
    if use is not None or own:
        config = with_adapters_base(config, use)
    if config.history is not None:
        parse_url(config.history)
    if config.engine.type == "vllm" and not elsewhere:
        require_vllm()
    check_model(config.model, config.engine.quantization_bit)
    if "max_length" in config.engine.model_fields_set:  # else it is no more than fits
        check_length(config.model, config.engine)
    return config
