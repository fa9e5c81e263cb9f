"""The Ray cluster that work runs on, and what fits on its nodes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import ray

from rayfin.config import ScalingConfig
from rayfin.errors import HardwareError
from rayfin.hardware import cpu_count
from rayfin.tuning.driver_errors import logged_errors
from rayfin.tuning.local_ray import local_ray, sigterm_as_it_was

Resources = Mapping[str, float]
"""Amounts of what a node has or a process holds, by Ray's names (CPU, GPU, …)."""


@contextmanager
def ray_cluster(address: str | None, *, num_cpus: int | None = None) -> Iterator[None]:
    """Connects to Ray for the time of the block: to the cluster at `address`, else to our own.

    A Ray that was connected before stays as it is; one started here is shut down at the end, and
    what it has to tell meanwhile is logged.
    """
    if ray.is_initialized():
        yield
        return
    # A training platform tells nobody that it was used, unless it is asked to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ours = not address or address == "local"
    with logged_errors(), local_ray(num_cpus or cpu_count()) if ours else _joined(str(address)):
        yield


@contextmanager
def _joined(address: str) -> Iterator[None]:
    """Connects to the cluster at `address` for the time of the block."""
    try:
        with sigterm_as_it_was():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:  # ValueError: ray:// without ray[client]
        raise HardwareError(
            f"no Ray cluster can be reached at '{address}' ({error}); start one with "
            "`ray start --head`, or leave --address and RAY_ADDRESS out; if one runs there, it may "
            "ask for a token: set RAY_AUTH_MODE=token"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def nodes() -> list[Resources]:
    """Returns the resources of each living node of the connected cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def free() -> Resources:
    """Returns what nothing holds, of all nodes together, as Ray knew it up to a second ago."""
    available: dict[str, float] = ray.available_resources()
    return available


def fits(nodes: Sequence[Resources], need: Resources) -> int:
    """Returns how many processes the nodes hold that `need` so much each.

    None spans two nodes, and none that needs a part of a GPU spans two GPUs.
    """

    def held(has: float, name: str, amount: float) -> int:
        if name == "GPU" and amount < 1:
            return int(has) * int(1 / amount + 1e-6)
        return int(has / amount + 1e-6)

    wanted = {name: amount for name, amount in need.items() if amount > 0}
    return sum(
        min(held(node.get(name, 0.0), name, amount) for name, amount in wanted.items())
        for node in nodes
    )


def even_share(
    nodes: Sequence[Resources], processes: int, *, gpu: float = 0.0
) -> dict[str, float] | None:
    """Returns the most whole CPUs for each of `processes` beside `gpu` GPUs (or part of one).

    None where so many don't fit: Ray would wait for the missing ones for ever. A process on a GPU
    goes without a CPU of its own where the nodes have too few.
    """
    cpus = int(sum(node.get("CPU", 0.0) for node in nodes))
    for share in range(cpus // processes, -1 if gpu else 0, -1):
        need = {"CPU": float(share), "GPU": gpu}
        if fits(nodes, need) >= processes:
            return need
    return None


def worker_resources(scaling: ScalingConfig, have: Sequence[Resources]) -> dict[str, float]:
    """Returns what each worker of a group holds on nodes that `have` so much.

    That is a GPU where there are any, else an even share of the CPUs.

    Raises HardwareError where the cluster is too small.
    """
    workers = scaling.num_workers
    gpus = sum(node.get("GPU", 0.0) for node in have)
    use_gpu = gpus >= 1 if scaling.use_gpu == "auto" else scaling.use_gpu
    resources = even_share(have, workers, gpu=1.0 if use_gpu else 0.0)
    if resources is None:
        kind = "GPU" if use_gpu else "CPU"
        count = int(sum(node.get(kind, 0.0) for node in have))
        many = "" if count == 1 else "s"
        raise HardwareError(
            f"scaling.num_workers={workers}, but the cluster has {count} {kind}{many}; "
            f"use at most {count} worker{many}, or a larger cluster with --address"
            f"{', or scaling.use_gpu=false' if use_gpu else ''}"
        )
    if scaling.cpu_offload and not use_gpu:
        raise HardwareError(
            "scaling.cpu_offload=true, but the workers have no GPU: all is in host memory as it "
            "is; leave it out"
        )
    return resources
