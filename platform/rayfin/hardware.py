"""What this machine has, and what a run would use of it."""

from __future__ import annotations

import os
import platform
import re
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rayfin.errors import HardwareError


@dataclass(frozen=True)
class Hardware:
    """Facts about one machine; memory in bytes."""

    device: Literal["cuda", "cpu"]
    device_name: str
    device_count: int
    device_memory: int
    cpu_count: int
    host_memory: int
    bf16: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cpu_count() -> int:
    """Processors this process may use (cgroup masks and affinity respected)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# A cluster that is there answers in milliseconds; one across the world in less than this.
_ANSWER_SECONDS = 4.0
_CLUSTER_ADDRESS = re.compile(r"(ray://)?(?P<host>[^\s/:]+|\[[^\s\]]+\]):(?P<port>\d{1,5})")


def cluster_address(address: str | None) -> str | None:
    """The running Ray cluster that is meant: `address`, else $RAY_ADDRESS; None for this machine.

    Raises HardwareError where nothing answers there: Ray itself would try for two minutes, and then
    end the process.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if address in (None, "", "local"):
        return None
    if address == "auto":
        return address
    remedy = "start one with `ray start --head`, or leave --address and RAY_ADDRESS out"
    parts = _CLUSTER_ADDRESS.fullmatch(address)
    if parts is None or int(parts["port"]) > 65535:
        raise HardwareError(
            f"'{address}' is not the address of a Ray cluster; give HOST:PORT, auto or local, or "
            "leave --address and RAY_ADDRESS out"
        )
    try:
        place = (parts["host"].strip("[]"), int(parts["port"]))
        with socket.create_connection(place, timeout=_ANSWER_SECONDS):
            return address
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise HardwareError(
            f"no Ray cluster answers at '{address}' ({reason}); {remedy}"
        ) from error


def describe_hardware(use_gpu: bool | Literal["auto"] = "auto") -> Hardware:
    """The hardware a trial would train on; raises HardwareError for a GPU that isn't there."""
    import psutil

    host_memory = int(psutil.virtual_memory().total)
    available = has_gpu(asked=use_gpu is True)
    if use_gpu is True and not available:
        raise HardwareError(
            "scaling.use_gpu: true, but torch sees no GPU here; "
            "install a CUDA build of torch, or set scaling.use_gpu=false"
        )
    if use_gpu is False or not available:
        return Hardware(
            device="cpu",
            device_name=platform.processor() or platform.machine(),
            device_count=0,
            device_memory=host_memory,
            cpu_count=cpu_count(),
            host_memory=host_memory,
            bf16=False,
        )
    import torch

    properties = torch.cuda.get_device_properties(0)
    return Hardware(
        device="cuda",
        device_name=properties.name,
        device_count=torch.cuda.device_count(),
        device_memory=properties.total_memory,
        cpu_count=cpu_count(),
        host_memory=host_memory,
        bf16=torch.cuda.is_bf16_supported(),
    )


_GPU_FILES = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/kfd", "/dev/dxg")
"""Device files of NVIDIA's (servers', Jetson's), AMD's and Windows' (WSL) drivers; without one
Linux has no GPU."""


def has_gpu(*, asked: bool) -> bool:
    """Whether torch sees a GPU; torch, which takes seconds to import, is asked where it may, and
    where a GPU was `asked` for.
    """
    linux = sys.platform == "linux" and "torch" not in sys.modules
    if linux and not asked and not any(Path(file).exists() for file in _GPU_FILES):
        return False
    import torch

    return bool(torch.cuda.is_available())
