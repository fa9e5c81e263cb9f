"""A Ray cluster that is gone ends the command that serves on it."""

from __future__ import annotations

import socket
import threading
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from rayfin.config.serving import ServeConfig
from rayfin.errors import RayfinError

GONE_WITHIN = 560.0
"""Seconds."""


# Serve's own schemas, on import.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field` is deprecated")
@pytest.mark.parametrize(
    ("ours", "says"),
    [(True, "is gone, and the deployment with it"), (False, "can't be reached any more")],
)
def test_a_head_that_answers_no_more_is_told_of(
    ours: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayfin.serving import deployment_lifecycle

    monkeypatch.setattr(deployment_lifecycle, "_WATCH_SECONDS", 0.01)
    for name in ("_AWAY_SECONDS", "_LOST_SECONDS"):
        monkeypatch.setattr(deployment_lifecycle, name, 0.1)
    stop = threading.Event()
    errors: list[str] = []

    def watch(address: str | None) -> None:
        try:
            deployment_lifecycle.watch(stop, address)
        except RayfinError as error:
            errors.append(str(error))

    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        context = SimpleNamespace(gcs_address=address)
        monkeypatch.setattr("ray.get_runtime_context", lambda: context)
        watching = threading.Thread(target=watch, args=(None if ours else address,))
        watching.start()
        head.accept()[0].close()
        assert watching.is_alive()
    watching.join(GONE_WITHIN)
    (told,) = errors
    assert told.startswith(f"the Ray cluster at {address} {says}")
    stop.set()
    deployment_lifecycle.watch(stop, address)  # who is told to stop has nothing to tell


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field` is deprecated")
def test_a_proxy_that_does_not_answer_in_time_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve itself waits a minute for it when the application is there."""
    from rayfin.serving import deployment_lifecycle

    def run(*_: object, **__: object) -> None:
        raise TimeoutError("Proxies not available after 60s.")

    serve = SimpleNamespace(
        start=lambda **_: None, status=lambda: SimpleNamespace(applications={}), run=run
    )
    monkeypatch.setattr(deployment_lifecycle, "serve", serve)
    monkeypatch.setattr(deployment_lifecycle, "ray_cluster", nullcontext)
    monkeypatch.setattr(deployment_lifecycle.kv_store, "clear", lambda: None)
    monkeypatch.setattr(deployment_lifecycle, "planned", lambda config: (config, None))
    monkeypatch.setattr(deployment_lifecycle, "application", lambda *_: None)
    deleted: list[str] = []
    monkeypatch.setattr(deployment_lifecycle, "delete_application", deleted.append)
    said = (
        r"HTTP proxy did not start \(Proxies not available after 60s\.\); the machine may be very"
    )
    with (
        pytest.raises(RayfinError, match=said),
        deployment_lifecycle.serving(ServeConfig(), "127.0.0.1:1"),
    ):
        pass
    assert deleted == ["rayfin"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_a_cluster_that_is_gone_ends_the_command(
    lab: Any, tiny: str, processes: ModuleType, tmp_path: Path
) -> None:
    served = lab.Service(processes, tiny, tmp_path)
    try:
        assert served.ask(served.model).status_code == 200
        family = psutil.Process(served.process.pid).children(recursive=True)
        engines = served.replicas("engine")
        (head,) = [process for process in family if "gcs_server" in lab.title(process)]
        head.kill()
        assert served.process.wait(GONE_WITHIN) == 1
        assert "the Ray cluster at" in served.errors() and "is gone" in served.errors()
        assert "Traceback" not in served.errors()
        assert engines and not psutil.wait_procs(engines, GONE_WITHIN)[1]
    finally:
        served.close()
