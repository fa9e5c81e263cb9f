"""Memory, time and cost of a trial before it runs: formulas, corrected by what trials measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from rayfin.config.method import FullConfig
from rayfin.config.schema import Config
from rayfin.errors import ConfigError, RayfinError
from rayfin.hardware import Hardware
from rayfin.methods.table import METHODS
from rayfin.models.facts import ModelFacts
from rayfin.recommend import memory
from rayfin.recommend.memory import Device, MemoryParts

if TYPE_CHECKING:
    from rayfin.data import DataProfile
    from rayfin.history import TrialRecord

_Z80 = 1.2816  # standard deviations to either side of a normal's middle 80 %

_SPREAD = {"cpu": 0.3, "cuda": 0.4}
"""Standard deviation of log(measured / formula) of memory where nothing was measured: the formula
is within 30 % of what the trials it was made with held on CPU; on CUDA it is untested."""

_TIME_SPREAD = 0.9
"""The same of seconds: a factor of three, as processors and their load differ."""

_ABSURD = math.log(30)
"""A row this far from the formula measured something else, or nothing."""

_LARGEST_LEARNING_RATE = 100.0
"""Nobody meant to run a row with a larger one."""

_PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10": 125e12,
    "L4": 121e12,
    "T4": 65e12,
}
"""Dense 16-bit tensor FLOP/s by what a GPU's name has in it (NVIDIA's data sheets); first fit."""
_SUSTAINED = 0.3
"""Share of the peak that training reaches; well-tuned runs 0.3 to 0.5 (arXiv:2204.02311, 4.1)."""
_CORE_FLOPS = 25e9
"""float32 FLOP/s of a CPU core: half of what an AVX2 core's matrix products reach."""
_BLOCK_SECONDS = {"cpu": 1e-2, "cuda": 2e-3}
"""Of a block, forward and backward, however few its tokens: Python and launches."""

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


_Count = Annotated[int, Field(gt=0, lt=10**15)]


@dataclass(frozen=True)
class Lengths:
    """What of the data decides memory and time; named as in its profile."""

    tokens_per_sample_mean: Annotated[float, Field(gt=0, lt=1e15)]
    tokens_per_sample_p95: _Count
    tokens_per_sample_max: _Count
    completion_share: Annotated[float, Field(gt=0, le=1)]

    @classmethod
    def of(cls, profile: DataProfile | Lengths) -> Lengths:
        return cls(*(getattr(profile, field.name) for field in fields(cls)))

    def longest_of(self, samples: int) -> int:
        """Tokens to expect of the longest of so many samples: a quantile, between those known."""
        known = (
            self.tokens_per_sample_mean,
            self.tokens_per_sample_p95,
            self.tokens_per_sample_max,
        )
        return round(np.interp(samples / (samples + 1), (0.5, 0.95, 1.0), known))


@dataclass(frozen=True)
class Machine:
    """What of the hardware decides memory and speed."""

    device: Device
    device_name: str
    cpu_count: _Count


@dataclass(frozen=True)
class _Scenario:
    """What is read of a trial's scenario in the history."""

    model: ModelFacts
    hardware: Machine
    data: Lengths


_SCENARIO = TypeAdapter(_Scenario)


@dataclass(frozen=True)
class Measured:
    """A trial that ran, and what it took; None for what was not measured."""

    config: Config
    facts: ModelFacts
    machine: Machine
    lengths: Lengths
    peak_memory_bytes: float | None = None
    seconds_per_step: float | None = None


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
    """Measured trials on this kind of device that corrected it."""
    near_trials: int
    """Those of them that had this model and this method."""
    fits: bool | None
    """Whether the device's memory is enough; None where the interval does not tell."""

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
    profile: DataProfile | Lengths | None = None,
) -> Estimate:
    """What training `config` on `hardware` takes, corrected by the trials in `measured`.

    `profile` tells how long the samples are; without it all have `tokens`, or else
    data.max_length, and a loss on every one. `price_per_hour` is that of all workers together.
    Raises ConfigError for numbers that can't be meant.
    """
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        raise ConfigError(f"price_per_hour={price_per_hour} must be 0 or more, or left out")
    length = config.data.max_length if tokens is None else min(tokens, config.data.max_length)
    lengths = Lengths.of(profile) if profile is not None else Lengths(length, length, length, 1.0)
    machine = Machine(hardware.device, hardware.device_name, hardware.cpu_count)
    this = Measured(config, facts, machine, lengths)
    alike = [trial for trial in measured if trial.machine.device == hardware.device]
    parts = _memory(this)
    peak = _corrected(
        parts.total,
        [(one.peak_memory_bytes, _memory(one).total, _same(one, this)) for one in alike],
        _SPREAD[hardware.device],
    )
    step = _corrected(
        _step_seconds(this),
        [
            (one.seconds_per_step, _step_seconds(one), [one.machine == machine, *_same(one, this)])
            for one in alike
        ],
        _TIME_SPREAD,
    )
    seconds = step.times(config.train.max_steps)
    room = hardware.device_memory - (_CUDA_RESERVE if hardware.device == "cuda" else 0)
    return Estimate(
        parts=parts,
        memory=peak,
        seconds=seconds,
        cost=None if price_per_hour is None else seconds.times(price_per_hour / 3600),
        trials=len(alike),
        near_trials=sum(all(_same(trial, this)) for trial in alike),
        fits=True if peak.high <= room else False if peak.low > room else None,
    )


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


