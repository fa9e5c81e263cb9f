"""Why a Ray of our own did not start, in one line; what was written about it, in a file."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import psutil

from rayfin.paths import cache_dir, write_text

_REASONS = 3
_LOG_CHARACTERS = 5000
_LEAST_DISK = _LEAST_MEMORY = 10**9
_LEAST_FILES = 1024
_OTHER = "set RAY_TMPDIR to another directory, with a short name and 1 GB free"
_SOCKET = 107
"""The most bytes of a socket's path on Linux."""
_RAYS_SOCKET = f"/ray/session_2026-11-30_04-55-04_537709_{os.getpid()}/sockets/plasma_store"


def why_no_start(error: BaseException) -> str:
    """Returns a line: what Ray raised, where the rest is, the likeliest reasons and remedies.

    The pages of C++ stacks that Ray's programs leave go to the file.
    """
    what = " ".join(str(error).split()) or type(error).__name__
    reasons = "; ".join(f"({n}) {r}" for n, r in enumerate(islice(_reasons(), _REASONS), 1))
    return (
        f"Ray did not start on this machine: {what if len(what) <= 150 else what[:147] + '...'}; "
        f"log: {_log(error)}; likeliest reasons: {reasons}"
    )


def _temporary() -> Path:
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())


def certain_reasons() -> Iterator[str]:
    """Returns what is wrong with this machine or shell, and would be another time."""
    directory = _temporary()
    if len(os.fsencode(directory)) + len(_RAYS_SOCKET) > _SOCKET:
        yield f"the name of '{directory}' is too long for Ray's sockets: {_OTHER}"
    free = 0
    try:
        with tempfile.TemporaryFile(dir=directory):
            free = shutil.disk_usage(directory).free
    except OSError as error:
        yield f"'{directory}' can't be written ({error.strerror or error}): {_OTHER}"
    else:
        if free < _LEAST_DISK:
            yield f"{free / 1e9:.1f} GB of disk are free under '{directory}': {_OTHER}"
    for name, option, least in (
        ("RLIMIT_AS", "-v unlimited", psutil.virtual_memory().total),
        ("RLIMIT_FSIZE", "-f unlimited", _LEAST_DISK),
        ("RLIMIT_NOFILE", "-n 65536", _LEAST_FILES),
    ):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY and limit < least:
            yield f"this shell's limit {name} is {limit}: raise it with `ulimit {option}`"


def _reasons() -> Iterator[str]:
    """Returns what is wrong for certain first, then what Ray is known to stop at."""
    yield from certain_reasons()
    memory = psutil.virtual_memory().available
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    told = {
        f"too little memory, {memory / 1e9:.1f} GB are available: end what takes the rest": (
            memory < _LEAST_MEMORY
        ),
        f"a busy machine, {load:.1f} processes for {cores} processors: try again later": (
            load > 2 * cores
        ),
    }
    yield from sorted(told, key=told.__getitem__, reverse=True)
    yield f"files that a Ray of another user left in '{_temporary() / 'ray'}': {_OTHER}"


def _log(error: BaseException) -> str:
    """Writes what Ray raised and logged; returns the file's path, or why there is none."""
    at = datetime.now(UTC)
    parts = ["".join(traceback.format_exception(error))]
    root = _temporary() / "ray"
    sessions = sorted(root.glob(f"session_*_{os.getpid()}")) if root.is_dir() else []
    for path in sorted((sessions[-1] / "logs").glob("*")) if sessions else []:
        with suppress(OSError):  # Ray is ending, and may take them away
            if path.suffix in (".err", ".out", ".log"):
                end = path.read_text("utf-8", errors="replace").rstrip()[-_LOG_CHARACTERS:]
                parts += [f"--- the end of {path}\n{end}\n"] * bool(end)
    path = cache_dir() / "logs" / f"ray-{at:%Y%m%d-%H%M%S}-{os.getpid()}.log"
    try:
        write_text(path, "\n".join(parts))
    except OSError as failure:
        return f"none, '{path.parent}' can't be written ({failure.strerror})"
    return str(path)
