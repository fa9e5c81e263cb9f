"""How long a served adapter's first token takes: a formula, corrected by what serving measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from rayfin.advisor.answer import Range
from rayfin.advisor.reach import is_toy
from rayfin.hardware import Hardware
from rayfin.history import SERVING, TrialRecord
from rayfin.models.facts import ModelFacts

_FIRST_TOKEN = f"{SERVING}time_to_first_token_seconds"
_PROMPT_TOKENS = 128
_FLOPS = {"cpu": 25e9, "cuda": 20e12}
"""FLOP/s of a CPU core, and of a GPU; as for training (`estimate`), no more than a start."""
_OVERHEAD_SECONDS = 0.01
"""Of a request beside the model: HTTP, the queue, the tokenizer."""
_SPREAD = 3.0
"""The formula's interval; measurements of the same model narrow it to `_MEASURED_SPREAD`."""
_MEASURED_SPREAD = 1.5
_ABSURD = math.log(100)
"""A measurement this far from the formula was of something else."""


@dataclass(frozen=True)
class Served:
    """What serving measured of one trial's adapter."""

    parameters: float
    """Of the base model."""
    seconds: float
    """To the first token, the mean of its requests."""
    device: str


def served_from(records: Iterable[TrialRecord]) -> list[Served]:
    """The measurements among `records`; rows that don't say what was measured are left out."""
    found = []
    for record in records:
        seconds = record.metrics.get(_FIRST_TOKEN)
        model, hardware = record.scenario.get("model"), record.scenario.get("hardware")
        if not (isinstance(model, dict) and isinstance(hardware, dict)):
            continue
        parameters, device = model.get("parameters"), hardware.get("device")
        if _positive(seconds) and _positive(parameters) and isinstance(device, str):
            found.append(Served(float(parameters), float(seconds), device))
    return found


def _positive(value: Any) -> TypeGuard[float]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < 1e15


def first_token(facts: ModelFacts, hardware: Hardware, served: Sequence[Served]) -> Range:
    """Milliseconds to the first token of a prompt of 128 tokens.

    Prefill takes 2 FLOPs a parameter and token (Kaplan et al. 2020, arXiv:2001.08361).
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
    error = sum(errors) / (1 + len(errors))  # the formula counts as one measurement
    spread = _MEASURED_SPREAD if len(errors) >= 2 else _SPREAD
    middle = 1000 * formula(facts.parameters) * math.exp(error)
    return Range(low=middle / spread, expected=middle, high=middle * spread)
