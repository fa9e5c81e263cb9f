"""The engine that a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rayfin.config.schema import ModelConfig
from rayfin.config.serving import EngineConfig

if TYPE_CHECKING:
    from rayfin.serving.engine.engine import Engine
    from rayfin.serving.engine.vllm import VllmEngine


def open_engine(
    model: ModelConfig, config: EngineConfig, *, use_gpu: bool | Literal["auto"] = "auto"
) -> Engine | VllmEngine:
    """One that has started; raises what loading the model raises."""
    engine: Engine | VllmEngine
    if config.type == "vllm":
        from rayfin.serving.engine.vllm import VllmEngine

        engine = VllmEngine(model, config)
    else:
        from rayfin.serving.engine.engine import Engine

        engine = Engine(model, config, use_gpu=use_gpu)
    engine.start()
    return engine
