"""A Ray of our own on this machine: on loopback alone, with a token of its own."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray

from rayfin.compat.ray import (
    clusters_allowed,
    clusters_variable,
    few_processes,
    read_settings_again,
)
from rayfin.errors import DependencyError, RayfinError
from rayfin.tuning import end_with_driver
from rayfin.tuning.no_start import certain_reasons, why_no_start

_END_SECONDS = 10.0
_STARTS = 3
_MODE, _TOKEN, _TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_CLUSTERS = clusters_variable()
_SETTINGS = {
    # Tune's workers need an environment of their own: those that Ray would start at once never fit,
    # and cost a second of both cores.
    "RAY_prestart_worker_first_driver": "0",
    # Nobody warns a Ray of our own that its machine is taken away: a process less for each group.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray then binds to loopback, see `clusters_variable`.
    _CLUSTERS: "0",
}


@contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    """Starts Ray with so many CPUs for the time of the block.

    Raises RayfinError where it doesn't start. Ray's own settings in the environment stay.
    """
    settings = dict(_SETTINGS)
    if not {_MODE, _TOKEN, _TOKEN_PATH} & os.environ.keys():
        # Left alone, Ray writes a token that all users of this machine may read into ~/.ray.
        settings |= {_MODE: "token", _TOKEN: secrets.token_hex(32)}
    settings = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ |= settings
    with clusters_allowed(os.environ[_CLUSTERS] == "1"):
        read_settings_again()
        try:
            _start(num_cpus)
            with _agents_end_with_us():
                yield
        finally:
            ray.shutdown()
            for name in settings:
                os.environ.pop(name, None)
            read_settings_again()


def _start(num_cpus: int) -> None:
    for left in reversed(range(_STARTS)):
        before = set(psutil.Process().children())
        try:
            with sigterm_as_it_was(), few_processes():
                # "local", not None: None would join a cluster that somebody else started here.
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            return
        except DependencyError:
            raise  # it says what is wrong, and nothing has started
        # Ray raises what happens to go wrong first, and may exit.
        except (Exception, SystemExit) as error:
            # What it started would stay until this process ends.
            _end(set(psutil.Process().children()) - before)
            # It gives its node 30 s, has no setting for it, and may have them another time.
            slow = "timed out during startup" in str(error) and not any(certain_reasons())
            if not left or not slow:
                raise RayfinError(why_no_start(error)) from error


@contextmanager
def _agents_end_with_us() -> Iterator[None]:
    """Has what the raylet has started by now end when this process does, also when it is killed."""
    program = Path(end_with_driver.__file__)
    found = [
        f"{process.pid}:{end_with_driver.start_of(process.pid)}"
        for raylet in psutil.Process().children()
        if raylet.name() == "raylet"
        for process in raylet.children()
    ]
    # Alone in its session: Ctrl-C in a terminal is for the others.
    with subprocess.Popen(
        [sys.executable, "-S", "-E", program, *found],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as watcher:
        try:
            yield
        finally:
            watcher.terminate()


@contextmanager
def sigterm_as_it_was() -> Iterator[None]:
    """Keeps a command's handlers, which end it in order, where Ray would put its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before):  # where a command has none, Ray's is better than the system's
            _set_handler(signal.SIGTERM, before)


@contextmanager
def ctrl_c_as_it_was() -> Iterator[None]:
    """Puts the handler of Ctrl-C back: Tune leaves one that swallows the next, which is for what
    follows the trials."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if before is not None:  # None: one that is not Python's, and can't be put back
            _set_handler(signal.SIGINT, before)


def _set_handler(number: int, handler: Any) -> None:
    """Sets a signal's handler in the main thread; any other thread may not."""
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(number) is not handler:
        signal.signal(number, handler)


def _end(processes: Iterable[psutil.Process]) -> None:
    """Kills those of `processes` that are Ray's own programs, with all that they started."""
    programs = str(Path(ray.__file__).parent)
    every = []
    for process in processes:
        with suppress(psutil.Error):
            if programs in " ".join(process.cmdline()):
                process.suspend()  # or it starts one more
                every += [*process.children(recursive=True), process]
    for process in every:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(every, timeout=_END_SECONDS)
