"""The search space: its points, and how Optuna's distributions say them.

A point gives a value to each axis that its method has. Where method.type is swept, the space is
conditional: a point of `lora` has a `method.r` and no `method.num_virtual_tokens`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from rayfin.config import Config, Space, with_values
from rayfin.methods import METHODS
from rayfin.training import TrialSpec

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Values = dict[str, Any]
"""Dotted setting -> value: one point of the space."""

Choices = Space | tuple[Any, ...]

METHOD = "method.type"


def methods_of(config: Config) -> tuple[str, ...]:
    """The methods that the sweep's trials have, each once."""
    swept = config.sweep.parameters.get(METHOD)
    return tuple(dict.fromkeys(swept)) if isinstance(swept, tuple) else (config.method.type,)


def has_setting(method: str, setting: str) -> bool:
    """Whether trials of a method have the dotted setting."""
    section, _, name = setting.partition(".")
    return section != "method" or name in METHODS[method].model_fields


def axes_of(config: Config, method: str) -> dict[str, Choices]:
    """The axes that a trial of the method has, but for that of the method itself."""
    return {
        axis: choices
        for axis, choices in config.sweep.parameters.items()
        if axis != METHOD and has_setting(method, axis)
    }


def point(config: Config, choose: Callable[[str, Choices], Any]) -> Values:
    """The point whose axes have the values that `choose(axis, choices)` returns.

    It is asked for the method first, and then for the axes that this method has.
    """
    swept = config.sweep.parameters.get(METHOD)
    values = {} if swept is None else {METHOD: choose(METHOD, swept)}
    axes = axes_of(config, values.get(METHOD, config.method.type))
    return values | {axis: choose(axis, choices) for axis, choices in axes.items()}


def trial_config(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with one point of the space put in.

    What was written of the method holds for each method that has it; all else follows the
    defaults of the point's own.
    """
    return with_values(config, values)


def distributions(config: Config) -> dict[str, BaseDistribution]:
    """Optuna's view of the axes.

    A list is drawn by its index: ordinal where it is a list of numbers in order, so that the
    sampler knows that 8 lies between 4 and 16.
    """
    from optuna import distributions as optuna

    def one(choices: Choices) -> BaseDistribution:
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


def decode(choices: Choices, drawn: Any) -> Any:
    """Optuna's parameter -> a setting's value."""
    if not isinstance(choices, Space):
        chosen = choices[int(drawn)]
        return list(chosen) if isinstance(chosen, tuple) else chosen
    return int(drawn) if choices.space == "randint" else float(drawn)


def encode(config: Config, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """A point -> Optuna's parameters; None where it lies outside the space.

    `values` may be as a trial's spec has them (see `values_in`): 8 for '8', an absolute path for a
    relative one.
    """
    swept = config.sweep.parameters.get(METHOD)
    method = config.method.type if swept is None else values.get(METHOD)
    if method not in methods_of(config):
        return None
    axes = axes_of(config, method) if swept is None else {METHOD: swept, **axes_of(config, method)}
    drawn: dict[str, Any] = {}
    for axis, choices in axes.items():
        value = values.get(axis)
        if isinstance(choices, Space):
            inside = isinstance(value, int | float) and choices.lower <= value <= choices.upper
            drawn[axis] = value if inside else None
        elif axis in values:
            drawn[axis] = _index(config, method, axis, choices, value)
        if drawn.get(axis) is None:
            return None
    return drawn


def values_in(config: Config, spec: Mapping[str, Any]) -> Values:
    """The swept settings as a trial's saved `spec` has them; those that it doesn't have are left
    out."""
    found: Values = {}
    for axis in config.sweep.parameters:
        section, _, name = axis.partition(".")
        if name in spec.get(section, {}):
            found[axis] = spec[section][name]
    return found


def size(config: Config) -> float:
    """Points of the space; infinite where a method has an axis that is a range of real numbers.

    Several may compute the same: see `rayfin.tuning.search.distinct_settings`.
    """
    return sum(
        math.prod(map(_length, axes_of(config, method).values())) for method in methods_of(config)
    )


def grid(config: Config) -> Iterator[Values]:
    """Every point of a space of finite `size`, a method after the other."""
    swept = METHOD in config.sweep.parameters
    for method in methods_of(config):
        axes = axes_of(config, method)
        values = map(_values, axes.values())
        for one in itertools.product(*values):
            yield ({METHOD: method} if swept else {}) | dict(zip(axes, one, strict=True))


def drawn(config: Config, random: Random) -> Values:
    """A point of the space, every axis on its own and even over its list or range."""
    return point(config, lambda _, choices: _at(choices, random.random()))


def moved(config: Config, values: Mapping[str, Any], random: Random) -> Values:
    """A point beside `values`: each axis a little further, or an entry up or down its list."""

    def beside(axis: str, choices: Choices) -> Any:
        if axis not in values:
            return _at(choices, random.random())
        here = _place(choices, values[axis])
        step = _STEP if isinstance(choices, Space) else max(_STEP, 0.7 / len(choices))
        return _at(choices, min(max(random.gauss(here, step), 0.0), 1.0))

    return point(config, beside)


_STEP = 0.1
"""Of an axis' whole length: the standard deviation of a move."""


def _values(choices: Choices) -> Sequence[Any]:
    if isinstance(choices, Space):
        return range(int(choices.lower), int(choices.upper) + 1)
    return [decode(choices, index) for index in range(len(choices))]


def _length(choices: Choices) -> float:
    if not isinstance(choices, Space):
        return len(choices)
    return choices.upper - choices.lower + 1 if choices.space == "randint" else math.inf


def _at(choices: Choices, share: float) -> Any:
    """The value at a share of the axis, from 0 to 1."""
    if not isinstance(choices, Space):
        return decode(choices, min(int(share * len(choices)), len(choices) - 1))
    if choices.space == "loguniform":
        value = choices.lower * (choices.upper / choices.lower) ** share
        return min(max(value, choices.lower), choices.upper)
    whole = choices.space == "randint"
    value = choices.lower + share * (choices.upper - choices.lower + whole)
    return min(int(value), int(choices.upper)) if whole else value


def _place(choices: Choices, value: Any) -> float:
    """The share of the axis at which a value of it lies."""
    if not isinstance(choices, Space):
        plain = _plain(choices)
        return (plain.index(value) + 0.5) / len(choices) if value in plain else 0.5
    if choices.space == "loguniform":
        return math.log(value / choices.lower) / math.log(choices.upper / choices.lower)
    return float((value - choices.lower) / (choices.upper - choices.lower))


def _index(
    config: Config, method: str, axis: str, choices: tuple[Any, ...], value: Any
) -> int | None:
    """The place of a value in its axis' list."""
    value = list(value) if isinstance(value, tuple) else value
    if value in (plain := _plain(choices)):
        return plain.index(value)
    swept = {METHOD: method} if METHOD in config.sweep.parameters else {}
    for index, choice in enumerate(plain):
        spec = TrialSpec.of(trial_config(config, swept | {axis: choice})).model_dump(mode="json")
        if values_in(config, spec).get(axis) == value:
            return index
    return None


def _plain(choices: tuple[Any, ...]) -> list[Any]:
    return [list(choice) if isinstance(choice, tuple) else choice for choice in choices]


def _ordered_numbers(choices: tuple[Any, ...]) -> bool:
    numbers = all(isinstance(c, (int, float)) and not isinstance(c, bool) for c in choices)
    return numbers and len(choices) > 1 and list(choices) == sorted(choices)
