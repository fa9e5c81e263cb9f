"""What time, latency and the rules' preferences are worth in a choice, and why where they change
nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from rayfin.advisor.answer import PredictionInterval
from rayfin.advisor.candidates import preferred_methods
from rayfin.advisor.feasibility import AssessedCandidate
from rayfin.advisor.kernel import Array
from rayfin.advisor.rules import rule_for
from rayfin.advisor.scenario import Scenario
from rayfin.language import localized
from rayfin.methods import METHODS

_NOT_IN_THE_RULE = 0.05
_LATER_IN_THE_RULE = 0.02
"""Added to the regret of methods that the rules don't name, or name later, to settle ties."""
_PER_DOUBLING = {"quality": 0.005, "cost": 0.05, "latency": 0.01}
"""Added to the regret for each doubling of the training time, by the scenario's priority."""
_UNMERGEABLE, _FOUR_BITS = 0.3, 0.1
"""Added to the regret where answers are waited for: of what can't be merged into its base, and so
costs time in every token, and of 4-bit weights, whose products wait for their conversion, where the
rules don't ask for them."""
_MAY_BE_LATE = 0.1
"""Added to the regret of what may end after the budget; what is certain to is never chosen."""


def answers_are_waited_for(scenario: Scenario) -> bool:
    """Return whether the time of an answer counts more than that of the training."""
    return scenario.latency == "strict" or scenario.priority == "latency"


def preference_costs(options: Sequence[AssessedCandidate], scenario: Scenario) -> Array:
    """Return what is added to the regrets for time, latency and the rules' preferences (n)."""
    methods = preferred_methods(scenario)
    # Of a step: a budget leaves the slower ones fewer steps, not less time.
    seconds = np.array([one.estimate.seconds.expected / one.estimate.steps for one in options])
    costs = _PER_DOUBLING[scenario.priority] * np.log2(seconds / seconds.min())
    for at, option in enumerate(options):
        own, method = option.candidate.config.method, option.candidate.method
        costs[at] += (
            _LATER_IN_THE_RULE * methods.index(method) if method in methods else _NOT_IN_THE_RULE
        )
        if answers_are_waited_for(scenario):
            costs[at] += 0.0 if METHODS[method].merging else _UNMERGEABLE
            asked = method in rule_for(scenario).methods
            costs[at] += _FOUR_BITS if own.quantization_bit == 4 and not asked else 0.0
        if scenario.budget_hours is not None and option.feasibility.budget is None:
            costs[at] += _MAY_BE_LATE
    found: Array = costs
    return found


def without_each(scenario: Scenario) -> Iterator[tuple[str, Scenario]]:
    """Yield what was asked for (`priority=cost`, say), with the scenario as if it was not."""
    if scenario.priority != "quality":
        yield f"priority={scenario.priority}", replace(scenario, priority="quality")
    if scenario.latency_target_ms is not None:
        target = f"latency_target_ms={scenario.latency_target_ms:g}"
        yield target, replace(scenario, latency="normal", latency_target_ms=None)
    elif scenario.latency == "strict":
        yield "latency=strict", replace(scenario, latency="normal")
    if scenario.budget_hours is not None:
        yield f"budget_hours={scenario.budget_hours:g}", replace(scenario, budget_hours=None)


def why_unchanged(what: str, chosen: Sequence[AssessedCandidate]) -> str:
    """Return the line that says why `what` was asked for and changes none of the choices."""
    if what.startswith("budget"):
        if chosen[0].feasibility.budget:
            return localized(
                "{what} changes no choice: by the upper bound of its estimate the first one ends "
                "in {hours:.2g} hours",
                what=what,
                hours=chosen[0].estimate.seconds.high / 3600,
            )
        return localized(
            "{what} changes no choice: none is surer to end in time than the first, which is "
            "expected to take {hours:.2g} hours",
            what=what,
            hours=chosen[0].estimate.seconds.expected / 3600,
        )
    if what == "priority=cost":
        return localized(
            "{what} changes no choice: nothing that is expected to do as well takes less time",
            what=what,
        )
    if all(METHODS[one.candidate.method].merging for one in chosen):
        return localized(
            "{what} changes no choice: each can be merged into its base, and then answers as fast "
            "as that does",
            what=what,
        )
    return localized(
        "{what} changes no choice: of what was given nothing answers sooner", what=what
    )


def unknown_latency(scenario: Scenario, first_token: PredictionInterval | None) -> Iterator[str]:
    """Yield the line that says that a target can't be checked, where that is so."""
    if scenario.latency_target_ms is not None and first_token is None:
        yield localized(
            "whether {target:g} ms to the first token are kept isn't known: no model of about this "
            "size was served on such a device; rayfin serve measures it",
            target=scenario.latency_target_ms,
        )
