"""The Ray cluster that work runs on, and what fits on its nodes."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray

from rayfin.config import ScalingConfig
from rayfin.errors import HardwareError, RayfinError
from rayfin.hardware import cpu_count

log = logging.getLogger(__name__)

_END_SECONDS = 10.0
_STARTS = 3
_LOG_CHARACTERS = 500
_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"

Resources = Mapping[str, float]
"""Ray's names (CPU, GPU) -> how many."""


@contextmanager
def ray_cluster(address: str | None, *, num_cpus: int | None = None) -> Iterator[None]:
    """Ray for the time of the block: the cluster at `address`, else one of our own.

    A Ray that was connected before stays as it is; one started here is shut down at the end.
    """
    if ray.is_initialized():
        yield
        return
    # A training platform tells nobody that it was used, unless it is asked to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Tune's workers need an environment of their own: those that Ray would start at once never fit,
    # and cost a second of both cores.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    own = not address or address == "local"
    try:
        if own:
            _start(num_cpus or cpu_count())
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:  # ValueError: ray:// without ray[client]
        raise HardwareError(
            f"no Ray cluster can be reached at '{address}' ({error}); start one with "
            "`ray start --head`, or leave --address and RAY_ADDRESS out; if one runs there, it may "
            "ask for a token: set RAY_AUTH_MODE=token"
        ) from error
    # Nobody warns a Ray of our own that its machine is taken away: a process less for each group.
    unwatched = own and _WATCHER not in os.environ
    if unwatched:
        os.environ[_WATCHER] = "0"
    try:
        yield
    finally:
        ray.shutdown()
        if unwatched:
            del os.environ[_WATCHER]


def _start(num_cpus: int) -> None:
    """A Ray of our own, on this machine; raises RayfinError."""
    for left in reversed(range(_STARTS)):
        before = set(psutil.Process().children())
        try:
            # "local", not None: None would join a cluster that somebody else started here.
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:
            # Ray gives its node 30 s and has no setting for it. What it started in them would
            # stay until this process ends.
            if "timed out during startup" not in str(error):
                raise
            _end(set(psutil.Process().children()) - before)
            log.warning("Ray did not start within its 30 s; %s", _last_words())
            if not left:
                raise RayfinError(
                    f"Ray did not start on this machine within its 30 s, tried {_STARTS} times; it "
                    "may be very busy, or short of memory or disk"
                ) from error


def _last_words() -> str:
    """The end of what each of the newest Ray's programs, started by this process, wrote."""
    root = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"
    sessions = sorted(root.glob(f"session_*_{os.getpid()}"))
    logs = sorted((sessions[-1] / "logs").glob("*")) if sessions else []
    ends = {}
    for path in logs:
        with suppress(OSError):  # Ray is ending, and may take them away
            if path.suffix in (".err", ".out", ".log"):
                whole = path.read_text("utf-8", errors="replace")
                ends[path.name] = whole.rstrip()[-_LOG_CHARACTERS:]
    told = [f"{name}: {end}" for name, end in ends.items() if end]
    return "\n".join(["what its programs wrote last:", *told]) if told else "it wrote no logs"


def _end(processes: Iterable[psutil.Process]) -> None:
    """Those of Ray's own programs, and what they started themselves."""
    programs = str(Path(ray.__file__).parent)
    every = []
    for process in processes:
        with suppress(psutil.Error):
            if programs in " ".join(process.cmdline()):
                process.suspend()  # or it starts one more
                every += [*process.children(recursive=True), process]
    for process in every:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(every, timeout=_END_SECONDS)


def nodes() -> list[Resources]:
    """What each living node of the connected cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def fits(nodes: Sequence[Resources], need: Resources) -> int:
    """How many processes that each `need` so much the nodes hold; none spans two nodes."""
    wanted = {name: amount for name, amount in need.items() if amount > 0}
    return sum(
        min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in wanted.items())
        for node in nodes
    )


def even_share(
    nodes: Sequence[Resources], processes: int, *, gpu: float = 0.0
) -> dict[str, float] | None:
    """The most whole CPUs that each of `processes` can have beside `gpu` GPUs (or part of one).

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
    """For each worker of a group on nodes that `have` so much: a GPU where there are any, else an
    even share of the CPUs.

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
