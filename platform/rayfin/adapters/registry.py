"""Write a registry: publish, promote, roll back, remove; writers take turns by a lock file."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rayfin.adapters.aliases import Aliases
from rayfin.adapters.catalog import ALIASES, LOCK, AdapterVersion, Catalog
from rayfin.adapters.files import (
    copy_files,
    inspect_files,
    list_files,
    make_read_only,
    select_files,
    storage_errors,
    sync_directory,
)
from rayfin.adapters.metadata import trusted_metadata
from rayfin.adapters.ref import LATEST, AdapterRef, check_alias, check_name
from rayfin.errors import AdapterError, StorageError
from rayfin.models.bases import BASE_BITS, BASE_IDENTITY
from rayfin.models.chat_templates import CHAT_TEMPLATE
from rayfin.models.ends import END_OF_TURN
from rayfin.paths import METADATA, digest_files, write_directory_whole, write_json

_LOCK_SECONDS = 600
# Keys of a rayfin.json beside what is published that go on with it.
_CARRIED = ("base_model", BASE_IDENTITY, BASE_BITS, CHAT_TEMPLATE, END_OF_TURN)
# What a killed writer leaves in an adapter's directory: a version not yet in its place or on its
# way out, or the next aliases.json.
_LEFTOVER = re.compile(r"\.([1-9][0-9]*|aliases\.json)-.+")


class Registry(Catalog):
    """The registry of adapters under `root`, which the first publish creates."""

    def publish(
        self,
        name: str,
        source: str | Path,
        metadata: Mapping[str, Any] | None = None,
        alias: str | None = None,
        check: Callable[[Path], None] | None = None,
    ) -> AdapterVersion:
        """Copy the adapter or full fine-tune in `source` as the next version of `name`.

        `latest` moves to it, and so does `alias`. `metadata` goes into rayfin.json beside the
        registry's own keys, which take precedence; it takes precedence itself over a rayfin.json in
        `source` (if that has digests of the files), and its `base_model` over what the files say.
        `check` is called with the copy before it is visible, and may raise. Raises AdapterError for
        what can't be published, and StorageError where it can't be written.
        """
        return self._publish(name, source, metadata, alias, check, again=True)[0]

    def publish_changed(
        self,
        name: str,
        source: str | Path,
        metadata: Mapping[str, Any] | None = None,
        alias: str | None = None,
        check: Callable[[Path], None] | None = None,
    ) -> tuple[AdapterVersion, bool]:
        """Publish as `publish` does, unless the latest version has the same files, base and end of
        turn.

        Returns the version and whether it is new. For one that is not, `check` is called with its
        directory, and `alias` moves to it.
        """
        return self._publish(name, source, metadata, alias, check, again=False)

    def _publish(
        self,
        name: str,
        source: str | Path,
        metadata: Mapping[str, Any] | None,
        alias: str | None,
        check: Callable[[Path], None] | None,
        *,
        again: bool,
    ) -> tuple[AdapterVersion, bool]:
        directory = self._directory(name)
        if alias is not None:
            check_alias(alias)
        files = select_files(Path(source))
        metadata = _carried(Path(source)) | _plain(metadata or {})
        with self._writing():
            self._refuse_twin(name)
            aliases = self._read_aliases(name)
            if not again and (same := self._same(name, Path(source), files, metadata)) is not None:
                if check is not None:
                    check(same.path)
                if alias is not None and alias not in same.aliases:
                    self._write_aliases(name, aliases.promote(alias, same.version))
                return self._read(name, same.version), False
            version = aliases.newest + 1
            _clean(directory)
            with write_directory_whole(directory / str(version)) as temporary:
                copy_files(files, temporary)
                if check is not None:
                    check(temporary)
                described = _describe(temporary, metadata) | {"name": name, "version": version}
                write_json(temporary / METADATA, metadata | described)
                make_read_only(temporary / METADATA)
                sync_directory(temporary)
            sync_directory(directory)
            sync_directory(self.root)
            if alias is not None and alias != LATEST:
                aliases = aliases.promote(alias, version)
            self._write_aliases(name, replace(aliases, newest=version))
            return self._read(name, version), True

    def _same(
        self, name: str, source: Path, files: Mapping[str, Path], metadata: Mapping[str, Any]
    ) -> AdapterVersion | None:
        """Return the latest version if it is whole and publishing `files` would only repeat it."""
        versions = self.versions(name)
        try:
            latest = self._read(name, versions[-1]) if versions else None
            if latest is None:
                return None
            told = {**metadata, **_facts(source, files, metadata)}
            if any(latest.metadata.get(key) != told.get(key) for key in _CARRIED):
                return None
            recorded = latest.metadata["files"]
            sizes = {file: path.stat().st_size for file, path in files.items()}
            if sizes != {file: digest["bytes"] for file, digest in recorded.items()}:
                return None
            return self.verify(latest.ref) if digest_files(files) == recorded else None
        except (AdapterError, FileNotFoundError):
            return None  # what is damaged is what a new version makes up for

    def promote(
        self, name: str, version_or_ref: int | str | AdapterRef, alias: str = "prod"
    ) -> AdapterVersion:
        """Point an alias to a version, given as a number, an alias or a reference."""
        ref = _within(name, version_or_ref)
        _check_movable(alias)
        with self._writing(name):
            version = self.resolve(ref)
            inspect_files(version.path, list_files(version.path))
            aliases = self._read_aliases(name)
            if aliases.targets.get(alias) != version.version:
                self._write_aliases(name, aliases.promote(alias, version.version))
            return self._read(name, version.version)

    def rollback(self, name: str, alias: str = "prod") -> AdapterVersion:
        """Point an alias back to the version before; repeated calls go further back."""
        _check_movable(alias)
        with self._writing(name):
            aliases = self._read_aliases(name).rollback(alias)
            version = aliases.targets[alias]
            if version not in self.versions(name):
                raise AdapterError(
                    f"'{name}@{alias}' can't go back to version {version}, which was removed; "
                    f"choose one with: rayfin adapters promote {name}@VERSION --alias {alias}"
                )
            self._write_aliases(name, aliases)
            return self._read(name, version)

    def unalias(self, name: str, alias: str) -> None:
        """Remove an alias and its past."""
        _check_movable(alias)
        with self._writing(name):
            self._write_aliases(name, self._read_aliases(name).without(alias))

    def remove(self, ref: str | AdapterRef) -> AdapterRef:
        """Remove one version, readable or not, and return its reference.

        Raises AdapterError for a bare name, and while an alias other than `latest` points to the
        version.
        """
        ref = AdapterRef.parse(ref)
        if ref.version is None and ref.alias is None:
            raise AdapterError(f"'{ref}' names no version to remove; give one: {ref}@VERSION")
        with self._writing(ref.name):
            version = self._target(ref)
            path = self._numbered(ref.name).get(version)
            if path is None:
                raise self._missing(ref, version)
            aliases = self._read_aliases(ref.name)
            for alias in sorted(key for key, at in aliases.targets.items() if at == version):
                raise AdapterError(
                    f"'{ref.name}@{version}' is what alias '{alias}' points to; first point it "
                    f"elsewhere (rayfin adapters promote {ref.name}@VERSION --alias {alias}) "
                    f"or drop it (rayfin adapters unalias {ref.name} --alias {alias})"
                )
            # Written first: the number must stay used even if we die right after the rename.
            self._write_aliases(ref.name, aliases, leaving=version)
            hidden = path.with_name(f".{version}-removed-{secrets.token_hex(4)}")
            path.rename(hidden)
            sync_directory(path.parent)
            shutil.rmtree(hidden)
        return AdapterRef(ref.name, version)

    @contextmanager
    def _writing(self, name: str | None = None) -> Iterator[None]:
        """Hold the registry's lock; an adapter `name`, if given, must exist."""
        from filelock import FileLock, Timeout

        if name is not None and not self._directory(name).is_dir():
            raise self._unknown(name)
        lock = self.root / LOCK
        try:
            with storage_errors(f"registry '{self.root}'"):
                self.root.mkdir(parents=True, exist_ok=True)
                if lock.is_symlink():
                    raise AdapterError(f"'{lock}' is a link; delete it")
                with FileLock(lock, timeout=_LOCK_SECONDS):
                    yield
        except Timeout as error:
            raise StorageError(
                f"registry '{self.root}' was locked by another process for {_LOCK_SECONDS} s; "
                "try again when it is done"
            ) from error

    def _write_aliases(self, name: str, aliases: Aliases, leaving: int | None = None) -> None:
        """Write the aliases; `leaving` is a version that is about to be removed."""
        # `latest` is written for people and other programs; rayfin looks at the versions.
        directory = self._directory(name)
        staying = (version for version in self.versions(name) if version != leaving)
        write_json(directory / ALIASES, aliases.as_json(max(staying, default=None)))
        sync_directory(directory)

    def _refuse_twin(self, name: str) -> None:
        for path in self.root.iterdir():
            if path.name != name and path.name.lower() == name.lower():
                raise AdapterError(
                    f"adapter name '{name}' differs from '{path.name}' only in case, and some "
                    f"file systems can't tell them apart; publish as '{path.name}' or "
                    "another name"
                )


