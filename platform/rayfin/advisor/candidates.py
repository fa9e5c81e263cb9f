"""The complete configurations that could be run in a scenario, from which the advisor chooses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayfin.advisor import practice
from rayfin.advisor.features import category_codes, data_row, model_row
from rayfin.advisor.measurements import LengthFacts
from rayfin.advisor.rules import rule_for
from rayfin.advisor.scenario import Scenario
from rayfin.config import Config, with_values
from rayfin.errors import ConfigError, MethodError, RayfinError
from rayfin.hardware import Hardware
from rayfin.methods import METHODS
from rayfin.methods.layers import names_linear
from rayfin.models.facts import ModelFacts
from rayfin.training.combination import check_combination
from rayfin.training.strategies import check_scaling
from rayfin.tuning.preflight import check_positions

_RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Factors on practice's learning rate; less than a factor of two makes no noticeable difference."""
_CAPACITIES = (1 / 4, 1.0, 4.0)
"""Factors on practice's rank, or number of virtual tokens."""
_SECTIONS = ("model", "data", "method", "train", "scaling")


@dataclass(frozen=True)
class Candidate:
    """A configuration, and what of it differs from the base configuration."""

    config: Config
    settings: Mapping[str, Any]
    """The dotted settings that differ, with their values."""

    @property
    def method(self) -> str:
        """The name of the method."""
        return self.config.method.type


def given_settings(config: Config) -> dict[str, Any]:
    """Return the dotted settings that a configuration's file or overrides named, which are kept."""
    found: dict[str, Any] = {}
    for name in _SECTIONS:
        section = getattr(config, name)
        found |= {
            f"{name}.{leaf}": getattr(section, leaf)
            for leaf in section.model_fields_set
            if name in config.model_fields_set
        }
    return found


@dataclass(frozen=True)
class ScenarioFacts:
    """A scenario, with the facts about its model, hardware and data that predictions need."""

    scenario: Scenario
    facts: ModelFacts
    hardware: Hardware
    profile: Mapping[str, Any] | None = None
    """The profile of the data, as records hold it; unknown entries may be missing."""
    lengths: LengthFacts | None = None
    """The lengths of the samples before any cut; None where they are not known."""
    notes: tuple[str, ...] = ()
    """What was guessed of the model or the data, as lines."""

    @property
    def rows(self) -> int | None:
        """The number of training samples, or None where nothing says it."""
        known: int | None = (self.profile or {}).get("rows_train")
        return known or self.scenario.dataset_rows

    def columns(self) -> dict[str, float]:
        """Return the scenario's columns in the rows of the learned model."""
        name = self.facts.identity
        return (
            model_row(name, self.facts.as_dict())
            | data_row(self.profile or {"rows_train": self.scenario.dataset_rows})
            | category_codes(self.profile or {}, name)
        )


def candidates(base: Config, known: ScenarioFacts) -> list[Candidate]:
    """Return variants of `base`: methods, and learning rates and ranks around practice's.

    All of them keep the given settings of `base`. Practice decides the rest that the advisor does
    not (batch size, length, checkpointing, by the memory). Variants that can't run are left out;
    raises ConfigError where none is left.
    """
    scenario = known.scenario
    fixed = given_settings(base)
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
                settings = _unquantized_where_it_must(base, settings, known.facts)
                config = _within_positions(with_values(base, settings), known.facts, fixed)
                config = config.with_rows(known.rows) if known.rows else config
                _check_saved(config, known.facts)
                check_combination(config)
                check_scaling(config)
                check_positions(config, known.facts.max_position_embeddings)
                _check_workers(config, known.hardware)
            except (ConfigError, MethodError) as error:
                refused = refused or error
                continue
            if "data.max_length" in settings:
                settings["data.max_length"] = config.data.max_length
            found.setdefault(config.model_dump_json(), Candidate(config, settings))
    if not found:
        raise ConfigError(f"the given settings leave nothing that can be trained: {refused}")
    return list(found.values())


