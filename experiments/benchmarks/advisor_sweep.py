"""A sweep's first trials: the advisor's, which has seen other tasks, against TPE's and random ones.

python experiments/benchmarks/advisor_sweep.py [--history FILE.jsonl.gz] [--leave-out task model]
    [--repeats 20] [--quick]

The trials are those of the reference history: real CPU sweeps over one grid of methods, learning
rates and ranks or virtual tokens on each task, a model on a data set
(experiments/reference_history.py ran them). A search is replayed on a task's grid: what it asks for
is looked up, and nothing is trained again. What the advisor has not seen is this task's trials,
those on the same data, those of the same model, or both of the latter: each of them in turn, or
what --leave-out names. It is told of the scenario what a real sweep knows before its first trial.

The figure is the normalised regret after n trials, the mean over tasks and repeats:

    (best score among the first n - task's best) / (task's worst finite - task's best)
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import optuna
from common import print_figure

from rayfin.advisor.features import category_codes, data_row, model_row
from rayfin.advisor.knowledge import Knowledge, reference_trials
from rayfin.advisor.sweep_advisor import SweepAdvisor
from rayfin.history import TrialRecord
from rayfin.tuning.search import EndedTrial

COUNTS = (1, 2, 4, 8, 12, 16)
TRIALS = 16
WHAT = ("task", "data", "model", "model-and-data")
PATIENCE = 50


@dataclass(frozen=True)
class Task:
    """A model on a data set, and all that was tried there."""

    name: str
    records: Sequence[TrialRecord]

    def value(self, place: int) -> float | None:
        """The loss; None for a trial that failed."""
        record = self.records[place]
        return float(record.metrics["eval_loss"]) if record.status == "finished" else None

    def regrets(self, places: Sequence[int]) -> list[float]:
        """After each of `places`."""
        losses = [self.value(place) for place in range(len(self.records))]
        finite = [loss for loss in losses if loss is not None]
        best, worst = min(finite), max(finite)
        paid, left = [], 1.0
        for place in places:
            loss = losses[place]
            left = min(left, 1.0 if loss is None else (loss - best) / (worst - best))
            paid.append(left)
        return paid


Search = Callable[[Task, int], list[int]]
"""Places of the trials that it runs, in their order; the second argument is the seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--history", type=Path, metavar="FILE", help="default: rayfin's own")
    parser.add_argument("--leave-out", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="3 repeats")
    args = parser.parse_args()
    repeats = 3 if args.quick else args.repeats
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    records = _read(args.history) if args.history else _reference()
    tasks = _tasks(records)
    print(f"{len(tasks)} tasks, {len(records)} trials, {repeats} repeats")
    alone: dict[str, Search] = {"random": _random, "tpe": _tpe}
    regrets = {name: _replayed(search, tasks, repeats) for name, search in alone.items()}
    for what in args.leave_out:
        knowledge = {
            task.name: Knowledge.of(
                [record for record in records if not _same(record, task, what)], reference=False
            )
            for task in tasks
        }
        regrets["advisor"] = _replayed(partial(_advisor, knowledge), tasks, repeats)
        _report(what, tasks, regrets)


def _replayed(search: Search, tasks: Sequence[Task], repeats: int) -> list[list[list[float]]]:
    """The regrets after each trial, of each repeat of each task."""
    return [[task.regrets(search(task, seed)) for seed in range(repeats)] for task in tasks]


def _report(
    what: str, tasks: Sequence[Task], regrets: Mapping[str, Sequence[Sequence[Sequence[float]]]]
) -> None:
    """Print and write the figures; but for `task`, their names begin with `what`."""
    print(f"\n{f'left out by {what}':34}" + "".join(f"{f'n={n}':>8}" for n in COUNTS))
    for at, task in enumerate(tasks):
        for name in regrets:
            _print(f"{task.name[:24]:24} {name:9}", regrets[name][at])
    for name in regrets:
        _print(f"{'all':24} {name:9}", [run for runs in regrets[name] for run in runs])

    def mean(name: str, n: int) -> float:
        return statistics.mean(run[min(n, len(run)) - 1] for runs in regrets[name] for run in runs)

    def write(figure: str, value: float, bar: float) -> None:
        begin = "" if what == "task" else f"{what}_"
        print_figure("advisor_sweep", begin + figure, value, "regret", bar, most=True)

    for name in regrets:
        for n in COUNTS:
            write(f"{name}_{n}", mean(name, n), 1.0)
    for n, of_tpe in ((4, 12),) if what == "task" else ((4, 8), (8, 12)):
        write(f"advisor_{n}_less_tpe_{of_tpe}", mean("advisor", n) - mean("tpe", of_tpe), 0.0)


