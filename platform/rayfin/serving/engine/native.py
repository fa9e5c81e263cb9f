"""Compile the C kernels beside this module, once for a machine, and load them.

The environment variable `CC` names the compiler. Flags in `RAYFIN_CFLAGS` come after rayfin's own,
so that they prevail: `RAYFIN_CFLAGS="-O2 -ffp-contract=off"` compiles without fused multiply-add.
Each set of flags has a library of its own in the cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from rayfin.paths import cache_dir, write_whole

# Sums in any order, so that they are vectorised; NaN and infinity as always.
_FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC"),
    *("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"),
)
_SECONDS = 60.0


def compiler_flags() -> tuple[str, ...]:
    """Return the flags that the kernels are compiled with, those of `RAYFIN_CFLAGS` last.

    Raises OSError where a quotation mark in it is not closed.
    """
    own = os.environ.get("RAYFIN_CFLAGS", "")
    try:
        return (*_FLAGS, *shlex.split(own))
    except ValueError as error:
        raise OSError(f"RAYFIN_CFLAGS={own!r}: {error}; close the quotation mark") from error


@functools.cache
def library(name: str, **values: int) -> ctypes.CDLL:
    """Return `name`.c with `values` defined, compiled now or before; raises OSError."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if not compiler or shutil.which(compiler[0]) is None:
        raise OSError(f"there is no C compiler '{' '.join(compiler)}'; install one, or set CC")
    defined = tuple(f"-D{key}={value}" for key, value in values.items())
    # Without a runtime of its own it uses torch's, whose threads are there already. Where torch
    # has none by that name the library is not to be loaded, and one without threads is made.
    errors = []
    for threads in (("-fopenmp",), ()):
        try:
            return _open(_Build(name, compiler, (*compiler_flags(), *defined, *threads)))
        except OSError as error:
            errors.append(str(error))
    raise OSError("; ".join(errors))


class _Build:
    def __init__(self, name: str, compiler: list[str], flags: tuple[str, ...]) -> None:
        self.name, self.compiler, self.flags = name, compiler, flags
        self.source = Path(__file__).with_name(f"{name}.c")

    def into(self, path: Path) -> None:
        """Raises OSError where the compiler fails."""
        compiled = path.with_name(f"{path.name}.o")
        try:
            _run([*self.compiler, *self.flags, "-c", str(self.source), "-o", str(compiled)])
            _run([*self.compiler, "-shared", str(compiled), "-o", str(path), "-lm"])
        finally:
            compiled.unlink(missing_ok=True)

    @property
    def digest(self) -> str:
        version = _run([*self.compiler, "--version"]).partition("\n")[0]
        what = " ".join((platform.machine(), *self.compiler, version, *self.flags))
        sources = self.source.read_bytes() + self.source.with_name("native.h").read_bytes()
        return hashlib.sha256(sources + what.encode()).hexdigest()[:16]


def _open(build: _Build) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(_cached(build)))
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        # Not to be written, executed or trusted: a library of this process alone.
        with tempfile.TemporaryDirectory(prefix="rayfin-") as folder:
            path = Path(folder) / f"{build.name}.so"
            build.into(path)
            return ctypes.CDLL(str(path))


def _cached(build: _Build) -> Path:
    path = cache_dir() / "kernels" / f"{build.name}-{build.digest}.so"
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if not path.exists():
        with write_whole(path) as temporary:
            build.into(temporary)
        path.chmod(0o644)
    for place in (path.parent, path):
        status = place.stat()
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            raise OSError(f"others can write to {place}, and what lies there is executed")
    return path


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, check=True, capture_output=True, timeout=_SECONDS, encoding="utf-8",
            errors="replace",
        )  # fmt: skip
    except subprocess.SubprocessError as error:
        # Text, or bytes of a compiler that took too long.
        told = getattr(error, "stderr", None) or ""
        lines = (told if isinstance(told, str) else told.decode(errors="replace")).splitlines()
        said = [line.strip() for line in lines if line.strip()] or [str(error)]
        why = next((line for line in said if "error" in line), said[0])
        raise OSError(f"{command[0]} failed: {why}") from error
    return done.stdout
