"""`rayfin recommend --probe`: the learning rate of the first choice, by a few short trainings."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from rayfin.errors import ConfigError
from rayfin.language import localized
from rayfin.metrics import score_of
from rayfin.objectives import main_metric
from rayfin.statuses import SCORED

if TYPE_CHECKING:
    from rayfin.advisor.answer import Choice, ProbeReport, Recommendation
    from rayfin.advisor.probes import Probe
    from rayfin.config import Config
    from rayfin.library.messages import Say
    from rayfin.tuning.probe import ProbedTrial

    Ask = Callable[[Config], Recommendation]
    """Recommends one configuration for the scenario, which keeps the settings given."""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_MOST = 8
"""Probes within a time; by then the ladder's rates lie closer than they can be told apart."""
_USUAL = 4


@dataclass(frozen=True)
class ProbeBudget:
    """How many probes to make, or for how long."""

    count: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, value: int | str) -> Self:
        """Return the budget of `4` (probes) or `5m` (`90s`, `1h`); raises ConfigError."""
        text = str(value).strip()
        if text.isdecimal() and 2 <= int(text) <= 100:
            return cls(count=int(text))
        if (found := re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)) and float(found[1]) > 0:
            return cls(seconds=float(found[1]) * _UNITS[found[2]])
        raise ConfigError(
            f"probe='{value}' must be a number of probes from 2 to 100 (one alone compares "
            "nothing), or a time such as 90s, 5m or 1h"
        )

    def share(self, seconds: float, usual: float) -> float:
        """Return the share of a trial's steps for a probe, where all would take `seconds`.

        It is `usual`, or less where the usual number of them would not fit into the time.
        """
        if self.seconds is None or seconds <= 0:
            return usual
        return min(usual, self.seconds / _USUAL / seconds)


def check_here(known: Mapping[str, Any]) -> None:
    """Raise ConfigError where what would be probed is only described, or another machine's."""
    for name in ("model_size_b", "rows", "hardware", "gpu_memory_gb", "num_gpus"):
        if known.get(name) is not None:
            raise ConfigError(
                f"probe: probes train the model on the data on this machine, and "
                f"{name}={known[name]} describes another; leave one of the two out"
            )


def probed(
    answer: Recommendation,
    config: Config,
    ask: Ask,
    budget: ProbeBudget,
    say: Say,
) -> Recommendation:
    """Return an answer whose first choice has the learning rate that probes favour.

    `answer` is the one without them, for `config`, and `ask` gives it for other settings. The
    probes become rows of the history, and those that it has are not trained again. `say` gets a
    line for each. Raises UsageErrors.
    """
    from rayfin.advisor.probes import SHARE, best_probe, probe_rates
    from rayfin.config import build_config, with_values
    from rayfin.library.experiment import Experiment
    from rayfin.tuning.curve_bank import CurveBank
    from rayfin.tuning.curves import Curve, past_curves, reference_curves
    from rayfin.tuning.probe import Prober, probe_steps

    if not answer.choices:
        return answer
    first = answer.choices[0]
    total = first.predictions.steps
    # The steps that the epochs come to: a probe is a share of them, on their schedule.
    train_section = first.config["train"] | {"num_train_epochs": None, "max_steps": total}
    whole = build_config(first.config | {"train": train_section}, {})
    metric, advised = main_metric(whole.train.stage), whole.train.learning_rate
    share = budget.share(first.predictions.train_seconds.expected, SHARE)
    steps = probe_steps(total, share)
    made: list[ProbedTrial] = []
    begun = time.monotonic()
    experiment = Experiment.open(config)
    with experiment.history as history:
        bank = CurveBank(
            [*reference_curves(), *past_curves(history, metric)],
            keeps_best=whole.train.keep == "best",
        )
        prober = Prober(history, experiment.storage)

        def train(rate: float) -> Curve | None:
            made.append(prober.probe(with_values(whole, {"train.learning_rate": rate}), steps))
            row = made[-1].row
            found = Curve.of(row, metric, ended=False) if row.status in SCORED else None
            # One that the history has may be longer than those that it is compared with.
            curve = None if found is None else found.up_to(steps / total)
            score = None if curve is None else score_of(metric).sign * curve.values[-1]
            say(_line(score, metric, rate, steps, total, made[-1].recalled))
            return curve

        def another(count: int) -> bool:
            if budget.count is not None:
                return count < budget.count
            spent = time.monotonic() - begun
            longest = max((one.seconds for one in made), default=0.0)
            return count < _MOST and (count == 0 or spent + longest <= (budget.seconds or 0.0))

        probes = probe_rates(advised, train, bank, another)
    best = best_probe(probes)
    chosen = advised if best is None else best.rate
    report = _report(probes, made, metric, (steps, total), (advised, chosen))
    changed = answer.choices
    if best is not None and chosen != advised:
        changed = _with_rate(answer.choices, config, ask, chosen, report.summary)
    return answer.model_copy(update={"choices": changed, "probes": report})


