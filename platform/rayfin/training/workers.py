"""The same trial in a Ray Train worker group: several processes, one optimizer step."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.exceptions
import ray.train
import ray.train.torch
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import BackendConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2.api.config import FailureConfig
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayfin.config import DataConfig
from rayfin.data import Corpus
from rayfin.errors import TrialError
from rayfin.hardware import Hardware, describe_hardware
from rayfin.paths import write_json
from rayfin.training.spec import Report, TrialLeft, TrialResult, TrialSpec
from rayfin.training.strategies import Group, choose
from rayfin.training.streams import read_on_ray
from rayfin.training.trial import run_trial
from rayfin.training.warm import Warm

log = logging.getLogger(__name__)

_PREEMPTIONS = 20
"""Times that a trial starts again because its machines were taken away; Ray Train has no limit."""

_HANGS_AFTER = 120
"""Seconds without an answer after which a worker counts as hanging; Ray's own are 600."""


def run_in_worker_group(
    spec: TrialSpec,
    report: Report,
    *,
    directory: Path,
    group: Group,
    resources: Mapping[str, float],
    corpora: dict[DataConfig, Corpus],
    max_failures: int = 1,
) -> TrialResult:
    """`run_trial` on the processes of `group`, on the connected Ray cluster, with `resources` each.

    Everything that `run_trial` promises holds: errors become a result, `report` may stop the trial,
    and a group that lost a worker, or Ray Train's controller, starts again (`max_failures` times)
    from the newest checkpoint, which must lie on storage that all nodes see. Where a node is about
    to be taken away, a checkpoint is saved at once. The resources must be there: Ray Train would
    wait for them for ever. Raises whatever `report` raises; at a `TrialLeft` the workers end where
    they stand, and the trial stays as its checkpoints have it.
    """
    # Ray Train hands the driver's settings on to its controller.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(_HANGS_AFTER))
    held = directory / "ray" / "held.json"
    give_back(held)  # what a caller that was killed amid the trial could not
    # Where the caller is: on any other node it could be lost alone.
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    desk: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(_Desk).remote(group.size, held)
    listener = _Listener(report, desk, held)
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={
            "spec": spec.model_dump(mode="json"),
            "directory": str(directory),
            "group": group,
            "corpora": ray.put(corpora),
            "desk": desk,
        },
        torch_config=MeetOnRaysNetwork(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=group.size,
            use_gpu=resources.get("GPU", 0.0) > 0,
            resources_per_worker={k: v for k, v in resources.items() if v > 0},
        ),
        run_config=ray.train.RunConfig(
            name="group",
            storage_path=str(directory / "ray"),
            failure_config=FailureConfig(
                max_failures=max_failures,
                controller_failure_limit=max_failures,
                max_preemption_failures=_PREEMPTIONS,
            ),
        ),
    )
    listener.start()
    error = "it ended without a result"
    try:
        for _ in range(max_failures + 1):
            try:
                with _own_interrupt():
                    trainer.fit()
            except ray.train.TrainingFailedError as failed:
                error = _one_line(failed)
            except ray.exceptions.RayActorError as died:
                # The controller was killed, and its workers with it.
                error = _one_line(died)
                log.warning("Ray Train's controller died; the trial goes on from its checkpoint")
                # Ray Train's own cleaner asks the dashboard for the controller, and where there is
                # none it holds what the next group is to have.
                give_back(held)
                continue
            break
    finally:
        listener.close()
    with suppress(FileNotFoundError):
        held.unlink()  # Ray Train has given back what it names
    if listener.error is not None:
        raise listener.error
    return listener.final or TrialResult(status="failed", error=f"worker group died: {error}")


@contextmanager
def _own_interrupt() -> Iterator[None]:
    """Ctrl-C stays KeyboardInterrupt: Ray Train has it end the group, and then the program with 0,
    and leaves its handler behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


class MeetOnRaysNetwork(TorchConfig):
    """PyTorch's process group on the network on which Ray's nodes reach each other.

    Gloo, left alone, waits at the address that the machine's own name stands for. On Debian and its
    kin that is 127.0.1.1, where no other machine can be.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, TorchConfig)
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


