"""Runs trials in forked children that kill themselves on the way; see forked_trials.py.

A job is {spec, directory, threads, step | event | write}: SIGKILL in the middle of that step, or at
the trial's n-th touch of a file of its own, or in the middle of its n-th write of tensors; torch
has so many `threads`. Answers {signal, events}.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import peft
import psutil
import safetensors.torch
import torch

from rayfin.hardware import describe_hardware
from rayfin.paths import StoragePath
from rayfin.training.spec import TrialSpec
from rayfin.training.trainer import TrialTrainer
from rayfin.training.trial import run_trial
from rayfin.training.trial_cache import TrialCache


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_step(step: int) -> None:
    compute_loss = TrialTrainer.compute_loss

    def deadly(self: TrialTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, *args, **kwargs)
        if self.state.global_step == step:
            die()
        return loss

    TrialTrainer.compute_loss = deadly  # type: ignore[method-assign]


def die_in_write(number: int) -> None:
    """safetensors writes in Rust, where no hook of Python's sees it: another process looks on.

    The write is repeated, and has 64 MB more to write, until that process has stopped this one amid
    it, seen so, and killed it.
    """
    write, left = safetensors.torch.save_file, itertools.count(number - 1, -1)

    def deadly(tensors: dict[str, torch.Tensor], filename: str, **options: Any) -> None:
        if next(left):
            write(tensors, filename, **options)
            return
        # Smaller ones than a buffer of safetensors, so that it writes them in many calls.
        more = {f"more {n}": torch.zeros(2**17) for n in range(128)}
        if os.fork() == 0:
            kill_amid_write(Path(filename).parent, os.getppid())
            os._exit(0)
        while True:
            write(tensors | more, filename, **options)
            Path(filename).unlink()

    safetensors.torch.save_file = peft.peft_model.safe_save_file = deadly


def kill_amid_write(directory: Path, writer: int) -> None:
    """Kills `writer` as soon as a file there has begun to hold what it is to hold in the end."""
    while os.getppid() == writer:
        if not any(map(begun, directory.glob(".tmp*"))):
            continue
        os.kill(writer, signal.SIGSTOP)
        while psutil.Process(writer).status() != psutil.STATUS_STOPPED:
            pass
        if any(map(begun, directory.glob(".tmp*"))):
            os.kill(writer, signal.SIGKILL)
            return
        os.kill(writer, signal.SIGCONT)


def begun(file: Path) -> bool:
    try:
        found = file.stat()
    except FileNotFoundError:
        return False
    return 0 < found.st_blocks * 512 < found.st_size


class Events:
    """Counts what this process does to files under `directory`, and dies at the n-th time."""

    def __init__(self, directory: str, last: int) -> None:
        self.directory, self.last, self.count = directory, last, 0
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        if isinstance(args[0], (str, Path)) and str(args[0]).startswith(self.directory):
            self.count += 1
            if self.count == self.last:
                die()


_WARM = TrialCache()


def loaded(jobs: list[dict[str, Any]]) -> TrialCache:
    """With what every child needs, before the first fork."""
    first = TrialSpec.model_validate_json(jobs[0]["spec"])
    _WARM.tokenized(first)
    _WARM.base(first, describe_hardware())
    return _WARM


def work(job: dict[str, Any], warm: TrialCache, events_to: int) -> None:
    if "step" in job:
        die_in_step(job["step"])
    if "write" in job:
        die_in_write(job["write"])
    events = Events(job["directory"], job.get("event", -1))
    spec = TrialSpec.model_validate_json(job["spec"])
    result = run_trial(spec, lambda _: None, location=StoragePath.at(job["directory"]), warm=warm)
    assert result.status == "finished", result.error
    os.write(events_to, str(events.count).encode())


def run(job: dict[str, Any], warm: TrialCache) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # A product rounds otherwise with another number of threads.
            torch.set_num_threads(job["threads"])
            work(job, warm, writing)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        events = pipe.read()
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("a trial failed")
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return {"signal": ended_by, "events": int(events or 0)}
