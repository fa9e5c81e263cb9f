"""Estimate the time to a served adapter's first token by a formula, corrected by measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from rayfin.advisor.answer import PredictionInterval
from rayfin.advisor.model_sizes import is_toy
from rayfin.hardware import Hardware
from rayfin.history import SERVING, TrialRecord
from rayfin.models.facts import ModelFacts

_FIRST_TOKEN = f"{SERVING}time_to_first_token_seconds"
_PROMPT_TOKENS = 128
_FLOPS = {"cpu": 25e9, "cuda": 20e12}
"""The FLOP/s of a CPU core and of a GPU: rough values, as for training (`step_time`)."""
_OVERHEAD_SECONDS = 0.01
"""The part of a request besides the model: HTTP, the queue, the tokenizer."""
_SPREAD = 3.0
"""The factor of the formula's interval; measurements narrow it to `_MEASURED_SPREAD`."""
_MEASURED_SPREAD = 1.5
_ABSURD = math.log(100)
"""A measurement this far from the formula, as a logarithm, was of something else."""


@dataclass(frozen=True)
class ServingMeasurement:
    """The time to the first token that serving measured with one trial's adapter."""

    parameters: float
    """The number of parameters of the base model."""
    seconds: float
    """The mean time to the first token."""
    device: str


def served_from(records: Iterable[TrialRecord]) -> list[ServingMeasurement]:
    """Return the measurements in records; rows that don't say what was measured are left out."""
    found = []
    for record in records:
        seconds = record.metrics.get(_FIRST_TOKEN)
        model, hardware = record.scenario.get("model"), record.scenario.get("hardware")
        if not (isinstance(model, dict) and isinstance(hardware, dict)):
            continue
        parameters, device = model.get("parameters"), hardware.get("device")
        if _positive(seconds) and _positive(parameters) and isinstance(device, str):
            found.append(ServingMeasurement(float(parameters), float(seconds), device))
    return found


def _positive(value: Any) -> TypeGuard[float]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < 1e15


def first_token(
    facts: ModelFacts, hardware: Hardware, served: Sequence[ServingMeasurement]
) -> PredictionInterval | None:
    """Return the milliseconds to the first token after a prompt of 128 tokens.

    None where no model of half to twice the size was served on such a device: the formula alone may
    be wrong by any factor.
    Prefill takes 2 FLOPs per parameter and token (Kaplan et al. 2020, arXiv:2001.08361).
    """
    speed = _FLOPS[hardware.device] * (hardware.cpu_count if hardware.device == "cpu" else 1)

    def formula(parameters: float) -> float:
        return _OVERHEAD_SECONDS + 2 * parameters * _PROMPT_TOKENS / speed

    errors = [
        error
        for one in served
        if one.device == hardware.device and abs(math.log2(one.parameters / facts.parameters)) < 1
        if not is_toy(one.parameters) or one.parameters == facts.parameters
        if abs(error := math.log(one.seconds / formula(one.parameters))) < _ABSURD
    ]
    if not errors:
        return None
    error = sum(errors) / (1 + len(errors))  # the formula counts as one measurement
    spread = _MEASURED_SPREAD if len(errors) >= 2 else _SPREAD
    middle = 1000 * formula(facts.parameters) * math.exp(error)
    return PredictionInterval(low=middle / spread, expected=middle, high=middle * spread)
