"""A search space is checked, and what is to be known of it told, before anything starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from rayfin.config import Config, Space, leaf_names, shown
from rayfin.errors import ConfigError, MethodError, did_you_mean, listed
from rayfin.methods import METHODS
from rayfin.training.combination import check_combination
from rayfin.training.strategies import check_scaling
from rayfin.tuning.space import (
    METHOD,
    Choices,
    Values,
    axes_of,
    has_setting,
    methods_of,
    trial_config,
)

_SWEPT_SECTIONS = ("model", "data", "method", "train")


def check_space(config: Config) -> None:
    """Raises ConfigError or MethodError for an axis or value that can't be tried.

    Every value of a list is tried, and of a range both ends and a point between: for every method
    that is swept, each with each value of every other axis.
    """
    axes = config.sweep.parameters
    if not axes:
        raise ConfigError(
            "sweep.parameters: is empty, there is nothing to sweep; give an axis, such as "
            "sweep.parameters.method.r=[4,8,16], or run one trial with rayfin train"
        )
    _check_methods(config)
    known = _sweepable(config)
    for axis, choices in axes.items():
        if axis not in known:
            raise ConfigError(f"sweep.parameters.{axis}: {_unknown(config, axis, known)}")
        if config.sweep.search == "grid" and isinstance(choices, Space):
            raise ConfigError(
                f"sweep.parameters.{axis}: a range has no grid; give a list of values, "
                "or use sweep.search=tpe or random"
            )
    for values in _probed(config):
        _check_point(config, values)


def variants(config: Config) -> list[Config]:
    """Trials in which every method, model, data set and setting of them comes with every other."""
    return [trial_config(config, values) for values in _probed(config, ("model", "data", "method"))]


def space_notes(config: Config) -> list[str]:
    """What not every method of a sweep takes, a line for each such setting."""
    methods = methods_of(config)
    written = [f"method.{name}" for name in config.method.model_fields_set if name != "type"]
    lines = []
    for setting in dict.fromkeys([*sorted(written), *config.sweep.parameters]):
        having = [method for method in methods if has_setting(method, setting)]
        lacking = [method for method in methods if method not in having]
        if having and lacking:
            verb = "has" if len(lacking) == 1 else "have"
            lines.append(
                f"{setting} is for {listed(having)}; {listed(lacking)} {verb} no such setting"
            )
    return lines


def _check_methods(config: Config) -> None:
    """The axis over methods, and that all that was written of the method is for one of them."""
    swept = config.sweep.parameters.get(METHOD)
    if swept is None:
        return
    if isinstance(swept, Space):
        raise ConfigError(f"sweep.parameters.{METHOD}: methods are no range; give a list of them")
    for method in swept:
        if not isinstance(method, str) or method not in METHODS:
            raise ConfigError(
                f"sweep.parameters.{METHOD}: {shown(method)} is not a method; allowed: "
                f"{', '.join(METHODS)}{did_you_mean(str(method), METHODS)}"
            )
    for name in sorted(config.method.model_fields_set - {"type"}):
        if not any(has_setting(method, f"method.{name}") for method in swept):
            raise ConfigError(
                f"method.{name}: no method of sweep.parameters.{METHOD} ({', '.join(swept)}) has "
                f"it; leave it out, or sweep one of {', '.join(_having(f'method.{name}'))} too"
            )


def _check_point(config: Config, values: Values) -> None:
    try:
        trial = trial_config(config, values)
        check_combination(trial)
        check_scaling(trial)
    except (ConfigError, MethodError) as error:
        said = str(error)
        others = [axis for axis in values if axis != METHOD]
        axes = [axis for axis in others if axis in said] or [
            axis for axis in others if axis.rpartition(".")[2] in said
        ]
        parts = [f"sweep.parameters.{axis}" for axis in axes]
        if METHOD in values:
            parts.append(f"{'' if axes else 'sweep.parameters.'}{METHOD}={values[METHOD]}")
        where = f"{' with '.join(parts)}: " if parts else ""
        ranges = any(isinstance(config.sweep.parameters[axis], Space) for axis in axes)
        hint = ""
        if ranges and "whole number" in said:
            hint = "; a range of whole numbers is {space: randint, …}"
        elif METHOD in values and not axes:
            hint = "; what is set under method is for every method that has it"
        raise type(error)(f"{where}{said}{hint}") from None


def _probed(config: Config, sections: Sequence[str] = _SWEPT_SECTIONS) -> Iterator[Values]:
    """Points of every method in which each two values of two axes of `sections` come together."""
    swept = METHOD in config.sweep.parameters
    for method in methods_of(config):
        probes = {axis: _probes(choices) for axis, choices in axes_of(config, method).items()}
        first = {axis: values[0] for axis, values in probes.items()}
        first |= {METHOD: method} if swept else {}
        yield first
        varied = [name for name in probes if name.partition(".")[0] in sections]
        for count in (1, 2):
            for names in itertools.combinations(varied, count):
                for values in itertools.product(*(probes[name][1:] for name in names)):
                    yield first | dict(zip(names, values, strict=True))


def _probes(choices: Choices) -> Sequence[Any]:
    if not isinstance(choices, Space):
        return choices
    if choices.space == "randint":
        return [int(choices.lower), int(choices.upper)]
    # A point between, so that a real range over a setting that takes whole numbers is found out.
    return [choices.lower, choices.lower + (choices.upper - choices.lower) / math.pi, choices.upper]


def _sweepable(config: Config) -> list[str]:
    names = [name for name in leaf_names(config) if not name.startswith("method.")]
    for method in methods_of(config):
        names += [f"method.{name}" for name in METHODS[method].model_fields]
    return [name for name in dict.fromkeys(names) if name.partition(".")[0] in _SWEPT_SECTIONS]


def _unknown(config: Config, axis: str, known: list[str]) -> str:
    near = did_you_mean(axis, known)
    if having := _having(axis):
        return (
            f"no setting of {listed(methods_of(config))}{near}; {listed(having)} "
            f"{'has' if len(having) == 1 else 'have'} it"
        )
    return f"unknown setting{near}; any setting of {', '.join(_SWEPT_SECTIONS)} can be swept"


def _having(axis: str) -> list[str]:
    """The methods that have a setting of section `method`."""
    if not axis.startswith("method."):
        return []
    return [method for method in METHODS if has_setting(method, axis)]
