"""Early stopping by predicted curves against ASHA, on sweeps that are replayed.

python experiments/benchmarks/predictive.py [--curves FILE.jsonl.gz] [--repeats 40] [--quick]

The curves are those that come with rayfin (experiments/reference_curves.py made them, each from a
real training on a CPU). A sweep's trials are those of one task, a model on a data set at a number
of steps, in an order drawn at random; nothing is trained again. The predictive scheduler has seen
no curve of that data set, on any model: it learns the sweep's own as they end, as a real sweep's
does. The width of the kernel was chosen on the tasks `tiny 48 …` alone, and these are not reported;
what a curve is described by, and that a trial that is ahead is not stopped, was chosen on all.

Each task is replayed twice: with all its trials, whose learning rates span four decades, and with
the better half of them, as a sweep over a narrower space has it.

A stop is wrong where the trial would have ended better than all trials that had finished, or were
running. Steps and seconds are shares of those of a sweep without early stopping; an evaluation is
not counted. `lost` is what the sweep's best score is behind that of all its trials, as a share of
the range of their scores.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from common import print_figure

from rayfin.tuning.curve_bank import CurveBank
from rayfin.tuning.curves import Curve, read_curves, reference_curves
from rayfin.tuning.predictive import PredictiveStopping

RATE = 0.05
TUNED_ON = "tiny 48 "
LEAST_TRIALS = 8
WORKERS = (1, 4)
EVALUATIONS = (4, 16)

Stops = Callable[[str, Curve, bool], bool]
"""Told of a trial's curve until now, and whether it has ended; returns whether to stop it."""


@dataclass
class Replay:
    """What a sweep came to."""

    stops: int = 0
    wrong: int = 0
    steps: float = 0.0
    seconds: float = 0.0
    lost: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--curves", type=Path, metavar="FILE", help="default: rayfin's own")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="3 repeats")
    args = parser.parse_args()
    repeats = 3 if args.quick else args.repeats
    curves = read_curves(args.curves.read_bytes()) if args.curves else reference_curves()
    tasks = {c.task: [d for d in curves if d.task == c.task] for c in curves}
    tasks = {
        name: rows
        for name, rows in tasks.items()
        if len(rows) >= LEAST_TRIALS and not name.startswith(TUNED_ON)
    }
    print(f"{len(curves)} curves, {len(tasks)} tasks reported, {repeats} orders of each")
    print(f"{'':48}{'stops':>7}{'wrong':>7}{'rate':>8}{'steps':>8}{'seconds':>9}{'lost':>8}")
    banks = {
        data: CurveBank(c for c in curves if data_of(c.task) != data)
        for data in {data_of(task) for task in tasks}
    }
    figures: dict[str, list[Replay]] = {}
    ways = itertools.product(PARTS.items(), EVALUATIONS, WORKERS)
    for (which, part), evaluations, workers in ways:
        for name in ("asha", "predictive"):
            replays = []
            for task, rows in tasks.items():
                sweep = [thinned(c, evaluations) for c in part(rows)]
                for seed in range(repeats):
                    stops = (
                        asha(evaluations) if name == "asha" else predictive(banks[data_of(task)])
                    )
                    replays.append(replayed(sweep, stops, workers, seed))
            show(f"{name}, {which}, {evaluations} evaluations, {workers} at a time", replays)
            figures.setdefault(name, []).extend(replays)
    for name, replays in figures.items():
        made = sum(one.stops for one in replays)
        wrong = sum(one.wrong for one in replays) / max(1, made)
        most = RATE if name == "predictive" else 1.0
        print_figure("predictive", f"{name}_wrong_stops", wrong, "share of stops", most, most=True)
        seconds = statistics.mean(one.seconds for one in replays)
        print_figure("predictive", f"{name}_seconds", seconds, "of all", 1.0, most=True)
        lost = statistics.mean(loss for one in replays for loss in one.lost)
        print_figure("predictive", f"{name}_lost", lost, "of the range", 1.0, most=True)


def better_half(rows: Sequence[Curve]) -> Sequence[Curve]:
    """The trials of a task that end better than the others, in their order."""
    least = statistics.median(curve.values[-1] for curve in rows)
    return [curve for curve in rows if curve.values[-1] <= least]


