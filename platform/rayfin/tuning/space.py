"""The search space: axes checked before anything starts, and turned into Optuna's distributions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from random import Random
from typing import TYPE_CHECKING, Any

from rayfin.config import METHOD_CONFIGS, Config, Space, leaf_names, with_values
from rayfin.errors import ConfigError, MethodError, did_you_mean
from rayfin.methods import check_combination
from rayfin.training.strategies import check_scaling

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Values = dict[str, Any]
"""Dotted setting -> value: one point of the space."""

_SWEPT_SECTIONS = ("model", "data", "method", "train")


def check_space(config: Config) -> None:
    """Raises ConfigError or MethodError for an axis or value that can't be tried.

    Every value of a list is tried, and of a range both ends and a point between: each on its own,
    then each with each value of every other axis.
    """
    axes = config.sweep.parameters
    if not axes:
        raise ConfigError(
            "sweep.parameters: is empty, there is nothing to sweep; give an axis, such as "
            "sweep.parameters.method.r=[4,8,16], or run one trial with rayfin train"
        )
    check_scaling(config)
    known = _sweepable(config)
    for axis, choices in axes.items():
        if axis not in known:
            raise ConfigError(
                f"sweep.parameters.{axis}: unknown setting{did_you_mean(axis, known)}; any setting "
                f"of {', '.join(_SWEPT_SECTIONS)} can be swept"
            )
        if config.sweep.search == "grid" and isinstance(choices, Space):
            raise ConfigError(
                f"sweep.parameters.{axis}: a range has no grid; give a list of values, "
                "or use sweep.search=tpe or random"
            )
    for count in (1, 2):
        for names in itertools.combinations(axes, count):
            for values in itertools.product(*(_probes(axes[name]) for name in names)):
                _check_point(config, dict(zip(names, values, strict=True)))


def _check_point(config: Config, values: Values) -> None:
    try:
        point = trial_config(config, values)
        check_combination(point)
        check_scaling(point)
    except (ConfigError, MethodError) as error:
        where = " with ".join(f"sweep.parameters.{axis}" for axis in values)
        ranges = any(isinstance(config.sweep.parameters[axis], Space) for axis in values)
        whole = ranges and "whole number" in str(error)
        hint = "; a range of whole numbers is {space: randint, …}" if whole else ""
        raise type(error)(f"{where}: {error}{hint}") from None


def variants(config: Config) -> list[Config]:
    """`config` with each value of each axis put in, one at a time: what a sweep will ask for."""
    points = [
        {axis: value}
        for axis, choices in config.sweep.parameters.items()
        for value in _probes(choices)
    ]
    return [trial_config(config, point) for point in points] or [config]


def trial_config(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with one point of the space put in.

    Where method.type is itself swept, settings that the drawn method does not have are left out.
    """
    values = dict(values)
    if (drawn := values.get("method.type")) is not None and drawn in METHOD_CONFIGS:
        has = METHOD_CONFIGS[drawn].model_fields
        values = {
            name: value
            for name, value in values.items()
            if not name.startswith("method.") or name.removeprefix("method.") in has
        }
    return with_values(config, values)


def distributions(config: Config) -> dict[str, BaseDistribution]:
    """Optuna's view of the axes.

    A list is drawn by its index: ordinal where it is a list of numbers in order, so that the
    sampler knows that 8 lies between 4 and 16.
    """
    from optuna import distributions as optuna

    def one(choices: Space | tuple[Any, ...]) -> BaseDistribution:
        if not isinstance(choices, Space):
            indices = range(len(choices))
            if _ordered_numbers(choices):
                return optuna.IntDistribution(0, len(choices) - 1)
            return optuna.CategoricalDistribution(list(indices))
        if choices.space == "randint":
            return optuna.IntDistribution(int(choices.lower), int(choices.upper))
        return optuna.FloatDistribution(
            choices.lower, choices.upper, log=choices.space == "loguniform"
        )

    return {axis: one(choices) for axis, choices in config.sweep.parameters.items()}


def decode(config: Config, drawn: Mapping[str, Any]) -> Values:
    """Optuna's parameters -> values of settings."""
    return {
        axis: _decode_one(config.sweep.parameters[axis], value) for axis, value in drawn.items()
    }


