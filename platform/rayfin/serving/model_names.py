"""Resolve the `model` of a request to the adapter version that answers it.

The registry is the desired state: what it says is remembered here for `MAX_AGE` seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rayfin.adapters import LATEST, AdapterRef, AdapterVersion, Catalog
from rayfin.adapters.files import FULL
from rayfin.adapters.ref import is_name
from rayfin.errors import AdapterError, AdapterNotFound, ConfigError, did_you_mean
from rayfin.serving.engine.request import AdapterSource
from rayfin.serving.public_messages import PublicMessages

MAX_AGE = 1.0
"""Seconds that a name's version is remembered."""

_MAX_REMEMBERED = 4096
_LONGEST = 512
_SHOWN = 20
_RENAME = "set deployment.served_model_name to another name, and serve again"


@dataclass(frozen=True)
class ResolvedModel:
    """The model that answers: one adapter version, or the base model (no source and no version)."""

    answer_name: str
    """`support@3`, or the base's name."""
    source: AdapterSource | None = None
    version: AdapterVersion | None = None

    @property
    def trial_id(self) -> str | None:
        """Return the trial of the history that made the version, where its publisher says so."""
        found = None if self.version is None else self.version.metadata.get("trial_id")
        return found if isinstance(found, str) else None

    @property
    def adapter(self) -> str | None:
        """Return the adapter's name; None is the base model."""
        return None if self.version is None else self.version.name


@dataclass(frozen=True)
class Refusal:
    """The reason why a deployment won't answer with a version."""

    what: str
    """What the version is, in a few words, such as `of another base`."""
    error: AdapterError


@dataclass(frozen=True)
class RegistryListing:
    """The registry as a deployment sees it: every adapter's latest version, and those that aliases
    point to, by name and number."""

    served: tuple[ResolvedModel, ...]
    refused: Mapping[AdapterVersion, Refusal]
    """Versions that this deployment can't answer with, as far as their settings tell."""


