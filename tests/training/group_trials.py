"""Runs trials in groups of forked workers, as Ray Train would; see forked_trials.py.

A job is {spec, directory, environment, workers, strategy, own, kill_in, disks, notes}: `kill_in` is
a step in which the last worker kills itself; `disks` is a directory where each worker has one that
no other sees; `notes` one in which each leaves the tokens that it has trained on.
Answers the first worker's result, None where one was killed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # before the first import, which looks for one
import deepspeed
import peft  # noqa: F401
import torch.distributed as dist

from rayfin.hardware import describe_hardware
from rayfin.paths import StoragePath, cache_dir
from rayfin.training.spec import TrialSpec
from rayfin.training.strategies import WorkerLayout
from rayfin.training.trainer import TrialTrainer
from rayfin.training.trial import run_trial
from rayfin.training.trial_cache import TrialCache

assert deepspeed


def die_in_step(step: int) -> None:
    compute_loss = TrialTrainer.compute_loss

    def deadly(self: TrialTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, *args, **kwargs)
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    TrialTrainer.compute_loss = deadly  # type: ignore[method-assign]


def noted(trained: list[list[int]]) -> None:
    compute_loss = TrialTrainer.compute_loss

    def noting(self: TrialTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        trained.extend(ids[mask.bool()].tolist() for ids, mask in rows)
        return compute_loss(self, model, inputs, *args, **kwargs)

    TrialTrainer.compute_loss = noting  # type: ignore[method-assign]


def work(job: dict[str, Any], rank: int, port: int, warm: TrialCache) -> dict[str, Any] | None:
    workers = job["workers"]
    os.environ |= job["environment"]
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["OMP_NUM_THREADS"] = "1"  # else Accelerate shares out the cores of the machine
    if "disks" in job:
        own = Path(job["disks"], str(rank))
        own.mkdir(parents=True, exist_ok=True)
        if not (own / "models").exists():
            (own / "models").symlink_to(cache_dir() / "models")
        os.environ["RAYFIN_CACHE"] = str(own)
    if workers > 1 or job["strategy"] != "ddp":
        dist.init_process_group("gloo")
    if rank == workers - 1 and job.get("kill_in") is not None:
        die_in_step(job["kill_in"])
    trained: list[list[int]] = []
    if "notes" in job:
        noted(trained)
    result = run_trial(
        TrialSpec.model_validate_json(job["spec"]),
        lambda _: None,
        location=StoragePath.at(job["directory"]),
        hardware=describe_hardware(use_gpu=False),
        warm=warm,
        group=WorkerLayout(workers, job.get("strategy", "ddp"), own=job.get("own")),
    )
    if "notes" in job:
        Path(job["notes"], f"{rank}.json").write_text(json.dumps(trained))
    return result.as_dict()


_WARM = TrialCache()


def loaded(jobs: list[dict[str, Any]]) -> TrialCache:
    """With the data of all jobs; nothing that starts a thread before the fork."""
    for job in jobs:
        _WARM.tokenized(TrialSpec.model_validate_json(job["spec"]))
    return _WARM


def run(job: dict[str, Any], warm: TrialCache) -> dict[str, Any] | None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    answers = Path(tempfile.mkdtemp(), "answer.json")
    for rank in range(job["workers"]):
        child = os.fork()
        if child == 0:
            try:
                result = work(job, rank, port, warm)
                if rank == 0:
                    answers.write_text(json.dumps(result))
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        children.append(child)
    killed = [os.WIFSIGNALED(os.waitpid(child, 0)[1]) for child in reversed(children)]
    if any(killed) or not answers.exists():
        return None
    answer: dict[str, Any] = json.loads(answers.read_text())
    return answer