def _with_rate(
    choices: list[Choice], config: Config, ask: Ask, rate: float, reason: str
) -> list[Choice]:
    """Return the choices with another rate in the first one, and without another like it."""
    from rayfin.config import with_values

    first = choices[0]
    settings = first.settings | {"train.learning_rate": rate}
    pinned = ask(with_values(config, settings)).choices[0]
    told = first.model_copy(
        update={
            "settings": settings,
            "config": pinned.config,
            "command": pinned.command,
            "predictions": pinned.predictions,
            "trials": pinned.trials,
            "reasons": [reason, *pinned.reasons],
            "risks": pinned.risks,
        }
    )
    others = [one for one in choices[1:] if one.settings != settings]
    return [
        one.model_copy(update={"rank": rank}) for rank, one in enumerate([told, *others], start=1)
    ]


def _report(
    probes: list[Probe],
    made: list[ProbedTrial],
    metric: str,
    steps: tuple[int, int],
    rates: tuple[float, float],
) -> ProbeReport:
    from rayfin.advisor.answer import PredictionInterval, ProbedRate, ProbeReport

    sign = score_of(metric).sign

    def interval(probe: Probe) -> PredictionInterval | None:
        if probe.ending is None:
            return None
        low, middle, high = (sign * probe.ending.quantile(q) for q in (0.1, 0.5, 0.9))
        return PredictionInterval(low=min(low, high), expected=middle, high=max(low, high))

    advised, chosen = rates
    seconds = sum(one.seconds for one in made if not one.recalled)
    figures = {"count": len(probes), "steps": steps[0], "total": steps[1], "seconds": seconds}
    if all(math.isinf(probe.score) for probe in probes):
        said = localized(
            "all {count} probes failed ({steps} of {total} steps each, {seconds:.0f} s): the "
            "learning rate stays {rate:.2g}",
            **figures,
            rate=advised,
        )
    elif chosen == advised:
        said = localized(
            "{count} probes of {steps} of {total} steps keep the learning rate {rate:.2g}; they "
            "cost {seconds:.0f} s",
            **figures,
            rate=advised,
        )
    else:
        said = localized(
            "{count} probes of {steps} of {total} steps change the learning rate from {before:.2g} "
            "to {rate:.2g}; they cost {seconds:.0f} s",
            **figures,
            before=advised,
            rate=chosen,
        )
    return ProbeReport(
        metric=metric,
        steps=steps[0],
        of_steps=steps[1],
        advised=advised,
        chosen=chosen,
        seconds=seconds,
        summary=said,
        rates=[
            ProbedRate(
                learning_rate=probe.rate,
                trial_id=one.row.trial_id,
                score=sign * probe.score if math.isfinite(probe.score) else None,
                predicted=interval(probe),
                recalled=one.recalled,
                seconds=one.seconds,
            )
            for probe, one in zip(probes, made, strict=True)
        ],
    )


def _line(score: Any, metric: str, rate: float, steps: int, total: int, recalled: bool) -> str:
    told = localized("failed") if score is None else f"{metric} {score:.4g}"
    where = localized(", from the history") if recalled else ""
    return localized(
        "probe: learning rate {rate:.2g}, {steps} of {total} steps: {told}{where}",
        rate=rate,
        steps=steps,
        total=total,
        told=told,
        where=where,
    )
