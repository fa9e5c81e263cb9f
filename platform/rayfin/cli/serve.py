"""`rayfin serve`: the adapters of a registry over HTTP, until Ctrl-C."""

from __future__ import annotations

import argparse
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rayfin.cli.settings import ShowServeSettings, add_settings, split_settings

if TYPE_CHECKING:
    from rayfin.serving.deployment_lifecycle import RunningDeployment
    from rayfin.serving.model_names import RegistryListing

_SHOWN = 3
"""A line names so many versions."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "answer over HTTP with any adapter of a registry, by name"
    parser = subparsers.add_parser(
        "serve",
        help=summary,
        description="Answer over HTTP with any adapter of a registry, and with their base model, "
        "by name. Without model.name the base is the one that the registry's adapters name; where "
        "they name several, say which. An empty registry has the default of model.name "
        "(--settings).",
    )
    add_settings(parser, ShowServeSettings)
    parser.add_argument("--address", help="a running Ray cluster (default: $RAY_ADDRESS, or local)")
    parser.add_argument("--json", action="store_true", help="print what is served as JSON")
    parser.epilog = (
        f"Example: {parser.prog} storage=./runs deployment.port=8000 engine.max_rows=16. "
        f"All settings: {parser.prog} --settings"
    )
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Serve until it is stopped, and end all requests; returns exit code 0."""
    from rayfin.config import load_serve_config
    from rayfin.library.deployments import serve

    with serve(load_serve_config(*split_settings(args.settings)), address=args.address) as server:
        from rayfin.adapters import Catalog
        from rayfin.paths import Storage
        from rayfin.serving.compatibility import served_names  # torch, which only the listing needs

        deployed = server.deployed
        catalog = Catalog(Storage.open(deployed.config.storage).adapters)
        listing = served_names(deployed.config, catalog).list()
        _print(deployed, listing, len(catalog.scan()[1]), as_json=args.json)
        with _signals() as stop:
            server.watch(stop)
        if not args.json:
            print("Stopping: requests that are at work may end.", flush=True)
    return 0


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C, SIGTERM and SIGHUP set; what is ignored stays so."""
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in signals
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(
    deployed: RunningDeployment, listing: RegistryListing, unreadable: int, *, as_json: bool
) -> None:
    config, url = deployed.config, deployed.url
    named = [each.version for each in listing.served if each.version is not None]
    newest = max(named, key=lambda v: str(v.metadata.get("created_at")), default=None)
    model = config.served_name if newest is None else newest.name
    curl = _curl(url, model, needs_key=bool(config.api.api_keys))
    if as_json:
        served: dict[str, Any] = {
            "url": url,
            "base": config.served_name,
            "adapters": [{"ref": v.ref, "aliases": list(v.aliases)} for v in named],
            "engines": _engines(deployed),
            "not_served": {v.ref: str(why.error) for v, why in listing.refused.items()},
            "unreadable": unreadable,
            "curl": curl,
        }
        print(json.dumps(served), flush=True)
        return
    count = len({version.name for version in named})
    told = "no adapter yet" if not count else f"{count} adapter{'s' * (count > 1)}"
    print(f"Serving {config.served_name} and {told} at {url}")
    for version in named:
        print(f"  {version.ref:30} {', '.join(version.aliases)}")
    if listing.refused or unreadable:
        print(
            f"{_refused(listing, unreadable)}; see: rayfin adapters list storage={config.storage}"
        )
    print(_where(deployed))
    print(f"Adapters that are published under {config.storage} are served within seconds. Try:")
    print(f"  {curl}\nCtrl-C stops it.", flush=True)


def _engines(deployed: RunningDeployment) -> dict[str, Any]:
    config, placement = deployed.config, deployed.placement
    limits = ("max_rows", "max_length", "prefill_chunk", "max_queue", "slots")
    return {
        "type": config.engine.type,
        "device": "gpu" if placement.gpus else "cpu",
        "cpus": placement.cpus,
        "gpus": placement.gpus,
        "replicas": config.deployment.replicas,
        "max_replicas": config.deployment.most_replicas,
        **{name: getattr(config.engine, name) for name in limits},
        "notes": list(placement.notes),
    }


def _where(deployed: RunningDeployment) -> str:
    """Return what the engines run on, and how much each of them takes."""
    engine, placement = deployed.config.engine, deployed.placement
    least, most = deployed.config.deployment.replicas, deployed.config.deployment.most_replicas
    count = f"{least} to {most}" if most > least else f"{least}"
    engines = f"{count} {'vLLM ' if engine.type == 'vllm' else ''}engine{'s' * (most > 1)}"
    each = ", each" if most > 1 else ","
    device = f"{placement.gpus:g} GPU{'s' * (placement.gpus > 1)}" if placement.gpus else "the CPU"
    cpus = f"{placement.cpus:g} CPU{'s' * (placement.cpus != 1)}"
    return (
        f"{engines} on {device} ({cpus}){each} {engine.max_rows} rows of up to "
        f"{engine.max_length} tokens"
    )


def _refused(listing: RegistryListing, unreadable: int) -> str:
    """Return how many versions are not served, and why."""
    kinds: dict[str, list[str]] = {}
    for version, refusal in listing.refused.items():
        kinds.setdefault(refusal.what, []).append(version.ref)
    told = [
        f"{len(refs)} {what} ({', '.join(refs[:_SHOWN])}{', …' * (len(refs) > _SHOWN)})"
        for what, refs in kinds.items()
    ] + [f"{unreadable} unreadable"] * bool(unreadable)
    return f"Not served: {', '.join(told)}"


def _curl(url: str, model: str, *, needs_key: bool) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    body = body.replace("'", "'\\''")
    key = ' -H "authorization: Bearer $RAYFIN_API_KEY"' if needs_key else ""
    return f"curl {url}/v1/chat/completions -H 'content-type: application/json'{key} -d '{body}'"
