"""Identify base models by their content where it is known, else by their names."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass

from rayfin.config.schema import ModelConfig
from rayfin.errors import ModelError
from rayfin.models.facts import content_identity, identity
from rayfin.models.source import is_hub, model_directory

BASE_IDENTITY = "base_identity"
"""The key of rayfin.json for the `Base.identities` of an adapter's base."""
BASE_BITS = "base_quantization_bit"
"""The key of rayfin.json for the bits of the quantised base to which an adapter is bound."""

_CONTENT = "local@"
# Where the hub's client keeps what it downloaded: models--OWNER--NAME/snapshots/COMMIT.
_SNAPSHOT = re.compile(r"(?:.*/)?models--([^/]+?)(?:--([^/]+))?/snapshots/([^/]+)/*")
MAX_NAME = 4096
"""The longest name or identity of a base that is read, as it may be any text."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# The same weights, quantised before they were uploaded (Unsloth's naming).
_QUANTISED = re.compile(r"(?:-unsloth)?-bnb-4bit$")


@dataclass(frozen=True)
class Base:
    """The identity of a base model, as a deployment has it or as an adapter names it."""

    name: str
    """The base's name, or the path of its directory, as configured or written into the adapter."""
    identities: tuple[str, ...] = ()
    """The identities of its content that `rayfin.models.identity` returns: `name@version` for a
    bundled model, `id@commit` for a hub model, and `local@…`, a digest of the files."""
    directories: tuple[str, ...] = ()
    """The base's directories on this machine."""

    def is_same(self, other: Base) -> bool:
        """Whether both are the same model, so that an adapter of one fits the other.

        They are the same where any identity that both have is equal, and different where all
        differ. Where one side has no identity of its content, a common name decides: that of a
        bundled model, a hub id (also in a snapshot's path), or the whole path of a directory.
        `NAME-bnb-4bit` and NAME of one owner on the hub are the same model, whose files differ.
        """
        if set(self.identities) & set(other.identities):
            return True
        if self._contents and other._contents:
            return bool(self._hub_ids & other._hub_ids) and self._quantised != other._quantised
        return bool(self._hub_ids & other._hub_ids or self._names & other._names)

    def __str__(self) -> str:
        """Return the name, with an identity that tells it from another base of that name."""
        told = next(iter([*sorted(self._contents), *self.identities]), "")
        return f"'{self.name}' ({told})" if told else f"'{self.name}'"

    @property
    def _contents(self) -> set[str]:
        return {one for one in self.identities if one.startswith(_CONTENT)}

    @property
    def _called(self) -> list[str]:
        """All texts that may be a hub id or the path of a snapshot."""
        named = [one.partition("@")[0] for one in self.identities if not one.startswith(_CONTENT)]
        return [self.name, *self.directories, *named]

    @property
    def _hub_ids(self) -> set[str]:
        """The hub ids in lower case, without the suffix of a quantised model.

        The hub does not distinguish case either.
        """
        found = (hub_id(one) for one in self._called)
        return {_QUANTISED.sub("", one.casefold()) for one in found if one}

    @property
    def _quantised(self) -> bool:
        return any(_QUANTISED.search((hub_id(one) or "").casefold()) for one in self._called)

    @property
    def _names(self) -> set[str]:
        """The names of bundled models, and whole paths in normal form."""
        names = (one for one in (self.name, *self.directories) if one and hub_id(one) is None)
        return {posixpath.normpath(one) for one in names if "/" not in one or one[0] == "/"}


def base_of(config: ModelConfig) -> Base:
    """Return the identity of a configured base model; raises ModelError."""
    directory = model_directory(config, weights=False)
    found = [identity(config)]
    if (snapshot := _SNAPSHOT.fullmatch(str(directory))) is not None:
        found.append(f"{hub_id(str(directory))}@{snapshot[3]}")
    try:
        found.append(content_identity(directory))
    except ModelError:
        if not is_hub(config):  # of which the weights may not be here yet
            raise
    named = config.name if is_hub(config) or config.name == found[0].partition("@")[0] else None
    return Base(named or str(directory), tuple(dict.fromkeys(found)), (str(directory),))


def hub_id(name: str) -> str | None:
    """Return the hub id that `name` is, or that the path of a downloaded snapshot has, or None."""
    if len(name) > MAX_NAME:
        return None
    if (snapshot := _SNAPSHOT.fullmatch(name)) is not None:
        owner, model = snapshot[1], snapshot[2]
        return owner if model is None else f"{owner}/{model}"
    return name if _HUB_ID.fullmatch(name) else None
