"""How much is lost by running what is recommended, for models that the advisor has never seen.

python experiments/benchmarks/recommend_regret.py --leave-one-model-out SWEEP.csv [--quick]
python experiments/benchmarks/recommend_regret.py --table SWEEP.csv [--leave-out generation ...]
python experiments/benchmarks/recommend_regret.py --train SWEEP.csv --test OTHER.csv

The table has columns `model, learning_rate, lora_rank, test_nll, diverged`. For each model that is
left out, a policy sees the model's facts and the list of its cells (learning rate, rank), ranks
them, and the regret of its first k is

    (best NLL among them - model's best) / (model's worst finite - model's best)

where a diverged cell costs 1. What is left out together is each model, each generation (Qwen3),
each brand (Qwen), each task, or for each model on a task all that shares either. The table is of
one task; for the last two the trials that come with rayfin join it, but for those of toy models.

Policies:

- random: cells in any order, the exact expectation.
- constant: the best of all cells in hindsight, and the next best after it. It alone has seen the
  models that it is tested on.
- portfolio: the cells that together would have served the other models best, one after the other.
- nearest: what the most similar other models did best with, their regrets averaged by similarity.
- trees: quantile gradient boosting (scikit-learn) on the same columns as the advisor's.
- rules: the advisor with an empty history.
- flat: the advisor's Gaussian process without what practice expects as its mean.
- advisor: as `rayfin recommend` has it.

A constant or portfolio cell that a model lacks is replaced by that model's nearest one: the rate
first, then the rank.
"""

from __future__ import annotations

import argparse
import operator
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

import numpy as np
from common import print_figure

from rayfin.advisor import quality_model as quality
from rayfin.advisor.features import COLUMNS
from rayfin.advisor.kernel import Array, Hyperparameters
from rayfin.advisor.knowledge import reference_trials
from rayfin.advisor.model_sizes import is_toy
from rayfin.advisor.trial_table import ScenarioTrials, TrialTable, group_by_scenario
from rayfin.history import TrialRecord
from rayfin.history.csv_table import read_csv

K = 3
BARS = {
    "model": {1: 0.008, 2: 0.0036},
    "generation": {1: 0.051, 2: 0.003},
    "split": {1: 0.015, 2: 0.0015},
}
"""The most that the advisor's mean regret may be, by what is left out and k."""
WORST_COVERAGE = 0.6
QUANTILES = (0.1, 0.5, 0.9)
SHARED = {
    "model": ("model",),
    "generation": ("brand", "generation"),
    "brand": ("brand",),
    "task": ("task",),
    "model-and-task": ("model", "task"),
}
"""What the scenarios that are left out together share; of the last, either."""


@dataclass(frozen=True)
class Model:
    """One model's cells, and the regret of each."""

    name: str
    rows: Array
    regrets: Array

    def fact(self, name: str) -> float | str:
        """The code of the model's brand, generation or task, or of the model on the task."""
        return self.name if name == "model" else float(self.rows[0, COLUMNS.names.index(name)])

    own: ScenarioTrials
    """The cells with the regrets that the advisor gives them."""

    @property
    def cells(self) -> Array:
        """log10 of the learning rate, log2 of the rank."""
        places = [COLUMNS.names.index(name) for name in ("learning_rate", "capacity")]
        return self.rows[:, places]


@dataclass(frozen=True)
class Fold:
    """Models that are left out, the others, and what the advisor learns from the others."""

    others: Sequence[Model]
    tested: Sequence[Model]
    learned: quality.QualityModel


