"""Estimate a trial's memory, time and cost by formulas, corrected by what trials measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rayfin.advisor.measurements import LengthFacts, Machine, MeasuredTrial
from rayfin.advisor.memory import MemoryParts
from rayfin.advisor.model_sizes import is_toy
from rayfin.advisor.step_time import DESCRIBED_GPU, usual_gpu
from rayfin.config.schema import Config
from rayfin.errors import ConfigError
from rayfin.hardware import Hardware
from rayfin.models.facts import ModelFacts
from rayfin.training.companions import companion_facts
from rayfin.training.precision import MIXED
from rayfin.training.sharding import frozen_bytes
from rayfin.training.strategies import choose, needs_group

if TYPE_CHECKING:
    from rayfin.data import DataProfile

_Z80 = 1.2816  # standard deviations to either side of a normal's middle 80 %

_SPREAD = {"cpu": 0.3, "cuda": 0.4}
"""The standard deviation of log(measured / formula) of memory before any measurement: on CPU the
formula is within 30 % of the trials that it was made with. On CUDA it is that of activations and
overhead, which the formula guesses: the rest is counted."""

_LEAST_SPREAD = 0.05
"""The least of it, for what an allocator loses between tensors: a convention, nothing measured."""

_TIME_SPREAD = 0.9
"""The standard deviation of log(measured / formula) of time before any measurement: a factor of
about 2.5, as processors and their load differ."""

_ABSURD = math.log(30)
"""A trial this far from the formula, as a logarithm, measured something else, or nothing."""

_CUDA_RESERVE = 1 * 2**30
"""The bytes of a GPU's memory that its context and fragmentation make unusable."""


@dataclass(frozen=True)
class Interval:
    """An expected value and the bounds of its 80 % interval."""

    low: float
    expected: float
    high: float

    def times(self, factor: float) -> Interval:
        """Return the interval scaled by a factor."""
        return Interval(self.low * factor, self.expected * factor, self.high * factor)

    def at_least(self, least: float) -> Interval:
        """Return the interval with no value below `least`."""
        return Interval(max(self.low, least), max(self.expected, least), max(self.high, least))


