"""Models that need no download: built once, in the cache, by the first process that needs one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from rayfin.errors import StorageError
from rayfin.models.smollm2 import WHEEL_VERSION, convert_smollm2
from rayfin.models.tiny import write_tiny
from rayfin.paths import cache_dir, write_directory_whole

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BundledModel:
    """A model that rayfin builds itself; `version` must change whenever its files would."""

    version: str
    build: Callable[[Path], None]
    notice: str | None = None


BUNDLED: Mapping[str, BundledModel] = MappingProxyType(
    {
        "smollm2-135m": BundledModel(
            WHEEL_VERSION, convert_smollm2, "converting SmolLM2-135M-Instruct once (about 15 s)"
        ),
        "tiny": BundledModel("1", write_tiny),
    }
)


def bundled_directory(name: str) -> Path:
    """Return the directory of a bundled model, built if missing.

    Raises StorageError where the cache can't be written.
    """
    from filelock import FileLock

    bundled = BUNDLED[name]
    target = cache_dir() / "models" / f"{name}-{bundled.version}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.is_dir():
                _make(bundled, target)
    except OSError as error:
        raise StorageError(
            f"the model cache '{target.parent}' can't be written ({error.strerror or error}); "
            "set RAYFIN_CACHE to a directory with 1 GB free"
        ) from error
    return target


def _make(bundled: BundledModel, target: Path) -> None:
    # The caller holds the lock, which ends with its process: no temporary here has a living owner.
    for abandoned in target.parent.glob(f".{target.name}-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    if bundled.notice:
        log.info("%s into %s", bundled.notice, target)
    with write_directory_whole(target) as temporary:
        bundled.build(temporary)
