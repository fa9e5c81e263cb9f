"""Add an adapter that was trained elsewhere, by the command and by the API alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfin.adapters import AdapterVersion, Registry, check_alias, check_name
from rayfin.adapters.fetch import fetch_adapter
from rayfin.adapters.files import select_files
from rayfin.adapters.metadata import trusted_metadata
from rayfin.config.serving import ServeConfig
from rayfin.errors import AdapterError
from rayfin.paths import METADATA

_SHOWN = 6


@dataclass(frozen=True)
class AddedAdapter:
    """The result of adding an adapter: its version, and what its publisher should know."""

    version: AdapterVersion
    config: ServeConfig
    """The deployment, with the base that the adapter was held against."""
    is_new: bool
    """False where the latest version was the same already."""
    notes: tuple[str, ...]
    """What whoever added it should know, a sentence each."""


def add_adapter(
    registry: Registry,
    source: str,
    name: str,
    config: ServeConfig,
    *,
    alias: str | None = None,
    base_is_right: bool = False,
) -> AddedAdapter:
    """Checks the adapter at `source` and makes it the next version of `name`, or nothing at all.

    `source` is a directory, a ZIP file or a hub id. `config` is the deployment that is to serve it.
    `alias` points to the version afterwards, beside `latest`. With `base_is_right` the caller
    answers for the base, where that can't be told from the files. Raises AdapterError for what
    can't be served, StorageError where the registry can't be written.
    """
    check_name(name)
    if alias is not None:
        check_alias(alias)
    notes: list[str] = []
    with fetch_adapter(source) as found:
        told: dict[str, Any] = {"source": found.source}
        check = None
        if (found.directory / "adapter_config.json").exists():
            # Here: a full fine-tune is copied without any of what these import.
            from rayfin.serving.compatibility import base_to_record, check_adapter

            select_files(found.directory)  # what is no adapter is told before its base is asked
            config, base = base_to_record(found.directory, config, is_right=base_is_right)
            told |= base

            def check(copy: Path) -> None:
                try:
                    check_adapter(name, copy, config, told)
                except AdapterError as error:  # which names files of a copy that is gone by then
                    raise AdapterError(str(error).replace(str(copy), source)) from error

            named = found.directory / METADATA
            if named.exists() and not trusted_metadata(found.directory, whole=True):
                notes.append(f"its {METADATA} has no digests of these files, and is not believed")
        version, is_new = registry.publish_changed(name, found.directory, told, alias, check)
        left = found.left_out
    if left:
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        notes.append(f"left out, as no part of an adapter: {', '.join(left[:_SHOWN])}{more}")
    if not is_new:
        notes.append(f"already there as {version.ref} (same content); no version was made")
    elif (other := registry.base_change_warning(version)) is not None:
        notes.append(other)
    return AddedAdapter(version, config, is_new, tuple(notes))