PARTS: dict[str, Callable[[Sequence[Curve]], Sequence[Curve]]] = {
    "all": lambda rows: rows,
    "better half": better_half,
}


def data_of(task: str) -> str:
    """The data set of a task."""
    return task.split(" on ")[1]


def thinned(curve: Curve, evaluations: int) -> Curve:
    """The curve as so many evaluations show it."""
    return curve.until(len(curve.shares), len(curve.shares) // evaluations)


def asha(evaluations: int) -> Stops:
    """Ray's, with rayfin's settings: the first rung at the first evaluation, one in 3 kept."""
    from ray.tune.schedulers import AsyncHyperBandScheduler

    # Ray says that times are whole numbers, and takes any.
    times: dict[str, Any] = {"max_t": 1.0, "grace_period": 1.0 / evaluations}
    scheduler: Any = AsyncHyperBandScheduler(
        time_attr="share",
        metric="loss",
        mode="min",
        reduction_factor=3,
        stop_last_trials=False,
        **times,
    )
    trials: dict[str, Any] = {}

    def stops(name: str, curve: Curve, ended: bool) -> bool:
        if name not in trials:
            trials[name] = SimpleNamespace(trial_id=name)
            scheduler.on_trial_add(None, trials[name])
        result = {"share": curve.shares[-1] + 1e-9, "loss": curve.values[-1]}
        if ended:
            scheduler.on_trial_complete(None, trials[name], result)
            return False
        return bool(scheduler.on_trial_result(None, trials[name], result) == "STOP")

    return stops


def predictive(seen: CurveBank) -> Stops:
    """The predictive scheduler, which has seen these curves."""
    bank = seen.copy()
    scheduler = PredictiveStopping(bank, "eval_loss", rate=RATE, grace=0.0)

    def stops(name: str, curve: Curve, ended: bool) -> bool:
        if ended:
            scheduler.left(name)
            scheduler.finished(curve.values[-1], curve)
            bank.add(curve)
            return False
        return scheduler.stops(name, curve, 0)

    return stops


def replayed(sweep: Sequence[Curve], stops: Stops, workers: int, seed: int) -> Replay:
    """A sweep of these trials, so many at a time, each an evaluation after the other."""
    waiting = [int(at) for at in np.random.default_rng(seed).permutation(len(sweep))]
    running: dict[int, int] = {}
    finished: list[int] = []
    told = Replay()
    ends = [curve.values[-1] for curve in sweep]
    total = sum(curve.seconds or 1.0 for curve in sweep)

    def leave(at: int) -> None:
        share = sweep[at].shares[running.pop(at) - 1]
        told.steps += share / len(sweep)
        told.seconds += share * (sweep[at].seconds or 1.0) / total

    while waiting or running:
        while waiting and len(running) < workers:
            running[waiting.pop(0)] = 0
        at = min(running, key=lambda one: running[one])
        running[at] += 1
        ended = running[at] == len(sweep[at].shares)
        stop = stops(str(at), sweep[at].until(running[at]), ended)
        if ended:
            finished.append(at)
        elif stop:
            told.stops += 1
            rivals = [ends[one] for one in (*finished, *running) if one != at]
            told.wrong += all(ends[at] < rival for rival in rivals)
        if ended or stop:
            leave(at)
    spread = max(ends) - min(ends)
    told.lost.append((min(ends[at] for at in finished) - min(ends)) / spread)
    return told


def show(name: str, replays: Sequence[Replay]) -> None:
    """A line of the table."""
    stops, wrong = sum(r.stops for r in replays), sum(r.wrong for r in replays)
    steps, seconds = (statistics.mean(getattr(r, n) for r in replays) for n in ("steps", "seconds"))
    lost = statistics.mean(loss for r in replays for loss in r.lost)
    print(
        f"{name:48}{stops:>7}{wrong:>7}{wrong / max(1, stops):>8.4f}{steps:>8.3f}"
        f"{seconds:>9.3f}{lost:>8.4f}"
    )


if __name__ == "__main__":
    main()
