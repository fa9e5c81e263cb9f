"""Find the base model of a deployment that names none: that of its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rayfin.adapters import AdapterRef, Catalog
from rayfin.adapters.files import FULL
from rayfin.config.schema import ModelConfig
from rayfin.errors import AdapterError, ConfigError
from rayfin.models import BUNDLED, Base, hub_id
from rayfin.paths import Storage

if TYPE_CHECKING:
    from rayfin.adapters import AdapterVersion
    from rayfin.config import ServeConfig

_SHOWN = 3
"""The most adapters, and the most bases, that an error names."""


def with_adapters_base(config: ServeConfig, use: str | None = None) -> ServeConfig:
    """Returns `config` with the base of adapter `use`, or of all adapters of its registry.

    It stays as it is where model.name was given, and where there is no adapter. Raises ConfigError
    where adapters have different bases, AdapterError where `use` or its base isn't there.
    """
    if "name" in config.model.model_fields_set or use == config.model.name:
        return config
    catalog = Catalog(Storage.at(config.storage).adapters)
    if use is not None:
        # Any name by which a request may call it will do, BASE:NAME included.
        versions = [catalog.resolve(AdapterRef.parse(use.rpartition(":")[2]))]
    else:
        versions = [version for version in catalog.list() if version.aliases]
    versions = [one for one in versions if one.peft_type != FULL and one.base is not None]
    groups = _groups(versions)
    if not groups:
        return config
    if len(groups) > 1:
        told = "; ".join(f"{group[0].base} of {_listed(group)}" for group in groups[:_SHOWN])
        more = f"; and {len(groups) - _SHOWN} more" if len(groups) > _SHOWN else ""
        raise ConfigError(
            f"model.name: the adapters of '{catalog.root}' have different bases, and one can be "
            f"served: {told}{more}; say which, such as model.name={groups[0][0].base_model}"
        )
    # Of a base and its quantised twin the plain one, which can be quantised here.
    first = min(groups[0], key=lambda one: len(str(one.base_model)))
    assert first.base is not None
    model = find_base(first.base, config.model, f"adapter '{first.ref}'", _revision(first))
    return config.model_copy(update={"model": model})


def find_base(
    base: Base, model: ModelConfig, who: str, revision: str | None = None, more: str = ""
) -> ModelConfig:
    """Returns `model` with the name by which `base`, which `who` names, is found on this machine.

    `more` is put after the remedy. Raises AdapterError for a directory that isn't here.
    """
    name = base.name
    if name not in BUNDLED and not _is_directory(name):
        on_hub = hub_id(name)
        if on_hub is None:
            raise AdapterError(
                f"{who} names its base '{name[:200]}', and there is no such directory here; say "
                f"where that model lies: model.name=DIRECTORY{more}"
            )
        # A snapshot that was downloaded elsewhere: the hub has it.
        name, revision = on_hub, revision or model.revision
        return model.model_copy(update={"name": name, "revision": revision})
    return model.model_copy(update={"name": name})


def _groups(versions: list[AdapterVersion]) -> list[list[AdapterVersion]]:
    """Returns the versions in groups that have one base each, in their order."""
    groups: list[list[AdapterVersion]] = []
    for version in versions:
        assert version.base is not None
        for group in groups:
            if group[0].base is not None and version.base.is_same(group[0].base):
                group.append(version)
                break
        else:
            groups.append([version])
    return groups


def _listed(group: list[AdapterVersion]) -> str:
    more = f" and {len(group) - _SHOWN} more" if len(group) > _SHOWN else ""
    return ", ".join(version.ref for version in group[:_SHOWN]) + more


def _revision(version: AdapterVersion) -> str | None:
    """Returns the commit of the hub model that it was trained on, where its trial says so."""
    spec = version.metadata.get("spec")
    model = spec.get("model") if isinstance(spec, dict) else None
    found = model.get("revision") if isinstance(model, dict) else None
    return found if isinstance(found, str) else None


def _is_directory(name: str) -> bool:
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):
        return False
