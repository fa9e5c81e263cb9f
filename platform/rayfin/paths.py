"""Where things lie, and writing them whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfin.errors import StorageError


def cache_dir() -> Path:
    """`$RAYFIN_CACHE` or `~/.cache/rayfin`: converted models, and what else can be made again."""
    if configured := os.environ.get("RAYFIN_CACHE"):
        return Path(configured).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser().resolve() / "rayfin"


@dataclass(frozen=True)
class Storage:
    """Every path under one `storage` directory; nothing else in rayfin joins these names."""

    root: Path

    @classmethod
    def open(cls, location: str | Path) -> Storage:
        """The storage at `location`, made if missing; StorageError where it can't be written."""
        text = str(location)
        if "://" in text:
            raise StorageError(
                f"storage: '{text}' is a URL; this version writes to directories only. "
                "Mount the bucket and give its path"
            )
        root = Path(text).expanduser().resolve()
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=root, prefix=".write-test-"):
                pass
        except OSError as error:
            raise StorageError(
                f"storage: '{root}' can't be written ({error.strerror or error}); "
                "give a directory you may write to, storage=DIR"
            ) from error
        return cls(root)

    @property
    def history_url(self) -> str:
        return f"sqlite:///{self.root / 'history.sqlite'}"

    @property
    def adapters(self) -> Path:
        return self.root / "adapters"

    @property
    def ray(self) -> Path:
        """Ray Tune's own files; nothing in rayfin reads them back."""
        return self.root / "ray"

    def sweep(self, sweep_id: str) -> Path:
        return self.root / "sweeps" / sweep_id

    def trial(self, sweep_id: str, trial_id: str) -> Path:
        return self.sweep(sweep_id) / "trials" / trial_id


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path`; on success it is renamed over `path`, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files private; what is published should follow the user's umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def write_directory_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling directory, renamed to `path` on success; `path` must not exist.

    Where another process published `path` first, theirs stays and FileExistsError is raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            temporary.rename(path)
        except OSError as error:
            if path.exists():
                raise FileExistsError(f"{path} exists") from error
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