def _choose_interface() -> None:
    """On each worker; what the user has set stays."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == address for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def give_back(held: Path) -> None:
    """Gives the resources back that the file names, which ends what still runs on them.

    Ray takes a placement group from whom its controller's death left it only when the whole
    program ends, and the next group would wait until then.
    """
    with suppress(FileNotFoundError):
        for name in json.loads(held.read_text()):
            # In a Ray of another time there is none of this name, which is no error.
            group_id = ray.PlacementGroupID(bytes.fromhex(name))
            ray.util.remove_placement_group(PlacementGroup(group_id))
        held.unlink()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


class _Desk:
    """An actor between the workers and the caller: a report goes one way, its answer the other.

    Every report waits for an answer of its own, so that a worker that is killed while it waits
    takes no other's.
    """

    def __init__(self, workers: int, held: Path) -> None:
        """`held`: the file that says what the workers hold; see `give_back`."""
        self._workers = workers
        self._held = held
        self._failed: set[int] = set()
        self._hopeless = False
        self._reports: asyncio.Queue[tuple[int, TrialResult] | None] = asyncio.Queue()
        self._answers: list[asyncio.Future[bool]] = []
        self._placement_groups: set[str] = set()

    async def begin(self, placement_group: str) -> bool:
        """Whether a worker that starts has work to do: not where its trial would fail once more."""
        self._failed.clear()
        if placement_group not in self._placement_groups:
            self._placement_groups.add(placement_group)
            with suppress(OSError):  # a full disk is told by the checkpoint that it does not take
                write_json(self._held, sorted(self._placement_groups))
        return not self._hopeless

    async def leave(self) -> None:
        """No worker that starts from now on has work to do."""
        self._hopeless = True

    async def hand_in(self, rank: int, result: TrialResult) -> bool:
        """The caller's word on `result`: whether to go on."""
        if result.status in ("failed", "oom"):
            self._failed.add(rank)
            # Where one was killed, the others fail for want of it: that is worth another attempt.
            if result.status == "oom" or len(self._failed) == self._workers:
                self._hopeless = True
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._answers.append(answer)
        await self._reports.put((len(self._answers) - 1, result))
        return await answer

    async def next_report(self) -> tuple[int, TrialResult] | None:
        return await self._reports.get()

    async def answer(self, number: int, go_on: bool) -> None:
        self._answers[number].set_result(go_on)

    async def close(self) -> None:
        await self._reports.put(None)


class _Listener(threading.Thread):
    """Hands rank 0's reports to the caller, and the caller's word back."""

    def __init__(self, report: Report, desk: Any, held: Path) -> None:
        super().__init__(daemon=True)
        self._report, self._desk, self._held = report, desk, held
        self.final: TrialResult | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        while (handed := ray.get(self._desk.next_report.remote())) is not None:
            number, result = handed
            try:
                self._desk.answer.remote(number, self._take(result))
            except TrialLeft as left:  # no answer: whoever waits for one is ended where it stands
                self.error = left
                ray.get(self._desk.leave.remote())
                give_back(self._held)

    def close(self) -> None:
        self._desk.close.remote()
        self.join()
        ray.kill(self._desk)

    def _take(self, result: TrialResult) -> bool:
        if result.status != "running":
            if self.final is None or self.final.status != "oom":  # what follows is its consequence
                self.final = result
            return True
        try:
            return self._report(result) is not False
        except Exception as error:  # noqa: BLE001  # raised by run_in_worker_group, once all stopped
            self.error = error
            return False


def decided(group: Group, spec: TrialSpec, warm: Warm, hardware: Hardware) -> Group:
    """`group` with its strategy named: where it is left open, the first worker chooses for all."""
    if group.strategy != "auto":
        return group
    import torch.distributed as dist

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_gpu = hardware.device == "cuda"
    chosen = [
        choose(
            spec.method,
            warm.facts(spec.model),
            workers=group.size,
            memory=hardware.device_memory if on_gpu else hardware.host_memory / here,
            bytes_a_weight={4: 0.6, 8: 1.1, None: 2.0 if on_gpu else 4.0}[
                spec.method.quantization_bit
            ],
        )
    ]
    if group.size > 1:
        dist.broadcast_object_list(chosen, src=0)
    strategy, why = chosen[0]
    return replace(group, strategy=strategy, why=why)


def _worker(config: dict[str, Any]) -> None:
    """Runs on every worker; rank 0 speaks for all."""
    import torch

    desk = config["desk"]
    place = ray.util.get_current_placement_group()
    assert place is not None  # Ray Train runs every worker in one
    if not ray.get(desk.begin.remote(place.id.hex())):
        return
    rank = ray.train.get_context().get_world_rank()
    resources = ray.get_runtime_context().get_assigned_resources()
    torch.set_num_threads(max(1, int(resources.get("CPU", 1))))

    def report(result: TrialResult) -> bool:
        return rank != 0 or bool(ray.get(desk.hand_in.remote(rank, result)))

    spec = TrialSpec.model_validate(config["spec"])
    hardware = describe_hardware(resources.get("GPU", 0) > 0)
    warm = Warm(ray.get(config["corpora"]), read_on_ray)
    result = run_trial(
        spec,
        report,
        directory=Path(config["directory"]),
        hardware=hardware,
        warm=warm,
        group=decided(config["group"], spec, warm, hardware),
        warned=lambda: ray.train.get_preemption_info() is not None,
    )
    failed = result.status in ("failed", "oom")
    if rank == 0 or failed:
        ray.get(desk.hand_in.remote(rank, result))
    if failed:
        # The other workers may wait for this one in a collective operation: end them too.
        raise TrialError(result.error or result.status)
