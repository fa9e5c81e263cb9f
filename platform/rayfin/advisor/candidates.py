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
from rayfin.advisor.steps import advised_length
from rayfin.config import Config, TrainConfig, build_config, with_values
from rayfin.errors import ConfigError, MethodError, RayfinError
from rayfin.hardware import Hardware
from rayfin.methods import METHODS
from rayfin.methods.layers import names_linear
from rayfin.models.facts import ModelFacts
from rayfin.training.combination import check_combination
from rayfin.training.strategies import check_scaling, refusal
from rayfin.tuning.preflight import check_positions

_RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Factors on practice's learning rate; less than a factor of two makes no noticeable difference."""
_CAPACITIES = (1 / 2, 1.0, 4.0)
"""Factors on practice's rank, or number of virtual tokens."""
_RATE = "train.learning_rate"
SECTIONS = ("model", "data", "method", "train", "scaling")


@dataclass(frozen=True)
class Candidate:
    """A configuration, and what of it differs from the base configuration."""

    config: Config
    settings: Mapping[str, Any]
    """The dotted settings that differ, with their values."""

    @property
    def method(self) -> str:
        """The name of the method; LoRA over 4-bit or 8-bit weights is QLoRA, whatever was given."""
        own = self.config.method
        return "qlora" if own.type == "lora" and own.quantization_bit else own.type

    def with_rate(self, rate: float) -> Candidate:
        """Return the candidate with another learning rate; where it is given, that is kept."""
        if _RATE not in self.settings:
            return self
        train = self.config.train.model_copy(update={"learning_rate": rate})
        config = self.config.model_copy(update={"train": train})
        return Candidate(config, {**self.settings, _RATE: rate})


def given_settings(config: Config) -> dict[str, Any]:
    """Return the dotted settings that a configuration's file or overrides named, which are kept."""
    found: dict[str, Any] = {}
    for name in SECTIONS:
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

    @property
    def rank(self) -> int:
        """The rank that the data ask for (`practice.rank`)."""
        profile = self.profile or {}
        tokens, share = (
            profile.get("tokens_per_sample_mean"),
            profile.get("completion_share"),
        )
        if self.lengths is not None:
            tokens, share = self.lengths.tokens_per_sample_mean, self.lengths.completion_share
        told = None if not (tokens and self.rows) else tokens * (share or 1.0) * self.rows
        each = build_config({"method": {"type": "lora", "r": 1}}, {}).method
        return practice.rank(told, each.trained_parameters(self.facts))

    def columns(self) -> dict[str, float]:
        """Return the scenario's columns in the rows of the learned model."""
        name = self.facts.identity
        return (
            model_row(name, self.facts.as_dict())
            | data_row(self.profile or {"rows_train": self.scenario.dataset_rows})
            | category_codes(self.profile or {}, name)
        )


