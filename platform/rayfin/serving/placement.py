"""Decide how many CPUs and GPUs each engine of a deployment gets, or say why they don't fit.

Serve itself waits for resources that are not there, and does not say so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import ray

from rayfin.config.serving import ServeConfig
from rayfin.errors import HardwareError
from rayfin.tuning.cluster import Resources, even_share, fits, free, nodes

_FREE_SECONDS = 5.0
"""Patience with resources that whoever had them before gives back."""
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Cluster:
    """The resources of a Ray cluster, by Ray's names for them (CPU, GPU)."""

    nodes: Sequence[Resources]
    """What each node has."""
    free: Resources | None = None
    """What nothing holds now, of all nodes; None if the deployment itself already holds some."""
    may_grow: bool = False
    """Nodes may be added, for which the deployment is to wait."""

    def total(self, kind: str) -> float:
        """Returns how many its nodes have."""
        return sum(node.get(kind, 0.0) for node in self.nodes)


@dataclass(frozen=True)
class Placement:
    """The resources of each engine."""

    cpus: float
    gpus: float
    notes: tuple[str, ...] = ()
    """Sentences about what the user might not expect."""

    @property
    def options(self) -> dict[str, float]:
        """Returns them as options of a Ray actor."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


class _InUse(HardwareError):
    """An error for resources that the cluster has, and that something else holds."""


def place_engines(config: ServeConfig, *, running: bool, may_grow: bool = False) -> Placement:
    """Decides the resources of each engine of `config` on the connected cluster.

    `running`: the deployment runs there already, and is to be updated. `may_grow`: it is to wait
    for nodes that may be added. Raises HardwareError if it is not to wait, and the cluster has too
    few resources for deployment.replicas engines, or something else holds them.
    """
    if not ray.is_initialized():
        return place(config, Cluster([]))
    give_up = time.monotonic() + _FREE_SECONDS
    while True:
        try:
            return place(config, Cluster(nodes(), None if running else free(), may_grow))
        except _InUse:
            if time.monotonic() > give_up:
                raise
        time.sleep(_POLL_SECONDS)


def place(config: ServeConfig, cluster: Cluster) -> Placement:
    """Decides as `place_engines` does; a cluster without nodes is taken to have room for all."""
    deployment = config.deployment
    least, most = deployment.replicas, deployment.most_replicas
    gpus = _gpus(config, cluster)
    if (cpus := deployment.cpus) == "auto":
        # Those that there is a GPU for share the CPUs.
        engines = max(least, min(most, fits(cluster.nodes, {"GPU": gpus}))) if gpus else most
        cpus = (even_share(cluster.nodes, engines, gpu=gpus) or {}).get("CPU", 1.0)
    need = {"CPU": float(cpus), "GPU": gpus}
    if cluster.nodes and not cluster.may_grow:
        _check_room(least, need, cluster)
    return Placement(need["CPU"], gpus, tuple(_notes(config, need, cluster)))


def _notes(config: ServeConfig, need: Resources, cluster: Cluster) -> Iterator[str]:
    if not cluster.nodes:
        return
    deployment, vllm = config.deployment, config.engine.type == "vllm"
    least, most = deployment.replicas, deployment.most_replicas
    room = fits(cluster.nodes, need)
    if deployment.gpus == "auto" and not need["GPU"] and (vllm or cluster.may_grow):
        yield (
            f"engine.type={config.engine.type} runs on the CPU, as the cluster has no GPU; where "
            "one is to come, set deployment.gpus=1"
        )
    if room < least:
        yield (
            f"the cluster has room for {room} of deployment.replicas={least} engines with "
            f"{_words(need)} each; they wait for nodes that are added"
        )
    elif room < most:
        yield (
            f"the cluster has room for {room} of deployment.max_replicas={most} engines with "
            f"{_words(need)} each; more of them need more nodes"
        )


def _gpus(config: ServeConfig, cluster: Cluster) -> float:
    """Returns the GPUs of one engine, 0 for the CPU.

    Raises HardwareError if there are GPUs, but too few for deployment.replicas engines: which of
    the remedies is right, only the user knows.
    """
    deployment, each = config.deployment, config.engine.gpus
    if (given := deployment.gpus) != "auto":
        if 0 < given < each and each > 1:
            raise HardwareError(
                f"deployment.gpus={given:g}, and engine.vllm has each engine compute on {each}; "
                f"use deployment.gpus={each}, or auto"
            )
        return float(given)
    least, seen = deployment.replicas, int(cluster.total("GPU"))
    if not seen:
        return 0.0
    room = fits(cluster.nodes, {"GPU": each})
    if room >= least or cluster.may_grow:
        return float(each)
    remedies = [f"deployment.replicas={room}"] if room else []
    if each == 1:
        # Rounded down: three times 0.33 is one GPU, and three times 0.34 is not.
        part = math.floor(100 / math.ceil(least / seen)) / 100
        remedies += [f"deployment.gpus={part:g} (engines share one)"] if part else []
    else:
        remedies.append("a smaller engine.vllm.tensor_parallel_size")
    remedies.append("deployment.gpus=0 (all on the CPU)")
    raise HardwareError(
        f"deployment.gpus=auto is {_count(each, 'GPU')} for each of deployment.replicas={least} "
        f"engines, and the cluster has {_count(seen, 'GPU')}; use {' or '.join(remedies)}"
    )


def _check_room(replicas: int, need: Mapping[str, float], cluster: Cluster) -> None:
    """Raises HardwareError if so many engines would wait for resources, perhaps for ever."""
    if need["GPU"] and not cluster.total("GPU"):
        raise HardwareError(
            f"deployment.gpus={need['GPU']:g}, and the cluster has no GPU; use deployment.gpus=0 "
            "for the CPU, or, where nodes come when they are asked for, start it by "
            "cluster/with_workers.py"
        )
    if fits(cluster.nodes, need) < replicas:
        has = " and ".join(_count(cluster.total(kind), kind) for kind in need)
        raise HardwareError(
            f"deployment.replicas={replicas} engines with {_words(need)} each don't fit: the "
            f"cluster has {has}; lower deployment.replicas, cpus or gpus (0.5 shares one)"
        )
    if (free_now := cluster.free) is None:
        return
    for kind, remedy in (("GPU", ", or use deployment.gpus=0 for the CPU"), ("CPU", "")):
        if (left := free_now.get(kind, 0.0)) + 1e-6 < replicas * need[kind]:
            raise _InUse(
                f"deployment.replicas={replicas} engines take {_count(need[kind], kind)} each, and "
                f"{left:g} of {cluster.total(kind):g} are free, as something else on the cluster "
                f"holds the rest; wait until it ends, or lower deployment.replicas or "
                f"{kind.lower()}s{remedy}"
            )


def _words(need: Mapping[str, float]) -> str:
    cpus = _count(need["CPU"], "CPU")
    return f"{cpus} and {_count(need['GPU'], 'GPU')}" if need["GPU"] else cpus


def _count(number: float, kind: str) -> str:
    return f"{number:g} {kind}" + ("" if 0 < number <= 1 else "s")
