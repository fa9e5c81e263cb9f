"""Trains on a small and on a large JSONL file with data.streaming=true: memory, and a kill.

The memory is that of all processes of the run, Ray's and its object store included, shared pages
counted once (PSS). The large run is then killed in its middle and started again: it must end with
the loss of the run that was left alone.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from common import parse_arguments, print_figure, quiet_environment

# fmt: off
_WORDS = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world",
    "school", "state", "family", "student", "group", "country", "problem", "hand", "part", "place",
    "case", "week", "company", "system", "program", "question", "work", "government", "number",
    "night", "point", "home", "water", "room", "mother", "area", "money", "story", "fact", "month",
    "lot", "right", "study", "book",
]
# fmt: on


def write_rows(path: Path, megabytes: int) -> int:
    """Questions and answers of random words; how many."""
    rng, count = random.Random(0), 0
    with path.open("w") as file:
        while file.tell() < megabytes * 1_000_000:
            for _ in range(1000):
                question = " ".join(rng.choices(_WORDS, k=rng.randint(5, 40)))
                answer = " ".join(rng.choices(_WORDS, k=rng.randint(20, 120)))
                row = {"prompt": f"{count} {question}", "completion": answer}
                file.write(json.dumps(row) + "\n")
                count += 1
    return count


def train(data: Path, storage: Path, steps: int, kill_at: int | None = None) -> dict[str, Any]:
    """The row of the trial, None where it was killed, and the most that its processes held."""
    settings = {
        "model.name": "tiny",
        "method.type": "lora",
        "data.path": data,
        "data.streaming": "true",
        "data.max_length": 256,
        "data.val_size": 0.0001,
        "train.max_steps": steps,
        "train.eval_steps": steps // 4,
        "storage": storage,
    }
    command = [sys.executable, "-m", "rayfin", "train", "--json"]
    command += [f"{name}={value}" for name, value in settings.items()]
    started, peak = time.perf_counter(), 0
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=quiet_environment()
    )
    own = psutil.Process(running.pid)
    while running.poll() is None:
        peak = max(peak, sum(map(held, [own, *own.children(recursive=True)])))
        saved = storage.glob("sweeps/train/trials/*/checkpoints/checkpoint-*")
        steps_saved = (int(path.name.partition("-")[2]) for path in saved)
        if kill_at is not None and max(steps_saved, default=0) >= kill_at:
            family = own.children(recursive=True)
            running.kill()
            psutil.wait_procs(family, timeout=90)
            break
        time.sleep(0.25)
    out, _ = running.communicate()
    result = {"peak_bytes": peak, "wall_seconds": time.perf_counter() - started, "trial": None}
    if running.returncode == 0:
        result["trial"] = json.loads(out)["trial"]
    elif kill_at is None:
        raise SystemExit(f"it failed:\n{out.decode()[-3000:]}")
    return result


def held(process: psutil.Process) -> int:
    """Bytes; nothing of a process that is gone."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    small, large, repeats, steps = (2, 20, 1, 40) if arguments.quick else (20, 1000, 2, 400)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = {size: root / f"{size}.jsonl" for size in (small, large)}
        for size, path in files.items():
            print(f"{size} MB: {write_rows(path, size)} rows", flush=True)
        runs: dict[int, list[dict[str, Any]]] = {small: [], large: []}
        for repeat in range(repeats):
            for size, path in files.items():
                run = train(path, root / f"runs-{size}-{repeat}", steps)
                runs[size].append(run)
                metrics = run["trial"]["metrics"]
                print(
                    f"{size:5} MB  all processes {run['peak_bytes'] / 2**20:6.0f} MiB, the one "
                    f"that trains {metrics['peak_memory_bytes'] / 2**20:5.0f} MiB  "
                    f"{run['wall_seconds']:5.0f} s  eval_loss {metrics['eval_loss']:.6f}",
                    flush=True,
                )
        storage = root / "killed"
        train(files[large], storage, steps, kill_at=steps // 2)
        resumed = train(files[large], storage, steps)["trial"]["metrics"]["eval_loss"]
    alone = runs[large][0]["trial"]["metrics"]["eval_loss"]
    print(f"killed at step {steps // 2} and started again: eval_loss {resumed:.6f}")
    peaks = {s: statistics.median(r["peak_bytes"] for r in each) for s, each in runs.items()}
    print_figure(
        "streaming", "peak_large_vs_small", peaks[large] / peaks[small], "ratio", 1.3, most=True
    )
    print_figure("streaming", "peak_bytes_large", peaks[large] / 2**20, "MiB", 4096, most=True)
    difference = abs(resumed - alone) / alone
    print_figure("streaming", "loss_after_a_kill_off_by", difference, "ratio", 0.001, most=True)


if __name__ == "__main__":
    main()
