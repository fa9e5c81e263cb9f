"""The sentences of a recommendation: its explanation, reasons, risks and deployment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rayfin.advisor.answer import Predictions, SupportingTrial
from rayfin.advisor.answer_text import NEAR, WIDE
from rayfin.advisor.candidates import Candidate
from rayfin.advisor.features import COLUMNS
from rayfin.advisor.knowledge import Knowledge
from rayfin.advisor.model_sizes import FACTOR, format_size, is_toy
from rayfin.advisor.quality_model import LEARNED, is_informative, model_size
from rayfin.advisor.rules import Rule
from rayfin.advisor.scenario import Scenario
from rayfin.advisor.trial_table import ScenarioTrials
from rayfin.language import localized
from rayfin.methods import METHODS


def explanation(
    relevance: float, knowledge: Knowledge, columns: Mapping[str, float], *, learned: bool
) -> str:
    """Return what a recommendation rests on; for the rules, also how far the nearest trials are."""
    trials = localized(
        "{history} trials of the history and {reference} of the reference",
        history=knowledge.trials,
        reference=knowledge.reference,
    )
    groups = list(knowledge.quality_model.groups.values())
    near = [group for group in groups if is_informative(group, columns)]
    if learned:
        settings = sum(len(group) for group in near)
        models = len({_model(group) for group in near})
        return localized(
            "learned from {settings} settings tried with {models} model{plural} of about this "
            "size, among {trials}; they take away {relevance:.0%} of the doubt about which "
            "settings are better here",
            settings=settings,
            models=models,
            plural="s" * (models > 1),
            trials=trials,
            relevance=relevance,
        )
    if near and relevance >= LEARNED:
        return localized(
            "the rules: {trials} include models of about this size, none of this family and none "
            "trained on this data",
            trials=trials,
        )
    if near:
        return localized(
            "the rules: {trials} say next to nothing about this scenario (they take away "
            "{relevance:.0%} of the doubt about which settings are better)",
            trials=trials,
            relevance=relevance,
        )
    return localized(
        "the rules: {trials} say nothing about a model of this size{far}",
        trials=trials,
        far=_nearest(knowledge, groups, columns),
    )


def _nearest(
    knowledge: Knowledge, groups: Sequence[ScenarioTrials], columns: Mapping[str, float]
) -> str:
    """Return ` (8 billion parameters): the nearest is …`, as far as that is known."""
    size = 10.0 ** columns["parameters"]
    here = localized(" ({size})", size=format_size(size)) if size > 0 else ""
    known = [group for group in groups if model_size(group) > 0 and not is_toy(model_size(group))]
    if not known or not size > 0:
        return here
    away = [abs(math.log(model_size(group) / size)) for group in known]
    group = known[int(np.argmin(away))]
    times = size / model_size(group)
    far = (
        localized("{times:.3g} times smaller", times=times)
        if times > 1
        else localized("{times:.3g} times larger", times=1 / times)
    )
    return localized(
        "{here}: the nearest, {nearest}, is {far}, and settings carry over within a factor of "
        "{factor:g}",
        here=here,
        nearest=knowledge.scenario_of(int(group.first[0])),
        far=far,
        factor=FACTOR,
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
        found.append(localized("covers for where those before it go wrong"))
    own = option.config.method
    if own.quantization_bit is not None and option.method not in rule.methods:
        found.append(localized("4-bit weights make room for it"))
    elif option.method in rule.methods:
        found.append(localized(rule.reason))
    near = max(supporting, key=lambda one: one.similarity, default=None)
    if near is not None and near.similarity > 0.5:
        found.append(
            localized("much like trial {trial}: {what}", trial=near.trial_id, what=near.summary)
        )
    if predictions.shortfall.high < NEAR:
        found.append(localized("expected near the best known, with little doubt"))
    return found


def risks(option: Candidate, rule: Rule, predictions: Predictions) -> list[str]:
    """Return what speaks against a candidate."""
    found = [localized(rule.risk)] if rule.risk and option.method in rule.methods else []
    if predictions.divergence is not None and predictions.divergence >= 0.1:
        chance = predictions.divergence
        found.append(localized("{chance:.0%} of settings like it diverge", chance=chance))
    if predictions.shortfall.high - predictions.shortfall.low > WIDE:
        found.append(localized("little is known of such settings here: its interval is wide"))
    return found


def deployment(option: Candidate, scenario: Scenario, rule: Rule) -> str:
    """Return how to deploy the adapter."""
    method = METHODS[option.method]
    if scenario.latency == "strict" and scenario.hardware == "multi_gpu":
        return localized(rule.deployment)
    if method.changes_base:
        return localized("a base model of its own")
    if option.config.method.quantization_bit == 4:
        return localized("beside other adapters on the 4-bit base (engine.quantization_bit=4)")
    if scenario.latency == "strict" and method.merging:
        return localized("merged into its base model, or an adapter in a shared deployment")
    return localized("an adapter in a shared deployment, switched per request")