def _describe(directory: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the registry's own part of rayfin.json; raises AdapterError unless files are whole."""
    files = list_files(directory)
    return {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **_facts(directory, files, metadata),
        "files": digest_files(files),
    }


def _facts(
    directory: Path, files: Mapping[str, Path], metadata: Mapping[str, Any]
) -> dict[str, str | None]:
    facts = inspect_files(directory, files)
    base_model = metadata.get("base_model")
    return {
        "peft_type": facts.peft_type,
        "base_model": base_model if isinstance(base_model, str) else facts.base_model,
    }


def _carried(source: Path) -> dict[str, Any]:
    """Return what training wrote into the rayfin.json of `source` that every version needs."""
    with storage_errors(f"'{source}'"):
        told = trusted_metadata(source, whole=True)
    return {key: told[key] for key in _CARRIED if key in told}


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"adapter metadata can't be written as JSON ({error}); "
            "give strings, finite numbers, lists and mappings"
        ) from error
    return plain


def _within(name: str, target: int | str | AdapterRef) -> AdapterRef:
    """Return `target` as a reference to a version of `name`."""
    if isinstance(target, int):
        return AdapterRef(check_name(name), version=target)
    if isinstance(target, str) and "@" not in target:
        target = f"{check_name(name)}@{target}"
    ref = AdapterRef.parse(target)
    if ref.name != name:
        raise AdapterError(
            f"'{ref}' is no version of '{name}'; an alias points within its own adapter"
        )
    return ref


def _check_movable(alias: str) -> None:
    if check_alias(alias) == LATEST:
        raise AdapterError(
            f"alias '{LATEST}' always follows the newest version; choose another, such as 'prod'"
        )


def _clean(directory: Path) -> None:
    """Remove what killed writers left; the caller must hold the lock."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name) and not path.is_symlink():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
