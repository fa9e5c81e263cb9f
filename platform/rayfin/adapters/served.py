"""A registry that others are served from: one that isn't there is no empty one."""

from __future__ import annotations

from rayfin.adapters.catalog import Catalog
from rayfin.adapters.files import storage_errors
from rayfin.errors import StorageError


class ServedCatalog(Catalog):
    """A catalog that raises StorageError where its registry has gone, as with a disk.

    Whoever serves makes the directory once (`make`): from then on there always is one.
    """

    _has_lock = False

    def make(self) -> None:
        with storage_errors(f"registry '{self.root}'"):
            self.root.mkdir(parents=True, exist_ok=True)

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
        """Raises StorageError where the registry isn't there."""
        with storage_errors(f"registry '{self.root}'"):
            there = self.root.is_dir()
            # Publishing leaves this file. An empty directory in its place is where a disk was.
            lock = (self.root / ".lock").exists()
        self._has_lock = self._has_lock or lock
        if not there or lock < self._has_lock:
            raise StorageError(
                f"registry '{self.root}' is not there; mount its disk, or put it back: what was "
                "loaded before stays"
            )
