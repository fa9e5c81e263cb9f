"""Describe the hardware of this machine, and find the Ray cluster to use."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import re
import socket
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from rayfin.errors import HardwareError
from rayfin.paths import cache_dir, write_json


@dataclass(frozen=True)
class Hardware:
    """The hardware of one machine that a run would use; memory in bytes."""

    device: Literal["cuda", "cpu"]
    device_name: str
    device_count: int
    device_memory: int
    cpu_count: int
    host_memory: int
    bf16: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the description as JSON stores it."""
        return asdict(self)


def cpu_count() -> int:
    """Return the number of processors that this process may use, by its affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# A running cluster answers in milliseconds; one across the world in less than this.
_ANSWER_SECONDS = 4.0
_CLUSTER_ADDRESS = re.compile(r"(ray://)?(?P<host>[^\s/:]+|\[[^\s\]]+\]):(?P<port>\d{1,5})")


def cluster_address(address: str | None) -> str | None:
    """Return the address of the Ray cluster to use: `address` or $RAY_ADDRESS; None for this
    machine.

    Raises HardwareError where nothing answers there, as Ray itself would try for two minutes and
    then end the process.
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
    """Return the hardware that a trial would train on; raises HardwareError for a missing GPU."""
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
"""The device files of the drivers of NVIDIA (servers, Jetson), AMD and Windows (WSL); without any
of
them Linux has no GPU."""


# --- bfloat16 on processors ---------------------------------------------------------------------

CLEAR_GAIN = 2.0
"""How many times as fast as float32 ones bfloat16 products must be for rayfin to choose them: no
noise of a measurement is as large."""
_AMX = "amx_bf16"
_PROBE = (512, 576, 1536)
"""Rows, inputs and outputs of the product that is timed: SmolLM2's, of a step of 512 tokens."""
_PROBE_SECONDS = 0.4
_GAINS = "bfloat16.json"


def bfloat16_gain() -> float | None:
    """Return how many times as fast as float32 products bfloat16 ones are on this processor.

    None where it has no AMX: AVX-512 alone gains too little, AVX2 takes many times as long. The
    answer is measured once, in less than a second, and kept in the cache directory for each model
    of processor and version of torch.
    """
    if _AMX not in _processor()[1]:
        return None
    known = _known_gains().get(_gains_key())
    if isinstance(known, float):
        return known
    measured = _measured_gain()
    with contextlib.suppress(OSError):  # then it is measured again
        remember_bfloat16_gain(measured)
    return measured


def remember_bfloat16_gain(gain: float) -> None:
    """Keep the answer of `bfloat16_gain` for this processor in the cache directory."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    write_json(cache_dir() / _GAINS, _known_gains() | {_gains_key(): gain})


def _gains_key() -> str:
    return f"{_processor()[0]}, torch {version('torch')}"


def _known_gains() -> dict[str, Any]:
    try:
        known = json.loads((cache_dir() / _GAINS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


@functools.cache
def _processor() -> tuple[str, frozenset[str]]:
    """Return the model of the processor and its instruction sets, as Linux names them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor(), frozenset()
    lines = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]
    told = {name.strip(): value.strip() for name, _, value in lines}
    return told.get("model name", platform.processor()), frozenset(told.get("flags", "").split())


def _measured_gain() -> float:
    """Return the median ratio of times, each of two products of the same size one after another."""
    import torch
    from torch.nn.functional import linear

    rows, inputs, outputs = _PROBE
    drawn = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=drawn)
    batch = torch.randn(rows, inputs, generator=drawn)
    rounded = weight.bfloat16()

    def seconds(weight: torch.Tensor) -> float:
        begun = time.perf_counter()
        linear(batch.to(weight.dtype), weight)
        return time.perf_counter() - begun

    ratios: list[float] = []
    until = time.perf_counter() + _PROBE_SECONDS
    while len(ratios) < 5 or (time.perf_counter() < until and len(ratios) < 50):
        ratios.append(seconds(weight) / seconds(rounded))
    return statistics.median(ratios[2:])  # the first ones also start threads


def has_gpu(*, asked: bool) -> bool:
    """Whether torch sees a GPU.

    torch, which takes seconds to import, is imported only where there may be one, or where a GPU
    was `asked` for.
    """
    linux = sys.platform == "linux" and "torch" not in sys.modules
    if linux and not asked and not any(Path(file).exists() for file in _GPU_FILES):
        return False
    import torch

    return bool(torch.cuda.is_available())