Policy = Callable[[Fold, Model], Sequence[int]]
"""Ranks the cells of a model, from the others."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leave-one-model-out", type=Path, metavar="CSV")
    parser.add_argument("--table", type=Path, metavar="CSV")
    parser.add_argument("--leave-out", nargs="+", choices=SHARED, default=list(SHARED))
    parser.add_argument("--train", type=Path, metavar="CSV")
    parser.add_argument("--test", type=Path, metavar="CSV")
    parser.add_argument("--quick", action="store_true", help="constant, rules and advisor only")
    args = parser.parse_args()
    given = (args.leave_one_model_out, args.table, args.train and args.test)
    if sum(one is not None for one in given) != 1:
        parser.error("give --leave-one-model-out, --table, or --train and --test")
    if args.train:
        _report("split", [_split(args.train, args.test)], quick=args.quick)
        return
    table, models = _read(args.leave_one_model_out or args.table)
    for what in ["model"] if args.leave_one_model_out else args.leave_out:
        of_tasks = "task" in SHARED[what]
        known = _with_reference(table, models) if of_tasks else (table, models)
        _report(what, _left_out(*known, SHARED[what]), quick=args.quick)


def _report(what: str, folds: Iterable[Fold], *, quick: bool) -> None:
    """Print and write the figures; but for `model` and `split`, their names begin with `what`."""
    folds = list(folds)
    tested = [model for fold in folds for model in fold.tested]
    cells = sum(len(model.regrets) for model in tested)
    print(f"\nleft out by {what}: {len(tested)} models, {cells} cells, {len(folds)} times")
    regrets: dict[str, list[list[float]]] = {"random": [_random(model) for model in tested]}
    inside: dict[str, float] = {}
    for fold in folds:
        for name, policy in _policies(tested, quick=quick).items():
            for model in fold.tested:
                order = list(policy(fold, model))
                paid = [float(model.regrets[order[: k + 1]].min()) for k in range(K)]
                regrets.setdefault(name, []).append(paid)
        inside |= {model.name: _inside(fold.learned, model) for model in fold.tested}
    _print(regrets)
    coverage, worst = float(np.mean(list(inside.values()))), min(inside, key=inside.__getitem__)
    print(f"80 % intervals hold {coverage:.1%} of all cells, {inside[worst]:.1%} of {worst}'s")
    begin = "" if what in ("model", "split") else f"{what}_"
    for name, of_models in regrets.items():
        for k in range(K):
            mean = statistics.mean(row[k] for row in of_models)
            bar = BARS.get(what, {}).get(k + 1, 1.0) if name == "advisor" else 1.0
            figure = f"{begin}{name}_k{k + 1}_mean"
            print_figure("recommend_regret", figure, mean, "regret", bar, most=True)
    figure = f"{begin}interval_coverage"
    print_figure("recommend_regret", figure, coverage, "share", 0.7)
    print_figure("recommend_regret", f"{figure}_worst", inside[worst], "share", WORST_COVERAGE)
    print_figure("recommend_regret", f"{figure}_most", coverage, "share", 0.9, most=True)


def _left_out(table: TrialTable, models: Sequence[Model], shared: Sequence[str]) -> Iterator[Fold]:
    either = shared == SHARED["model-and-task"]
    facts = [tuple(model.fact(name) for name in shared) for model in models]
    codes = table.column("group")
    for left in dict.fromkeys(facts):
        tested = [model for model, own in zip(models, facts, strict=True) if own == left]
        alike = any if either else all
        others = [
            model
            for model, own in zip(models, facts, strict=True)
            if not alike(map(operator.eq, own, left))
        ]
        known = [model.fact("group") for model in others]
        yield Fold(others, tested, quality.QualityModel.of(table.take(np.isin(codes, known))))


def _split(train: Path, test: Path) -> Fold:
    table, models = _read(train)
    return Fold(models, _read(test)[1], quality.QualityModel.of(table))


def _with_reference(
    table: TrialTable, models: Sequence[Model]
) -> tuple[TrialTable, Sequence[Model]]:
    """The table and its models, joined by what rayfin ran itself."""
    records = [one for one in reference_trials() if "origin" not in one.scenario]
    reference = TrialTable.of(records)
    known = [not is_toy(10.0**size) for size in reference.column("parameters").tolist()]
    reference = reference.take(np.array(known))
    return table.joined(reference), [*models, *_models(reference, records)]


def _read(path: Path) -> tuple[TrialTable, list[Model]]:
    """The table as `rayfin history import` would read it, and its models."""
    records = []
    for record in read_csv(path, datetime.now(UTC)):
        if isinstance(record, str):
            raise SystemExit(record)
        # One data set, whatever the file is called.
        data = record.spec.get("data") or {"path": "sweep"}
        records.append(record.updated(spec=record.spec | {"data": data}))
    table = TrialTable.of(records)
    if len(table) != len(records):
        raise SystemExit(f"{path}: {len(records) - len(table)} rows can't be used")
    return table, _models(table, records)


def _models(table: TrialTable, records: Sequence[TrialRecord]) -> list[Model]:
    names = {record.trial_id: str(record.spec["model"]["name"]) for record in records}
    models, groups = [], group_by_scenario(table)
    for code in dict.fromkeys(table.column("group").tolist()):
        own = table.take(table.column("group") == code)
        nll = np.where(own.diverged, np.nan, own.scores[:, 0])
        best, worst = np.nanmin(nll), np.nanmax(nll)
        regrets = np.where(np.isnan(nll), 1.0, (nll - best) / max(worst - best, 1e-12))
        models.append(Model(names[str(own.ids[0])], own.rows, regrets, groups[code]))
    return models


def _policies(tested: Sequence[Model], *, quick: bool) -> dict[str, Policy]:
    policies: dict[str, Policy] = {
        "constant": lambda _, model: _constants(tested, model),
        "rules": lambda _, model: _chosen(_NOTHING, model),
        "advisor": lambda fold, model: _chosen(fold.learned, model),
    }
    if quick:
        return policies
    return {
        "constant": policies["constant"],
        "portfolio": lambda fold, model: _portfolio(fold.others, model),
        "nearest": _nearest,
        "trees": _trees,
        "rules": policies["rules"],
        "flat": _flat,
        "advisor": policies["advisor"],
    }


def _random(model: Model) -> list[float]:
    """Expected least of k cells drawn without replacement."""
    regrets = np.sort(model.regrets)
    n = len(regrets)
    expectation = []
    left = np.arange(n, 0, -1.0)  # cells that are no better than the one at this place
    chance = np.ones(n)
    for k in range(1, K + 1):
        chance = chance * np.maximum(left - (k - 1), 0.0) / (n - k + 1)
        at_least = np.append(chance, 0.0)
        expectation.append(float(regrets @ (at_least[:-1] - at_least[1:])))
    return expectation


def _constants(tested: Sequence[Model], model: Model) -> list[int]:
    cells = np.unique(np.concatenate([other.cells for other in tested]), axis=0)
    mean = np.mean([other.regrets[_nearest_cells(other, cells)] for other in tested], axis=0)
    return _distinct(_nearest_cells(model, cells[np.argsort(mean, kind="stable")]))


def _portfolio(others: Sequence[Model], model: Model) -> list[int]:
    cells = np.unique(np.concatenate([other.cells for other in others]), axis=0)
    regrets = np.array([other.regrets[_nearest_cells(other, cells)] for other in others])
    order = quality.choose_complementary(regrets, len(cells))
    return _distinct(_nearest_cells(model, cells[order]))


def _nearest_cells(model: Model, cells: Array) -> Array:
    """The model's cell nearest to each of `cells`."""
    away = np.abs(model.cells[None] - cells[:, None])
    nearest: Array = (10.0 * away[:, :, 0] + away[:, :, 1]).argmin(axis=1)
    return nearest


