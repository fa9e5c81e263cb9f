"""The sentences of a recommendation: its explanation, reasons, risks and deployment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rayfin.advisor.answer import Predictions, SupportingTrial
from rayfin.advisor.candidates import Candidate
from rayfin.advisor.estimate import Estimate
from rayfin.advisor.features import COLUMNS
from rayfin.advisor.knowledge import Knowledge
from rayfin.advisor.model_sizes import FACTOR, format_size, is_toy
from rayfin.advisor.quality_model import is_informative, model_size
from rayfin.advisor.rules import Rule
from rayfin.advisor.scenario import Scenario
from rayfin.advisor.trial_table import ScenarioTrials
from rayfin.methods import METHODS


def explanation(
    relevance: float, knowledge: Knowledge, columns: Mapping[str, float], *, learned: bool
) -> str:
    """Return what a recommendation rests on; for the rules, also how far the nearest trials are."""
    trials = f"{knowledge.trials} trials of the history and {knowledge.reference} of the reference"
    doubt = f"{relevance:.0%} of the doubt about which settings are better"
    groups = list(knowledge.quality_model.groups.values())
    near = [group for group in groups if is_informative(group, columns)]
    if learned:
        settings = sum(len(group) for group in near)
        models = len({_model(group) for group in near})
        return (
            f"learned from {settings} settings tried with {models} model{'s' * (models > 1)} of "
            f"about this size, among {trials}; they take away {doubt} here"
        )
    if near:
        return (
            f"the rules: {trials} say next to nothing about this scenario (they take away {doubt})"
        )
    far = _nearest(knowledge, groups, columns)
    return f"the rules: {trials} say nothing about a model of this size{far}"


def _nearest(
    knowledge: Knowledge, groups: Sequence[ScenarioTrials], columns: Mapping[str, float]
) -> str:
    """Return ` (8 billion parameters): the nearest is …`, as far as that is known."""
    size = 10.0 ** columns["parameters"]
    here = f" ({format_size(size)})" if size > 0 else ""
    known = [group for group in groups if model_size(group) > 0 and not is_toy(model_size(group))]
    if not known or not size > 0:
        return here
    away = [abs(math.log(model_size(group) / size)) for group in known]
    group = known[int(np.argmin(away))]
    times = size / model_size(group)
    far = f"{times:.3g} times smaller" if times > 1 else f"{1 / times:.3g} times larger"
    return (
        f"{here}: the nearest, {knowledge.scenario_of(int(group.first[0]))}, is {far}, and "
        f"settings carry over within a factor of {FACTOR:g}"
    )


def _model(group: ScenarioTrials) -> tuple[float, ...]:
    names = ("parameters", "brand", "generation")
    return tuple(float(group.rows[0, COLUMNS.names.index(name)]) for name in names)


def reasons(
    option: Candidate,
    rule: Rule,
    predictions: Predictions,
    number: int,
    supporting: Sequence[SupportingTrial],
) -> list[str]:
    """Return what speaks for a candidate, of which `number` are recommended before it."""
    found = []
    if number:
        found.append("covers for where those before it go wrong")
    own = option.config.method
    if own.quantization_bit is not None and not own.quantized_by_default():
        found.append("4-bit weights make room for it")
    elif option.method in rule.methods:
        found.append(rule.reason)
    if supporting and supporting[0].similarity > 0.5:
        found.append(f"much like trial {supporting[0].trial_id}: {supporting[0].summary}")
    if predictions.shortfall.high < 0.25:
        found.append("expected near the best known, with little doubt")
    return found


def risks(option: Candidate, rule: Rule, predictions: Predictions, taken: Estimate) -> list[str]:
    """Return what speaks against a candidate."""
    found = [rule.risk] if rule.risk and option.method in rule.methods else []
    if predictions.divergence is not None and predictions.divergence >= 0.1:
        found.append(f"{predictions.divergence:.0%} of settings like it diverge")
    if predictions.shortfall.high - predictions.shortfall.low > 0.5:
        found.append("little is known of such settings here: its interval is wide")
    if taken.fits is not True:
        needs, has = (f"{n / 2**30:.1f}" for n in (taken.memory.expected, taken.room))
        found.append(f"may not fit the device's memory: expected are {needs} of {has} GiB")
    return found


def deployment(option: Candidate, scenario: Scenario, rule: Rule) -> str:
    """Return how to deploy the adapter."""
    method = METHODS[option.method]
    if scenario.latency == "strict" and scenario.hardware == "multi_gpu":
        return rule.deployment
    if method.changes_base:
        return "a base model of its own"
    if option.config.method.quantization_bit == 4:
        return "beside other adapters on the 4-bit base (engine.quantization_bit=4)"
    if scenario.latency == "strict" and method.merging:
        return "merged into its base model, or an adapter in a shared deployment"
    return "an adapter in a shared deployment, switched per request"
