"""A learning rate by four probes of a tenth of the length, against eight full random trials.

python experiments/benchmarks/probes.py [--curves FILE.jsonl.gz] [--quick]

The trials are those of the ladders `rates …` among the curves that come with rayfin: 17 learning
rates over four decades on each of three data sets, with a model that was trained on another one
(experiments/reference_curves.py). A probe is the first tenth of such a trial; nothing is trained
again. Probes start from each rate of the ladder within a decade of the middle, as nobody knows how
far off an advised rate is; the random trials are eight of the 17, drawn without replacement.

The figure is the normalised regret of the chosen rate: (its loss - the best) / (worst - best). The
ratio of costs is that of optimizer steps. The order of rates, and that probes are ranked by their
scores and not by their predicted ends, was chosen on these ladders.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import print_figure

from rayfin.advisor.probes import SHARE, best_probe, probe_rates
from rayfin.tuning.curve_bank import CurveBank
from rayfin.tuning.curves import Curve, read_curves, reference_curves

PROBES, TRIALS = 4, 8
LADDER = "rates "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--curves", type=Path, metavar="FILE", help="default: rayfin's own")
    parser.add_argument(
        "--quick", action="store_true", help="200 draws of random trials, not 5,000"
    )
    args = parser.parse_args()
    curves = read_curves(args.curves.read_bytes()) if args.curves else reference_curves()
    tasks = sorted({c.task for c in curves if c.task.startswith(LADDER)})
    probed: list[float] = []
    drawn: list[float] = []
    print(f"{'':28}{'start':>9}{'chosen':>9}{'regret':>8}")
    for task in tasks:
        rows = sorted(
            (c for c in curves if c.task == task), key=lambda curve: curve.learning_rate or 0.0
        )
        data = task.split(" on ")[1]
        bank = CurveBank(c for c in curves if c.task.split(" on ")[1] != data)
        ends = [curve.values[-1] for curve in rows]
        regrets = [(end - min(ends)) / (max(ends) - min(ends)) for end in ends]
        middle = len(rows) // 2
        for start in range(middle - 4, middle + 5):
            chosen = by_probes(rows, start, bank)
            probed.append(regrets[chosen])
            rates = [rows[at].learning_rate or 0.0 for at in (start, chosen)]
            print(f"{task[:28]:28}{rates[0]:>9.2g}{rates[1]:>9.2g}{regrets[chosen]:>8.4f}")
        rng = np.random.default_rng(0)
        for _ in range(200 if args.quick else 5000):
            some = rng.permutation(len(rows))[:TRIALS]
            drawn.append(min(regrets[at] for at in some))
        print(f"{task[:28]:28}{'':9}{f'{TRIALS} random':>9}{statistics.mean(drawn[-200:]):>8.4f}")
    ahead = statistics.mean(probed) - statistics.mean(drawn)
    print_figure("probes", "probes_4", statistics.mean(probed), "regret", 1.0, most=True)
    print_figure("probes", "random_8", statistics.mean(drawn), "regret", 1.0, most=True)
    print_figure("probes", "probes_4_less_random_8", ahead, "regret", 0.0, most=True)
    print_figure("probes", "steps_ratio", TRIALS / (PROBES * SHARE), "times", 10.0)


def by_probes(rows: Sequence[Curve], start: int, bank: CurveBank) -> int:
    """The place of the rate that probes choose, from the rate at `start`."""
    rates = [curve.learning_rate or 0.0 for curve in rows]

    def nearest(rate: float) -> int:
        return min(range(len(rates)), key=lambda at: abs(np.log(rates[at] / rate)))

    def train(rate: float) -> Curve:
        curve = rows[nearest(rate)]
        return curve.until(sum(share <= SHARE + 1e-6 for share in curve.shares))

    best = best_probe(probe_rates(rates[start], train, bank, lambda count: count < PROBES))
    assert best is not None
    return nearest(best.rate)


if __name__ == "__main__":
    main()
