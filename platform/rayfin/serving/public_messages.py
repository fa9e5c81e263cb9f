"""Word errors for clients of the API, without the server's paths and commands."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from pathlib import PurePath

from rayfin.redaction import printable, redact

log = logging.getLogger(__name__)

# An absolute path in quotes; one that was cut short has an ellipsis for the second.
_QUOTED = re.compile(r"'((?:~|\.\.?)?/[^'…]*)(?='|…)")
# One without: two components at least, and no path of the API.
_BARE = re.compile(r"(?<![\w'./:~-])~?(?:/(?!v1/)[\w.@+~-]+){2,}/?")
_SNAPSHOT = re.compile(r"models--(.+)/snapshots/[^/]+/*$")
_COMMAND = re.compile(r"\brayfin (?:adapters|chat|serve|sweep|train)\b")
_REMEDY = "whoever runs the server finds the remedy in its log"
_MOST = 1024


class PublicMessages:
    """Rewords errors for clients, and logs each once as it was; thread-safe.

    What is withheld is for whoever runs the server, who can use a path and run a command.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        """Reword by `places`: directory on this machine -> what clients call it; empty: its own
        contents.
        """
        self._places = sorted(places.items(), key=lambda item: -len(item[0]))
        self._lock = threading.Lock()
        self._logged: set[str] = set()

    def __call__(self, text: str) -> str:
        """Return `text` without paths of this machine and remedies that are commands here."""
        found = self.without_places(text)
        found = _QUOTED.sub(lambda path: f"'{_name(path[1])}", found)
        found = _BARE.sub(lambda path: _name(path[0]), found)
        parts = found.split("; ")
        kept = [part for part in parts if not _COMMAND.search(part)]
        if len(kept) < len(parts):
            found = "; ".join([*kept, _REMEDY])
        if found != text:
            self._log(text)
        return found

    def without_places(self, text: str) -> str:
        """Return `text` with the known directories by their names; what else is in it stays."""
        for place, name in self._places:
            text = text.replace(f"{place}/", f"{name}/" if name else "")
            text = text.replace(place, name or "registry")
        return text

    def _log(self, text: str) -> None:
        with self._lock:
            if text in self._logged:
                return
            if len(self._logged) >= _MOST:  # clients may make up any number of texts
                self._logged.clear()
            self._logged.add(text)
        log.warning("in full, for whoever runs this server: %s", printable(text))


class AvailabilityLog:
    """Logs when something that requests need goes away, and when it is back."""

    def __init__(self, what: str) -> None:
        self._what, self._lock, self._is_away = what, threading.Lock(), False

    def away(self, why: Exception) -> None:
        with self._lock:
            first, self._is_away = not self._is_away, True
        if first:
            cause = why.__cause__
            told = f" ({type(cause).__name__}: {cause})" if isinstance(cause, OSError) else ""
            log.warning("%s is away: %s", self._what, printable(redact(f"{why}{told}")))

    def over(self) -> None:
        with self._lock:
            was, self._is_away = self._is_away, False
        if was:
            log.warning("%s is back", self._what)


def _name(path: str) -> str:
    """Return a directory's name without its parents, as `ServeConfig.served_name` has it."""
    if (snapshot := _SNAPSHOT.search(path)) is not None:
        return snapshot[1].replace("--", "/")
    pure = PurePath(path)
    return pure.parent.name if pure.name.isdecimal() and pure.parent.name else pure.name
