"""Full configurations that could be run in a scenario: what the advisor chooses from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayfin.config import Config, with_values
from rayfin.errors import ConfigError, MethodError, RayfinError
from rayfin.methods import METHODS, check_combination
from rayfin.recommend import practice
from rayfin.recommend.rules import rule_for
from rayfin.recommend.scenario import Scenario

_RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Of practice's learning rate; a factor of two is as near as anybody can tell apart."""
_CAPACITIES = (1 / 4, 1.0, 4.0)
"""Of practice's rank, or number of virtual tokens."""
_SECTIONS = ("model", "data", "method", "train", "scaling")


@dataclass(frozen=True)
class Candidate:
    """A configuration, and what of it is not the base configuration's."""

    config: Config
    settings: Mapping[str, Any]
    """Dotted setting -> value."""

    @property
    def method(self) -> str:
        return self.config.method.type


def given(config: Config) -> dict[str, Any]:
    """The dotted settings that a configuration's file and overrides named: they are kept."""
    found: dict[str, Any] = {}
    for name in _SECTIONS:
        section = getattr(config, name)
        found |= {
            f"{name}.{leaf}": getattr(section, leaf)
            for leaf in section.model_fields_set
            if name in config.model_fields_set
        }
    return found


def candidates(base: Config, scenario: Scenario) -> list[Candidate]:
    """Variants of `base` for `scenario`: methods, learning rates and ranks around practice's.

    What `base` was given is kept in all of them; of the rest, practice decides what the advisor
    does not (batch, length, checkpointing by the memory). Those that can't work are left out;
    ConfigError where none is left.
    """
    fixed = given(base)
    found: dict[str, Candidate] = {}
    refused: RayfinError | None = None
    for method in methods_for(fixed, scenario):
        for values in _variants(method, scenario):
            settings = {
                name: value
                for name, value in values.items()
                if name == "method.type" or name not in fixed
            }
            try:
                config = with_values(base, settings)
                check_combination(config)
            except (ConfigError, MethodError) as error:
                refused = refused or error
                continue
            found.setdefault(config.model_dump_json(), Candidate(config, settings))
    if not found:
        raise ConfigError(f"the given settings leave nothing that can be trained: {refused}")
    return list(found.values())


def methods_for(fixed: Mapping[str, Any], scenario: Scenario) -> Sequence[str]:
    """The method that was asked for; else the rules' first, and then all others that may do."""
    if "method.type" in fixed:
        return [str(fixed["method.type"])]
    rule = rule_for(scenario).methods or ("lora",)
    return list(dict.fromkeys([*rule, *(name for name in METHODS if name != "full")]))


def _variants(method: str, scenario: Scenario) -> Iterator[dict[str, Any]]:
    usual = practice.settings(scenario, method)
    name = _capacity(usual)
    if name is None:
        for rate in _RATES:
            yield usual | _learning_rate(usual, rate)
        return
    for rate, share in itertools.product(_RATES, _CAPACITIES):
        capacity = max(1, round(usual[name] * share))
        yield usual | _learning_rate(usual, rate) | _capacity_settings(method, name, capacity)


def _learning_rate(usual: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {"train.learning_rate": float(f"{usual['train.learning_rate'] * factor:.2g}")}


def _capacity(settings: Mapping[str, Any]) -> str | None:
    names = ("method.r", "method.target_r", "method.num_virtual_tokens")
    return next((name for name in names if name in settings), None)


def _capacity_settings(method: str, name: str, capacity: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: capacity}
    if METHODS[method].trains == "low rank":
        found["method.lora_alpha"] = practice.lora_alpha(method, capacity)
    if name == "method.target_r":
        found["method.init_r"] = max(capacity * 3 // 2, capacity)
    return found
