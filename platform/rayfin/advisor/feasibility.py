"""Decide which candidates can run in a scenario, and what would where none can.

A candidate that does not fit the memory is changed (`candidates.memory_savings`) until it does: it
fits if the upper bound of the estimate's interval does, nine chances in ten. One that does not fit
then, or whose whole interval is too late or too slow, is left out.
"""

from __future__ import annotations

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
from rayfin.advisor.published_models import LEAST_B, shown_model, usual_model
from rayfin.advisor.scenario import hardware_class
from rayfin.advisor.steps import SHORTEST, is_given, within_budget
from rayfin.config import Config, build_config, with_values
from rayfin.config.steps import duration
from rayfin.errors import RayfinError
from rayfin.hardware import Hardware
from rayfin.language import localized, localized_template
from rayfin.methods import METHODS
from rayfin.training.precision import with_precision

_SOLD_GIB = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)
"""The memory of the GPUs that are sold, in GiB."""
_HOST_GIB = (8, 16, 32, 64, 128, 256, 512, 1024)
"""The memory of the machines without a GPU that are named, in GiB."""
_MOST_WORKERS = 64
_SHORTEST = 256
"""The least tokens of a sample that are named as what would fit."""
_GIB = 2**30


@dataclass(frozen=True)
class AssessedCandidate:
    """A candidate with its estimate of memory and time."""

    candidate: Candidate
    estimate: Estimate
    feasibility: Feasibility

    @property
    def fits(self) -> bool:
        """Whether it fits the memory, by the upper bound of its estimate."""
        return self.feasibility.memory is True

    @property
    def possible(self) -> bool:
        """Whether it fits, and is not certain to be too slow."""
        return self.fits and False not in vars(self.feasibility).values()


def assess_candidates(
    found: Sequence[Candidate],
    known: ScenarioFacts,
    measured: Sequence[MeasuredTrial],
    first_token: PredictionInterval | None,
    fixed: Mapping[str, Any],
) -> list[AssessedCandidate]:
    """Estimate each candidate, changed to save memory where it must; `fixed` settings are kept.

    Candidates that differ only in the learning rate share an estimate.
    """
    takes: dict[str, tuple[Candidate, Estimate, bool]] = {}
    options = []
    for candidate in found:
        key = candidate.with_rate(1.0).config.model_dump_json()
        if key not in takes:
            takes[key] = _in_time(*fitted(candidate, known, measured, fixed), known, fixed)
        changed, taken, in_time = takes[key]
        budget = _within(taken.seconds, _seconds(known.scenario.budget_hours))
        feasibility = Feasibility(
            memory=taken.fits,
            budget=budget if in_time else False,
            latency=_within(first_token, known.scenario.latency_target_ms),
        )
        own = changed.with_rate(candidate.config.train.learning_rate)
        options.append(AssessedCandidate(own, taken, feasibility))
    return options


def feasible(options: Sequence[AssessedCandidate]) -> list[AssessedCandidate]:
    """Return the candidates that may be recommended."""
    return [option for option in options if option.possible]


def fitted(
    candidate: Candidate,
    known: ScenarioFacts,
    measured: Sequence[MeasuredTrial],
    fixed: Mapping[str, Any],
) -> tuple[Candidate, Estimate]:
    """Return the candidate with the cheapest changes that make it fit, or take the least memory."""
    best, taken = candidate, _estimate(candidate, known, measured)
    if taken.fits is True:
        return best, taken
    for group in memory_savings(candidate, fixed, known.facts):
        low, high = 0, len(group) - 1
        while low <= high:  # each takes less than those before it
            at = high if high == len(group) - 1 else (low + high) // 2
            changed = with_changes(candidate, group[at])
            less = _estimate(changed, known, measured)
            if less.fits is True or less.memory.high < taken.memory.high:
                best, taken = changed, less
            if less.fits is True:
                high = at - 1
            elif at == len(group) - 1:
                break
            else:
                low = at + 1
        if taken.fits is True:
            return best, taken
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


def _in_time(
    candidate: Candidate, taken: Estimate, known: ScenarioFacts, fixed: Mapping[str, Any]
) -> tuple[Candidate, Estimate, bool]:
    """Return the candidate with as many of the advised steps as end within the budget.

    The last result is whether so few are still a training (`steps.within_budget`). Given lengths
    are kept.
    """
    budget = _seconds(known.scenario.budget_hours)
    if budget is None or not known.rows or is_given(fixed):
        return candidate, taken, True
    took = taken.seconds
    steps, possible = within_budget(taken.steps, took.expected, took.high, budget)
    if steps == taken.steps:
        return candidate, taken, possible
    changed = with_changes(candidate, {"train.num_train_epochs": None, "train.max_steps": steps})
    seconds = taken.seconds.times(steps / taken.steps)
    cost = taken.cost and taken.cost.times(steps / taken.steps)
    return changed, replace(taken, steps=steps, seconds=seconds, cost=cost), possible


def _seconds(hours: float | None) -> float | None:
    return None if hours is None else 3600 * hours


def _within(value: PredictionInterval | Interval | None, limit: float | None) -> bool | None:
    if limit is None or value is None:
        return None
    return True if value.high <= limit else False if value.low > limit else None


# --- where nothing fits -------------------------------------------------------------------------


