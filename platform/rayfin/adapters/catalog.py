"""Read a registry of adapters, their versions and aliases, without a lock.

    <root>/<name>/<version>/{adapter_config.json, adapter_model.safetensors, …, rayfin.json}
    <root>/<name>/aliases.json

A version appears by one rename and an alias moves by one rename, so that a reader never sees a
half-written state. Links below the root are not followed.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rayfin.adapters.aliases import Aliases
from rayfin.adapters.files import (
    CONFIGS,
    inspect_files,
    list_files,
    read_json,
    storage_errors,
)
from rayfin.adapters.metadata import are_digests, claimed_base
from rayfin.adapters.ref import LATEST, AdapterRef, check_name, is_name, parse_version
from rayfin.errors import AdapterError, did_you_mean
from rayfin.models.bases import Base
from rayfin.paths import METADATA, digest_files

ALIASES = "aliases.json"
LOCK = ".lock"
"""The file in the root that writers lock; every registry has one."""
_FIRST = "begin one by publishing: rayfin sweep publish.name=NAME, or rayfin adapters add DIR NAME"


@dataclass(frozen=True)
class AdapterVersion:
    """A published version; `path` is a plain PEFT adapter, or a whole model where it is FULL."""

    name: str
    version: int
    path: Path
    metadata: Mapping[str, Any] = field(hash=False)
    """The content of rayfin.json."""
    peft_type: str
    base_model: str | None
    aliases: tuple[str, ...]
    """The aliases that pointed to this version when it was read, sorted."""

    @property
    def ref(self) -> str:
        """The reference `name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def base(self) -> Base | None:
        """The base that the adapter was trained on, or None where rayfin.json does not say."""
        return claimed_base({}, self.metadata)

    def as_dict(self) -> dict[str, Any]:
        """Return the version as JSON shows it."""
        return {
            "ref": self.ref,
            "name": self.name,
            "version": self.version,
            "aliases": list(self.aliases),
            "peft_type": self.peft_type,
            "base_model": self.base_model,
            "created_at": self.metadata.get("created_at"),
            "path": str(self.path),
            "metadata": dict(self.metadata),
        }


class Catalog:
    """The registry under `root`, read anew at every call; it can be pickled."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().resolve()

    def check(self) -> None:
        """Accept any directory: a missing registry is an empty one, except for `ServedCatalog`."""

    def require(self) -> None:
        """Raise AdapterError where there is no registry, not even an empty one."""
        with storage_errors(f"registry '{self.root}'"):
            there = self.root.is_dir()
        if not there:
            raise AdapterError(
                f"there is no registry of adapters at '{self.root}'; say in which directory it "
                f"lies (storage=DIR has it as DIR/{self.root.name}), or {_FIRST}"
            )

    def names(self) -> tuple[str, ...]:
        """Return the names of adapters with at least one version, sorted."""
        found = (path.name for path in _entries(self.root) if is_name(path.name) and _real(path))
        return tuple(name for name in sorted(found) if self.versions(name))

    def versions(self, name: str) -> tuple[int, ...]:
        """Return the published versions of an adapter, ascending; none for an unknown adapter."""
        # A directory without rayfin.json was not published.
        numbered = self._numbered(name)
        return tuple(sorted(at for at, path in numbered.items() if (path / METADATA).is_file()))

    def aliases(self, name: str) -> dict[str, int]:
        """Return the version of each alias, `latest` included where there is a version."""
        targets = dict(self._read_aliases(name).targets)
        if versions := self.versions(name):
            targets[LATEST] = versions[-1]
        return dict(sorted(targets.items()))

    def resolve(self, ref: str | AdapterRef) -> AdapterVersion:
        """Return the version that a reference names, the latest for a bare name.

        Raises AdapterError where there is none.
        """
        ref = AdapterRef.parse(ref)
        version = self._target(ref)
        while True:
            try:
                return self._read(ref.name, version)
            except FileNotFoundError as error:
                # The alias may have moved, and its old version gone, between the two reads.
                moved = self._target(ref)
                if moved == version:
                    raise self._missing(ref, version) from error
                version = moved

    def scan(self) -> tuple[tuple[AdapterVersion, ...], tuple[AdapterError, ...]]:
        """Return all versions by name and number, and the reasons why others aren't among them."""
        found, problems = self._read_all()
        return tuple(found), (*problems, *map(AdapterError, self.unpublished_copies().values()))

    def _read_all(self) -> tuple[list[AdapterVersion], list[AdapterError]]:
        found: list[AdapterVersion] = []
        problems: list[AdapterError] = []
        for name in self.names():
            try:
                aliases = self.aliases(name)
            except AdapterError as error:
                problems.append(error)
                continue
            for version in self.versions(name):
                try:
                    found.append(self._read(name, version, aliases))
                except FileNotFoundError:
                    pass  # removed since it was listed
                except AdapterError as error:
                    problems.append(error)
        return found, problems

    def unpublished_copy(self, name: str) -> str | None:
        """Return what to do about an adapter that was copied by hand into the directory of `name`.

        It is not served, as without digests it is unknown whether it is whole. None where there is
        none.
        """
        directory = self._directory(name)
        if not directory.is_dir():
            return None
        places: list[tuple[int | None, Path]] = [*self._numbered(name).items()]
        if not self.versions(name):
            places.insert(0, (None, directory))
        for number, path in places:
            if any((path / one).is_file() for one in CONFIGS) and not (path / METADATA).is_file():
                then = (
                    ""
                    if number is None
                    else f", then remove it: rayfin adapters rm {name}@{number}"
                )
                return (
                    f"'{path}' was copied into the registry by hand, and is not served; check and "
                    f"publish it with: rayfin adapters add {shlex.quote(str(path))} {name}{then}"
                )
        return None

    def unpublished_copies(self) -> dict[str, str]:
        """Return what to do about adapters that were copied into the registry by hand, by name."""
        names = (path.name for path in _entries(self.root) if is_name(path.name) and _real(path))
        return {
            name: told
            for name in sorted(names)
            if (told := self.unpublished_copy(name)) is not None
        }

    def verify(self, ref: str | AdapterRef) -> AdapterVersion:
        """Read every byte of a version; raises AdapterError for the first problem."""
        version = self.resolve(ref)
        recorded = version.metadata["files"]
        mend = f"publish it again and remove this one: rayfin adapters rm {version.ref}"
        with storage_errors(f"adapter '{version.ref}'"):
            files = list_files(version.path)
            files.pop(METADATA)
            for name in sorted(files.keys() ^ recorded.keys()):
                state = "is missing" if name in recorded else "was not published with it"
                raise AdapterError(f"adapter '{version.ref}': {name} {state}; {mend}")
            inspect_files(version.path, files)
            for name, digest in digest_files(files).items():
                if digest != recorded[name]:
                    raise AdapterError(
                        f"adapter '{version.ref}': {name} changed since it was published; {mend}"
                    )
        return version

    def list(self) -> tuple[AdapterVersion, ...]:
        """Return all readable versions, by name and number."""
        return tuple(self._read_all()[0])

    def base_change_warning(self, version: AdapterVersion) -> str | None:
        """Return a warning if a new latest version has another base than the version before it.

        None where the base is the same or unknown, and where `version` is not the latest.
        """
        numbers = self.versions(version.name)
        older = [number for number in numbers if number < version.version]
        if not older or numbers[-1] != version.version:
            return None
        try:
            before = self._read(version.name, older[-1])
        except (AdapterError, FileNotFoundError):
            return None
        if version.base is None or before.base is None or version.base.is_same(before.base):
            return None
        return (
            f"'{version.name}' is {version.ref} from now on, whose base is {version.base}, and "
            f"{before.ref} has {before.base}: a deployment of that base refuses it; give each base "
            f"a name of its own (and here: rayfin adapters rm {version.ref}), or ask for the other "
            f"by an alias (rayfin adapters promote {before.ref} --alias prod)"
        )

    def _directory(self, name: str) -> Path:
        path = self.root / check_name(name)
        if path.is_symlink():
            raise AdapterError(f"'{path}' is a link; put the adapter's directory itself there")
        return path

    def _numbered(self, name: str) -> dict[int, Path]:
        """Return the directory of each version, published or not."""
        return {
            version: path
            for path in _entries(self._directory(name))
            if (version := parse_version(path.name)) is not None and _real(path)
        }

    def _read(
        self, name: str, version: int, aliases: Mapping[str, int] | None = None
    ) -> AdapterVersion:
        """Read a version; raises FileNotFoundError where there is none."""
        path = self._directory(name) / str(version)
        if path.is_symlink():
            raise AdapterError(f"'{path}' is a link; put the version's directory itself there")
        metadata = read_json(path / METADATA)
        peft_type, files = metadata.get("peft_type"), metadata.get("files")
        if not isinstance(peft_type, str) or not are_digests(files):
            raise AdapterError(
                f"'{path / METADATA}' lacks peft_type, or digests of the files, as one that was "
                f"written by hand; publish them with rayfin adapters add {path} {name}, and remove "
                f"this one with rayfin adapters rm {name}@{version}"
            )
        aliases = self.aliases(name) if aliases is None else aliases
        held = sorted(alias for alias, at in aliases.items() if at == version)
        base_model = metadata.get("base_model")
        return AdapterVersion(name, version, path, metadata, peft_type, base_model, tuple(held))

    def _read_aliases(self, name: str) -> Aliases:
        path = self._directory(name) / ALIASES
        try:
            value = read_json(path)
        except FileNotFoundError:
            value = Aliases(name).as_json(None)
        try:
            aliases = Aliases.from_json(name, value)
        except (AdapterError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterError(
                f"'{path}' is damaged ({error}); restore it, or delete it and promote again"
            ) from error
        # A publisher that was killed after its rename has used the number all the same.
        return replace(aliases, newest=max(aliases.newest, *self._numbered(name), 0))

    def _target(self, ref: AdapterRef) -> int:
        if ref.version is not None:
            return ref.version
        if ref.alias is not None and ref.alias != LATEST and self.versions(ref.name):
            return self._read_aliases(ref.name).target(ref.alias)
        versions = self.versions(ref.name)
        if not versions:
            raise self._unknown(ref.name)
        return versions[-1]

    def _missing(self, ref: AdapterRef, version: int) -> AdapterError:
        versions = self.versions(ref.name)
        if not versions:
            return self._unknown(ref.name)
        wanted = "" if ref.version == version else f" (version {version})"
        known = ", ".join(map(str, versions))
        return AdapterError(
            f"adapter '{ref}'{wanted} is not in '{self.root}'; versions of '{ref.name}': {known}"
        )

    def _unknown(self, name: str) -> AdapterError:
        if (told := self.unpublished_copy(name)) is not None:
            return AdapterError(f"adapter '{name}': {told}")
        self.require()
        names = self.names()
        known = f"adapters: {', '.join(names[:20])}" if names else "it is empty"
        return AdapterError(
            f"adapter '{name}' is not in '{self.root}'{did_you_mean(name, names)}; {known}. "
            f"Publish one with: rayfin sweep publish.name={name}, or rayfin adapters add DIR {name}"
        )


def _real(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _entries(directory: Path) -> tuple[Path, ...]:
    """Return the entries of a directory, none where it is missing."""
    with storage_errors(f"'{directory}'"):
        try:
            return tuple(directory.iterdir())
        except FileNotFoundError:
            return ()
