"""How much is lost by running what is recommended, for models that the advisor has never seen.

python experiments/benchmarks/recommend_regret.py --leave-one-model-out SWEEP.csv [--quick]
python experiments/benchmarks/recommend_regret.py --train SWEEP.csv --test OTHER.csv

The table has columns `model, learning_rate, lora_rank, test_nll, diverged`. For each model that is
left out, a policy sees the model's facts and the list of its cells (learning rate, rank), ranks
them, and the regret of its first k is

    (best NLL among them - model's best) / (model's worst finite - model's best)

where a diverged cell costs 1. Policies:

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
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

import numpy as np
from common import print_figure

from rayfin.advisor import quality_model as quality
from rayfin.advisor.features import COLUMNS
from rayfin.advisor.kernel import Array, Hyperparameters
from rayfin.advisor.trial_table import TrialTable
from rayfin.history.csv_table import read_csv

K = 3
BARS = {1: 0.05, 2: 0.03}
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Model:
    """One model's cells, and the regret of each."""

    name: str
    rows: Array
    regrets: Array

    @property
    def cells(self) -> Array:
        """log10 of the learning rate, log2 of the rank."""
        places = [COLUMNS.names.index(name) for name in ("learning_rate", "capacity")]
        return self.rows[:, places]


Policy = Callable[[Sequence[Model], TrialTable, Model], Sequence[int]]
"""Ranks the cells of a model, from the others and their trials."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leave-one-model-out", type=Path, metavar="CSV")
    parser.add_argument("--train", type=Path, metavar="CSV")
    parser.add_argument("--test", type=Path, metavar="CSV")
    parser.add_argument("--quick", action="store_true", help="constant, rules and advisor only")
    args = parser.parse_args()
    if (args.leave_one_model_out is None) == (args.train is None or args.test is None):
        parser.error("give --leave-one-model-out, or --train and --test")
    folds = (
        _left_out(args.leave_one_model_out)
        if args.leave_one_model_out
        else _split(args.train, args.test)
    )
    tested = [model for _, _, models in folds for model in models]
    print(f"{len(tested)} models, {sum(len(model.regrets) for model in tested)} cells")
    policies = _policies(tested, quick=args.quick)
    regrets: dict[str, list[list[float]]] = {"random": [_random(model) for model in tested]}
    inside: list[float] = []
    for others, table, models in folds:
        for name, policy in policies.items():
            for model in models:
                order = list(policy(others, table, model))
                paid = [float(model.regrets[order[: k + 1]].min()) for k in range(K)]
                regrets.setdefault(name, []).append(paid)
        learned = quality.QualityModel.of(table)
        inside += [_inside(learned, model) for model in models]
    _print(regrets)
    print(f"80 % intervals hold {np.mean(inside):.1%} of the left-out cells")
    for name, of_models in regrets.items():
        for k in range(K):
            mean = statistics.mean(row[k] for row in of_models)
            bar = BARS.get(k + 1, 1.0) if name == "advisor" else 1.0
            print_figure(
                "recommend_regret", f"{name}_k{k + 1}_mean", mean, "regret", bar, most=True
            )
    coverage = float(np.mean(inside))
    print_figure("recommend_regret", "interval_coverage", coverage, "share", 0.7)
    print_figure("recommend_regret", "interval_coverage_most", coverage, "share", 0.9, most=True)


def _left_out(path: Path) -> list[tuple[list[Model], TrialTable, list[Model]]]:
    table, models = _read(path)
    codes = table.column("group")
    return [
        (
            [other for other in models if other is not model],
            table.take(codes != model.rows[0, COLUMNS.names.index("group")]),
            [model],
        )
        for model in models
    ]


def _split(train: Path, test: Path) -> list[tuple[list[Model], TrialTable, list[Model]]]:
    table, models = _read(train)
    return [(models, table, _read(test)[1])]


def _read(path: Path) -> tuple[TrialTable, list[Model]]:
    """The table as `rayfin history import` would read it, and its models."""
    records = []
    for record in read_csv(path, datetime.now(UTC)):
        if isinstance(record, str):
            raise SystemExit(record)
        # One data set, whatever the file is called.
        data = record.spec.get("data") or {"path": "sweep"}
        records.append(record.updated(spec=record.spec | {"data": data}))
    names = {record.trial_id: str(record.spec["model"]["name"]) for record in records}
    table = TrialTable.of(records)
    if len(table) != len(records):
        raise SystemExit(f"{path}: {len(records) - len(table)} rows can't be used")
    models = []
    for code in dict.fromkeys(table.column("group").tolist()):
        own = table.take(table.column("group") == code)
        nll = np.where(own.diverged, np.nan, own.scores[:, 0])
        best, worst = np.nanmin(nll), np.nanmax(nll)
        regrets = np.where(np.isnan(nll), 1.0, (nll - best) / max(worst - best, 1e-12))
        models.append(Model(names[str(own.ids[0])], own.rows, regrets))
    return table, models


def _policies(tested: Sequence[Model], *, quick: bool) -> dict[str, Policy]:
    policies: dict[str, Policy] = {
        "constant": lambda _, __, model: _constants(tested, model),
        "rules": lambda _, __, model: _rules(model),
        "advisor": lambda _, table, model: _advisor(table, model),
    }
    if quick:
        return policies
    return {
        "constant": policies["constant"],
        "portfolio": lambda others, _, model: _portfolio(others, model),
        "nearest": _nearest,
        "trees": _trees,
        "rules": policies["rules"],
        "flat": lambda _, table, model: _flat(table, model),
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


def _nearest(others: Sequence[Model], _: TrialTable, model: Model) -> list[int]:
    columns = [*COLUMNS.scenario["size"], "brand", "generation"]
    places = [COLUMNS.names.index(name) for name in columns]

    def facts(one: Model) -> Array:
        values: Array = np.nan_to_num(one.rows[0, places], nan=0.5)
        return values

    def similarity(other: Model) -> float:
        same = facts(other) == facts(model)
        size = np.abs(facts(other) - facts(model))[:2].sum()
        return float(np.exp(-size) * (1 + 2 * same[-2] + 2 * same[-1]))

    weights = np.array([similarity(other) for other in others])
    regrets = np.array([other.regrets[_nearest_cells(other, model.cells)] for other in others])
    return quality.choose_complementary(
        np.repeat(regrets, np.ceil(10 * weights).astype(int), axis=0), K
    )


def _trees(others: Sequence[Model], _: TrialTable, model: Model) -> list[int]:
    from sklearn.ensemble import HistGradientBoostingRegressor

    rows = np.concatenate([other.rows for other in others])
    varies = (rows != rows[0]).any(axis=0) & ~np.isnan(rows).all(axis=0)
    regrets = np.concatenate([other.regrets for other in others])
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


def _rules(model: Model) -> list[int]:
    return _chosen(quality.QualityModel({}, Hyperparameters.expected(COLUMNS)), model)


def _advisor(table: TrialTable, model: Model) -> list[int]:
    return _chosen(quality.QualityModel.of(table), model)


def _flat(table: TrialTable, model: Model) -> list[int]:
    with patch.object(quality, "prior_mean", lambda rows: np.full(len(rows), 0.4)):
        return _chosen(quality.QualityModel.of(table), model)


def _chosen(learned: quality.QualityModel, model: Model) -> list[int]:
    scenario = dict(zip(COLUMNS.names, model.rows[0].tolist(), strict=True))
    return quality.choose_complementary(
        quality.sample_regrets(learned.posterior(scenario).process, model.rows), K
    )


def _inside(learned: quality.QualityModel, model: Model) -> float:
    """Return the share of the model's cells whose regret lies in its 80 % interval."""
    scenario = dict(zip(COLUMNS.names, model.rows[0].tolist(), strict=True))
    regrets = quality.sample_regrets(learned.posterior(scenario).process, model.rows, measured=True)
    low, high = np.quantile(regrets, [0.1, 0.9], axis=0)
    return float(((model.regrets >= low) & (model.regrets <= high)).mean())


def _print(regrets: dict[str, list[list[float]]]) -> None:
    head = "".join(f"{f'k={k + 1}':>8}{'median':>8}{'max':>8}" for k in range(K))
    print(f"{'policy':12}{head}")
    for name, paid in regrets.items():
        columns = np.array(paid).T
        figures = [f(column) for column in columns for f in (np.mean, np.median, np.max)]
        print(f"{name:12}" + "".join(f"{value:8.4f}" for value in figures))


if __name__ == "__main__":
    main()
