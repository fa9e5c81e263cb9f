"""The schema of a recommendation, as `rayfin recommend --json` prints it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rayfin.advisor.answer_text import answer_text
from rayfin.language import Language


class _Schema(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_by_name=True,
        serialize_by_alias=True,
    )


class PredictionInterval(_Schema):
    """An expected value and the bounds of its 80 % interval."""

    low: float
    expected: float
    high: float


class Predictions(_Schema):
    """What is predicted of a run."""

    shortfall: PredictionInterval
    """The regret: 0 is the best score known in the scenario, 1 the worst."""
    divergence: float | None
    """The probability that the training diverges, or null where no trial tells."""
    memory_bytes: PredictionInterval
    """The peak memory of one worker, in bytes."""
    steps: int
    """The optimizer steps of the training."""
    train_seconds: PredictionInterval
    """The time of all optimizer steps, in seconds."""
    first_token_ms: PredictionInterval | None
    """The milliseconds from a request to its first token, if served on the same hardware; null
    where nothing of about this size was served on such a device."""


class Feasibility(_Schema):
    """Whether a run keeps within limits; null where there is none, or the interval does not tell.

    None of them is false in a choice.
    """

    memory: bool | None
    """Whether the run fits the device's memory."""
    budget: bool | None
    """Whether the run ends within budget_hours."""
    latency: bool | None
    """Whether the adapter answers within latency_target_ms."""


class SupportingTrial(_Schema):
    """A trial that a prediction rests on."""

    trial_id: str
    weight: float
    """The trial's share in all that moves what is predicted for the choice: at most 1."""
    similarity: float = Field(alias="likeness")
    """The similarity to what is recommended, of setting and scenario together: at most 1."""
    summary: str
    """The trial's setting, scenario and score, in one line."""
    reference: bool
    """Whether the trial comes with rayfin and is not in the history."""


class DoubtedTrial(_Schema):
    """A trial that counts for less than it says, or for nothing."""

    trial_id: str
    doubt: Literal["impossible", "outlier", "noisy"]
    """`impossible` is set aside: its score can't be, or lies far below all near it; `outlier`
    contradicts the trials around it; `noisy` is of a source that scatters more than its settings
    explain."""
    summary: str
    """The trial's setting, scenario and score, in one line."""


class Choice(_Schema):
    """A recommended configuration, with its predictions, reasons and risks."""

    rank: int
    """1 for the one to run first; each next one covers for the cases where those before it fail."""
    method: str
    settings: dict[str, Any]
    """The dotted settings that differ from the given configuration."""
    config: dict[str, Any]
    """The whole configuration, which `rayfin train` runs as it is; train.max_steps is null where
    train.num_train_epochs says how long to train."""
    command: str
    """The command that trains it; YOUR_MODEL and YOUR_DATA.jsonl stand for what was only
    described."""
    predictions: Predictions
    feasibility: Feasibility
    trials: list[SupportingTrial]
    """The trials that the predictions rest on, the weightiest first; empty for `rules`."""
    reasons: list[str]
    risks: list[str]
    deployment: str


class Alternative(_Schema):
    """Another branch of the rules than to train what is recommended, with its commands."""

    kind: Literal["quantise", "distribute", "merge", "distil"]
    text: str
    """What it does and costs, and what of it is not in this version."""
    commands: list[str]
    """Commands of a shell; YOUR_MODEL and YOUR_DATA.jsonl stand for what was only described."""


class ProbedRate(_Schema):
    """A learning rate with which the first steps of the first choice were trained."""

    learning_rate: float
    trial_id: str
    """Its row in the history."""
    score: float | None
    """The metric after these steps; null where the probe failed."""
    predicted: PredictionInterval | None
    """What the metric is predicted to come to at the last step; null where nothing can be said."""
    recalled: bool
    """Whether the history had it, so that nothing was trained."""
    seconds: float


class ProbeReport(_Schema):
    """What probes changed, and what they cost."""

    summary: str
    """Both in one sentence."""
    metric: str
    steps: int
    """The optimizer steps of each probe."""
    of_steps: int
    """The optimizer steps of the whole training."""
    advised: float
    """The learning rate of the first choice before the probes."""
    chosen: float
    """Its learning rate now."""
    seconds: float
    """The time of the probes that were trained, loading and scoring included."""
    rates: list[ProbedRate]
    """In the order in which they were tried."""


class TradeOffPoint(_Schema):
    """A candidate in the chart of shortfall against training time."""

    method: str
    settings: dict[str, Any]
    shortfall: float
    train_seconds: float
    memory_bytes: float
    front: bool
    """Whether the candidate is on the Pareto front of shortfall and training time."""


class Recommendation(_Schema):
    """What to run in a scenario, and what that rests on; `print` shows it as the command does."""

    lang: Language
    """The language of the sentences."""
    source: Literal["rules", "learned"]
    """`learned` where trials tell which settings are better, else `rules`."""
    relevance: float
    """How much trials say about which settings are better: the share of the variance of their
    differences that trials have removed, 0 to 1."""
    explanation: str
    """What the recommendation rests on, as a sentence."""
    doubted: list[DoubtedTrial]
    """The trials that could say something about the scenario and count for less, or for nothing."""
    notes: list[str]
    """What was guessed of the model or the data, as they were only described, and why what was
    asked for (a priority, a latency, a budget) changes no choice."""
    rule: str
    """The rules' recommendation for the scenario."""
    scenario: dict[str, Any]
    trials: int
    """The number of trials in the history."""
    choices: list[Choice]
    """The recommended configurations, which keep within memory, budget and latency, or may; empty
    where nothing does."""
    nothing_fits: str | None
    """Why there is no choice, and what would fit, in one line; null where there is one."""
    alternatives: list[Alternative]
    """What else could be done in the scenario; empty where nothing fits."""
    probes: ProbeReport | None = None
    """What was probed; null where no probes were asked for."""
    points: list[TradeOffPoint]

    def __str__(self) -> str:
        """Return the answer as `rayfin recommend` prints it, without the evidence."""
        return answer_text(self.model_dump(mode="json"))

    def __repr__(self) -> str:
        """Return the same: an interpreter and a notebook show it."""
        return str(self)
