"""Run the API and its engine in this process, for one user at one machine: no Ray, no replicas."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rayfin.config.serving import ApiConfig, ApiKey, ServeConfig
from rayfin.errors import RayfinError


@dataclass(frozen=True)
class Endpoint:
    """The URL at which an API answers, and the key that it asks for, if any."""

    url: str
    key: str | None = field(default=None, repr=False)


@contextmanager
def local_api(config: ServeConfig) -> Iterator[Endpoint]:
    """Serves `config.storage` on a free port of this machine for the time of the block.

    The key is made for it: others on the machine can't use it. Raises what loading the model does,
    and ConfigError where an adapter has the base's name.
    """
    import uvicorn

    from rayfin.adapters.served_catalog import ServedCatalog
    from rayfin.paths import Storage
    from rayfin.serving.api.app import create_app
    from rayfin.serving.compatibility import served_names
    from rayfin.serving.engine.open import open_engine

    engine = open_engine(config.model, config.engine)
    try:
        key = secrets.token_urlsafe()
        catalog = ServedCatalog(Storage.open(config.storage).adapters)
        catalog.make()
        names = served_names(config, catalog)
        names.check()
        own = config.model_copy(update={"api": ApiConfig(api_keys=(ApiKey(key=key),))})
        app = create_app(engine, names, own)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = uvicorn.Server(
                uvicorn.Config(app, log_level="error", access_log=False, ws="none")
            )
            thread = threading.Thread(
                target=server.run, kwargs={"sockets": [listening]}, name="api", daemon=True
            )
            thread.start()
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            if not server.started:
                raise RayfinError("the API did not start on this machine's loopback address")
            try:
                yield Endpoint(f"http://127.0.0.1:{listening.getsockname()[1]}", key)
            finally:
                server.should_exit = True
                thread.join()
    finally:
        engine.close()
