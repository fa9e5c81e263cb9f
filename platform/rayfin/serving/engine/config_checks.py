"""Refuse what can't be served as configured, before anything is loaded; imports no torch."""

from __future__ import annotations

import importlib.util

from rayfin.config.schema import ModelConfig
from rayfin.config.serving import EngineConfig
from rayfin.errors import ConfigError
from rayfin.models import max_positions


def check_length(model: ModelConfig, engine: EngineConfig) -> None:
    """Raises ConfigError where sequences may get longer than the model's positions."""
    positions = max_positions(model)
    if positions is not None and engine.max_length > positions:
        raise ConfigError(
            f"engine.max_length={engine.max_length} is more than the {positions} positions of "
            f"'{model.name}'; use engine.max_length={positions} or less"
        )


def require_vllm() -> None:
    """Raises ConfigError where vLLM isn't installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "engine.type: vllm is not installed; install rayfin[vllm] on a machine with a GPU, or "
            "use engine.type=transformers"
        )
