"""One configuration for every command: frozen pydantic models, YAML and dotted overrides."""

from rayfin.config.data import DataConfig
from rayfin.config.load import (
    build_config,
    dump_yaml,
    load_config,
    load_serve_config,
    parse_overrides,
    parse_yaml,
    saved,
    with_values,
)
from rayfin.config.problems import format_value, leaf_names
from rayfin.config.schema import (
    Config,
    ModelConfig,
    PublishConfig,
    ScalingConfig,
    TrainConfig,
)
from rayfin.config.serving import ApiConfig, EngineConfig, ReplicaConfig, ServeConfig
from rayfin.config.sweep import Space, SweepConfig
from rayfin.methods import MethodConfig
from rayfin.section import Section

__all__ = [
    "ApiConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "MethodConfig",
    "ModelConfig",
    "PublishConfig",
    "ReplicaConfig",
    "ScalingConfig",
    "Section",
    "ServeConfig",
    "Space",
    "SweepConfig",
    "TrainConfig",
    "build_config",
    "dump_yaml",
    "format_value",
    "leaf_names",
    "load_config",
    "load_serve_config",
    "parse_overrides",
    "parse_yaml",
    "saved",
    "with_values",
]
