"""Turn trials and scenarios into the rows of numbers that the Gaussian process takes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any, get_args

from rayfin.advisor.kernel import Columns
from rayfin.advisor.model_names import facts_from_name, name_to_read
from rayfin.config import TrainConfig
from rayfin.config.optimizers import (
    ADAM_SETTINGS,
    DEFAULT_OPTIMIZER,
    PLAIN_SCHEDULES,
    Schedule,
)
from rayfin.history import TrialRecord
from rayfin.history.record import finite
from rayfin.methods import METHODS, capacities
from rayfin.objectives import DEFAULT, stage_of

NAN = math.nan

COLUMNS = Columns(
    setting={
        "learning_rate": 0.7,  # decades beyond the method's usual one
        "capacity": 4.0,  # octaves of the rank, or of the number of virtual tokens
        "scaling": 2.0,  # octaves of lora_alpha / r
        "dropout": 0.5,
        "targets": 2.0,  # share of the linear layers that are adapted
        "samples_per_step": 4.0,  # octaves
        "steps": 4.0,  # octaves
        "method_x": 1.0,
        "method_y": 1.0,
    },
    scenario={
        "size": {"parameters": 1.0, "active": 1.0, "tuned": 2.0, "width": 2.0},
        "data": {"rows": 1.5, "tokens": 2.0, "completion_share": 0.5},
    },
    categorical=("brand", "generation", "task", "group"),
    # A history of one task or one model says nothing of what the others share with it: these are
    # then what an answer for another one rests on, and make its intervals wide.
    amplitudes={
        "size": 0.15,
        "data": 0.2,
        "brand": 0.1,
        "generation": 0.1,
        "task": 0.2,
        "group": 0.12,
    },
    common=0.3,
    group="group",
    defaults={
        "capacity": 4.0,
        "scaling": 1.0,
        "targets": 1.0,
        "samples_per_step": 4.0,
        "steps": 7.0,
        "parameters": 9.5,
        "active": 9.5,
        "tuned": 0.5,
        "rows": 3.5,
        "tokens": 8.0,
        "completion_share": 0.5,
    },
)
"""The columns of a row: sizes and rows in decades, tokens per sample in octaves, width in octaves
beyond the usual one. Their names are part of the cache's format."""

RATES, CAPACITIES = (1e-8, 1.0), (1, 4096)
"""The least and the largest learning rate, and rank or number of virtual tokens, of a trial that
says something; others are mistakes in a table."""
_LINEAR_LAYERS = 7  # of a Llama-like block: query, key, value, output, gate, up, down


def code(text: str) -> float:
    """Return a number for a text: equal texts have equal numbers, different ones almost never."""
    return float(zlib.crc32(text.encode(errors="replace")))


_OTHER_SCHEDULES = {*get_args(Schedule)} - {*PLAIN_SCHEDULES}
_UNLEARNED = (*ADAM_SETTINGS, "optim_args", "lr_scheduler_kwargs")
_UNLEARNED_TOO = ("neftune_noise_alpha", "label_smoothing_factor")


def unlearned(train: Mapping[str, Any]) -> str | None:
    """Return a setting under `train` whose trials are not those of AdamW as it comes, or None.

    The learned model has no column for it: a rate that suits Lion would be taken for AdamW's.
    """
    if "adamw" not in str(train.get("optim") or DEFAULT_OPTIMIZER).lower():
        return "optim"
    if str(train.get("lr_scheduler_type")) in _OTHER_SCHEDULES:
        return "lr_scheduler_type"
    for name in (*_UNLEARNED, *_UNLEARNED_TOO):
        default = TrainConfig.model_fields[name].get_default(call_default_factory=True)
        if train.get(name) not in (None, default):
            return name
    return None


