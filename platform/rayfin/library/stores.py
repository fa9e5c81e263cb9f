"""Where results lie: the history of trials, and the registry of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayfin.adapters import Registry
    from rayfin.config import Config
    from rayfin.history import History


def open_history(storage: str | Path = "./runs", *, history: str | None = None) -> History:
    """Open the history of all trials, to be read or added to; close it, or use it in a `with`.

    `storage` is the directory of the runs, whose history is an SQLite file; `history` is the URL of
    another one, as the setting of that name has it. Nothing is made: raises HistoryError where no
    history has been begun, or it can't be read.
    """
    from rayfin.history import History
    from rayfin.paths import Storage

    return History.open(history or Storage.at(str(storage)).history_url, create=False)


def open_registry(storage: str | Path = "./runs") -> Registry:
    """Return the registry of adapters that lies in `storage`, a directory.

    It reads the directory anew at every call. A registry that isn't there has no adapters, until
    the first one is published. Raises StorageError for a bucket, which can't have one.
    """
    from rayfin.adapters import Registry
    from rayfin.paths import Storage

    return Registry(Storage.at(str(storage)).adapters)


def history_url(config: Config) -> str:
    """Return the URL of the configuration's history, without making anything."""
    from rayfin.paths import Storage

    # Not Storage.open, which makes the directory.
    return config.history or Storage.at(config.storage).history_url


def begun_history(config: Config) -> History | None:
    """Open the configuration's history; None where none has been begun, and none is made."""
    from rayfin.history import History
    from rayfin.history.connect import parse_url

    url = history_url(config)
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(str(parsed.database)).exists():
        return None
    return History.open(url, create=False)
