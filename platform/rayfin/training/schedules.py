"""Schedules of the learning rate: what each takes, and those that follow the evaluations."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

from rayfin.compat.bitsandbytes import import_bitsandbytes
from rayfin.config import TrainConfig
from rayfin.config.optimizers import PLAIN_SCHEDULES
from rayfin.errors import ConfigError, did_you_mean

EVALUATED = ("reduce_lr_on_plateau", "greedy")
"""Schedules that change the rate after an evaluation, by its eval loss, and have no warm-up."""
_BESIDE_PATIENCE = {"reduce_lr_on_plateau": 3, "greedy": 2}
"""The evaluations that each needs beside its patience: a higher rate needs no worse evaluation."""
WITHOUT_WARMUP = ("constant", *EVALUATED)

# Set by rayfin, or following from what it sets.
_SET = ("optimizer", "num_warmup_steps", "num_training_steps", "num_stable_steps", "last_epoch")
_SET_TOO = ("mode", "verbose")
_NOMINAL_STEPS = 1000


def warmup_steps(train: TrainConfig, steps: int) -> int:
    """Return the steps in which the learning rate rises, of a trial of so many steps.

    A share is rounded up, but that of one step: the rate of the first step of a warm-up is 0, and
    the trial would train nothing.
    """
    if train.warmup_steps is not None:
        return train.warmup_steps
    return 0 if steps == 1 else math.ceil(steps * train.warmup_ratio)


def check_schedule(train: TrainConfig, steps: int | None) -> None:
    """Raise ConfigError where the schedule lacks an argument, or has one that it doesn't take.

    Transformers itself is asked, by making the schedule for `steps`, None where their number is
    not known yet. It is not imported for a schedule that needs no argument and has none.
    """
    name, given = train.lr_scheduler_type, train.lr_scheduler_kwargs
    if name in WITHOUT_WARMUP and train.warmup_steps is not None:
        raise ConfigError(
            f"train.warmup_steps={train.warmup_steps}: train.lr_scheduler_type={name} has no "
            "warm-up; leave it out, or use constant_with_warmup"
        )
    if steps is not None and train.warmup_steps is not None and train.warmup_steps >= steps:
        raise ConfigError(
            f"train.warmup_steps={train.warmup_steps} of {steps} steps in all: the learning rate "
            f"would never reach its peak; use {max(0, steps - 1)} or less"
        )
    if name in PLAIN_SCHEDULES and not given:
        return
    import_bitsandbytes()  # Transformers imports PEFT, which would import it with a warning
    takes = _arguments(name)
    for key in given:
        if key not in takes:
            allowed = f"it takes {', '.join(takes)}" if takes else "it takes none"
            raise ConfigError(
                f"train.lr_scheduler_kwargs.{key}: train.lr_scheduler_type={name} has no such "
                f"argument{did_you_mean(key, takes)}; {allowed}"
            )
    if missing := [key for key, needed in takes.items() if needed and key not in given]:
        raise ConfigError(
            f"train.lr_scheduler_type={name} needs train.lr_scheduler_kwargs.{missing[0]}; set it"
        )
    if (problem := _problem(train, steps)) is not None:
        raise ConfigError(
            f"train.lr_scheduler_type={name}: {problem}; its train.lr_scheduler_kwargs are "
            f"{', '.join(takes)}"
        )


def idle_warmup(train: TrainConfig, steps: int | None) -> Iterator[str]:
    """Yield a line for a share of warm-up that the schedule does not have, or that is all steps.

    `steps` is None where their number is not known yet.
    """
    ratio, name = train.warmup_ratio, train.lr_scheduler_type
    if train.warmup_steps is not None or ratio in (0, TrainConfig().warmup_ratio):
        return
    if name in WITHOUT_WARMUP:
        yield (
            f"train.warmup_ratio={ratio:g} has no effect: train.lr_scheduler_type={name} has no "
            "warm-up; leave it out, or use constant_with_warmup"
        )
    elif steps is not None and warmup_steps(train, steps) >= steps:
        yield (
            f"train.warmup_ratio={ratio:g} of {steps} steps is all of them: the learning rate "
            f"never reaches its peak; use train.warmup_steps={steps - 1} or less"
        )


def idle_patience(train: TrainConfig) -> Iterator[str]:
    """Yield a line for each patience that can't act, as its trial has too few evaluations.

    The steps must have been counted. The first evaluation is always the best so far, and nothing is
    trained after the last.
    """
    evaluations = math.ceil(train.max_steps / train.evaluate_every)

    def told(what: str, patience: float, others: int, least: int) -> Iterator[str]:
        if patience + others > evaluations:
            most = evaluations - others
            lower = f"use {most} or less, or " if most >= least else ""
            yield (
                f"{what} can't act in the {evaluations} evaluations of a trial; {lower}evaluate "
                f"more often, by train.eval_steps (every {train.evaluate_every} steps now)"
            )

    if train.early_stopping_patience is not None:
        patience = train.early_stopping_patience
        yield from told(f"train.early_stopping_patience={patience}", patience, 2, 1)
    if (others := _BESIDE_PATIENCE.get(train.lr_scheduler_type)) is not None:
        waits = train.lr_scheduler_kwargs.get("patience", 10)
        name = f"train.lr_scheduler_type={train.lr_scheduler_type} with patience={waits}"
        yield from told(name, float(waits), others, 0)


def own_schedule(train: TrainConfig, optimizer: Any, steps: int) -> Any:
    """Return a schedule of EVALUATED, which Trainer ties to evaluations of its own, else None.

    Raise ConfigError for one that can't be that of a trial of so many steps.
    """
    check_schedule(train, steps)
    if train.lr_scheduler_type not in EVALUATED:
        return None
    from transformers import get_scheduler

    return get_scheduler(
        train.lr_scheduler_type,
        optimizer,
        scheduler_specific_kwargs=dict(train.lr_scheduler_kwargs),
    )


def schedule_state(train: TrainConfig, scheduler: Any) -> dict[str, Any] | None:
    """Return the numbers and words that a schedule of EVALUATED keeps; None for other schedules."""
    if train.lr_scheduler_type not in EVALUATED:
        return None
    plain = (bool, int, float, str, list, dict, type(None))
    return {k: v for k, v in scheduler.state_dict().items() if isinstance(v, plain)}


def _arguments(name: str) -> dict[str, bool]:
    """Return the arguments of a schedule, and whether each must be given."""
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR
    from transformers.trainer_utils import SchedulerType

    followers = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}
    made: Any = followers.get(name) or TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    left_out = {*_SET, *(_SET_TOO if name in followers else ())}
    parameters = inspect.signature(made).parameters.items()
    return {key: it.default is it.empty for key, it in parameters if key not in left_out}


def _problem(train: TrainConfig, steps: int | None) -> str | None:
    """Return what the schedule itself says of its arguments; None where it takes them."""
    import torch
    from transformers import get_scheduler

    length = steps or _NOMINAL_STEPS
    warmup = warmup_steps(train, length)
    if train.lr_scheduler_type == "greedy":
        least = train.lr_scheduler_kwargs.get("min_lr", 1e-3)
        if isinstance(least, float | int) and least > train.learning_rate:
            return f"its min_lr, {least:g}, is above train.learning_rate={train.learning_rate:g}"
    decay = train.lr_scheduler_kwargs.get("num_decay_steps")
    if steps is not None and isinstance(decay, float | int) and decay + warmup > steps:
        return f"num_decay_steps={decay} with {warmup} of warm-up are more than the {steps} in all"
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=train.learning_rate)
    arguments: dict[str, Any] = dict(train.lr_scheduler_kwargs)
    try:
        schedule: Any = get_scheduler(
            train.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=length,
            scheduler_specific_kwargs=arguments,
        )
        if train.lr_scheduler_type in EVALUATED:
            schedule.step(1.0)
            rates = schedule.get_last_lr()
        else:
            points = (0, warmup, (warmup + length) // 2, length - 1, length)
            rates = [float(schedule.lr_lambdas[0](step)) for step in points]
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        return " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        return "the learning rate would be below 0, or no number"
    return None