def setting_row(spec: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the columns of a trial's setting, or None where no trial can have run with it.

    A learning rate of 1e308 or a rank of -3 is a mistake in a table, for example.
    """
    method, train = _section(spec, "method"), _section(spec, "train")
    kind = method.get("type")
    if not isinstance(kind, str) or kind not in METHODS:
        return None
    rate = _within(train.get("learning_rate"), *RATES)
    named = next((method[name] for name in capacities() if name in method), None)
    capacity = _within(named, *CAPACITIES)
    dropout = _within(method.get("lora_dropout"), 0.0, 1.0)
    if rate is None or capacity is None or dropout is None:
        return None
    alpha = _number(method.get("lora_alpha"))
    own = METHODS[kind]
    samples = _number(train.get("per_device_train_batch_size")) * _number(
        train.get("gradient_accumulation_steps", 1)
    )
    method_x, method_y = own.coordinates_of(method)
    return {
        "learning_rate": _log(10, rate / own.rate.at()),
        "capacity": _log(2, capacity),
        "scaling": _log(2, alpha / capacity**own.scale_exponent if capacity > 0 else NAN),
        "dropout": dropout,
        "targets": _targets(method.get("target_modules")),
        "samples_per_step": _log(2, samples),
        "steps": _log(2, _number(train.get("max_steps"))),
        "method_x": method_x,
        "method_y": method_y,
    }


def model_row(name: str, facts: Mapping[str, Any]) -> dict[str, float]:
    """Return the columns of a base model, from its facts as records hold them, or from its name."""
    called, identity, architecture = (
        str(facts.get(key) or otherwise)
        for key, otherwise in (("name", name), ("identity", name), ("architecture", ""))
    )
    said = facts_from_name(name_to_read(called, identity, architecture))
    total = _number(facts.get("parameters"))
    if not total > 0:
        total = said.size_b * 1e9 if said.size_b else NAN
    mixture = said.active_b != said.size_b
    active = said.active_b * 1e9 if said.active_b and mixture else total
    # A dense transformer has about 12 * layers * width**2 parameters, and its width is about 128 *
    # layers: a model of the usual shape is 0 wide.
    usual = (active * 128 / 12) ** (1 / 3)
    return {
        "parameters": _log(10, total),
        "active": _log(10, active),
        "tuned": NAN if said.tuned is None else float(said.tuned),
        "width": _log(2, _number(facts.get("hidden_size")) / usual),
        "brand": code(said.brand),
        "generation": code(said.generation),
    }


def data_row(profile: Mapping[str, Any]) -> dict[str, float]:
    """Return the columns of a data set, from its profile as records hold it."""
    share = _within(profile.get("completion_share"), 0.0, 1.0)
    return {
        "rows": _log(10, _number(profile.get("rows_train"))),
        "tokens": _log(2, _number(profile.get("tokens_per_sample_mean"))),
        "completion_share": NAN if share is None else share,
    }


def category_codes(
    profile: Mapping[str, Any],
    model: str,
    otherwise: str = "",
    stage: str = DEFAULT,
    start: str = "",
) -> dict[str, float]:
    """Return the categorical columns of the data (`task`) and of comparable scores (`group`).

    A group is a model on one split of the data; another sample of the data is another group, and
    `TrialTable` tells those apart that were scored on other tokens of it.
    `profile` is the data's, as records hold it; `otherwise` names data whose profile does not.
    `start` is the identity of the adapter that the trials continue.
    """
    objective = [] if stage == DEFAULT else [stage]  # scores of others don't compare
    objective += [start] if start else []  # nor do those of trials that begin further on
    named = str(profile.get("digest") or profile.get("datasets") or otherwise)
    source = str(profile.get("source") or named)
    return {"task": code(source), "group": code("\n".join((named, model, *objective)))}


def model_name(spec: Mapping[str, Any], scenario: Mapping[str, Any]) -> str:
    """Return the name of a record's base model, or an empty text."""
    facts, model = _section(scenario, "model"), _section(spec, "model")
    return str(facts.get("identity") or model.get("name") or "")


def row_of(record: TrialRecord) -> dict[str, float] | None:
    """Return all columns of a trial, or None for one that says nothing of a setting.

    No trial can have run with it, or it was trained otherwise than the columns tell (`unlearned`).
    """
    if unlearned(_section(record.spec, "train")) is not None:
        return None
    setting = setting_row(record.spec)
    if setting is None:
        return None
    steps = _number(record.metrics.get("steps"))
    early = record.status == "stopped" or "early_stop" in record.scenario
    if early and steps > 0:
        setting["steps"] = _log(2, steps)  # so far it went, and so good it was by then
    name, profile = model_name(record.spec, record.scenario), _section(record.scenario, "data")
    otherwise = str(_section(record.spec, "data").get("path") or record.sweep_id)
    start = str(_section(record.scenario, "init_from").get("identity") or "")
    return (
        setting
        | model_row(name, _section(record.scenario, "model"))
        | data_row(profile)
        | category_codes(profile, name, otherwise, stage_of(record.spec), start)
    )


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _targets(modules: Any) -> float:
    if modules == "all-linear":
        return 1.0
    if isinstance(modules, list | tuple) and modules:
        return min(1.0, len(modules) / _LINEAR_LAYERS)
    return NAN


def _number(value: Any) -> float:
    """Return a finite number, or NaN for anything else that a record may hold."""
    found = finite(value)
    return NAN if found is None else found


def octaves(value: Any) -> float:
    """Return the base-2 logarithm of a positive number, or NaN for anything else."""
    return _log(2, _number(value))


def _within(value: Any, least: float, most: float) -> float | None:
    """Return a number, NaN where it was left out, or None for anything not in [least, most]."""
    if value is None:
        return NAN
    number = _number(value)
    return number if least <= number <= most else None


def _log(base: float, value: float) -> float:
    return math.log(value, base) if 0 < value < math.inf else NAN
