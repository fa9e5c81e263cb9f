"""What a base model can't be served with, told from its small files; loads no torch."""

from __future__ import annotations

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
