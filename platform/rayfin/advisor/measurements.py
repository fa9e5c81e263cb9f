"""The time and memory that past trials took, read from the rows of a history."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from rayfin.advisor.memory import MemoryParts, memory_of
from rayfin.advisor.step_time import step_seconds
from rayfin.config.schema import Config
from rayfin.errors import RayfinError
from rayfin.history.record import finite
from rayfin.models.facts import ModelFacts
from rayfin.statuses import SCORED
from rayfin.training.sharding import Device

if TYPE_CHECKING:
    from rayfin.data import DataProfile
    from rayfin.history import TrialRecord

_LARGEST_LEARNING_RATE = 100.0
"""A row with a larger learning rate is a mistake."""

_Count = Annotated[int, Field(gt=0, lt=10**15)]


@dataclass(frozen=True)
class LengthFacts:
    """What of the data decides memory and time, under the names of its profile."""

    tokens_per_sample_mean: Annotated[float, Field(gt=0, lt=1e15)]
    tokens_per_sample_p95: _Count
    tokens_per_sample_max: _Count
    completion_share: Annotated[float, Field(gt=0, le=1)]

    @classmethod
    def of(cls, profile: DataProfile | LengthFacts) -> LengthFacts:
        """Take the facts from a profile."""
        return cls(*(getattr(profile, field.name) for field in fields(cls)))

    def cut(self, length: int) -> LengthFacts:
        """Return the facts with samples cut to so many tokens."""
        return LengthFacts(
            min(self.tokens_per_sample_mean, length),
            min(self.tokens_per_sample_p95, length),
            min(self.tokens_per_sample_max, length),
            self.completion_share,
        )

    def longest_of(self, samples: int) -> int:
        """Return the expected tokens of the longest of so many samples, from known quantiles."""
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
    """The part of a trial's scenario in the history that is read here."""

    model: ModelFacts
    hardware: Machine
    data: LengthFacts
    companions: dict[str, ModelFacts] = field(default_factory=dict)


_SCENARIO = TypeAdapter(_Scenario)


@dataclass(frozen=True)
class MeasuredTrial:
    """A trial that ran, with its time and memory; None for what was not measured."""

    config: Config
    facts: ModelFacts
    machine: Machine
    lengths: LengthFacts
    peak_memory_bytes: float | None = None
    seconds_per_step: float | None = None
    companions: tuple[ModelFacts, ...] = ()
    """The frozen models that the objective uses beside the one that is trained."""

    # The formulas' values are needed again for every estimate that a trial corrects.
    @cached_property
    def parts(self) -> MemoryParts:
        """The bytes by the formula alone."""
        train = self.config.train
        step = train.per_device_train_batch_size * train.gradient_accumulation_steps
        return memory_of(
            self.config,
            self.facts,
            device=self.machine.device,
            tokens=self.lengths.longest_of(step * train.max_steps),
            completion_share=self.lengths.completion_share,
            companions=self.companions,
        )

    @cached_property
    def formula_seconds(self) -> float:
        """The seconds of a step by the formula alone."""
        return step_seconds(
            self.config,
            self.facts,
            **vars(self.machine),
            tokens=self.lengths.tokens_per_sample_mean,
            completion_share=self.lengths.completion_share,
        )


def measured_from(records: Iterable[TrialRecord]) -> list[MeasuredTrial]:
    """Return the trials whose time or memory was measured; of equal ones, the first.

    Left out are trials that did not end well, that other programs ran, whose row does not hold what
    was trained, or whose numbers are impossible.
    """
    found: dict[str, MeasuredTrial] = {}
    for record in records:
        hardware = record.scenario.get("hardware")
        key = json.dumps([record.spec, hardware], sort_keys=True)
        if key not in found and (measured := _measured(record)) is not None:
            found[key] = measured
    return list(found.values())


def _measured(record: TrialRecord) -> MeasuredTrial | None:
    if record.status not in SCORED or "source" in record.scenario:
        return None
    steps = _positive(record.metrics, "steps")
    seconds = _positive(record.metrics, "train_seconds")
    try:
        scenario = _SCENARIO.validate_python(record.scenario)
        sections = {name: record.spec[name] for name in ("model", "data", "method", "train")}
        hardware = record.scenario["hardware"]
        known = ("num_workers", "strategy", "cpu_offload")
        scaling = {name: hardware[name] for name in known if name in hardware}
        trial = MeasuredTrial(
            config=Config.model_validate({**sections, "scaling": scaling}),
            facts=scenario.model,
            machine=scenario.hardware,
            lengths=scenario.data,
            peak_memory_bytes=_positive(record.metrics, "peak_memory_bytes"),
            seconds_per_step=seconds / steps if seconds and steps else None,
            companions=tuple(scenario.companions.values()),
        )
        usual = trial.config.model.attn_implementation in ("auto", "sdpa")
        if not usual or trial.config.train.use_liger_kernel:
            return None  # other kernels take other times, and another memory
        return trial if _credible(trial) else None
    except (ValidationError, RayfinError, KeyError, ArithmeticError):
        return None


def _credible(trial: MeasuredTrial) -> bool:
    sizes = [value for value in asdict(trial.facts).values() if isinstance(value, int)]
    return (
        (trial.peak_memory_bytes or trial.seconds_per_step) is not None
        and trial.config.train.learning_rate <= _LARGEST_LEARNING_RATE
        and all(0 < size < 10**15 for size in sizes)
        and 0 < trial.parts.total < math.inf
        and 0 < trial.formula_seconds < math.inf
    )


def _positive(metrics: Mapping[str, Any], name: str) -> float | None:
    value = finite(metrics.get(name))
    return value if value is not None and 0 < value < 1e300 else None
