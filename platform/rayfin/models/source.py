"""Find the directory of a model by its name."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rayfin import hub
from rayfin.config.schema import ModelConfig
from rayfin.errors import ModelError, did_you_mean
from rayfin.models.bundled import BUNDLED, bundled_directory
from rayfin.models.quiet import no_progress_bars

# Weights are read from safetensors only: a pickle can run code when it is opened.
_CONFIG_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
_WEIGHT_FILES = ["*.safetensors"]
# The same weights once more, in other formats or for other libraries.
_OTHER_COPIES = ["*/*", "consolidated*"]


def locate(config: ModelConfig) -> str:
    """Return the directory of a bundled or local model, or the id of a hub model.

    A bundled model that isn't in the cache yet is built first. Raises ModelError where there is no
    such model.
    """
    directory = model_directory(config, weights=False)
    return config.name if is_hub(config) else str(directory)


def is_hub(config: ModelConfig) -> bool:
    """Whether the model is neither bundled nor a local directory."""
    if config.name in BUNDLED:
        return False
    try:
        return not Path(config.name).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):
        # Too long for the file system, a NUL in it, or the home of nobody: no directory either.
        return True


def model_directory(config: ModelConfig, *, weights: bool = True) -> Path:
    """Return the directory of the model's files; a hub model is downloaded first.

    Without `weights`, only its small files are. Raises ModelError.
    """
    name = config.name
    if is_hub(config):
        return _hub_directory(config, weights)
    if config.revision is not None:
        raise ModelError(
            f"model.revision: '{config.revision}' needs a hub model, and '{name}' is none; "
            "leave it out"
        )
    if name in BUNDLED:
        return bundled_directory(name)
    return Path(name).expanduser().resolve()


def is_path(name: str) -> bool:
    """Whether a model's name can be that of a directory only, and of no model of the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def is_in_hub_cache(config: ModelConfig) -> bool:
    """Whether the small files of a hub model are on this machine; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(config.name, "config.json", revision=config.revision)
    except HFValidationError:
        return False
    return isinstance(found, str)


def _hub_directory(config: ModelConfig, weights: bool) -> Path:
    name = config.name
    if is_path(name):
        raise ModelError(
            f"model.name: there is no directory '{name}'; give a directory with config.json and "
            f"safetensors weights, a hub id, or one of: {', '.join(sorted(BUNDLED))}"
        )
    from huggingface_hub import HfApi, snapshot_download

    wanted: dict[str, Any] = {
        "repo_id": name,
        "revision": config.revision,
        "allow_patterns": _CONFIG_FILES + (_WEIGHT_FILES if weights else []),
        "ignore_patterns": _OTHER_COPIES,
    }
    # The download itself would wait minutes for a silent server.
    failure = hub.ask(
        lambda: HfApi().model_info(name, revision=config.revision, timeout=hub.SECONDS)
    )
    if failure is None:
        try:
            # A bar is for weights, which take a while.
            with nullcontext() if weights else no_progress_bars():
                return Path(snapshot_download(**wanted))
        # As in `ask`: any error of the HTTP library's may come through.
        except Exception as error:  # noqa: BLE001
            failure = error
    try:
        return Path(snapshot_download(**wanted, local_files_only=True))
    except (OSError, ValueError):
        raise ModelError(_not_found(config, failure)) from failure


def _not_found(config: ModelConfig, failure: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    remedy = "check the name, or give a directory"
    match failure:
        case hub.HubUnreachable():
            reason, remedy = f"{failure}, nor is it in the hub's cache", hub.REMEDY
        case GatedRepoError():
            reason = "the hub asks for its terms to be accepted on the model's page, then HF_TOKEN"
        case RepositoryNotFoundError():
            reason = "the hub has no public model of that name; a private one needs HF_TOKEN"
        case RevisionNotFoundError():
            reason = f"it has no revision '{config.revision}'"
        case HFValidationError():
            reason = "it can't be a hub id"
        case OfflineModeIsEnabled():
            reason = "HF_HUB_OFFLINE is set and it isn't in the hub's cache"
            remedy = "unset it, or give a local directory"
        case _:
            reason = f"it can't be downloaded ({' '.join(str(failure).split()):.120})"
    return (
        f"model.name: '{config.name}' is neither bundled ({', '.join(sorted(BUNDLED))}) nor a "
        f"directory here nor to be had from the Hugging Face hub: {reason}"
        f"{did_you_mean(config.name, BUNDLED)}; {remedy}"
    )
