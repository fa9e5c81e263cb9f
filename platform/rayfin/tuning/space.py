"""The search space: its points, and how Optuna's distributions say them.

A point gives a value to each axis that its method has. Where method.type is swept, the space is
conditional: a point of `lora` has a `method.r` and no `method.num_virtual_tokens`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rayfin.config import Config, MethodConfig, Space, TrainConfig, with_values
from rayfin.methods import METHODS
from rayfin.training import TrialSpec
from rayfin.training.spec import absolute_companions, deciding_metric
from rayfin.training.starting_adapter import pinned

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Values = dict[str, Any]
"""Dotted setting -> value: one point of the space."""

Choices = Space | tuple[Any, ...]
"""The values that an axis may take: a range, or a list."""

METHOD = "method.type"
SWEPT_SECTIONS = ("model", "data", "method", "train")
"""Sections of a configuration whose settings can be axes."""


class SearchSpace:
    """The points that a sweep may try, read once from its configuration.

    It checks nothing itself: `rayfin.tuning.space_check.check_space` does, before anything else is
    asked of it.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.axes: Mapping[str, Choices] = config.sweep.parameters
        """Every axis of sweep.parameters, by its dotted setting."""
        self._axes_of: dict[str, dict[str, Choices]] = {}
        self._directories: dict[str, str | None] = {}

    @property
    def sweeps_methods(self) -> bool:
        """Whether the method is an axis itself."""
        return METHOD in self.axes

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """The methods that the trials have, each once."""
        swept = self.axes.get(METHOD)
        return tuple(dict.fromkeys(swept)) if isinstance(swept, tuple) else (self._method,)

    @property
    def _method(self) -> str:
        return self.config.method.type

    def axes_of(self, method: str) -> dict[str, Choices]:
        """Return the axes that a trial of the method has, but for that of the method itself."""
        if method not in self._axes_of:
            self._axes_of[method] = {
                axis: choices
                for axis, choices in self.axes.items()
                if axis != METHOD and has_setting(method, axis)
            }
        return self._axes_of[method]

    # --- points ------------------------------------------------------------------------------

    @cached_property
    def size(self) -> float:
        """The number of points; infinite where an axis is a range of real numbers.

        Several may compute the same: see `rayfin.tuning.search.distinct_settings`.
        """
        return sum(
            math.prod(map(_length, self.axes_of(method).values())) for method in self.methods
        )

    def grid(self) -> Iterator[Values]:
        """Yield every point of a space of finite `size`, one method after the other."""
        for method in self.methods:
            axes = self.axes_of(method)
            values = map(_values, axes.values())
            for one in itertools.product(*values):
                yield self._of_method(method) | dict(zip(axes, one, strict=True))

    def point(self, choose: Callable[[str, Choices], Any]) -> Values:
        """Return the point whose axes have the values that `choose(axis, choices)` returns.

        It is asked for the method first, and then for the axes that this method has.
        """
        values = {METHOD: choose(METHOD, self.axes[METHOD])} if self.sweeps_methods else {}
        axes = self.axes_of(values.get(METHOD, self._method))
        return values | {axis: choose(axis, choices) for axis, choices in axes.items()}

    def drawn(self, random: Random) -> Values:
        """Return a random point, every axis on its own and even over its list or range."""
        return self.point(lambda _, choices: _at(choices, random.random()))

    def moved(self, values: Mapping[str, Any], random: Random) -> Values:
        """Return a point near `values`: each axis a little further, or a few entries along."""

        def near(axis: str, choices: Choices) -> Any:
            if axis not in values:
                return _at(choices, random.random())
            here = _share(choices, values[axis])
            step = _STEP if isinstance(choices, Space) else max(_STEP, 0.7 / len(choices))
            return _at(choices, min(max(random.gauss(here, step), 0.0), 1.0))

        return self.point(near)

    def values_in(self, spec: Mapping[str, Any]) -> Values:
        """Return the swept settings that a trial's saved `spec` has, as it has them."""
        found: Values = {}
        for axis in self.axes:
            section, _, name = axis.partition(".")
            if name in spec.get(section, {}):
                found[axis] = spec[section][name]
        return found

    def _of_method(self, method: str) -> Values:
        return {METHOD: method} if self.sweeps_methods else {}

    # --- what a point is a setting of ---------------------------------------------------------

    def config_of(self, values: Mapping[str, Any]) -> Config:
        """Return the configuration with one point put in.

        What was written of the method holds for each method that has it; all else follows the
        defaults of the point's own. Raises ConfigError for values that no trial can have. Equals
        `with_values`, but only the sections that have axes are validated again: an advisor asks
        for hundreds of points before each trial.
        """
        changed: dict[str, Values] = {}
        for axis, value in values.items():
            section, _, name = axis.partition(".")
            changed.setdefault(section, {})[name] = value
        try:
            sections = {name: self._section(name, given) for name, given in changed.items()}
        except ValidationError:
            return with_values(self.config, values)  # raises, with all that is wrong
        return self.config.model_copy(update=sections)

    def spec_of(self, values: Mapping[str, Any]) -> TrialSpec:
        """Return the specification of the trial at one point; raises ConfigError as `config_of`."""
        config = self.config_of(values)
        config = config.model_copy(update={"method": self.pinned(config)})
        if any(axis.startswith(("model.", "data.")) for axis in values):
            return TrialSpec.of(config)
        # Their paths are absolute already: nothing is asked of the file system.
        base, train = self._base, absolute_companions(config.train)
        return TrialSpec(
            model=base.model,
            data=base.data,
            method=config.method,
            train=train,
            metric=deciding_metric(config),
        )

    def pinned(self, config: Config) -> MethodConfig:
        """Return the method with the directory of the adapter that it continues, if it does.

        An alias that moves meanwhile goes on naming the version that it named first.
        """
        if (name := config.method.init_from) is None:
            return config.method
        if name not in self._directories:
            self._directories[name] = pinned(config).init_from
        return config.method.model_copy(update={"init_from": self._directories[name]})

    @cached_property
    def _base(self) -> TrialSpec:
        method = self.pinned(self.config)
        return TrialSpec.of(self.config.model_copy(update={"method": method}))

    @cached_property
    def _written(self) -> Mapping[str, Values]:
        """Section -> what was written of it; all else is left to the defaults of each trial."""
        written = self.config.model_dump(
            mode="json", include=set(SWEPT_SECTIONS), exclude_unset=True
        )
        return {name: written.get(name, {}) for name in SWEPT_SECTIONS}

    def _section(self, name: str, given: Values) -> Any:
        """Return a section with some of its settings given; raises ValidationError."""
        written = self._written[name]
        if name == "train":
            return TrainConfig.model_validate(written | given)
        if name != "method":
            return type(getattr(self.config, name)).model_validate(written | given)
        kind = given.get("type", self._method)
        if kind != self._method and kind in METHODS:
            written = {k: v for k, v in written.items() if k in METHODS[kind].model_fields}
        return MethodConfig.model_validate(written | {"type": kind} | given)

    # --- as Optuna has it ---------------------------------------------------------------------

    @cached_property
    def distributions(self) -> Mapping[str, BaseDistribution]:
        """Each axis as Optuna draws it.

        A list is drawn by its index: ordinal where it is a list of numbers in order, so that the
        sampler knows that 8 lies between 4 and 16.
        """
        return {axis: _distribution(choices) for axis, choices in self.axes.items()}

    def encode(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a point as Optuna's parameters; None where it lies outside the space.

        `values` may be as a trial's spec has them (see `values_in`): 8 for '8', an absolute path
        for a relative one.
        """
        method = values.get(METHOD) if self.sweeps_methods else self._method
        if method not in self.methods:
            return None
        axes = self.axes_of(method)
        if self.sweeps_methods:
            axes = {METHOD: self.axes[METHOD], **axes}
        drawn: dict[str, Any] = {}
        for axis, choices in axes.items():
            value = values.get(axis)
            if isinstance(choices, Space):
                inside = isinstance(value, int | float) and choices.lower <= value <= choices.upper
                drawn[axis] = value if inside else None
            elif axis in values:
                drawn[axis] = self._index(method, axis, choices, value)
            if drawn.get(axis) is None:
                return None
        return drawn

    def _index(self, method: str, axis: str, choices: tuple[Any, ...], value: Any) -> int | None:
        """Return the index of a value in its axis' list; None where it isn't there."""
        value = list(value) if isinstance(value, tuple) else value
        if value in (plain := _plain(choices)):
            return plain.index(value)
        for index, choice in enumerate(plain):
            spec = self.spec_of(self._of_method(method) | {axis: choice}).model_dump(mode="json")
            if self.values_in(spec).get(axis) == value:
                return index
        return None


def has_setting(method: str, setting: str) -> bool:
    """Whether trials of a method have the dotted setting."""
    section, _, name = setting.partition(".")
    return section != "method" or name in METHODS[method].model_fields


def ends_of(choices: Choices) -> Sequence[Any]:
    """Return the values of a list, or both ends of a range."""
    if not isinstance(choices, Space):
        return [decode(choices, index) for index in range(len(choices))]
    if choices.space == "randint":
        return [int(choices.lower), int(choices.upper)]
    return [choices.lower, choices.upper]


def decode(choices: Choices, drawn: Any) -> Any:
    """Return the value of an axis for Optuna's parameter."""
    if not isinstance(choices, Space):
        chosen = choices[int(drawn)]
        return list(chosen) if isinstance(chosen, tuple) else chosen
    return int(drawn) if choices.space == "randint" else float(drawn)


_STEP = 0.1
"""Standard deviation of a move, as a share of the axis' whole length."""


def _distribution(choices: Choices) -> BaseDistribution:
    from optuna import distributions as optuna

    if not isinstance(choices, Space):
        if _ordered_numbers(choices):
            return optuna.IntDistribution(0, len(choices) - 1)
        return optuna.CategoricalDistribution(list(range(len(choices))))
    if choices.space == "randint":
        return optuna.IntDistribution(int(choices.lower), int(choices.upper))
    return optuna.FloatDistribution(choices.lower, choices.upper, log=choices.space == "loguniform")


def _values(choices: Choices) -> Sequence[Any]:
    if isinstance(choices, Space):
        return range(int(choices.lower), int(choices.upper) + 1)
    return [decode(choices, index) for index in range(len(choices))]


def _length(choices: Choices) -> float:
    if not isinstance(choices, Space):
        return len(choices)
    return choices.upper - choices.lower + 1 if choices.space == "randint" else math.inf


def _at(choices: Choices, share: float) -> Any:
    """Return the value at a share of the axis, from 0 to 1."""
    if not isinstance(choices, Space):
        return decode(choices, min(int(share * len(choices)), len(choices) - 1))
    if choices.space == "loguniform":
        value = choices.lower * (choices.upper / choices.lower) ** share
        return min(max(value, choices.lower), choices.upper)
    whole = choices.space == "randint"
    value = choices.lower + share * (choices.upper - choices.lower + whole)
    return min(int(value), int(choices.upper)) if whole else value


def _share(choices: Choices, value: Any) -> float:
    """Return the share of the axis at which a value of it lies."""
    if not isinstance(choices, Space):
        plain = _plain(choices)
        return (plain.index(value) + 0.5) / len(choices) if value in plain else 0.5
    if choices.space == "loguniform":
        return math.log(value / choices.lower) / math.log(choices.upper / choices.lower)
    return float((value - choices.lower) / (choices.upper - choices.lower))


def _plain(choices: tuple[Any, ...]) -> list[Any]:
    return [list(choice) if isinstance(choice, tuple) else choice for choice in choices]


def _ordered_numbers(choices: tuple[Any, ...]) -> bool:
    numbers = all(isinstance(c, (int, float)) and not isinstance(c, bool) for c in choices)
    return numbers and len(choices) > 1 and list(choices) == sorted(choices)
