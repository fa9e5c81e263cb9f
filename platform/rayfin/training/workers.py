"""The same trial in a Ray Train worker group: several processes, one optimizer step."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.util.queue import Queue

from rayfin.config import DataConfig, ScalingConfig
from rayfin.data import Corpus
from rayfin.errors import HardwareError, TrialError
from rayfin.hardware import cpu_count, describe_hardware
from rayfin.training.spec import Report, TrialResult, TrialSpec
from rayfin.training.trial import run_trial
from rayfin.training.warm import Warm


@contextmanager
def ray_cluster(address: str | None, *, num_cpus: int | None = None) -> Iterator[None]:
    """Ray for the time of the block: the cluster at `address` or RAY_ADDRESS, else one of our own.

    A Ray that was connected before stays as it is; one started here is shut down at the end.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            # "local", not None: None would join a cluster that somebody else started here.
            ray.init(
                address="local",
                num_cpus=num_cpus or cpu_count(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, ValueError) as error:  # ValueError: ray:// without ray[client]
        raise HardwareError(
            f"no Ray cluster can be reached at '{address}' ({error}); start one with "
            "`ray start --head`, or leave --address and RAY_ADDRESS out"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def run_in_worker_group(
    spec: TrialSpec,
    report: Report,
    *,
    directory: Path,
    scaling: ScalingConfig,
    corpora: dict[DataConfig, Corpus],
    max_failures: int = 1,
) -> TrialResult:
    """`run_trial` on `scaling.num_workers` processes of the connected Ray cluster, as DDP.

    Everything that `run_trial` promises holds: errors become a result, `report` may stop the trial,
    and a group whose worker was killed starts again (`max_failures` times) from the newest
    checkpoint, which must lie on storage that all nodes see. Raises HardwareError where the cluster
    is too small: Ray Train would wait for ever.
    """
    resources = _resources_per_worker(scaling)
    reports, orders = _queue(), _queue()
    listener = _Listener(report, reports, orders)
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={
            "spec": spec.model_dump(mode="json"),
            "directory": str(directory),
            "num_workers": scaling.num_workers,
            "corpora": ray.put(corpora),
            "reports": reports,
            "orders": orders,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name="group",
            storage_path=str(directory / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
        ),
    )
    listener.start()
    try:
        trainer.fit()
        error = "the worker group ended without a result"
    except ray.train.TrainingFailedError as failed:
        error = " ".join(str(failed).split())[:500]
    finally:
        listener.close()
        for queue in (reports, orders):
            queue.shutdown()
    return listener.final or TrialResult(status="failed", error=f"worker group died: {error}")


class _Listener(threading.Thread):
    """Hands rank 0's reports to the caller, and the caller's word back."""

    def __init__(self, report: Report, reports: Queue, orders: Queue) -> None:
        super().__init__(daemon=True)
        self._report, self._reports, self._orders = report, reports, orders
        self.final: TrialResult | None = None

    def run(self) -> None:
        while (result := self._reports.get()) is not None:
            if result.status == "running":
                self._orders.put(self._report(result) is not False)
            else:
                self.final = result

    def close(self) -> None:
        self._reports.put(None)
        self.join()


def _worker(config: dict[str, Any]) -> None:
    """Runs on every worker; rank 0 speaks for all."""
    import torch

    context = ray.train.get_context()
    first = context.get_world_rank() == 0
    resources = ray.get_runtime_context().get_assigned_resources()
    torch.set_num_threads(max(1, int(resources.get("CPU", 1))))

    def report(result: TrialResult) -> bool:
        if not first:
            return True
        config["reports"].put(result)
        return bool(config["orders"].get())

    result = run_trial(
        TrialSpec.model_validate(config["spec"]),
        report,
        directory=Path(config["directory"]),
        hardware=describe_hardware("GPU" in resources),
        warm=Warm(ray.get(config["corpora"])),
        num_workers=config["num_workers"],
    )
    if first or result.status in ("failed", "oom"):
        config["reports"].put(result)
    if result.status in ("failed", "oom"):
        # The other workers may wait for this one in a collective operation: end them too.
        raise TrialError(result.error or result.status)


def _queue() -> Queue:
    return Queue(actor_options={"num_cpus": 0})


def _resources_per_worker(scaling: ScalingConfig) -> dict[str, float]:
    """One GPU a worker where the cluster has them, else an even share of the CPUs."""
    total = ray.cluster_resources()
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    workers = scaling.num_workers
    use_gpu = gpus >= workers if scaling.use_gpu == "auto" else scaling.use_gpu
    kind, have = ("GPU", gpus) if use_gpu else ("CPU", cpus)
    if have < workers:
        raise HardwareError(
            f"scaling.num_workers={workers}, but the cluster has {have:g} {kind}s; "
            f"use at most {int(have)} workers, or a larger cluster with --address"
        )
    share = max(1.0, float(int(cpus // workers)))
    return {"CPU": share, "GPU": 1.0} if use_gpu else {"CPU": share}
