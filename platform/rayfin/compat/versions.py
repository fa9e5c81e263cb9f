"""Versions of other packages with which rayfin serves, but does not train."""

from __future__ import annotations

from importlib import metadata

from rayfin.errors import DependencyError

TRAINS_WITH = (5, 23)
"""Transformers' minor version whose Trainer rayfin extends; vLLM brings an older one."""


def check_trainer() -> None:
    """Raise DependencyError where the installed Transformers is too old to train with.

    It is not imported for that. One that is missing is left to whoever imports it.
    """
    try:
        installed = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return
    major, _, rest = installed.partition(".")
    minor = rest.partition(".")[0]
    if major.isdigit() and minor.isdigit() and (int(major), int(minor)) < TRAINS_WITH:
        needed = ".".join(map(str, TRAINS_WITH))
        raise DependencyError(
            f"transformers {installed} is enough to serve, but training needs {needed}; run, in an "
            f"environment without vLLM: pip install 'transformers=={needed}.*'"
        )
