"""The aliases of one adapter, where each pointed before, and the highest version ever used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rayfin.adapters.ref import LATEST, check_alias, is_version
from rayfin.errors import AdapterError, did_you_mean

_REMEMBERED = 20


@dataclass(frozen=True)
class Aliases:
    """The content of `aliases.json`; each change returns a new object.

    `latest` is not in `targets`, as it follows the versions.
    """

    name: str
    targets: Mapping[str, int] = field(default_factory=dict)
    """The version that each alias points to."""
    history: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The versions that each alias pointed to before, the oldest first."""
    newest: int = 0
    """The highest version ever published; no number is reused, not even after a removal."""

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> Aliases:
        """Parse what `as_json` returns; raises ValueError for anything else."""
        targets = {check_alias(alias): _version(at) for alias, at in value["aliases"].items()}
        targets.pop(LATEST, None)
        history = {
            check_alias(alias): tuple(_version(at) for at in versions)
            for alias, versions in value["history"].items()
        }
        newest = value["newest"]
        return cls(name, targets, history, _version(newest) if newest else 0)

    def as_json(self, latest: int | None) -> dict[str, Any]:
        """Return the content of `aliases.json`; `latest` is the newest version, if there is one."""
        newest = {} if latest is None else {LATEST: latest}
        return {
            "aliases": {**self.targets, **newest},
            "history": {alias: list(versions) for alias, versions in self.history.items()},
            "newest": self.newest,
        }

    def target(self, alias: str) -> int:
        """Return the version that an alias points to; raises AdapterError for an unknown alias."""
        if alias not in self.targets:
            known = sorted([*self.targets, LATEST])
            raise AdapterError(
                f"adapter '{self.name}' has no alias '{alias}'{did_you_mean(alias, known)}; "
                f"aliases: {', '.join(known)}. "
                f"Make one with: rayfin adapters promote {self.name}@VERSION --alias {alias}"
            )
        return self.targets[alias]

    def promote(self, alias: str, version: int) -> Aliases:
        """Point an alias to a version, remembering the version it pointed to before."""
        history = dict(self.history)
        if alias in self.targets:
            history[alias] = (*history.get(alias, ()), self.targets[alias])[-_REMEMBERED:]
        return replace(self, targets={**self.targets, alias: version}, history=history)

    def rollback(self, alias: str) -> Aliases:
        """Point an alias back to the version before; raises AdapterError where there is none."""
        current, before = self.target(alias), self.history.get(alias, ())
        if not before:
            raise AdapterError(
                f"'{self.name}@{alias}' has no earlier target than version {current}; choose one "
                f"with: rayfin adapters promote {self.name}@VERSION --alias {alias}"
            )
        return replace(
            self,
            targets={**self.targets, alias: before[-1]},
            history={**self.history, alias: before[:-1]},
        )

    def without(self, alias: str) -> Aliases:
        """Remove an alias and its past; raises AdapterError for an unknown alias."""
        self.target(alias)
        return replace(
            self,
            targets={key: at for key, at in self.targets.items() if key != alias},
            history={key: past for key, past in self.history.items() if key != alias},
        )


def _version(value: Any) -> int:
    if not is_version(value):
        raise ValueError(f"{value!r} is no version number")
    return int(value)
