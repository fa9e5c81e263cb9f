"""A search space is checked, and what is to be known of it told, before anything starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from rayfin.config import Config, Space, format_value, leaf_names
from rayfin.errors import ConfigError, MethodError, did_you_mean, listed
from rayfin.history.comparable import decides_scored_tokens, keeps_scored_answers
from rayfin.methods import METHODS
from rayfin.metrics import score_of
from rayfin.objectives import OBJECTIVES
from rayfin.training.combination import check_combination
from rayfin.training.schedules import WITHOUT_WARMUP, idle_warmup
from rayfin.training.strategies import check_scaling
from rayfin.tuning.space import (
    METHOD,
    SWEPT_SECTIONS,
    Choices,
    SearchSpace,
    Values,
    has_setting,
)


def check_space(space: SearchSpace) -> None:
    """Raise ConfigError or MethodError for an axis or value that can't be tried.

    Every value of a list is tried, and of a range both ends and a point between: for every method
    that is swept, each with each value of every other axis.
    """
    config, axes = space.config, space.axes
    if not axes:
        raise ConfigError(
            "sweep.parameters: is empty, there is nothing to sweep; give an axis, such as "
            "sweep.parameters.method.r=[4,8,16], or run one trial with rayfin train"
        )
    _check_methods(space)
    known = _sweepable(space)
    for axis, choices in axes.items():
        if axis not in known:
            raise ConfigError(f"sweep.parameters.{axis}: {_unknown(space, axis, known)}")
        if config.sweep.search == "grid" and isinstance(choices, Space):
            raise ConfigError(
                f"sweep.parameters.{axis}: a range has no grid; give a list of values, "
                "or use sweep.search=tpe or random"
            )
    for values in _probed(space):
        _check_point(space, values)


def variants(space: SearchSpace) -> list[Config]:
    """Return trials in which every method, model, data set, objective and setting of them comes
    with every other, and with every optimizer and number of epochs."""
    own = ["train.stage", "train.optim", "train.use_liger_kernel", "train.num_train_epochs"]
    for objective in OBJECTIVES.values():
        own += [f"train.{name}" for name in objective.settings_class.model_fields]
    sections = ("model", "data", "method", *own)
    return [space.config_of(values) for values in _probed(space, sections)]


def space_notes(space: SearchSpace) -> list[str]:
    """Return a line for each setting that not every method takes, or that suits only some.

    Settings without an effect, and what is compared with what, are told, too.
    """
    methods, config = space.methods, space.config
    written = [f"method.{name}" for name in config.method.model_fields_set if name != "type"]
    lines = []
    for setting in dict.fromkeys([*sorted(written), *space.axes]):
        having = [method for method in methods if has_setting(method, setting)]
        lacking = [method for method in methods if method not in having]
        if having and lacking:
            verb = "has" if len(lacking) == 1 else "have"
            lines.append(
                f"{setting} is for {listed(having)}; {listed(lacking)} {verb} no such setting"
            )
    lines += _unusual_capacities(space) + _idle_warmups(space) + _of_other_schedulers(space)
    return lines + _rescored(space)


def _of_other_schedulers(space: SearchSpace) -> list[str]:
    """Return a line for each written setting of early stopping that the scheduler does not have."""
    sweep = space.config.sweep
    having = {
        "grace_period": ("asha", "predictive"),
        "reduction_factor": ("asha",),
        "wrong_stop_rate": ("predictive",),
    }
    return [
        f"sweep.{name} is for sweep.scheduler={' and '.join(which)}; it has no effect on "
        f"{sweep.scheduler}"
        for name, which in having.items()
        if sweep.scheduler not in which
        and getattr(sweep, name) != type(sweep).model_fields[name].default
    ]


_WARMUP = ("train.lr_scheduler_type", "train.warmup_ratio")


def _idle_warmups(space: SearchSpace) -> list[str]:
    """Return a line for each share of warm-up that is all steps, or that no trial has."""
    varied, lines = {*_WARMUP} & space.axes.keys(), dict[str, None]()
    for values in _probed(space, (*_WARMUP, "train.max_steps", "train.num_train_epochs")):
        train = space.config_of(values).train
        if not (varied and train.lr_scheduler_type in WITHOUT_WARMUP):
            lines |= dict.fromkeys(idle_warmup(train, train.steps))
    return [*lines]


def _rescored(space: SearchSpace) -> list[str]:
    """Return a line on what is compared with what, where an axis decides what is scored."""
    config = space.config
    axes = [axis for axis in space.axes if decides_scored_tokens(axis, config.data)]
    kept = [axis for axis in axes if keeps_scored_answers(axis)]
    if not axes:
        return []
    metric, more = config.sweep.metric, ""
    if kept and (others := _shares_of_samples(config.train.stage)):
        which = "it" if metric in others else f"sweep.metric={others[0]}"
        more = f"; {which} compares across {listed(kept)} where answers are single and none is cut"
    learns = config.sweep.search not in ("grid", "random")
    stopping = {"asha": ["ASHA"], "predictive": ["early stopping"], "none": []}
    who = stopping[config.sweep.scheduler] + ["the search"] * learns + ["the choice of the best"]
    return [
        f"{listed(axes)} {'decides' if len(axes) == 1 else 'decide'} which held-out tokens are "
        f"scored: {listed(who)} {'compares' if len(who) == 1 else 'compare'} {metric} only among "
        f"trials scored on the same ones{more}"
    ]


def _shares_of_samples(stage: str) -> list[str]:
    return [name for name in OBJECTIVES[stage].metrics if score_of(name).of_samples]


def _unusual_capacities(space: SearchSpace) -> list[str]:
    """Return a line for each method that shares a rank, or a number of tokens, with methods that
    usually have others."""
    lines = []
    for method in space.methods:
        setting = f"method.{METHODS[method].capacity}"
        low, high = _usual_capacity(method)
        given = _given_numbers(space, setting)
        if not given or (min(given) <= high and max(given) >= low):
            continue
        suited = [
            other
            for other in space.methods
            if METHODS[other].capacity == METHODS[method].capacity
            and min(given) <= _usual_capacity(other)[1]
            and max(given) >= _usual_capacity(other)[0]
        ]
        if suited:
            least, most = min(given), max(given)
            has = f"{least:g} to {most:g}" if least < most else f"{least:g}"
            middle = round((low * high) ** 0.5)
            lines.append(
                f"{setting} is {has} here, which suits {listed(suited)}; {method} usually has "
                f"{low} to {high}: sweep it by itself, with method.type={method} "
                f"sweep.parameters.{setting}=[{low},{middle},{high}]"
            )
    return lines


def _usual_capacity(method: str) -> tuple[int, int]:
    """Return the least and the greatest capacity that trials of a method usually have: a quarter
    of what its practice starts from, to four times as much."""
    kind = METHODS[method]
    starts = [kind.usual(rank, _LENGTH).get(str(kind.capacity), 1) for rank in _RANKS]
    return max(1, min(starts) // 4), max(starts) * 4


_RANKS, _LENGTH = (8, 64), 512
"""Ranks from which practice starts on small and large devices, and tokens of a sample."""


def _given_numbers(space: SearchSpace, setting: str) -> list[float]:
    """Return the numbers that the sweep gives a setting; of a range its ends."""
    choices = space.axes.get(setting)
    if isinstance(choices, Space):
        return [choices.lower, choices.upper]
    if choices is None:
        name = setting.partition(".")[2]
        written = name in space.config.method.model_fields_set
        choices = (getattr(space.config.method, name),) if written else ()
    return [choice for choice in choices if isinstance(choice, int | float)]


def _check_methods(space: SearchSpace) -> None:
    """Check the axis over methods, and that all that was written is for one of them."""
    config, swept = space.config, space.axes.get(METHOD)
    if swept is None:
        return
    if isinstance(swept, Space):
        raise ConfigError(f"sweep.parameters.{METHOD}: methods are no range; give a list of them")
    for method in swept:
        if not isinstance(method, str) or method not in METHODS:
            raise ConfigError(
                f"sweep.parameters.{METHOD}: {format_value(method)} is not a method; allowed: "
                f"{', '.join(METHODS)}{did_you_mean(str(method), METHODS)}"
            )
    for name in sorted(config.method.model_fields_set - {"type"}):
        if not any(has_setting(method, f"method.{name}") for method in swept):
            raise ConfigError(
                f"method.{name}: no method of sweep.parameters.{METHOD} ({', '.join(swept)}) has "
                f"it; leave it out, or sweep one of {', '.join(_having(f'method.{name}'))} too"
            )


def _check_point(space: SearchSpace, values: Values) -> None:
    try:
        trial = space.config_of(values)
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
        ranges = any(isinstance(space.axes[axis], Space) for axis in axes)
        hint = ""
        if ranges and "whole number" in said:
            hint = "; a range of whole numbers is {space: randint, …}"
        elif METHOD in values and not axes:
            hint = "; what is set under method is for every method that has it"
        raise type(error)(f"{where}{said}{hint}") from None


def _probed(space: SearchSpace, sections: Sequence[str] = SWEPT_SECTIONS) -> Iterator[Values]:
    """Yield points of every method in which each two values of two axes come together that are in
    `sections`, by their own name or by that of their section."""
    for method in space.methods:
        probes = {axis: _probes(choices) for axis, choices in space.axes_of(method).items()}
        first = {axis: values[0] for axis, values in probes.items()}
        first |= {METHOD: method} if space.sweeps_methods else {}
        yield first
        varied = [name for name in probes if {name, name.partition(".")[0]} & {*sections}]
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


def _sweepable(space: SearchSpace) -> list[str]:
    names = [name for name in leaf_names(space.config) if not name.startswith("method.")]
    for method in space.methods:
        names += [f"method.{name}" for name in METHODS[method].model_fields]
    return [name for name in dict.fromkeys(names) if name.partition(".")[0] in SWEPT_SECTIONS]


def _unknown(space: SearchSpace, axis: str, known: list[str]) -> str:
    near = did_you_mean(axis, known)
    if having := _having(axis):
        return (
            f"no setting of {listed(space.methods)}{near}; {listed(having)} "
            f"{'has' if len(having) == 1 else 'have'} it"
        )
    return f"unknown setting{near}; any setting of {', '.join(SWEPT_SECTIONS)} can be swept"


def _having(axis: str) -> list[str]:
    """Return the methods that have a setting of section `method`."""
    if not axis.startswith("method."):
        return []
    return [method for method in METHODS if has_setting(method, axis)]