def _reference() -> list[TrialRecord]:
    """What comes with rayfin and was run by it."""
    return [record for record in reference_trials() if "origin" not in record.scenario]


def _read(path: Path) -> list[TrialRecord]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [TrialRecord.parse(json.loads(line)) for line in lines]


def _task(record: TrialRecord) -> str:
    return f"{record.spec['model']['name']} on {record.spec['data']['path']}"


def _same(record: TrialRecord, task: Task, what: str) -> bool:
    """Whether a trial is of that task, has its data, its model, or either."""
    model, data = _task(record).split(" on ")
    own_model, own_data = task.name.split(" on ")
    same_model, same_data = model == own_model, data == own_data
    return {
        "task": same_model and same_data,
        "data": same_data,
        "model": same_model,
        "model-and-data": same_model or same_data,
    }[what]


def _tasks(records: Sequence[TrialRecord]) -> list[Task]:
    ended = [record for record in records if record.status in ("finished", "failed")]
    names = dict.fromkeys(_task(record) for record in ended)
    return [Task(name, [row for row in ended if _task(row) == name]) for name in names]


def _random(task: Task, seed: int) -> list[int]:
    order: list[int] = np.random.default_rng(seed).permutation(len(task.records)).tolist()
    return order[:TRIALS]


def _tpe(task: Task, seed: int) -> list[int]:
    """As sweep.search=tpe has it: method, learning rate and capacity by their place in the list."""
    points = [_point(record) for record in task.records]
    methods = sorted({method for method, _, _ in points})
    rates = sorted({rate for _, rate, _ in points})
    sizes = {m: sorted({size for method, _, size in points if method == m}) for m in methods}
    levels = max(map(len, sizes.values()))
    sampler = optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=5, multivariate=True, constant_liar=True
    )
    study = optuna.create_study(sampler=sampler, direction="minimize")
    found: list[int] = []
    again = 0  # asks in a row for what was tried, or is not on the grid
    while len(found) < min(TRIALS, len(points)):
        if again >= PATIENCE:  # as rayfin's search, which then takes any point that is left
            left = [place for place in range(len(points)) if place not in found]
            method, rate, size = points[left[seed % len(left)]]
            level = sizes[method].index(size)
            study.enqueue_trial(
                {"method": method, "learning_rate": rates.index(rate), "capacity": level}
            )
        trial = study.ask()
        method = trial.suggest_categorical("method", methods)
        rate = rates[trial.suggest_int("learning_rate", 0, len(rates) - 1)]
        level = trial.suggest_int("capacity", 0, levels - 1)
        size = sizes[method][min(level, len(sizes[method]) - 1)]
        place = next((at for at, p in enumerate(points) if p == (method, rate, size)), None)
        value = None if place is None else task.value(place)
        if place is None or place in found or value is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, value)
        again += 1
        if place is not None and place not in found:
            found.append(place)
            again = 0
    return found


def _point(record: TrialRecord) -> tuple[str, float, int]:
    method = record.spec["method"]
    size = method.get("r", method.get("num_virtual_tokens", 0))
    return method["type"], record.spec["train"]["learning_rate"], size


def _advisor(knowledge: Mapping[str, Knowledge], task: Task, seed: int) -> list[int]:
    about = task.records[0].scenario
    profile = {name: about["data"][name] for name in ("rows_train", "source")}
    scenario = (
        model_row(about["model"]["identity"], about["model"])
        | data_row(profile)
        | category_codes(profile, task.name, otherwise=f"replay {seed}")
    )
    advisor = SweepAdvisor(knowledge[task.name], scenario, "eval_loss", seed=1000 * seed)
    found: list[int] = []
    for _ in range(min(TRIALS, len(task.records))):
        left = [place for place in range(len(task.records)) if place not in found]
        ended = [EndedTrial(task.records[place].spec, task.value(place)) for place in found]
        found.append(left[advisor.choose([task.records[p].spec for p in left], ended, [])])
    return found


def _print(label: str, runs: Sequence[Sequence[float]]) -> None:
    means = [statistics.mean(run[min(n, len(run)) - 1] for run in runs) for n in COUNTS]
    print(label + "".join(f"{value:8.4f}" for value in means))


if __name__ == "__main__":
    main()
