"""Ray Train's private names: the parts of its controller, its backend for torch, and its timeouts.

It imports Ray Train: only what runs trials in worker groups may import it.
"""

from __future__ import annotations

import os
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from rayfin.compat.private import PrivateName

_name = partial(PrivateName, __name__)

_FEWER = partial(
    _name,
    needed_to="start a worker group without processes that nobody needs",
    instead="arguments of TorchTrainer that leave out its callbacks and its autoscaling",
)
_CALLBACKS = "ray.train.v2._internal.callbacks"
_DATASETS = _FEWER(f"{_CALLBACKS}.datasets", "DatasetsCallback")
_CLEANER = _FEWER(f"{_CALLBACKS}.placement_group_callback", "PlacementGroupCleanerCallback")
_TRAINER = "ray.train.v2.torch.torch_trainer"
_DEFAULTS = _FEWER(_TRAINER, "TorchTrainer._create_default_callbacks", parameters=())
_CONTROLLER = _FEWER(
    _TRAINER,
    "TorchTrainer._initialize_and_run_controller",
    parameters=("controller_init_kwargs",),
)
_SCALING = "ray.train.v2._internal.execution.scaling_policy"
_POLICY = _FEWER(_SCALING, "FixedScalingPolicy", parameters=("scaling_config",))
_REQUESTS = tuple(
    _FEWER(_SCALING, f"FixedScalingPolicy.{name}", parameters=())
    for name in (
        "_send_resource_request",
        "_maybe_send_resource_request",
        "_cancel_resource_request",
    )
)
_NO_ROOM = _name(
    "ray.train.v2._internal.exceptions",
    "WorkerGroupStartupTimeoutError",
    needed_to="tell a cluster without room from a group that died",
    instead="a public class for this error",
)
_TORCH = _name(
    "ray.train.torch.config",
    "_TorchBackend",
    needed_to="have Gloo meet on Ray's network",
    instead="a setting of TorchConfig for the network interface",
)
_ON_START = _name(
    "ray.train.torch.config",
    "_TorchBackend.on_start",
    needed_to="have Gloo meet on Ray's network",
    instead="a setting of TorchConfig for the network interface",
    parameters=("worker_group", "backend_config"),
)
_SECONDS = partial(_name, "ray.train.v2._internal.constants", instead="fields of RunConfig")
_ANSWER_VARIABLE = _SECONDS(
    "WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR", needed_to="end a worker that does not answer"
)
_START_VARIABLE = _SECONDS(
    "WORKER_GROUP_START_TIMEOUT_S_ENV_VAR", needed_to="say in time that a cluster has no room"
)

# What is overridden below: a method that was renamed would no longer be called.
for _one in (_DEFAULTS, _CONTROLLER, *_REQUESTS, _ON_START):
    _one.check()

if TYPE_CHECKING:
    from ray.train._internal.base_worker_group import BaseWorkerGroup
    from ray.train.backend import BackendConfig
    from ray.train.torch.config import _TorchBackend as TorchBackend
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
    from ray.train.v2.api.callback import RayTrainCallback
else:
    FixedScalingPolicy, TorchBackend = _POLICY.get(), _TORCH.get()


def set_group_timeouts(*, answer: int, start: int) -> None:
    """Set times in seconds that the environment does not set, for controllers of this process.

    `answer`: without an answer after which a worker counts as hanging. `start`: until a group that
    finds no room fails.
    """
    os.environ.setdefault(_ANSWER_VARIABLE.get(), str(answer))
    os.environ.setdefault(_START_VARIABLE.get(), str(start))


def found_no_room(failure: Exception) -> bool:
    """Return whether a trainer failed because its workers found no room on the cluster in time."""
    return isinstance(getattr(failure, "controller_failure", None), _NO_ROOM.get())


class LeanTorchTrainer(TorchTrainer):
    """Ray's TorchTrainer without three of its processes, which take seconds to start.

    One hands out Ray datasets, of which there are none. One gives back what a killed controller
    held, but asks the dashboard for it: where there is none, it stays and holds what the next
    group is to have. One tells an autoscaler what the group needs: on loopback, where no other
    node can join, there is none.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        dispensable = (_DATASETS.get(), _CLEANER.get())
        every = super()._create_default_callbacks()
        return [callback for callback in every if not isinstance(callback, dispensable)]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        if ray.util.get_node_ip_address() == "127.0.0.1":
            wanted: Any = self.scaling_config
            settings["scaling_policy"] = _NoAutoscaler(wanted)
        return super()._initialize_and_run_controller(**settings)


class _NoAutoscaler(FixedScalingPolicy):
    """A group of a fixed size whose needs no autoscaler is told of."""

    def _send_resource_request(self) -> None:
        """Do nothing."""

    def _maybe_send_resource_request(self) -> None:
        """Do nothing."""

    def _cancel_resource_request(self) -> None:
        """Do nothing."""


class TorchOnRaysNetwork(TorchConfig):
    """PyTorch's process group on the network on which Ray's nodes reach each other.

    Gloo, left alone, waits at the address that the machine's own name stands for. On Debian and
    systems made from it that is 127.0.1.1, where no other machine can be.
    """

    @property
    def backend_cls(self) -> type[TorchBackend]:
        return _Backend


class _Backend(TorchBackend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, TorchConfig)
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


def _choose_interface() -> None:
    """Name Ray's network interface to Gloo on a worker; what the user has set stays."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == address for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
