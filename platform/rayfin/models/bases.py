"""The identity of base models: by their content where it is known, else by their names."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass

from rayfin.config.schema import ModelConfig
from rayfin.errors import ModelError
from rayfin.models.facts import content_identity, identity
from rayfin.models.source import is_hub, model_directory

BASE_IDENTITY = "base_identity"
"""The key of rayfin.json under which `Base.identities` of an adapter's base are written."""
BASE_BITS = "base_quantization_bit"
"""The key of rayfin.json that an adapter has which is exact over a base in so many bits alone."""

_CONTENT = "local@"
# Where the hub's client keeps what it downloaded: models--OWNER--NAME/snapshots/COMMIT.
_SNAPSHOT = re.compile(r"(?:.*/)?models--([^/]+?)(?:--([^/]+))?/snapshots/([^/]+)/*")
MAX_NAME = 4096
"""The longest name or identity of a base that is looked at; it may be anybody's text."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# The same weights, quantised before they were uploaded (Unsloth's naming).
_QUANTISED = re.compile(r"(?:-unsloth)?-bnb-4bit$")


@dataclass(frozen=True)
class Base:
    """A base model as a deployment has it, or as an adapter tells of its own."""

    name: str
    """The base's name as it was configured or written into the adapter; a directory's path."""
    identities: tuple[str, ...] = ()
    """Identities of its content, as `rayfin.models.identity` writes them: `name@version` of a
    bundled model, `id@commit` of a hub model, and `local@…`, a digest of the files."""
    directories: tuple[str, ...] = ()
    """The directories in which it lies on this machine."""

    def is_same(self, other: Base) -> bool:
        """Returns whether both are one model, so that an adapter of one is one of the other.

        They are one where any content that both know is equal, and two where all of it differs.
        Where one side knows of no content, they are one by a common name: a bundled model's, a
        hub id (in a snapshot's path, too), or the whole path of a directory. `NAME-bnb-4bit` and
        NAME of one owner of the hub are one model, whose files differ.
        """
        if set(self.identities) & set(other.identities):
            return True
        if self._contents and other._contents:
            return bool(self._hub_ids & other._hub_ids) and self._quantised != other._quantised
        return bool(self._hub_ids & other._hub_ids or self._names & other._names)

    def __str__(self) -> str:
        """Returns the name, with an identity that tells it from another base of that name."""
        told = next(iter([*sorted(self._contents), *self.identities]), "")
        return f"'{self.name}' ({told})" if told else f"'{self.name}'"

    @property
    def _contents(self) -> set[str]:
        return {one for one in self.identities if one.startswith(_CONTENT)}

    @property
    def _called(self) -> list[str]:
        """All texts that may be a hub id, or the path of a snapshot, which has one."""
        named = [one.partition("@")[0] for one in self.identities if not one.startswith(_CONTENT)]
        return [self.name, *self.directories, *named]

    @property
    def _hub_ids(self) -> set[str]:
        """The hub ids, as of the model before it was quantised, without regard to case.

        The hub does not distinguish case either.
        """
        found = (hub_id(one) for one in self._called)
        return {_QUANTISED.sub("", one.casefold()) for one in found if one}

    @property
    def _quantised(self) -> bool:
        return any(_QUANTISED.search((hub_id(one) or "").casefold()) for one in self._called)

    @property
    def _names(self) -> set[str]:
        """Bundled names, and whole paths in their normal form."""
        names = (one for one in (self.name, *self.directories) if one and hub_id(one) is None)
        return {posixpath.normpath(one) for one in names if "/" not in one or one[0] == "/"}


def base_of(config: ModelConfig) -> Base:
    """Returns the base model at hand, with all that identifies its content; raises ModelError."""
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
    """Returns the hub id that `name` is, or that a downloaded snapshot's path has, or None."""
    if len(name) > MAX_NAME:
        return None
    if (snapshot := _SNAPSHOT.fullmatch(name)) is not None:
        owner, model = snapshot[1], snapshot[2]
        return owner if model is None else f"{owner}/{model}"
    return name if _HUB_ID.fullmatch(name) else None
