"""The registry of what a trial measures: names, units, directions, and how each is shown.

A metric's name is its key in a trial's row, in `--json` and in `sweep.metric`. A `Score` says how
good a model is; the row holds the base model's score under the same name with `base_` before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["number", "share", "seconds", "bytes", "count"]
Direction = Literal["min", "max"]

BASE = "base_"
"""Before a score's name: the same score of the base model."""
CHANGE_ERROR = "_change_se"
"""After a score's name: the standard error of its change from the base model."""
GENERATIONS = "generations"
"""The key of a curve's point for what the model answered then to a few held-out questions."""
ONLY_BASE = "_only_base"
"""After a paired score's name: the number of samples that only the base model fulfils."""


class Column(NamedTuple):
    """How a metric stands in a table for the terminal."""

    header: str
    decimals: int
    leaves: int = 0
    """How early the column leaves a table that is too wide; 0 is never."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that a trial measures."""

    name: str
    label: str
    """Its name in reports."""
    kind: Kind = "number"
    progress: Column | None = None
    """Its column in a sweep's live table; None leaves it out."""
    history: Column | None = None
    """Its column in lists of trials; None leaves it out."""
    synonyms: tuple[str, ...] = ()
    """Its names in the columns of other programs' tables."""
    whole: bool = False
    """Whether it is a whole number."""
    diverges: bool = False
    """Whether a value that is not finite means that the training diverged."""

    def in_line(self, value: float) -> str:
        """The value as a sweep's progress has it."""
        return f"{value:.{self.progress.decimals if self.progress else 4}f}"


@dataclass(frozen=True, kw_only=True)
class Score(Metric):
    """A metric that says how good a model is on the held-out samples."""

    better: Literal["less", "more"]
    says: str
    """The predicate of a model that has the score, with the fields {value} and {on}.

    {on} is `120 held-out samples`. Where `of_samples`, {value} has it in it: `30 of 120 held-out
    samples`.
    """
    of_samples: bool = False
    """Whether it is the share of the held-out samples that fulfil a condition.

    The interval of its change is made from the samples that only one of two models fulfils, and
    else from a standard error.
    """
    exponential_of: str | None = None
    """The score whose exponential it is; its changes are factors then."""
    least_spread: float = 0.01
    """The least spread of trials' scores that is more than chance: a share of the best score, or,
    of a share, points of it."""

    @property
    def direction(self) -> Direction:
        """Where better values lie."""
        return "min" if self.better == "less" else "max"

    @property
    def sign(self) -> float:
        """What the score is multiplied by so that less is better."""
        return 1.0 if self.better == "less" else -1.0

    @property
    def change_error(self) -> str:
        """The metric that holds the standard error of its change."""
        return f"{self.exponential_of or self.name}{CHANGE_ERROR}"

    def at(self, point: Mapping[str, float]) -> float | None:
        """The score at a point of a trial's curve, which holds no exponentials; None without."""
        if self.exponential_of is None or self.name in point:
            return point.get(self.name)
        value = point.get(self.exponential_of)
        return None if value is None else exponential(value)


METRICS: dict[str, Metric] = {}
"""Every metric by its name, in the order in which tables have them."""


def register(*metrics: Metric) -> None:
    """Adds metrics to METRICS; raises TypeError for a name that another one has."""
    for metric in metrics:
        if METRICS.get(metric.name, metric) != metric:
            raise TypeError(f"another metric has the name {metric.name}; give this one its own")
        METRICS[metric.name] = metric
    for name in [name for name, metric in METRICS.items() if not isinstance(metric, Score)]:
        METRICS[name] = METRICS.pop(name)  # scores stand before all else


def score_names() -> tuple[str, ...]:
    """Names of all scores."""
    return tuple(name for name, metric in METRICS.items() if isinstance(metric, Score))


def score_of(name: str) -> Score:
    """The score of this name; raises KeyError where there is none."""
    found = METRICS[name]
    if not isinstance(found, Score):
        raise KeyError(name)
    return found


def exponential(value: float) -> float:
    """`exp(value)`, finite for every finite value."""
    return math.exp(min(value, 700.0))


register(
    Score(
        name="eval_loss",
        label="Eval loss",
        better="less",
        says="has a loss of {value} nats a token on {on}",
        progress=Column("eval_loss", 4, leaves=1),
        history=Column("eval loss", 4),
        synonyms=(
            *("test_loss", "val_loss", "valid_loss", "validation_loss"),
            *("eval_nll", "test_nll", "val_nll", "valid_nll", "validation_nll", "nll"),
        ),
        diverges=True,
    ),
    Score(
        name="perplexity",
        label="Perplexity",
        better="less",
        says="has a perplexity of {value} on {on}",
        exponential_of="eval_loss",
        synonyms=("ppl", "eval_perplexity", "test_perplexity", "eval_ppl", "test_ppl"),
    ),
    Score(
        name="exact_match",
        label="Exact match",
        kind="share",
        better="more",
        says="answers {value} exactly",
        of_samples=True,
        least_spread=0.02,
        progress=Column("exact_match", 4, leaves=1),
        history=Column("match", 3, leaves=1),
        synonyms=("em", "accuracy", "acc", "test_accuracy", "eval_accuracy"),
    ),
    Score(
        name="token_accuracy",
        label="Token accuracy",
        kind="share",
        better="more",
        says="predicts {value} of the answer tokens of {on}",
        least_spread=0.02,
        synonyms=("mean_token_accuracy", "eval_mean_token_accuracy"),
    ),
    Metric(
        name="train_loss",
        label="Training loss",
        synonyms=("train_nll", "training_loss"),
        diverges=True,
    ),
    Metric(name="steps", label="Steps", kind="count"),
    Metric(
        name="train_seconds",
        label="Training time",
        kind="seconds",
        history=Column("train s", 1, leaves=2),
        synonyms=("train_time", "train_runtime", "train_minutes", "train_hours"),
    ),
    Metric(
        name="wall_seconds",
        label="Wall time",
        kind="seconds",
        synonyms=("wall_time", "wall_minutes", "wall_hours", "total_time", "runtime"),
    ),
    Metric(
        name="tokens_per_second",
        label="Tokens per second",
        progress=Column("tokens/s", 0, leaves=3),
        synonyms=("tok_per_s", "tokens_per_sec", "throughput"),
    ),
    Metric(
        name="peak_memory_bytes",
        label="Peak memory",
        kind="bytes",
        synonyms=("peak_memory_mb", "peak_memory_gb", "max_memory_gb", "memory_gb"),
        whole=True,
    ),
    Metric(
        name="trainable_parameters",
        label="Trainable parameters",
        kind="count",
        synonyms=("trainable_params", "num_trainable_params"),
        whole=True,
    ),
)

COSTS = ("train_seconds", "trainable_parameters", "peak_memory_bytes")
"""What a trial costs, in the order in which the report offers them."""
FIGURES = (
    *("steps", "train_seconds", "tokens_per_second", "peak_memory_bytes"),
    "trainable_parameters",
)
"""What tables show of a trial after its scores."""