def _distinct(places: Array) -> list[int]:
    return list(dict.fromkeys(places.tolist()))


def _nearest(fold: Fold, model: Model) -> list[int]:
    columns = [*COLUMNS.scenario["size"], "brand", "generation"]
    places = [COLUMNS.names.index(name) for name in columns]

    def facts(one: Model) -> Array:
        values: Array = np.nan_to_num(one.rows[0, places], nan=0.5)
        return values

    def similarity(other: Model) -> float:
        same = facts(other) == facts(model)
        size = np.abs(facts(other) - facts(model))[:2].sum()
        return float(np.exp(-size) * (1 + 2 * same[-2] + 2 * same[-1]))

    weights = np.array([similarity(other) for other in fold.others])
    regrets = np.array([one.regrets[_nearest_cells(one, model.cells)] for one in fold.others])
    return quality.choose_complementary(
        np.repeat(regrets, np.ceil(10 * weights).astype(int), axis=0), K
    )


def _trees(fold: Fold, model: Model) -> list[int]:
    from sklearn.ensemble import HistGradientBoostingRegressor

    rows = np.concatenate([other.rows for other in fold.others])
    varies = (rows != rows[0]).any(axis=0) & ~np.isnan(rows).all(axis=0)
    regrets = np.concatenate([other.regrets for other in fold.others])
    predicted = []
    for quantile in QUANTILES:
        trees = HistGradientBoostingRegressor(
            loss="quantile", quantile=quantile, max_iter=200, min_samples_leaf=5, random_state=0
        ).fit(rows[:, varies], regrets)
        predicted.append(trees.predict(model.rows[:, varies]))
    low, middle, high = np.clip(np.array(predicted), 0.0, 1.0)
    # A draw from a normal distribution with the tree's 80 % interval, cells on their own.
    deviation = np.maximum(high - low, 1e-3) / 2.563
    normal = np.random.default_rng(0).standard_normal((1024, len(middle)))
    return quality.choose_complementary(np.clip(middle + normal * deviation, 0.0, 1.0), K)


_NOTHING = quality.QualityModel({}, Hyperparameters.expected(COLUMNS))


def _flat(fold: Fold, model: Model) -> list[int]:
    with patch.object(quality, "prior_mean", lambda rows: np.full(len(rows), 0.4)):
        groups = fold.learned.groups
        return _chosen(quality.QualityModel(groups, quality.fit_hyperparameters(groups)), model)


def _chosen(learned: quality.QualityModel, model: Model) -> list[int]:
    scenario = dict(zip(COLUMNS.names, model.rows[0].tolist(), strict=True))
    posterior = learned.posterior(scenario)
    regrets = quality.sample_regrets(posterior.process, model.rows)
    past = posterior.past_regrets(model.rows)
    return quality.choose_complementary(regrets, K, past=past, relative=posterior.relative)


def _inside(learned: quality.QualityModel, model: Model) -> float:
    """Return the share of the model's cells whose regret lies in its 80 % interval.

    The regret is the advisor's own, which the interval is about, of cells that did not diverge.
    """
    scenario = dict(zip(COLUMNS.names, model.rows[0].tolist(), strict=True))
    process = learned.posterior(scenario).process
    low, high = quality.regret_quantiles(process, model.own.rows, (0.1, 0.9))
    inside = (model.own.regrets >= low) & (model.own.regrets <= high)
    return float(inside[model.own.diverged < 1.0].mean())


def _print(regrets: dict[str, list[list[float]]]) -> None:
    head = "".join(f"{f'k={k + 1}':>8}{'median':>8}{'max':>8}" for k in range(K))
    print(f"{'policy':12}{head}")
    for name, paid in regrets.items():
        columns = np.array(paid).T
        figures = [f(column) for column in columns for f in (np.mean, np.median, np.max)]
        print(f"{name:12}" + "".join(f"{value:8.4f}" for value in figures))


if __name__ == "__main__":
    main()
