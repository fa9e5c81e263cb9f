"""A recommendation, as `rayfin recommend --json` prints it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Range(_Part):
    """An expected value, and bounds that hold it four times in five."""

    low: float
    expected: float
    high: float


class Predictions(_Part):
    """What a run is expected to come to."""

    shortfall: Range
    """Of the way from the best that is known for the scenario (0) to the worst (1)."""
    divergence: float | None
    """Probability that the training diverges; None where no trial tells."""
    memory_bytes: Range
    """At the peak, of one worker."""
    train_seconds: Range
    """Of the optimizer steps."""
    first_token_ms: Range
    """From a request to its first token, when the adapter is served on the same hardware."""


class Feasibility(_Part):
    """None where it was not asked, or the interval does not tell; never false in a choice."""

    memory: bool | None
    """Whether it fits the device."""
    budget: bool | None
    """Whether it ends within budget_hours."""
    latency: bool | None
    """Whether it answers within latency_target_ms."""


class Basis(_Part):
    """A trial that a prediction rests on."""

    trial_id: str
    likeness: float
    """To what is recommended, setting and scenario together: at most 1."""
    summary: str
    """What was run, on what, and what it came to."""
    reference: bool
    """Whether it comes with rayfin, and is not in the history."""


class Choice(_Part):
    """One configuration, and all that speaks for and against it."""

    rank: int
    """1 for the one to run first; each next one covers for where those before it go wrong."""
    method: str
    settings: dict[str, Any]
    """Dotted settings that are not the given configuration's."""
    config: dict[str, Any]
    """All of the configuration: `rayfin train` runs it as it is."""
    predictions: Predictions
    feasibility: Feasibility
    trials: list[Basis]
    """The most alike first; empty where the rules alone speak."""
    reasons: list[str]
    risks: list[str]
    deployment: str


class Point(_Part):
    """A candidate in the picture of quality against cost."""

    method: str
    settings: dict[str, Any]
    shortfall: float
    train_seconds: float
    memory_bytes: float
    front: bool
    """Whether none is better in one and no worse in the other (Pareto)."""


class Recommendation(_Part):
    """What to run in a scenario, and how sure that is."""

    source: Literal["rules", "learned"]
    """`learned` where trials tell which settings are better; `rules` where they don't."""
    relevance: float
    """Share of the doubt about which settings are better that trials have taken away: 0 to 1."""
    explanation: str
    """What it rests on, for people."""
    rule: str
    """What the rules say to the scenario."""
    scenario: dict[str, Any]
    trials: int
    """In the history."""
    choices: list[Choice]
    """What fits the memory, the budget and the latency, or may; empty where nothing does."""
    nothing_fits: str | None
    """Where there is no choice: why, and what would fit, in one line."""
    points: list[Point]
