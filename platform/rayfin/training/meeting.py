"""How the processes of a worker group find one another."""

from __future__ import annotations

import os
import socket

import psutil
import ray
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import BackendConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


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
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


def _choose_interface() -> None:
    """On each worker; what the user has set stays."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == address for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
