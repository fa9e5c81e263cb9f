"""What `rayfin doctor` finds out about processors, memory and GPUs, and what a trial would use."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

Section = dict[str, Any]
"""What one check reports: name -> plain value; bytes end in `_bytes`."""

# Its float32 weights (0.5 GB), activations and logits of the default batch, and the libraries.
MEMORY_NEEDED = 2_000_000_000
# NF4 with double quantisation leaves a relative error of 0.09 in normally distributed weights.
NF4_ERROR = 0.15

_SMI_SECONDS = 5.0


def devices(problems: list[str]) -> Section:
    """Processors, memory in bytes, and the GPUs that torch sees."""
    import psutil
    import torch

    from rayfin.hardware import cpu_count

    memory = psutil.virtual_memory()
    if memory.available < MEMORY_NEEDED:
        problems.append(
            f"{memory.available / 1e9:.1f} GB of memory are free, training the default model takes "
            f"about {MEMORY_NEEDED / 1e9:.0f} GB; end other programs"
        )
    gpus, bf16 = [], False
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported()
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            gpus.append({"name": name, "memory_bytes": total, "free_bytes": free})
            if free < MEMORY_NEEDED:
                problems.append(
                    f"GPU {index} ({name}) has {free / 1e9:.1f} GB free; end what runs on it "
                    "(nvidia-smi lists it), or hide it with CUDA_VISIBLE_DEVICES"
                )
    elif unused := unused_gpu(torch.version.cuda, torch.__version__):
        problems.append(unused)
    return {
        "cpus": cpu_count(),
        "memory_bytes": memory.total,
        "available_memory_bytes": memory.available,
        "gpus": gpus,
        "bf16": bf16,
    }


def trial(problems: list[str]) -> Section:
    """What a trial of a sweep would use on this machine, left to its defaults."""
    from rayfin.hardware import describe_hardware

    hardware = describe_hardware()
    at_a_time = max(1, hardware.device_count)
    half = "bfloat16" if hardware.bf16 else "float16"
    four_bit = _nf4_works(hardware.device, problems)
    return {
        "device": f"{hardware.device} ({hardware.device_name})",
        "dtype": half if hardware.device == "cuda" else _processor_dtype(),
        "4-bit": four_bit,
        "threads": max(1, hardware.cpu_count // at_a_time),
        "trials_at_a_time": at_a_time,
        "strategy": "one process a trial; chosen by memory with scaling.num_workers above 1",
    }


def _processor_dtype() -> str:
    """What model.dtype=auto is for a training on this processor, and why."""
    from rayfin.hardware import CLEAR_GAIN, bfloat16_gain

    gain = bfloat16_gain()
    if gain is None:
        return "float32 (the processor has no AMX for bfloat16)"
    chosen = "bf16-mixed" if gain >= CLEAR_GAIN else "float32"
    return f"{chosen} (bfloat16 products are {gain:.1f} times as fast as float32)"


def unused_gpu(cuda: str | None, torch_version: str) -> str | None:
    """What keeps torch from a GPU that the driver shows, or that there is none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not shutil.which("nvidia-smi"):
        return None  # hidden on purpose, or not there
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi is there but fails: the driver is not loaded; install it, or reboot"
    names = ", ".join(answer.stdout.split("\n")).strip(", ")
    if not names:
        return None
    if cuda is None:
        return (
            f"there is a GPU ({names}), but torch {torch_version} is a CPU build; "
            "install a CUDA build of torch: https://pytorch.org/get-started/locally"
        )
    return (
        f"there is a GPU ({names}), but torch {torch_version} sees none; check "
        f"CUDA_VISIBLE_DEVICES and that the driver (nvidia-smi) is new enough for CUDA {cuda}"
    )


def _nf4_works(device: str, problems: list[str]) -> bool:
    """Quantises a small matrix to NF4 and back: an import alone proves nothing."""
    remedy = "run: pip install --force-reinstall --no-deps bitsandbytes, or use method.type=lora"
    try:
        import torch

        from rayfin.models import import_bitsandbytes

        import_bitsandbytes()  # without a word on kernels that are not used
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        back = dequantize_4bit(packed, state)
        error = float((back - weight).norm() / weight.norm())
    except Exception as failure:  # noqa: BLE001 - a broken native library raises anything
        problems.append(f"bitsandbytes can't quantise on this {device}: {failure}; {remedy}")
        return False
    # Not `error > …`, which NaN would pass.
    if not error < NF4_ERROR:
        problems.append(f"bitsandbytes' NF4 is off by {error:.0%} on this {device}; {remedy}")
        return False
    return True
