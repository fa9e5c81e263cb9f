"""Memory, time and cost of a trial before it runs: formulas, corrected by what trials measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rayfin.advisor.measured import LengthFacts, Machine, Measured
from rayfin.advisor.memory import MemoryParts
from rayfin.advisor.reach import is_toy
from rayfin.config.schema import Config
from rayfin.errors import ConfigError
from rayfin.hardware import Hardware
from rayfin.models.facts import ModelFacts
from rayfin.training.strategies import choose, needs_group

if TYPE_CHECKING:
    from rayfin.data import DataProfile

_Z80 = 1.2816  # standard deviations to either side of a normal's middle 80 %

_SPREAD = {"cpu": 0.3, "cuda": 0.4}
"""Standard deviation of log(measured / formula) of memory where nothing was measured: the formula
is within 30 % of what the trials it was made with held on CPU; on CUDA it is untested."""

_TIME_SPREAD = 0.9
"""The same of seconds: a factor of three, as processors and their load differ."""

_ABSURD = math.log(30)
"""A row this far from the formula measured something else, or nothing."""

_CUDA_RESERVE = 1 * 2**30
"""Of a GPU's memory: its context and what fragmentation leaves unusable."""


@dataclass(frozen=True)
class Interval:
    """An expected value, and the bounds that hold it four times in five."""

    low: float
    expected: float
    high: float

    def times(self, factor: float) -> Interval:
        return Interval(self.low * factor, self.expected * factor, self.high * factor)

    def at_least(self, least: float) -> Interval:
        return Interval(max(self.low, least), max(self.expected, least), max(self.high, least))


@dataclass(frozen=True)
class Estimate:
    """What training a configuration takes on one machine; memory is a worker's."""

    parts: MemoryParts
    """Bytes by the formula alone."""
    memory: Interval
    """Bytes at the peak, corrected by what trials measured."""
    seconds: Interval
    """Of the optimizer steps; loading and evaluations come on top."""
    cost: Interval | None
    trials: int
    """Measured trials on this kind of device, shared in this way, that corrected it."""
    near_trials: int
    """Those of them that had this model and this method."""
    room: float
    """Bytes of its device that are a worker's."""
    fits: bool | None
    """Whether that is enough; None where the interval does not tell."""
    strategy: str | None
    """How several workers share the trial; None where one process holds all."""
    strategy_why: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    config: Config,
    facts: ModelFacts,
    hardware: Hardware,
    *,
    measured: Sequence[Measured] = (),
    price_per_hour: float | None = None,
    tokens: int | None = None,
    profile: DataProfile | LengthFacts | None = None,
) -> Estimate:
    """What training `config` on `hardware` takes, corrected by the trials in `measured`.

    `profile` tells how long the samples are; without it all have `tokens`, or else
    data.max_length, and a loss on every one. `price_per_hour` is that of all workers together,
    which share the memory of `hardware` where that has no GPU. Raises ConfigError for numbers that
    can't be meant.
    """
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        raise ConfigError(f"price_per_hour={price_per_hour} must be 0 or more, or left out")
    length = config.data.max_length if tokens is None else min(tokens, config.data.max_length)
    lengths = (
        LengthFacts.of(profile) if profile is not None else LengthFacts(length, length, length, 1.0)
    )
    config, why = _settled(config, facts, hardware)
    machine = Machine(hardware.device, hardware.device_name, hardware.cpu_count)
    this = Measured(config, facts, machine, lengths)
    # What one process took says little of what several take that share; and a toy model's memory
    # and time are the interpreter's.
    alike = [
        trial
        for trial in measured
        if trial.machine.device == hardware.device
        and _sharing(trial) == _sharing(this)
        and (not is_toy(trial.facts.parameters) or trial.facts.identity == facts.identity)
    ]
    parts = this.parts
    peak = _corrected(
        parts.total,
        [(one.peak_memory_bytes, one.parts.total, _same(one, this)) for one in alike],
        _SPREAD[hardware.device],
    )
    if hardware.device == "cuda":  # these are counted, whatever the doubt about the rest
        peak = peak.at_least(parts.weights + parts.adapter + parts.gradients + parts.optimizer)
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
        seconds=seconds,
        cost=None if price_per_hour is None else seconds.times(price_per_hour / 3600),
        trials=len(alike),
        near_trials=sum(all(_same(trial, this)) for trial in alike),
        room=room,
        fits=True if peak.high <= usable else False if peak.low > usable else None,
        strategy=_sharing(this),
        strategy_why=why,
    )


def _settled(config: Config, facts: ModelFacts, hardware: Hardware) -> tuple[Config, str | None]:
    """`config` with its strategy named as its workers would, and why that one."""
    scaling = config.scaling
    if not needs_group(scaling):
        return config, None
    if scaling.strategy != "auto":
        return config, "asked for"
    size, dtype = scaling.num_workers, config.model.dtype
    strategy, why = choose(config.method, facts, hardware, workers=size, here=size, dtype=dtype)
    named = scaling.model_copy(update={"strategy": strategy})
    return config.model_copy(update={"scaling": named}), why


def _sharing(trial: Measured) -> str | None:
    scaling = trial.config.scaling
    return scaling.strategy if needs_group(scaling) else None


def _same(one: Measured, other: Measured) -> list[bool]:
    """Whether they have the same model, and the same method over the same kind of weights."""
    ways = [
        (c.method.type, c.method.quantization_bit, c.train.gradient_checkpointing)
        for c in (one.config, other.config)
    ]
    return [one.facts.identity == other.facts.identity, ways[0] == ways[1]]


def _corrected(
    formula: float, trials: Iterable[tuple[float | None, float, list[bool]]], spread: float
) -> Interval:
    """The formula's value moved by the mean log error of measured trials, with an 80 % interval.

    Each of `trials`: what was measured, if it was, what the formula says of it, and what it has in
    common, first what counts most. From the widest circle of trials to the nearest, each starts
    from what the wider one found, as if that were one trial more: a few near trials count for more
    than many far ones, none leave the formula as it is, and one moves it half of the way. Within a
    circle a trial of the same size counts one, and one of twice or half the size half. The interval
    is that of a normal distribution of the errors, by their scatter and the doubt about their mean;
    before any trial its standard deviation is `spread`, and a half more for that doubt.
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
