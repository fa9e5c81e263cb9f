"""From the name of a model to the directory that holds it."""

from __future__ import annotations

from pathlib import Path

from rayfin.config.schema import ModelConfig
from rayfin.errors import ModelError, did_you_mean
from rayfin.models.bundled import BUNDLED, bundled_directory

# Weights are read from safetensors only: a pickle can run code when it is opened.
_CONFIG_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
_WEIGHT_FILES = ["*.safetensors"]
_HUB_TIMEOUT = 10.0


def locate(config: ModelConfig) -> str:
    """Directory of a bundled or local model, or the id of a hub model; ModelError if there's none.

    A bundled model that isn't in the cache yet is made first.
    """
    directory = model_directory(config, weights=False)
    return config.name if is_hub(config) else str(directory)


def is_hub(config: ModelConfig) -> bool:
    """Neither bundled nor a local directory."""
    return config.name not in BUNDLED and not Path(config.name).expanduser().is_dir()


def model_directory(config: ModelConfig, *, weights: bool = True) -> Path:
    """Where the files of the model lie, hub models downloaded first (their weights if asked for)."""
    name = config.name
    if is_hub(config):
        return _hub_directory(config, weights)
    if config.revision is not None:
        raise ModelError(
            f"model.revision: '{config.revision}' means nothing for '{name}', which is no hub model; "
            "leave it out"
        )
    if name in BUNDLED:
        return bundled_directory(name)
    return Path(name).expanduser().resolve()


def _hub_directory(config: ModelConfig, weights: bool) -> Path:
    name = config.name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"model.name: there is no directory '{name}'; give a directory with config.json and "
            f"safetensors weights, a hub id, or one of: {', '.join(sorted(BUNDLED))}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(
                name,
                revision=config.revision,
                allow_patterns=_CONFIG_FILES + (_WEIGHT_FILES if weights else []),
                etag_timeout=_HUB_TIMEOUT,
            )
        )
    except (OSError, ValueError, HFValidationError) as error:
        raise ModelError(_not_found(config)) from error


def _not_found(config: ModelConfig) -> str:
    revision = f" at revision '{config.revision}'" if config.revision else ""
    return (
        f"model.name: '{config.name}' is no bundled model ({', '.join(sorted(BUNDLED))}), no local "
        f"directory, and could not be had from the Hugging Face hub{revision}"
        f"{did_you_mean(config.name, BUNDLED)}; check the name and the network, or give a directory"
    )