def _memory(trial: Measured) -> MemoryParts:
    train = trial.config.train
    step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    return memory.memory_of(
        trial.config,
        trial.facts,
        device=trial.machine.device,
        tokens=trial.lengths.longest_of(step * train.max_steps),
        completion_share=trial.lengths.completion_share,
    )


def _step_seconds(trial: Measured) -> float:
    """Seconds of an optimizer step by the formula: its FLOPs at the device's usual speed."""
    train, machine = trial.config.train, trial.machine
    length = trial.lengths.tokens_per_sample_mean + memory.virtual_tokens(trial.config.method)
    tokens = train.per_device_train_batch_size * length
    share = trial.lengths.completion_share
    flops = tokens * flops_per_token(trial.config, trial.facts, length, share)
    if machine.device == "cpu":
        speed = _CORE_FLOPS * machine.cpu_count
    else:
        known = (peak for part, peak in _PEAK_FLOPS.items() if part in machine.device_name)
        speed = _SUSTAINED * next(known, 60e12)  # a guess at any other
    launches = _BLOCK_SECONDS[machine.device] * trial.facts.num_layers
    return train.gradient_accumulation_steps * (flops / speed + launches)


def flops_per_token(
    config: Config, facts: ModelFacts, length: float, completion_share: float = 1.0
) -> float:
    """FLOPs of a training step for one token in a row of `length` tokens.

    A product takes 2 a weight forward, 2 backward to its inputs, and 2 to its weights where these
    are trained: 6 a parameter for full fine-tuning, 4 for adapters (Kaplan et al. 2020,
    arXiv:2001.08361, section 2.1). Attention adds two products with the row; the head runs on
    tokens with a loss only; recomputed activations are one more forward pass.
    """
    head = completion_share * facts.vocab_size * facts.hidden_size
    attention = 2 * length * facts.num_attention_heads * facts.head_dim * facts.num_layers
    forward = 2 * (facts.linear_parameters + head + attention)
    full = isinstance(config.method, FullConfig)
    passes = (3 if full else 2) + config.train.gradient_checkpointing
    everywhere = not full and METHODS[config.method.type].trains == "low rank"
    adapter = memory.trained_parameters(config.method, facts) if everywhere else 0
    return passes * forward + 6 * adapter


def measured_from(records: Iterable[TrialRecord]) -> list[Measured]:
    """The trials among `records` that tell what they took, each computation once, the first one.

    Left out, whatever is wrong with them: trials that did not end well, that other programs ran,
    whose row does not hold what was trained, or whose numbers can't be.
    """
    found: dict[str, Measured] = {}
    for record in records:
        hardware = record.scenario.get("hardware")
        key = json.dumps([record.spec, hardware], sort_keys=True)
        if key not in found and (measured := _measured(record)) is not None:
            found[key] = measured
    return list(found.values())


def _measured(record: TrialRecord) -> Measured | None:
    if record.status not in ("finished", "stopped") or "source" in record.scenario:
        return None
    steps = _positive(record.metrics, "steps")
    seconds = _positive(record.metrics, "train_seconds")
    try:
        scenario = _SCENARIO.validate_python(record.scenario)
        sections = {name: record.spec[name] for name in ("model", "data", "method", "train")}
        workers = record.scenario["hardware"].get("num_workers", 1)
        trial = Measured(
            config=Config.model_validate({**sections, "scaling": {"num_workers": workers}}),
            facts=scenario.model,
            machine=scenario.hardware,
            lengths=scenario.data,
            peak_memory_bytes=_positive(record.metrics, "peak_memory_bytes"),
            seconds_per_step=seconds / steps if seconds and steps else None,
        )
        return trial if _credible(trial) else None
    except (ValidationError, RayfinError, KeyError, ArithmeticError):
        return None


def _credible(trial: Measured) -> bool:
    sizes = [value for value in asdict(trial.facts).values() if isinstance(value, int)]
    return (
        (trial.peak_memory_bytes or trial.seconds_per_step) is not None
        and trial.config.train.learning_rate <= _LARGEST_LEARNING_RATE
        and all(0 < size < 10**15 for size in sizes)
        and 0 < _memory(trial).total < math.inf
        and 0 < _step_seconds(trial) < math.inf
    )


def _positive(metrics: Mapping[str, Any], name: str) -> float | None:
    value = metrics.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 < value < 1e300 else None
