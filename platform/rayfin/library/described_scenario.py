"""The scenario of a question: this machine, or the hardware that is told in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from rayfin.errors import ConfigError
from rayfin.language import localized

if TYPE_CHECKING:
    from rayfin.advisor.scenario import Scenario
    from rayfin.config import Config
    from rayfin.hardware import Hardware

_ASSUMED_GIB = 12.0
"""The memory of a GPU of which nobody says it: the smallest class of `rayfin.advisor.practice`."""


def described_scenario(
    config: Config, told: Mapping[str, Any], **found: Any
) -> tuple[Scenario, Hardware, list[str]]:
    """Return the scenario and its hardware, with lines on what is assumed of the hardware."""
    from rayfin.advisor.scenario import Scenario
    from rayfin.advisor.step_time import DESCRIBED_GPU, usual_gpu
    from rayfin.hardware import describe_hardware

    _check_hardware(told)
    use_gpu = use_gpu_of(config, told)
    machine = describe_hardware(use_gpu)
    notes = []
    if told.get("hardware") == "multi_gpu" and "num_gpus" not in told:
        found["num_gpus"] = max(2, machine.device_count)
        count = found["num_gpus"]
        notes.append(localized("{count} GPUs are assumed; num_gpus says how many", count=count))
    scenario = Scenario.detect(use_gpu=use_gpu, **found, **told)
    if scenario.hardware == "cpu":
        memory = machine.host_memory
        return scenario, replace(machine, device="cpu", device_memory=memory, device_count=0), notes
    if scenario.gpu_memory_gb is None:
        scenario = replace(scenario, gpu_memory_gb=_ASSUMED_GIB)
        notes.append(
            localized(
                "each GPU is taken to have {size:g} GiB; gpu_memory_gb says how many",
                size=_ASSUMED_GIB,
            )
        )
    hardware = replace(
        machine,
        device="cuda",
        device_name=machine.device_name if machine.device == "cuda" else DESCRIBED_GPU,
        device_count=scenario.num_gpus or 1,
        device_memory=int((scenario.gpu_memory_gb or _ASSUMED_GIB) * 2**30),
    )
    if hardware.device_name == DESCRIBED_GPU:
        like = usual_gpu(hardware.device_memory)
        notes.append(localized("each GPU is taken to be as fast as NVIDIA's {like}", like=like))
    return scenario, hardware, notes


def _check_hardware(told: Mapping[str, Any]) -> None:
    """Raise ConfigError where the GPUs that are told aren't those of the hardware that is told."""
    from rayfin.advisor.scenario import hardware_class

    hardware, gpus = told.get("hardware"), told.get("num_gpus")
    memory = told.get("gpu_memory_gb")
    if hardware == "cpu" and (gpus or memory is not None):
        name, value = ("num_gpus", gpus) if gpus else ("gpu_memory_gb", memory)
        raise ConfigError(
            f"hardware=cpu has no GPU, and {name}={value:g} is given too; leave one of them out"
        )
    if hardware is not None and gpus is not None and hardware != hardware_class(gpus):
        raise ConfigError(
            f"hardware={hardware} and num_gpus={gpus} contradict each other; use "
            f"hardware={hardware_class(gpus)}"
        )


def use_gpu_of(config: Config, told: Mapping[str, Any]) -> bool | Literal["auto"]:
    """Return whether this machine's GPUs are looked at; none has to be here for another machine."""
    elsewhere = {"hardware", "gpu_memory_gb", "num_gpus"} & told.keys()
    return "auto" if elsewhere else config.scaling.use_gpu
