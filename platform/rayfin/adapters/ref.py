"""References to adapters: `support`, `support@3`, `support@prod`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rayfin.config.schema import ADAPTER_NAME
from rayfin.errors import AdapterError

LATEST = "latest"
"""The alias that always points to the newest version, and can't be moved."""

_NAME = re.compile(ADAPTER_NAME)
# Nine digits are plenty, and int() of an endless number is not free.
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_NAME_RULE = "1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or digit"


def is_name(name: object) -> bool:
    """Whether `name` is allowed as the name of an adapter or alias."""
    # fullmatch, because `$` alone would let a trailing newline through.
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_name(name: str) -> str:
    """Return the name of an adapter if it is allowed, else raise AdapterError."""
    if not is_name(name):
        raise AdapterError(f"adapter name {name!r} is not allowed; use {_NAME_RULE}")
    return name


def check_alias(alias: str) -> str:
    """Return the name of an alias, `latest` included, if it is allowed, else raise AdapterError."""
    if not is_name(alias):
        raise AdapterError(f"alias {alias!r} is not allowed; use {_NAME_RULE}")
    if alias.isdigit():
        raise AdapterError(
            f"alias '{alias}' is not allowed: it reads as a version number; "
            "put a letter in it, such as 'prod'"
        )
    if alias.lower() == LATEST and alias != LATEST:
        raise AdapterError(f"alias '{alias}' is too close to '{LATEST}'; choose another name")
    return alias


def is_version(value: object) -> bool:
    """Whether a value is a version number: 1, 2, 3, …"""
    return type(value) is int and parse_version(str(value)) is not None


def parse_version(text: str) -> int | None:
    """Return the version number that a text spells (1, 2, 3, …), or None."""
    return int(text) if _VERSION.fullmatch(text) else None


@dataclass(frozen=True)
class AdapterRef:
    """The name of an adapter with a version number or an alias, or neither."""

    name: str
    version: int | None = None
    alias: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.alias is not None:
            check_alias(self.alias)
        if self.version is not None and self.alias is not None:
            raise AdapterError(
                f"'{self.name}' is asked for by version {self.version} and by alias "
                f"'{self.alias}'; give one of both"
            )
        if self.version is not None and not is_version(self.version):
            raise AdapterError(
                f"'{self.name}' has no version {self.version!r}; versions are 1, 2, 3, …"
            )

    @classmethod
    def parse(cls, text: str | AdapterRef) -> AdapterRef:
        """Parse `name`, `name@3` or `name@prod`; raises AdapterError for anything else."""
        if isinstance(text, AdapterRef):
            return text
        name, at, target = text.partition("@")
        check_name(name)
        if not at:
            return cls(name)
        if target.isdigit():
            version = parse_version(target)
            if version is None:
                raise AdapterError(
                    f"adapter '{text}': '{target}' is no version number; write NAME@3"
                )
            return cls(name, version=version)
        return cls(name, alias=target)

    def __str__(self) -> str:
        target = self.alias if self.version is None else self.version
        return self.name if target is None else f"{self.name}@{target}"