@dataclass(frozen=True)
class Estimate:
    """What training a configuration takes on one machine; memory is that of one worker."""

    parts: MemoryParts
    """The bytes by the formula alone."""
    memory: Interval
    """The peak in bytes, corrected by what trials measured."""
    steps: int
    """The optimizer steps of the training."""
    seconds: Interval
    """The time of the optimizer steps; loading and evaluations come on top."""
    cost: Interval | None
    trials: int
    """The number of measured trials, on such a device with this strategy, that corrected it."""
    near_trials: int
    """The number of those that had this model and this method."""
    room: float
    """The bytes of the device that one worker can use."""
    fits: bool | None
    """Whether the memory is enough, or None where the interval does not tell."""
    strategy: str | None
    """How several workers share the trial, or None where one process holds all."""
    strategy_why: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON stores it."""
        return asdict(self)


def estimate(
    config: Config,
    facts: ModelFacts,
    hardware: Hardware,
    *,
    measured: Sequence[MeasuredTrial] = (),
    price_per_hour: float | None = None,
    tokens: int | None = None,
    profile: DataProfile | LengthFacts | None = None,
) -> Estimate:
    """Estimate what training `config` on `hardware` takes, corrected by the `measured` trials.

    Its steps are those of `config.train.with_rows`, where it is of epochs.

    `profile` tells how long the samples are; without it, all have `tokens` tokens, or else
    data.max_length, with a loss on every token. `price_per_hour` is that of all workers together,
    which share the memory of `hardware` if it has no GPU. Raises ConfigError for impossible
    numbers, and ModelError where a companion of the objective (a teacher, say) is not there.
    """
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        raise ConfigError(f"price_per_hour={price_per_hour} must be 0 or more, or left out")
    length = config.data.max_length if tokens is None else min(tokens, config.data.max_length)
    lengths = (
        LengthFacts.of(profile) if profile is not None else LengthFacts(length, length, length, 1.0)
    )
    companions = companion_facts(config.train, config.model)
    config, why = _settled(config, facts, hardware, companions)
    machine = Machine(hardware.device, _speed_of(hardware), hardware.cpu_count)
    this = MeasuredTrial(config, facts, machine, lengths, companions=companions)
    # What one process took says little of what several take that share; and a toy model's memory
    # and time are the interpreter's.
    alike = [
        trial
        for trial in measured
        if trial.machine.device == hardware.device
        and _sharing(trial) == _sharing(this)
        and (trial.config.model.dtype == MIXED) == (config.model.dtype == MIXED)
        and (not is_toy(trial.facts.parameters) or trial.facts.identity == facts.identity)
    ]
    parts = this.parts
    spread, counted = _SPREAD[hardware.device], 0.0
    if hardware.device == "cuda":
        counted = parts.weights + parts.adapter + parts.gradients + parts.optimizer
        spread = max(_LEAST_SPREAD, spread * (1 - counted / parts.total))
    peak = _corrected(
        parts.total,
        [(one.peak_memory_bytes, one.parts.total, _same(one, this)) for one in alike],
        spread,
    ).at_least(counted)
    step = _corrected(
        this.formula_seconds,
        [
            (one.seconds_per_step, one.formula_seconds, [one.machine == machine, *_same(one, this)])
            for one in alike
        ],
        _TIME_SPREAD,
    )
    seconds = step.times(config.train.max_steps)
    on_gpu = hardware.device == "cuda"
    room = hardware.device_memory / (1 if on_gpu else config.scaling.num_workers)
    usable = room - (_CUDA_RESERVE if on_gpu else 0)
    return Estimate(
        parts=parts,
        memory=peak,
        steps=config.train.max_steps,
        seconds=seconds,
        cost=None if price_per_hour is None else seconds.times(price_per_hour / 3600),
        trials=len(alike),
        near_trials=sum(all(_same(trial, this)) for trial in alike),
        room=room,
        fits=True if peak.high <= usable else False if peak.low > usable else None,
        strategy=_sharing(this),
        strategy_why=why,
    )


def _speed_of(hardware: Hardware) -> str:
    """Return the name of the device whose speed is taken."""
    described = hardware.device_name == DESCRIBED_GPU
    return usual_gpu(hardware.device_memory) if described else hardware.device_name


def _settled(
    config: Config, facts: ModelFacts, hardware: Hardware, companions: Iterable[ModelFacts]
) -> tuple[Config, str | None]:
    """Return the configuration with the strategy that its workers would choose, and the reason."""
    scaling = config.scaling
    if not needs_group(scaling):
        return config, None
    if scaling.strategy != "auto":
        return config, "asked for"
    size, dtype = scaling.num_workers, config.model.dtype
    beside = sum(frozen_bytes(one, dtype, hardware.device) for one in companions)
    strategy, why = choose(
        config.method,
        facts,
        hardware,
        workers=size,
        here=size,
        train=config.train,
        dtype=dtype,
        beside=beside,
    )
    named = scaling.model_copy(update={"strategy": strategy})
    return config.model_copy(update={"scaling": named}), why


def _sharing(trial: MeasuredTrial) -> str | None:
    scaling = trial.config.scaling
    return scaling.strategy if needs_group(scaling) else None


def _same(one: MeasuredTrial, other: MeasuredTrial) -> list[bool]:
    """Return whether two trials have the same model, and the same method over the same weights."""
    ways = [
        (c.method.type, c.method.quantization_bit, c.train.gradient_checkpointing)
        for c in (one.config, other.config)
    ]
    return [one.facts.identity == other.facts.identity, ways[0] == ways[1]]


def _corrected(
    formula: float, trials: Iterable[tuple[float | None, float, list[bool]]], spread: float
) -> Interval:
    """Return the formula's value corrected by the mean log error of trials, with its 80 % interval.

    Each of `trials` is what was measured, what the formula says, and what the trial has in common
    with this one, the most important first. The correction goes from all trials to the most similar
    ones; each level starts from the mean of the level before, which counts as one trial. So a few
    similar trials count for more than many others, no trial leaves the formula as it is, and one
    trial moves it half of the way. Within a level a trial of the same size has weight 1, and one of
    twice or half the size 1/2. The interval is that of a normal distribution of the errors, by
    their scatter and the uncertainty of their mean; before any trial its standard deviation is
    `spread`, increased by that uncertainty.
    """
    known = [
        (math.log(value / own), math.log2(own / formula), [*same, False].index(False))
        for value, own, same in trials
        if value is not None and abs(math.log(value / own)) < _ABSURD
    ]
    table = np.array(known, dtype=np.float64).reshape(-1, 3)
    mean, variance, weight = 0.0, spread**2, 0.0
    for circle in range(int(table[:, 2].max(initial=-1)) + 1):
        errors, distances, _ = table[table[:, 2] >= circle].T
        weights = 1 / (1 + distances**2)
        # A trial apart from the median moves the mean no further than two spreads would.
        order = errors.argsort()
        centre = errors[order][np.searchsorted(weights[order].cumsum(), weights.sum() / 2)]
        errors = errors.clip(centre - 2 * spread, centre + 2 * spread)
        weight = float(weights.sum())
        before, mean = mean, (mean + float(weights @ errors)) / (1 + weight)
        scatter = float(weights @ (errors - mean) ** 2)
        variance = (variance + (before - mean) ** 2 + scatter) / (1 + weight)
    deviation = math.sqrt(variance * (1 + 1 / (1 + weight)))
    low, expected, high = (formula * math.exp(mean + z * deviation) for z in (-_Z80, 0, _Z80))
    return Interval(low, expected, high)
