"""Open the engine that a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rayfin.config.schema import ModelConfig
from rayfin.config.serving import EngineConfig
from rayfin.errors import HardwareError
from rayfin.hardware import has_gpu
from rayfin.models import max_positions

if TYPE_CHECKING:
    from rayfin.serving.engine.engine import Engine
    from rayfin.serving.engine.vllm import VllmEngine


def open_engine(
    model: ModelConfig, config: EngineConfig, *, use_gpu: bool | Literal["auto"] = "auto"
) -> Engine | VllmEngine:
    """Return an engine that has started, with defaults that fit the model and the device.

    Raises HardwareError for a GPU that isn't there, and what loading the model raises.
    """
    gpu = use_gpu is not False and has_gpu(asked=use_gpu is True)
    if use_gpu is True and not gpu:
        raise HardwareError(
            "deployment.gpus: the engine has a GPU of Ray's, and torch sees none there; install a "
            "CUDA build of torch, or set deployment.gpus=0"
        )
    config = config.fitted(1.0 if gpu else 0.0, max_positions(model))
    engine: Engine | VllmEngine
    if config.type == "vllm":
        from rayfin.serving.engine.vllm import VllmEngine

        engine = VllmEngine(model, config)
    else:
        from rayfin.serving.engine.engine import Engine

        engine = Engine(model, config, use_gpu=gpu)
    engine.start()
    return engine
