"""The registry as a deployment reads it: one that disappears is an error, not an empty one."""

from __future__ import annotations

import stat

from rayfin.adapters.catalog import LOCK, Catalog
from rayfin.adapters.files import storage_errors
from rayfin.errors import StorageError


class ServedCatalog(Catalog):
    """A catalog that raises StorageError where its registry has disappeared, with its disk say.

    A registry that exists has a lock file, which every writer and `make` create. A directory
    without one is taken for the mount point of a missing disk.
    """

    def make(self) -> None:
        """Create the registry where there is none yet, before it is served."""
        with storage_errors(f"registry '{self.root}'"):
            self.root.mkdir(parents=True, exist_ok=True)
            lock = self.root / LOCK
            if not lock.exists():  # a registry that may only be read has one, or needs one
                lock.touch()

    def names(self) -> tuple[str, ...]:
        with storage_errors(f"registry '{self.root}'"):
            found = super().names()
        self.check()
        return found

    def versions(self, name: str) -> tuple[int, ...]:
        with storage_errors(f"registry '{self.root}'"):
            found = super().versions(name)
        if not found:
            self.check()
        return found

    def check(self) -> None:
        """Raise StorageError where the registry does not exist."""
        stays = "what was loaded before stays"
        try:
            with storage_errors(f"registry '{self.root}'"):
                there = stat.S_ISDIR(self.root.stat().st_mode)
                if there and (self.root / LOCK).exists():
                    return
        except StorageError as error:
            cause = error.__cause__
            if not isinstance(cause, FileNotFoundError | NotADirectoryError):
                raise
            raise StorageError(
                f"registry '{self.root}' is not there ({cause.strerror}); mount its disk, or put "
                f"it back: {stays}"
            ) from cause
        missing = (
            f"has no {LOCK}, as an empty directory where a disk was mounted, or a copy without it: "
            "that registry is not there; mount its disk, or after a copy write to it by any "
            "`rayfin adapters` command, such as promote"
            if there
            else "is no directory; put the registry back"
        )
        raise StorageError(f"registry '{self.root}' {missing}: {stays}")
