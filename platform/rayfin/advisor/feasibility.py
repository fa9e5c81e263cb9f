"""Decide which candidates can run in a scenario, and what would where none can.

A candidate that does not fit the memory is changed (`candidates.memory_savings`) until it does. One
that still isn't expected to fit, or whose whole interval is too late or too slow, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayfin.advisor.answer import Feasibility, PredictionInterval
from rayfin.advisor.candidates import (
    Candidate,
    ScenarioFacts,
    candidates,
    given_settings,
    memory_savings,
    with_changes,
)
from rayfin.advisor.estimate import Estimate, Interval, estimate
from rayfin.advisor.measurements import MeasuredTrial
from rayfin.advisor.model_sizes import format_size
from rayfin.advisor.published_models import shown_model
from rayfin.advisor.scenario import hardware_class
from rayfin.config import Config, build_config
from rayfin.config.steps import duration
from rayfin.errors import RayfinError
from rayfin.hardware import Hardware
from rayfin.language import localized, localized_template
from rayfin.methods import METHODS
from rayfin.models.facts import ModelFacts
from rayfin.training.precision import with_precision

_SOLD_GIB = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)
"""The memory of the GPUs that are sold, in GiB."""
_HALVINGS = 12
_MOST_WORKERS = 64
_GIB = 2**30


@dataclass(frozen=True)
class AssessedCandidate:
    """A candidate with its estimate of memory and time."""

    candidate: Candidate
    estimate: Estimate
    feasibility: Feasibility

    @property
    def fits(self) -> bool:
        """Whether it is expected to fit the memory, even if that is not certain."""
        taken = self.estimate
        return self.feasibility.memory is True or (
            self.feasibility.memory is None and taken.memory.expected <= taken.room
        )

    @property
    def possible(self) -> bool:
        """Whether it is expected to fit, and is not certain to be too slow."""
        return self.fits and False not in vars(self.feasibility).values()


def assess_candidates(
    found: Sequence[Candidate],
    known: ScenarioFacts,
    measured: Sequence[MeasuredTrial],
    first_token: PredictionInterval,
    fixed: Mapping[str, Any],
) -> list[AssessedCandidate]:
    """Estimate each candidate, changed to save memory where it must; `fixed` settings are kept.

    Candidates that differ only in the learning rate share an estimate.
    """
    takes: dict[str, tuple[dict[str, Any], Estimate]] = {}
    options = []
    for candidate in found:
        train = candidate.config.train.model_copy(update={"learning_rate": 1.0})
        key = f"{candidate.config.method.model_dump_json()} {train.model_dump_json()}"
        if key not in takes:
            takes[key] = _fitted(candidate, known, measured, fixed)
        changes, taken = takes[key]
        feasibility = Feasibility(
            memory=taken.fits,
            budget=_within(taken.seconds, _seconds(known.scenario.budget_hours)),
            latency=_within(first_token, known.scenario.latency_target_ms),
        )
        options.append(AssessedCandidate(with_changes(candidate, changes), taken, feasibility))
    return options


def feasible(options: Sequence[AssessedCandidate]) -> list[AssessedCandidate]:
    """Return the candidates that may be recommended."""
    return [option for option in options if option.possible]


def _fitted(
    candidate: Candidate,
    known: ScenarioFacts,
    measured: Sequence[MeasuredTrial],
    fixed: Mapping[str, Any],
) -> tuple[dict[str, Any], Estimate]:
    """Return the first changes with which a candidate fits, or else takes the least memory."""
    best: dict[str, Any] = {}
    taken = _estimate(candidate, known, measured)
    if taken.fits is True:
        return best, taken
    for changes in memory_savings(candidate, fixed, known.facts):
        less = _estimate(with_changes(candidate, changes), known, measured)
        if less.fits is True:
            return changes, less
        if less.memory.high < taken.memory.high:
            best, taken = changes, less
    return best, taken


def _estimate(
    candidate: Candidate, known: ScenarioFacts, measured: Sequence[MeasuredTrial]
) -> Estimate:
    config = candidate.config
    if known.hardware.device == "cpu":
        config = with_precision(config)  # as it is trained
    return estimate(
        config,
        known.facts,
        known.hardware,
        measured=measured,
        tokens=known.scenario.sequence_length,
        profile=known.lengths and known.lengths.cut(candidate.config.data.max_length),
    )


def _seconds(hours: float | None) -> float | None:
    return None if hours is None else 3600 * hours


def _within(value: PredictionInterval | Interval, limit: float | None) -> bool | None:
    if limit is None:
        return None
    return True if value.high <= limit else False if value.low > limit else None


# --- where nothing fits -------------------------------------------------------------------------


def nothing_fits(
    options: Sequence[AssessedCandidate],
    known: ScenarioFacts,
    measured: Sequence[MeasuredTrial],
    first_token: PredictionInterval,
    base: Config,
) -> str:
    """Return one line that says why no candidate is feasible, and what would be."""
    scenario = known.scenario
    fitting = [one for one in options if one.fits]
    if not fitting:
        least = min(options, key=lambda one: one.estimate.memory.expected).estimate
        memory = least.memory
        # What is asked of the other machines is whether anything fits, by the formula: fast.
        remedies = list(_more_room(least, known, measured, base))
        return localized(
            "nothing fits: {model} needs about {about:.1f} GiB at least ({low:.1f} to {high:.1f}), "
            "and there are {room:.1f} GiB on {device}; what would: {remedies}",
            model=shown_model(known.facts.name),
            about=memory.expected / _GIB,
            low=memory.low / _GIB,
            high=memory.high / _GIB,
            room=least.room / _GIB,
            device=localized_template(known.hardware.device_name),
            remedies=_listed(remedies),
        )
    if all(one.feasibility.latency is False for one in fitting):
        return localized(
            "nothing answers in time: the first token takes {low:.3g} to {high:.3g} ms on "
            "{device}, more than --latency-target-ms {target:g}; use a smaller model or a faster "
            "machine, or allow more",
            low=first_token.low,
            high=first_token.high,
            device=localized_template(known.hardware.device_name),
            target=scenario.latency_target_ms,
        )
    quickest = min(fitting, key=lambda one: one.estimate.seconds.high).estimate
    length, _ = duration(base.train.model_dump())
    return localized(
        "nothing ends in time: the fastest takes {low:.2g} to {high:.2g} hours for {steps} steps, "
        "more than --budget-hours {budget:g}; use fewer {length}, a smaller model or a faster "
        "machine, or allow more",
        low=quickest.seconds.low / 3600,
        high=quickest.seconds.high / 3600,
        steps=quickest.steps,
        budget=scenario.budget_hours,
        length=length,
    )


def _more_room(
    least: Estimate, known: ScenarioFacts, measured: Sequence[MeasuredTrial], base: Config
) -> Iterator[str]:
    """Yield single changes that would make something fit, the smallest first."""
    data = base.data.model_dump(include={"path", "sources"}, exclude_unset=True)
    named = {"model.name", "model.revision", "data.path", "data.sources"}
    fixed = sorted(given_settings(base).keys() - named)
    free = build_config({"model": base.model.model_dump(), "data": data}, {})
    loose = [name for name in fixed if name.startswith(("method.", "train.", "data.", "scaling."))]
    if loose and (method := _fits(free, known, measured)):
        settings = ", ".join(loose)
        yield localized("without {settings} ({method} does)", settings=settings, method=method)
    gpu = known.hardware.device == "cuda"
    workers = max(1, known.hardware.device_count) * 2
    while gpu and workers <= _MOST_WORKERS and "scaling.num_workers" not in fixed:
        if method := _fits(base, _with_gpus(known, workers), measured):
            yield localized("--num-gpus {count} ({method}, sharded)", count=workers, method=method)
            break
        workers *= 2
    needed = least.memory.high / _GIB + (1 if gpu else 0)
    if gpu:
        sold = next((size for size in _SOLD_GIB if size >= needed), None)
        if sold is not None:
            yield localized("a GPU of {size} GiB", size=sold)
    else:
        yield localized("a machine with {size} GiB", size=math.ceil(needed))
    facts = known.facts
    for _ in range(_HALVINGS):
        facts = _half(facts)
        if method := _fits(base, replace(known, facts=facts), measured):
            size = format_size(facts.parameters)
            yield localized("a model of up to {size} ({method})", size=size, method=method)
            break


def _fits(base: Config, known: ScenarioFacts, measured: Sequence[MeasuredTrial]) -> str | None:
    """Return the first method, low-rank or given, of which a candidate certainly fits, if any."""
    size = known.facts.parameters / 1e9
    known = replace(known, scenario=replace(known.scenario, model_size_b=size))
    fixed = given_settings(base)
    seen = set()
    try:
        found = candidates(base, known)
    except RayfinError:
        return None
    for candidate in found:
        # LoRA and its kin, one of which is what would be recommended.
        usual = METHODS[candidate.method].usual_alpha is not None or "method.type" in fixed
        if usual and candidate.method not in seen:
            seen.add(candidate.method)
            changes, taken = _fitted(candidate, known, measured, fixed)
            if taken.fits is True:
                config = with_changes(candidate, changes).config
                own = config.method
                four = own.quantization_bit == 4 and not own.quantized_by_default()
                name = candidate.method
                return localized("{method} over 4-bit weights", method=name) if four else name
    return None


def _with_gpus(known: ScenarioFacts, count: int) -> ScenarioFacts:
    scenario = replace(known.scenario, hardware=hardware_class(count), num_gpus=count)
    hardware: Hardware = replace(known.hardware, device_count=count)
    return replace(known, scenario=scenario, hardware=hardware)


def _half(facts: ModelFacts) -> ModelFacts:
    """Return the facts of a model of the same kind with about half as many parameters."""
    return replace(
        facts,
        parameters=facts.parameters // 2,
        linear_parameters=facts.linear_parameters // 2,
        num_layers=max(1, facts.num_layers // 2),
    )


def _listed(remedies: Sequence[str]) -> str:
    if not remedies:
        return localized("a machine with more memory, or a smaller model")
    *rest, last = remedies
    return localized("{others}; or {last}", others="; ".join(rest), last=last) if rest else last
