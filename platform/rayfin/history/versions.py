"""The versions of the packages that a result depends on."""

from __future__ import annotations

import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from rayfin.version import __version__

PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "optuna",
    "deepspeed",
)


@lru_cache(maxsize=1)
def package_versions() -> dict[str, str]:
    """Return the versions of rayfin, Python, and each installed package of PACKAGES, by name."""
    found = {"rayfin": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