def candidates(base: Config, known: ScenarioFacts, *, varied: bool = True) -> list[Candidate]:
    """Return variants of `base`: methods, and learning rates and ranks around practice's.

    All of them keep the given settings of `base`. Practice decides the rest that the advisor does
    not, and nothing is done yet to save memory (`memory_savings`). Without `varied` each method has
    practice's rate and rank alone. Variants that can't run are left out; raises ConfigError where
    none is left.
    """
    scenario, r = known.scenario, known.rank
    fixed = given_settings(base)
    length = advised_length(known.rows, fixed)
    found: dict[str, Candidate] = {}
    refused: RayfinError | None = None
    for method in methods_for(fixed, scenario):
        usual = practice.settings(scenario, method, r)
        for values in _capacities(method, usual) if varied else (usual,):
            settings = {
                name: value
                for name, value in {**values, **length}.items()
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
            if method == "lora" and config.method.quantization_bit and "method.type" not in fixed:
                continue  # it is QLoRA, which is a candidate of its own
            if "data.max_length" in settings:
                settings["data.max_length"] = config.data.max_length
            found.setdefault(config.model_dump_json(), Candidate(config, settings))
    if not found:
        raise ConfigError(f"the given settings leave nothing that can be trained: {refused}")
    if not varied:
        return list(found.values())
    return [
        one.with_rate(float(f"{one.config.train.learning_rate * factor:.2g}"))
        for one in found.values()
        for factor in (_RATES if _RATE in one.settings else (1.0,))
    ]


def memory_savings(
    option: Candidate, fixed: Mapping[str, Any], facts: ModelFacts
) -> Iterator[list[dict[str, Any]]]:
    """Yield changes to a candidate that save memory, the cheapest first; `fixed` settings are kept.

    They come in lists of ever smaller batches, of which each takes less memory than the one before.
    The samples of a step stay the same: fewer are scored at once, fewer are trained on at once,
    then activations are recomputed, then the weights are quantised to 4 bits, and then several
    workers shard them.
    """
    method, train, scaling = option.config.method, option.config.train, option.config.scaling
    shared: list[dict[str, Any]] = [{}]
    name = "scaling.strategy"
    several = scaling.num_workers > 1 and scaling.strategy == "auto" and name not in fixed
    if several and refusal("fsdp", method, train.optim) is None:
        shared.append({name: "fsdp"})
    bits: list[dict[str, Any]] = [{}]
    four = {"method.quantization_bit": 4}
    # LoRA over 4-bit weights is QLoRA, a candidate of its own unless LoRA was asked for.
    free = method.type != "lora" or "method.type" in fixed
    free &= not method.quantization_bit and not four.keys() & fixed.keys()
    if method.quantized_base and free and not _trains_linear_whole(option.config, facts):
        quantized = with_changes(option, four).config.method
        if not any(quantized.refusals(train.max_steps)):  # as of PiSSA, which needs whole weights
            bits.append(four)
    recomputed: list[dict[str, Any]] = [{}]
    name = "train.gradient_checkpointing"
    if method.gradient_checkpointing and not train.gradient_checkpointing and name not in fixed:
        recomputed.append({name: True})
    batches = _batches(train, fixed)
    for parts in itertools.product(shared, bits, recomputed):
        changes = {key: value for part in parts for key, value in part.items()}
        yield [changes | batch for batch in batches]


def _batches(train: TrainConfig, fixed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return changes by which fewer samples are held at once, as many in a step; at first none."""
    size, steps = "train.per_device_train_batch_size", "train.gradient_accumulation_steps"
    scored = "train.per_device_eval_batch_size"
    at_once, times = train.per_device_train_batch_size, train.gradient_accumulation_steps
    found: list[dict[str, Any]] = [{}]
    while True:
        # Scoring holds the logits of every position: with long samples that is the most of all.
        fewer = {} if scored in fixed else {scored: min(at_once, train.per_device_eval_batch_size)}
        found.append(fewer | ({} if len(found) == 1 else {size: at_once, steps: times}))
        if at_once == 1 or {size, steps} & fixed.keys():
            return found
        part = next(n for n in range(2, at_once + 1) if at_once % n == 0)
        at_once, times = at_once // part, times * part


def with_changes(option: Candidate, changes: Mapping[str, Any]) -> Candidate:
    """Return a candidate with dotted settings changed; only the values are checked again."""
    if not changes:
        return option
    config = with_values(option.config, changes)
    settings = {**option.settings, **changes}
    if config.train.num_train_epochs is not None:  # the samples of a step stay the same
        counted = config.train.with_steps(option.config.train.max_steps)
        config = config.model_copy(update={"train": counted})
    return Candidate(config, {name: v for name, v in settings.items() if v is not None})


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
    """Return the given method, or else the rules' methods, then all others that are served.

    Where settings of a method are given without its type, those that have all of them.
    """
    if "method.type" in fixed:
        return [str(fixed["method.type"])]
    # What no engine serves is trained where it is asked for.
    others = (n for n, method in METHODS.items() if method.engines and not method.changes_base)
    given = {leaf for leaf in map(_method_setting, fixed) if leaf is not None}
    found = dict.fromkeys([*preferred_methods(scenario), *others])
    return [name for name in found if given <= METHODS[name].model_fields.keys()] or ["lora"]


def _method_setting(name: str) -> str | None:
    """Return the setting of a method that a dotted name is, or None for another section's."""
    section, _, leaf = name.partition(".")
    return leaf if section == "method" else None


def preferred_methods(scenario: Scenario) -> Sequence[str]:
    """Return the rules' methods, and QLoRA behind LoRA for where LoRA does not fit the memory."""
    rule = rule_for(scenario).methods or ("lora",)
    at = rule.index("lora") + 1 if "lora" in rule else len(rule)
    return list(dict.fromkeys([*rule[:at], *(("qlora",) if at else ()), *rule[at:]]))


def _capacities(method: str, usual: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    own = METHODS[method]
    if own.capacity is None:
        yield dict(usual)
        return
    for share in _CAPACITIES:
        settings = own.of_capacity(max(1, round(usual[f"method.{own.capacity}"] * share)))
        yield {**usual, **{f"method.{leaf}": value for leaf, value in settings.items()}}