def memory_savings(
    option: Candidate, fixed: Mapping[str, Any], facts: ModelFacts
) -> Iterator[dict[str, Any]]:
    """Yield changes to a candidate that save memory, the cheapest first; `fixed` settings are kept.

    The samples of a step stay the same: fewer are scored at once, fewer are trained on at once,
    then activations are recomputed, and then the weights are quantised to 4 bits.
    """
    method, train = option.config.method, option.config.train
    bits: list[dict[str, Any]] = [{}]
    four = {"method.quantization_bit": 4}
    free = not method.quantization_bit and not four.keys() & fixed.keys()
    if method.quantized_base and free and not _trains_linear_whole(option.config, facts):
        quantized = with_changes(option, four).config.method
        if not any(quantized.refusals(train.max_steps)):  # as of PiSSA, which needs whole weights
            bits.append(four)
    recomputed: list[dict[str, Any]] = [{}]
    name = "train.gradient_checkpointing"
    if method.gradient_checkpointing and not train.gradient_checkpointing and name not in fixed:
        recomputed.append({name: True})
    size, steps = "train.per_device_train_batch_size", "train.gradient_accumulation_steps"
    scored = "train.per_device_eval_batch_size"
    at_once, times = train.per_device_train_batch_size, train.gradient_accumulation_steps
    batches: list[dict[str, Any]] = [{}]
    while True:
        # Scoring holds the logits of every position: with long samples that is the most of all.
        fewer = {} if scored in fixed else {scored: min(at_once, train.per_device_eval_batch_size)}
        batches.append(fewer | ({} if len(batches) == 1 else {size: at_once, steps: times}))
        if at_once % 2 or {size, steps} & fixed.keys():
            break
        at_once, times = at_once // 2, times * 2
    for parts in itertools.product(bits, recomputed, batches):
        if changes := {key: value for part in parts for key, value in part.items()}:
            yield changes


def with_changes(option: Candidate, changes: Mapping[str, Any]) -> Candidate:
    """Return a candidate with dotted settings changed; only the values are checked again."""
    if not changes:
        return option
    config = with_values(option.config, changes)
    if config.train.num_train_epochs is not None:  # the samples of a step stay the same
        counted = config.train.with_steps(option.config.train.max_steps)
        config = config.model_copy(update={"train": counted})
    return Candidate(config, {**option.settings, **changes})


def _trains_linear_whole(config: Config, facts: ModelFacts) -> bool:
    """Return whether `modules_to_save` names a linear module, which 4 or 8 bits leave no gradient.

    MethodConfig.check_base refuses these, once there is a base.
    """
    saved: Sequence[str] = getattr(config.method, "modules_to_save", None) or ()
    return any(names_linear(name, facts) for name in saved)


def _check_saved(config: Config, facts: ModelFacts) -> None:
    """Raise MethodError for a quantised base of which a linear module is to be trained whole."""
    if config.method.quantization_bit and _trains_linear_whole(config, facts):
        raise MethodError(
            "method.modules_to_save names a linear module, and those have no gradient in "
            f"{config.method.quantization_bit} bits; use method.quantization_bit=null, or name the "
            "output head, the embeddings or norms"
        )


def _unquantized_where_it_must(
    base: Config, settings: dict[str, Any], facts: ModelFacts
) -> dict[str, Any]:
    """Return `settings` without 4 bits where what was given of the method takes whole weights."""
    name, config = "method.quantization_bit", with_values(base, settings)
    refused = any(config.method.refusals(config.train.max_steps))
    if name not in settings or not (refused or _trains_linear_whole(config, facts)):
        return settings
    return {key: value for key, value in settings.items() if key != name}


def _within_positions(config: Config, facts: ModelFacts, fixed: Mapping[str, Any]) -> Config:
    """Return the configuration with samples cut to the model's positions, unless that was given."""
    has = facts.max_position_embeddings
    room = config.data.max_length if has is None else has - config.method.positions
    if "data.max_length" in fixed or config.data.max_length <= room:
        return config
    return with_values(config, {"data.max_length": max(8, room)})


def _check_workers(config: Config, hardware: Hardware) -> None:
    """Raise ConfigError for more workers than GPUs, as no two workers share one."""
    workers, devices = config.scaling.num_workers, hardware.device_count
    if hardware.device == "cuda" and workers > devices:
        raise ConfigError(
            f"scaling.num_workers={workers} needs as many GPUs, and there "
            f"{'is' if devices == 1 else 'are'} {devices}; use scaling.num_workers={devices}, or "
            f"--num-gpus {workers}"
        )


def methods_for(fixed: Mapping[str, Any], scenario: Scenario) -> Sequence[str]:
    """Return the given method, or else the rules' methods, then all others that are served."""
    if "method.type" in fixed:
        return [str(fixed["method.type"])]
    rule = rule_for(scenario).methods or ("lora",)
    # What no engine serves is trained where it is asked for.
    others = (n for n, method in METHODS.items() if method.engines and not method.changes_base)
    return list(dict.fromkeys([*rule, *others]))


def _variants(method: str, scenario: Scenario) -> Iterator[dict[str, Any]]:
    usual = practice.settings(scenario, method)
    own = METHODS[method]
    name = f"method.{own.capacity}"
    if own.capacity is None:
        for rate in _RATES:
            yield usual | _learning_rate(usual, rate)
        return
    for rate, share in itertools.product(_RATES, _CAPACITIES):
        settings = own.of_capacity(max(1, round(usual[name] * share)))
        changed = {f"method.{leaf}": value for leaf, value in settings.items()}
        yield usual | _learning_rate(usual, rate) | changed


def _learning_rate(usual: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {"train.learning_rate": float(f"{usual['train.learning_rate'] * factor:.2g}")}