def nothing_fits(
    options: Sequence[AssessedCandidate],
    known: ScenarioFacts,
    measured: Sequence[MeasuredTrial],
    first_token: PredictionInterval | None,
    base: Config,
) -> str:
    """Return one line that says why no candidate is feasible, and what would be."""
    scenario = known.scenario
    fitting = [one for one in options if one.fits]
    if not fitting:
        least = min(options, key=lambda one: one.estimate.memory.expected).estimate
        memory = least.memory
        # What is asked of the other machines is whether anything fits, by the formula: fast.
        remedies = list(_more_room(known, measured, base))
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
    if first_token and all(one.feasibility.latency is False for one in fitting):
        return localized(
            "nothing answers in time: the first token takes {low:.3g} to {high:.3g} ms on "
            "{device}, more than --latency-target-ms {target:g}; use a smaller model or a faster "
            "machine, or allow more",
            low=first_token.low,
            high=first_token.high,
            device=localized_template(known.hardware.device_name),
            target=scenario.latency_target_ms,
        )
    fastest = min(fitting, key=lambda one: one.estimate.seconds.high)
    quickest = fastest.estimate
    length, _ = duration(fastest.candidate.config.train.model_dump())
    allowed = quickest.seconds.high
    if not is_given(given_settings(base)):  # it is cut to what the budget allows
        allowed = quickest.seconds.expected * min(SHORTEST, quickest.steps) / quickest.steps
    return localized(
        "nothing ends in time: the fastest takes {low:.2g} to {high:.2g} hours for {steps} steps, "
        "more than --budget-hours {budget:g}; use fewer {length}, a smaller model or a faster "
        "machine, or allow {least:.2g} hours",
        least=allowed / 3600,
        low=quickest.seconds.low / 3600,
        high=quickest.seconds.high / 3600,
        steps=quickest.steps,
        budget=scenario.budget_hours,
        length=length,
    )


def _more_room(
    known: ScenarioFacts, measured: Sequence[MeasuredTrial], base: Config
) -> Iterator[str]:
    """Yield single changes that would make something fit, each the smallest of its kind."""
    data = base.data.model_dump(include={"path", "sources"}, exclude_unset=True)
    named = {"model.name", "model.revision", "data.path", "data.sources"}
    fixed = sorted(given_settings(base).keys() - named)
    free = build_config({"model": base.model.model_dump(), "data": data}, {})
    loose = [name for name in fixed if name.startswith(("method.", "train.", "data.", "scaling."))]
    if loose and (method := _fits(free, known, measured)):
        settings = ", ".join(loose)
        yield localized("without {settings} ({method} does)", settings=settings, method=method)
    if "data.max_length" not in fixed:
        longest = candidates(base, known, varied=False)[0].config.data.max_length
        length = 2 ** ((longest - 1).bit_length() - 1)  # the next smaller power of 2
        while length >= _SHORTEST:
            cut = with_values(base, {"data.max_length": length})
            if method := _fits(cut, known, measured):
                yield localized("data.max_length={length} ({method})", length=length, method=method)
                break
            length //= 2
    hardware = known.hardware
    gpu = hardware.device == "cuda"
    workers = max(1, hardware.device_count) * 2
    while gpu and workers <= _MOST_WORKERS and "scaling.num_workers" not in fixed:
        if method := _fits(base, _with_gpus(known, workers), measured):
            yield localized("--num-gpus {count} ({method}, sharded)", count=workers, method=method)
            break
        workers *= 2
    for size in _SOLD_GIB if gpu else _HOST_GIB:
        more = hardware.device_memory < size * _GIB
        if more and (method := _fits(base, _with_memory(known, size), measured)):
            if gpu:
                yield localized("a GPU of {size} GiB ({method})", size=size, method=method)
            else:
                yield localized("a machine with {size} GiB ({method})", size=size, method=method)
            break
    size_b = known.facts.parameters / 1e9
    while (size_b := size_b / 2) >= LEAST_B:
        smaller = replace(known, facts=usual_model(size_b)[0])
        if method := _fits(base, smaller, measured):
            most = format_size(smaller.facts.parameters)
            yield localized("a model of up to {size} ({method})", size=most, method=method)
            break


def _fits(base: Config, known: ScenarioFacts, measured: Sequence[MeasuredTrial]) -> str | None:
    """Return the first method, low-rank or given, of which a candidate certainly fits, if any."""
    size = known.facts.parameters / 1e9
    known = replace(known, scenario=replace(known.scenario, model_size_b=size))
    fixed = given_settings(base)
    seen = set()
    try:
        found = candidates(base, known, varied=False)
    except RayfinError:
        return None
    for candidate in found:
        # LoRA and its kin, one of which is what would be recommended.
        usual = METHODS[candidate.method].usual_alpha is not None or "method.type" in fixed
        if usual and candidate.method not in seen:
            seen.add(candidate.method)
            changed, taken = fitted(candidate, known, measured, fixed)
            if taken.fits is True:
                own = changed.config.method
                four = own.quantization_bit == 4 and changed.method != "qlora"
                name = changed.method
                return localized("{method} over 4-bit weights", method=name) if four else name
    return None


def _with_gpus(known: ScenarioFacts, count: int) -> ScenarioFacts:
    scenario = replace(known.scenario, hardware=hardware_class(count), num_gpus=count)
    hardware: Hardware = replace(known.hardware, device_count=count)
    return replace(known, scenario=scenario, hardware=hardware)


def _with_memory(known: ScenarioFacts, gib: int) -> ScenarioFacts:
    scenario, hardware = known.scenario, known.hardware
    if hardware.device == "cuda":
        scenario = replace(scenario, gpu_memory_gb=float(gib))
    else:
        hardware = replace(hardware, host_memory=gib * _GIB)
    return replace(known, scenario=scenario, hardware=replace(hardware, device_memory=gib * _GIB))


def _listed(remedies: Sequence[str]) -> str:
    if not remedies:
        return localized("a machine with more memory, or a smaller model")
    *rest, last = remedies
    return localized("{others}; or {last}", others="; ".join(rest), last=last) if rest else last
