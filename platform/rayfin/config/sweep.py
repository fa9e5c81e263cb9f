"""The section `sweep`: the space of a search, how it is searched, and when trials are stopped."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rayfin.config.steps import Interval
from rayfin.metrics import score_names, score_of
from rayfin.section import OneOf, Section


class Space(Section):
    """A range to draw from."""

    space: Literal["uniform", "loguniform", "randint"]
    """Uniform, log-uniform, or uniform over whole numbers (upper included)."""
    lower: float
    """Least value."""
    upper: float
    """Greatest value."""

    @model_validator(mode="after")
    def _ordered(self) -> Space:
        if not self.lower < self.upper:
            raise ValueError(f"lower ({self.lower}) must be less than upper ({self.upper})")
        if self.space == "loguniform" and self.lower <= 0:
            raise ValueError(f"lower ({self.lower}) of a loguniform must be above 0")
        if self.space == "randint" and (self.lower % 1 or self.upper % 1):
            raise ValueError("lower and upper of a randint must be whole numbers")
        return self


def _choices_or_space(value: Any) -> Any:
    if isinstance(value, dict):
        return Space.model_validate(value)
    if not isinstance(value, (list, tuple, Space)):
        raise ValueError("give a list of values, or {space, lower, upper}")
    if isinstance(value, (list, tuple)) and not value:
        raise ValueError("the list of values is empty; give at least one")
    return value


Axis = Annotated[Space | tuple[Any, ...], BeforeValidator(_choices_or_space)]


class SweepConfig(Section):
    num_samples: int = Field(8, ge=1)
    """Trials to run; fewer where the space has no more settings that differ."""
    metric: Annotated[str, OneOf(score_names)] = "eval_loss"
    """What the sweep optimises; left out, it is the main score of train.stage."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Whether less or more of the metric is better; auto knows."""
    search: Literal["auto", "advisor", "tpe", "random", "grid"] = "auto"
    """Where the next trial comes from; auto is the advisor where it knows all axes, and past trials
    say anything about them, else Optuna's TPE."""
    scheduler: Literal["asha", "predictive", "none"] = "asha"
    """Stop weak trials early: those behind most others (asha), or those whose curve says that they
    will end worse than the best (predictive). Or run all to the end."""
    grace_period: Interval | None = None
    """Steps, or below 1 the share of its own, that each trial may run before it can be stopped;
    null takes train.eval_steps."""
    reduction_factor: int = Field(3, ge=2)
    """ASHA keeps one in this many at each rung."""
    wrong_stop_rate: float = Field(0.05, gt=0, lt=0.5)
    """The predictive scheduler stops a trial when the probability that it ends better than the best
    is below this."""
    max_concurrent_trials: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Trials at a time; auto is one a GPU, or one on CPU."""
    max_failures: int = Field(1, ge=0)
    """Times that a trial whose process died is started again."""
    report_samples: int = Field(5, ge=0)
    """Held-out questions that the report has the base and the best adapter answer. This machine
    loads the model for it: 0 where it should not."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the search."""
    parameters: dict[str, Axis] = Field(default_factory=dict)
    """Dotted name of a setting -> list of values, or {space, lower, upper}; a trial takes those
    that its method has."""

    @property
    def direction(self) -> Literal["min", "max"]:
        """Where better values of the metric lie."""
        return score_of(self.metric).direction
