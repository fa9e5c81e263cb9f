"""Tokens a second of several workers, and of several trials at a time.

    python experiments/benchmarks/scaling.py [--quick]

Workers: weak scaling of one LoRA trial on SmolLM2 in Ray Train worker groups of one core a worker.
Two workers take twice the samples of an optimizer step, so that each has what one had alone. The
efficiency is what two train a second, over twice what one does. One worker has the machine to
itself, and memory, cache and clock with it: two groups of one at the same time, which exchange
nothing, show what of the loss is the machine's. All take turns, the ratios are those of one round.
Each group trains two trials: the first tells what launching it takes, beside the seconds in steps;
the second what a trial of a sweep pays whose group is there already, and the tokens a second.

Trials: the same sweep of four trials with sweep.max_concurrent_trials 1, 2 and 4.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import parse_arguments, print_figure, run_side, spread

BATCH_SIZE = 4  # samples of an optimizer step, a worker
CONCURRENT = (1, 2, 4)
LEARNING_RATES = [2e-4, 5e-4, 1e-3, 2e-3]
GROUPS = {"1 worker": 1, "2 workers": 2}


def configuration(work: Path, quick: bool, *, workers: int = 1, concurrent: int = 1) -> Any:
    from rayfin.config import load_config

    steps = 6 if quick else 10
    return load_config(
        {
            "model": {"name": "tiny" if quick else "smollm2-135m", "dtype": "float32"},
            # Few validation samples: they are no part of the training that is timed.
            "data": {"path": "pydocs", "max_samples": 240, "max_length": 128, "val_size": 0.04},
            "method": {"type": "lora", "r": 8, "lora_alpha": 16},
            "train": {
                "max_steps": steps,
                "eval_steps": steps,
                "save_steps": steps,
                "per_device_train_batch_size": BATCH_SIZE,
                "gradient_accumulation_steps": workers,  # which the workers share
            },
            "scaling": {"num_workers": workers, "use_gpu": False, "strategy": "ddp"},
            "sweep": {
                "num_samples": len(LEARNING_RATES),
                "search": "grid",
                "scheduler": "none",
                "max_concurrent_trials": concurrent,
                "parameters": {"train.learning_rate": LEARNING_RATES},
            },
            "storage": str(work / "rayfin"),
        }
    )


def workers_side(args: Namespace) -> dict[str, list[dict[str, float]]]:
    """The rounds: what ran -> its measurements, in order."""
    from rayfin.data import load_corpus
    from rayfin.paths import StoragePath
    from rayfin.training import TrialSpec
    from rayfin.training.strategies import WorkerLayout
    from rayfin.training.workers import WorkerGroup
    from rayfin.tuning.cluster import ray_cluster

    data = configuration(args.work, args.quick).data
    corpora = {data: load_corpus(data)}

    def train(name: str, workers: int) -> dict[str, float]:
        config = configuration(args.work, args.quick, workers=workers)
        around, group = [], WorkerLayout.of(config.scaling)
        with WorkerGroup(group, resources={"CPU": 1.0}, corpora=corpora) as processes:
            for trial in ("first", "second"):
                started = time.perf_counter()
                result = processes.train(
                    TrialSpec.of(config),
                    lambda _: True,
                    location=StoragePath.at(args.work / name / trial),
                    max_failures=0,  # a group that started twice would be no measurement
                )
                ended = time.perf_counter()
                if result.status != "finished":
                    raise SystemExit(f"{name}: {result.error}")
                around.append(ended - started - result.metrics["train_seconds"])
        names = ("tokens_per_second", "train_seconds")
        metrics = {n: result.metrics[n] for n in names}
        return metrics | {"launch_seconds": around[0], "warm_seconds": around[1], "ended": ended}

    runs: dict[str, list[dict[str, float]]] = {name: [] for name in [*GROUPS, "two apart"]}
    with ray_cluster(None, num_cpus=2), ThreadPoolExecutor(2) as pool:
        train("first", 1)  # reads files from disk, which no other does
        for number in range(1 if args.quick else 3):
            for name, workers in GROUPS.items():
                runs[name].append(train(f"{name} {number}", workers))
            names = [f"apart {number} {half}" for half in "ab"]
            both = list(pool.map(train, names, (1, 1)))
            runs["two apart"].append(
                {
                    "tokens_per_second": sum(one["tokens_per_second"] for one in both),
                    # Where they did not train at the same time, each had the machine to itself.
                    "apart_seconds": abs(both[0]["ended"] - both[1]["ended"]),
                    "train_seconds": max(one["train_seconds"] for one in both),
                }
            )
    return runs


def trials_side(args: Namespace, concurrent: int) -> dict[str, Any]:
    """A sweep: its tokens, its seconds, and how many trials ran at a time."""
    from rayfin.history import History
    from rayfin.paths import Storage
    from rayfin.tuning.sweep import SweepOptions, run_sweep

    config = configuration(args.work, args.quick, concurrent=concurrent)
    storage = Storage.open(config.storage)
    with History.open(storage.history_url) as history:
        rows = run_sweep(config, history, storage, SweepOptions(rerun=True)).trials
    if failed := [row.error for row in rows if row.status != "finished"]:
        raise SystemExit(f"trials failed: {failed}")
    begun = [row.created_at for row in rows]
    steps = [row.metrics["train_seconds"] for row in rows]
    return {
        # The most that had begun and not ended when one began, itself included.
        "at_a_time": max(sum(r.created_at <= t < r.updated_at for r in rows) for t in begun),
        "tokens": sum(
            row.metrics["tokens_per_second"] * s for row, s in zip(rows, steps, strict=True)
        ),
        "step_seconds": sum(steps),
        "trial_seconds": (max(row.updated_at for row in rows) - min(begun)).total_seconds(),
    }


def print_workers(runs: dict[str, list[dict[str, float]]]) -> tuple[float, float, float]:
    """The table; of two workers the efficiency, and seconds beside a first and a later trial."""
    print(f"groups of one core a worker, median of {len(runs['1 worker'])} (least to greatest)")
    for name, results in runs.items():
        line = f"  {name:9} {spread([r['tokens_per_second'] for r in results], 1):>24} tokens/s"
        line += f"; seconds: steps {spread([r['train_seconds'] for r in results], 1)}"
        if name in GROUPS:
            first, second = ([r[k] for r in results] for k in ("launch_seconds", "warm_seconds"))
            line += f", beside them {spread(first, 1)} in a first trial, {spread(second, 1)} later"
        else:
            lags = [r["apart_seconds"] for r in results]
            line += f", ended {spread(lags, 1)} after the other"
        print(line)
    print("  beside the steps: the base and its scores; in a first trial also Ray's processes,")
    print("  imports, and the process group")
    one, two, apart = (
        [r["tokens_per_second"] for r in runs[name]] for name in (*GROUPS, "two apart")
    )
    efficiency = [b / (2 * a) for a, b in zip(one, two, strict=True)]
    ceiling = [b / (2 * a) for a, b in zip(one, apart, strict=True)]
    of_ceiling = [b / a for a, b in zip(apart, two, strict=True)]
    print(
        f"  efficiency of 2 workers {spread(efficiency)}; of two groups apart {spread(ceiling)}, "
        f"of which 2 workers keep {spread(of_ceiling)}"
    )
    launched, warm = (
        statistics.median(r[k] for r in runs["2 workers"])
        for k in ("launch_seconds", "warm_seconds")
    )
    return statistics.median(efficiency), launched, warm


def print_trials(sweeps: dict[int, dict[str, Any]]) -> None:
    print(f"sweeps of {len(LEARNING_RATES)} trials on all cores")
    print("  tokens/s of all trials together: in the steps, times the trials at a time; and from")
    print("  the first trial's start to the last's end, loading and scoring included")
    print(f"  {'asked for':>9} {'ran':>4} {'in steps':>9} {'in trials':>9} {'start and end':>14}")
    for asked, sweep in sweeps.items():
        ran, tokens, seconds = sweep["at_a_time"], sweep["tokens"], sweep["trial_seconds"]
        print(
            f"  {asked:9} {ran:4} {tokens * ran / sweep['step_seconds']:9.1f} "
            f"{tokens / seconds:9.1f} {sweep['wall_seconds'] - seconds:12.1f} s"
            + (f"   capped: no core for each of {asked}" if ran < asked else "")
        )


def main() -> None:
    sweeps = {concurrent: f"trials-{concurrent}" for concurrent in CONCURRENT}
    args = parse_arguments(__doc__ or "", sides=("workers", *sweeps.values()))
    if args.side:
        kind, _, concurrent = args.side.partition("-")
        done = trials_side(args, int(concurrent)) if kind == "trials" else workers_side(args)
        args.out.write_text(json.dumps(done))
        return
    from rayfin.models import locate

    locate(configuration(Path(), args.quick).model)  # convert the model before any clock runs

    def side(name: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return run_side(__file__, name, Path(folder), quick=args.quick)

    runs = side("workers")
    del runs["wall_seconds"]
    efficiency, launched, warm = print_workers(runs)
    print_trials({concurrent: side(name) for concurrent, name in sweeps.items()})
    print_figure("scaling", "weak_efficiency_2_workers", efficiency, "ratio", 0.8)
    # A bar of our own: a sweep whose trials launch a group each would be at 1.
    print_figure("scaling", "seconds_beside_a_warm_trial", warm / launched, "ratio", 0.5, most=True)


if __name__ == "__main__":
    main()