def encode(config: Config, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Values of settings -> Optuna's parameters; None where a value lies outside the space.

    A setting that the drawn method doesn't have may be missing, and then takes any value.
    """
    drawn: dict[str, Any] = {}
    for axis, choices in config.sweep.parameters.items():
        if axis not in values:
            if not axis.startswith("method.") or "method.type" not in values:
                return None
            drawn[axis] = choices.lower if isinstance(choices, Space) else 0
            continue
        value = values[axis]
        if isinstance(choices, Space):
            if not isinstance(value, (int, float)) or not choices.lower <= value <= choices.upper:
                return None
            drawn[axis] = value
        else:
            plain = [list(c) if isinstance(c, tuple) else c for c in choices]
            value = list(value) if isinstance(value, tuple) else value
            if value not in plain:
                return None
            drawn[axis] = plain.index(value)
    return drawn


def values_in(config: Config, spec: Mapping[str, Any]) -> Values:
    """The swept settings as a trial's saved `spec` has them; others are left out."""
    found: Values = {}
    for axis in config.sweep.parameters:
        section, _, name = axis.partition(".")
        if name in spec.get(section, {}):
            found[axis] = spec[section][name]
    return found


def size(config: Config) -> float:
    """Distinct points of the space; infinite where an axis is a range of real numbers."""
    total = 1.0
    for choices in config.sweep.parameters.values():
        if not isinstance(choices, Space):
            total *= len(choices)
        elif choices.space == "randint":
            total *= choices.upper - choices.lower + 1
        else:
            return math.inf
    return total


def grid(config: Config) -> Iterator[Values]:
    """Every point of a space of finite `size`."""
    axes = config.sweep.parameters
    values = (
        range(int(choices.lower), int(choices.upper) + 1) if isinstance(choices, Space) else choices
        for choices in axes.values()
    )
    for point in itertools.product(*values):
        yield dict(zip(axes, point, strict=True))


def drawn(config: Config, random: Random) -> Values:
    """A point of the space, every axis on its own and even over its list or range."""
    return {
        axis: _at(choices, random.random()) for axis, choices in config.sweep.parameters.items()
    }


def moved(config: Config, values: Mapping[str, Any], random: Random) -> Values:
    """A point beside `values`: each axis a little further, or an entry up or down its list."""
    point = {}
    for axis, choices in config.sweep.parameters.items():
        if axis not in values:
            point[axis] = _at(choices, random.random())
            continue
        here = _place(choices, values[axis])
        step = _STEP if isinstance(choices, Space) else max(_STEP, 0.7 / len(choices))
        point[axis] = _at(choices, min(max(random.gauss(here, step), 0.0), 1.0))
    return point


_STEP = 0.1
"""Of an axis' whole length: the standard deviation of a move."""


def _at(choices: Space | tuple[Any, ...], share: float) -> Any:
    """The value at a share of the axis, from 0 to 1."""
    if not isinstance(choices, Space):
        return _decode_one(choices, min(int(share * len(choices)), len(choices) - 1))
    if choices.space == "loguniform":
        value = choices.lower * (choices.upper / choices.lower) ** share
        return min(max(value, choices.lower), choices.upper)
    whole = choices.space == "randint"
    value = choices.lower + share * (choices.upper - choices.lower + whole)
    return min(int(value), int(choices.upper)) if whole else value


def _place(choices: Space | tuple[Any, ...], value: Any) -> float:
    """The share of the axis at which a value of it lies."""
    if not isinstance(choices, Space):
        plain = [list(c) if isinstance(c, tuple) else c for c in choices]
        return (plain.index(value) + 0.5) / len(choices) if value in plain else 0.5
    if not isinstance(value, int | float):  # null, where the setting may be left out
        return 0.5
    if choices.space == "loguniform":
        return math.log(value / choices.lower) / math.log(choices.upper / choices.lower)
    return float((value - choices.lower) / (choices.upper - choices.lower))


def _sweepable(config: Config) -> list[str]:
    types = config.sweep.parameters.get("method.type")
    kinds = [t for t in types if t in METHOD_CONFIGS] if isinstance(types, tuple) else []
    names = dict.fromkeys(leaf_names(config))
    for kind in kinds:
        names |= dict.fromkeys(f"method.{field}" for field in METHOD_CONFIGS[kind].model_fields)
    return [name for name in names if name.partition(".")[0] in _SWEPT_SECTIONS]


def _probes(choices: Space | tuple[Any, ...]) -> list[Any]:
    if not isinstance(choices, Space):
        return list(choices)
    if choices.space == "randint":
        return [int(choices.lower), int(choices.upper)]
    # A point between, so that a real range over a setting that takes whole numbers is found out.
    return [choices.lower, choices.lower + (choices.upper - choices.lower) / math.pi, choices.upper]


def _decode_one(choices: Space | tuple[Any, ...], value: Any) -> Any:
    if not isinstance(choices, Space):
        chosen = choices[int(value)]
        return list(chosen) if isinstance(chosen, tuple) else chosen
    return int(value) if choices.space == "randint" else float(value)


def _ordered_numbers(choices: tuple[Any, ...]) -> bool:
    numbers = all(isinstance(c, (int, float)) and not isinstance(c, bool) for c in choices)
    return numbers and len(choices) > 1 and list(choices) == sorted(choices)