class ModelNames:
    """Resolves what `model` may be: the base's name, `<adapter>`, `<adapter>@<version or alias>`,
    or `<base>:` before either.

    A bare adapter name is its latest version. The base's name is the base's alone: an adapter that
    has it is refused. May be used by many threads; `clock` gives seconds.
    """

    def __init__(
        self,
        catalog: Catalog,
        base_name: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        places: Mapping[str, str] | None = None,
        refusal: Callable[[AdapterVersion], Refusal | None] = lambda _: None,
    ) -> None:
        """`places` are as in `PublicMessages`, beside the registry's. `refusal` says why the engine
        would refuse a version, as far as its settings tell.
        """
        self.catalog, self.base_name = catalog, base_name
        self.public = PublicMessages({str(catalog.root): "", **(places or {})})
        self._refusal, self._base_places = refusal, frozenset(places or {})
        self._clock = clock
        self._base = ResolvedModel(base_name)
        self._held: dict[AdapterRef, tuple[float, ResolvedModel]] = {}
        # Walks of the whole registry, one at a time: who waits for one has its result.
        self._walking = threading.Lock()
        self._listed: tuple[float, RegistryListing] | None = None
        self._known: tuple[float, tuple[str, ...]] | None = None

    def check(self) -> None:
        """Raises ConfigError where an adapter has the base's name: no request could tell them
        apart, and no API key.
        """
        if not is_name(self.base_name):
            return
        for number in self.catalog.versions(self.base_name):
            try:
                version = self.catalog.resolve(AdapterRef(self.base_name, version=number))
            except AdapterError:
                continue  # it can't answer to anything
            if version.peft_type != FULL:
                raise ConfigError(
                    f"deployment.served_model_name: the base is called '{self.base_name}', as "
                    f"adapter '{version.ref}' is; {_RENAME}"
                )

    def parse(self, model: str) -> AdapterRef | None:
        """Return the adapter that `model` asks for, None for the base; opens no file.

        Raises AdapterNotFound for another base, and for what no adapter can be called.
        """
        if model == self.base_name:
            return None
        prefix = f"{self.base_name}:"
        rest = model.removeprefix(prefix) if model.startswith(prefix) else model
        base, colon, name = rest.rpartition(":")
        if colon:
            raise AdapterNotFound(
                f"model '{_short(model)}' asks for base '{_short(base)}', and '{self.base_name}' "
                f"is the one that is served; use '{prefix}{_short(name)}'"
            )
        try:
            # Longer than any name, whose repetition in a message would help nobody.
            return AdapterRef.parse(rest[:_LONGEST])
        except AdapterError as error:
            raise AdapterNotFound(
                f"model {_short(model)!r} is neither the base '{self.base_name}' nor a name that "
                "an adapter can have; use NAME, NAME@VERSION or NAME@ALIAS"
            ) from error

    def held(self, model: str) -> ResolvedModel | None:
        """Return what `resolve` would, where that takes no reading of the registry; else None."""
        ref = self.parse(model)
        if ref is None:
            return self._base
        read_at, named = self._held.get(ref, (0.0, None))
        return named if named is not None and self._fresh(read_at) else None

    def resolve(self, model: str, *, anew: bool = False) -> ResolvedModel:
        """Return who answers a request for `model`; `anew` looks at the registry in any case.

        Raises AdapterNotFound for what isn't there, and AdapterError for what is there and can't
        answer: a damaged version, or a full fine-tune.
        """
        if not anew and (held := self.held(model)) is not None:
            return held
        ref = self.parse(model)
        if ref is None:
            return self._base
        self._held.pop(ref, None)
        now = self._clock()
        named = self._read_registry(ref)
        if len(self._held) >= _MAX_REMEMBERED:
            self._held.clear()
        self._held[ref] = (now, named)
        return named

    def list(self) -> RegistryListing:
        """Return every adapter's latest version and those that aliases point to, but for what can't
        be read.
        """
        with self._walking:
            held = self._listed
            if held is None or not self._fresh(held[0]):
                # The base itself may be a full fine-tune of this registry: it is no adapter.
                versions = [
                    each
                    for each in self.catalog.list()
                    if each.aliases and str(each.path) not in self._base_places
                ]
                refused = {each: why for each in versions if (why := self._why_not(each))}
                served = tuple(_named(each) for each in versions if each not in refused)
                # Afterwards: of a large registry the walk itself takes longer than MAX_AGE.
                held = self._listed = (self._clock(), RegistryListing(served, refused))
        return held[1]

    def missing(self, ref: AdapterRef) -> AdapterNotFound | None:
        """Returns why `ref` is not in the registry; None where it is, even if it can't answer."""
        versions = self.catalog.versions(ref.name)
        if not versions:
            return self._unknown(ref)
        if ref.version is not None and ref.version not in versions:
            known = ", ".join(map(str, versions[-_SHOWN:]))
            return AdapterNotFound(
                f"adapter '{ref.name}' has no version {ref.version}; it has {known}"
            )
        if ref.alias is not None and ref.alias != LATEST:
            aliases = self.catalog.aliases(ref.name)
            if (dangling := aliases.get(ref.alias)) is not None and dangling not in versions:
                known = ", ".join(map(str, versions[-_SHOWN:]))
                return AdapterNotFound(
                    f"alias '{ref.alias}' of adapter '{ref.name}' points to version {dangling}, "
                    f"which is not there any more; it has {known}: promote one of them"
                )
            if ref.alias not in aliases:
                return AdapterNotFound(
                    f"adapter '{ref.name}' has no alias '{ref.alias}'"
                    f"{did_you_mean(ref.alias, aliases)}; it has {', '.join(aliases)}"
                )
        return None

    def _fresh(self, read_at: float) -> bool:
        return self._clock() - read_at < MAX_AGE

    def _why_not(self, version: AdapterVersion) -> Refusal | None:
        """Return why a version can't answer beside this base; None where it can, as far as its
        settings tell.
        """
        if version.peft_type == FULL:
            error = AdapterError(
                f"adapter '{version.ref}' is a full fine-tune, a whole model that can't share the "
                f"base '{self.base_name}'; serve it as the base of its own: "
                "rayfin serve model.name=DIRECTORY"
            )
            return Refusal("fully fine-tuned, and so bases of their own", error)
        if version.name == self.base_name:
            error = AdapterNotFound(
                f"adapter '{version.ref}' is called as the base is, which alone answers to "
                f"'{self.base_name}'; {_RENAME}, or publish it under another name"
            )
            return Refusal("called as the base is", error)
        return self._refusal(version)

    def _read_registry(self, ref: AdapterRef) -> ResolvedModel:
        if not self.catalog.versions(ref.name):
            raise self._unknown(ref)
        try:
            version = self.catalog.resolve(ref)
        except AdapterError as error:
            if (missing := self.missing(ref)) is not None:
                raise missing from error
            raise
        if (refusal := self._why_not(version)) is not None:
            raise refusal.error
        return _named(version)

    def _unknown(self, ref: AdapterRef) -> AdapterNotFound:
        if (told := self.catalog.unpublished_copy(ref.name)) is not None:
            return AdapterNotFound(f"adapter '{ref.name}': {self.public(told)}")
        # What is known may be a second old, and the name itself be gone since.
        near = did_you_mean(ref.name, {*self._known_names()} - {ref.name})
        return AdapterNotFound(
            f"adapter '{ref.name}' is not served here{near}; GET /v1/models lists those that are"
        )

    def _known_names(self) -> tuple[str, ...]:
        with self._walking:
            held = self._known
            if held is None or not self._fresh(held[0]):
                names = self.catalog.names()
                held = self._known = (self._clock(), names)
        return held[1]


def _named(version: AdapterVersion) -> ResolvedModel:
    return ResolvedModel(version.ref, AdapterSource(version.ref, version.path), version)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
