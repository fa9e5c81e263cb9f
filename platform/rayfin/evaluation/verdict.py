"""What a sweep found, in one sentence, and what to do next.

The report begins with it, and `rayfin sweep` ends with it.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from rayfin.config import Config
from rayfin.config.serving import MAX_RANK, EngineConfig
from rayfin.config.steps import duration
from rayfin.evaluation.change import Change, change_of
from rayfin.evaluation.chart_data import ordered
from rayfin.evaluation.quantities import (
    is_factor,
    setting,
    show_between,
    show_gain,
    show_quantity,
    show_setting,
)
from rayfin.history.comparable import comparison_groups
from rayfin.history.record import finite
from rayfin.methods import MethodConfig
from rayfin.metrics import score_of
from rayfin.paths import Storage
from rayfin.statuses import ENDED, FAILED, STATUS_WORDS, UNFINISHED

if TYPE_CHECKING:
    from rayfin.history.record import TrialRecord

Outcome = Literal["better", "no clear difference", "worse", "no interval", "no base", "no result"]

_SETTINGS_SHOWN = 4


@dataclass(frozen=True)
class Verdict:
    """How the best trial stands against the base model; `change` is None where that is unknown."""

    outcome: Outcome
    sentence: str
    next: str
    """What to do now."""
    caution: str | None = None
    """What the sentence's figure does not take into account."""
    change: Change | None = None

    @property
    def text(self) -> str:
        """All of it as one line."""
        return " ".join(filter(None, (self.sentence, self.caution, self.next)))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class SweepOutcome:
    """A sweep as it ended, or stands: what its verdict and its report are made from."""

    trials: Sequence[TrialRecord]
    """Trials in any state and order; there may be none."""
    config: Config
    best: TrialRecord | None
    adapter: str | None = None
    """`name@version` of what was published."""
    interrupted: bool = False


def sweep_verdict(outcome: SweepOutcome) -> Verdict:
    """Return how the best trial of a sweep compares with the base model on the sweep's metric."""
    config, best, interrupted = outcome.config, outcome.best, outcome.interrupted
    adapter, trials = outcome.adapter, ordered(outcome.trials)
    if best is None:
        return _nothing(trials, interrupted)
    metric = config.sweep.metric
    *groups, here = comparison_groups([*trials, best], metric)
    alike = [t for t, group in zip(trials, groups, strict=True) if group == here]
    scored = [t.status for t in alike if finite(t.metrics.get(metric)) is not None]
    change = change_of(best, metric)
    who = _who(trials, best, config, scored.count("finished"))
    caution = None
    if len(scored) > 1 and change is not None:
        caution = (
            f"It was chosen among {len(scored)} trials by these same samples, so expect somewhat "
            "less on new ones."
        )
    if change is None:
        found: Outcome = "no base"
        sentence = (
            f"{who} {_scores(metric, best.metrics[metric], None)}; the base model was not scored, "
            "so there is nothing to compare it with."
        )
    else:
        found = _outcome(change)
        sentence = f"{who} {_compared(change)}."
    return Verdict(
        found,
        sentence,
        _next(found, config, change, best, adapter, interrupted),
        caution,
        change,
    )


def _nothing(trials: Sequence[TrialRecord], interrupted: bool) -> Verdict:
    counts: Counter[str] = Counter(trial.status for trial in trials)
    told = ", ".join(
        f"{counts[status]} {STATUS_WORDS[status]}"
        for status in (*ENDED, *UNFINISHED)
        if counts[status]
    )
    failed = next((t for t in trials if t.status in FAILED), None)
    if interrupted:
        after = "The same command with --resume carries on."
    elif failed is not None:
        after = f"Next: `rayfin history show {failed.trial_id}` tells why the first one failed."
    elif counts["running"]:
        after = "Next: wait for it to end."
    elif counts["interrupted"]:
        after = "Next: carry on with --resume."
    else:
        after = "Next: train longer, or lower sweep.reduction_factor, so that a trial finishes."
    if not trials:
        return Verdict("no result", "No trial was started.", "Next: start the sweep again.")
    return Verdict("no result", f"No trial finished: {told}.", after)


def _outcome(change: Change) -> Outcome:
    if change.low is None or change.high is None:
        return "no interval"
    if change.low > 0:
        return "better"
    return "worse" if change.high < 0 else "no clear difference"


def _who(trials: Sequence[TrialRecord], best: TrialRecord, config: Config, scored: int) -> str:
    """`The best of 8 trials (#3: lora, r 16, learning_rate 2e-4)`."""
    number = next((n for n, t in enumerate(trials, 1) if t.trial_id == best.trial_id), None)
    method = setting(best.spec, "method.type")[1]
    shown = [str(method)] if method else []
    for name in config.sweep.parameters:
        has, value = setting(best.spec, name)
        if has and name != "method.type":
            text = show_setting(value)
            shown.append(f"{name.partition('.')[2]} {text if len(text) <= 40 else text[:39] + '…'}")
    if len(shown) > _SETTINGS_SHOWN + 1:
        shown = [*shown[: _SETTINGS_SHOWN + 1], "…"]
    details = ": ".join(filter(None, (f"#{number}" if number else "", ", ".join(shown))))
    subject = "The one finished trial" if scored == 1 else f"The best of {scored} finished trials"
    return f"{subject} ({details})" if details else subject


def _scores(metric: str, value: float, samples: int | None) -> str:
    """The predicate of a model that scored `value`."""
    on = f"{samples} held-out samples" if samples else "the held-out samples"
    score = score_of(metric)
    shown = show_quantity(metric, value)
    if score.of_samples:
        shown = f"{round(value * samples)} of {on}" if samples else f"{value:.1%} of {on}"
    return score.says.format(value=shown, on=on)


def _compared(change: Change) -> str:
    metric, samples = change.metric, change.samples
    base = show_quantity(metric, change.base)
    if score_of(metric).of_samples and samples:
        base = str(round(change.base * samples))
    start = f"{_scores(metric, change.best, samples)}, the base model {base}"
    gained = show_gain(metric, change.gain, change.low, change.high)
    if change.low is None or change.high is None:
        return f"{start}: {gained}, without an interval ({change.missing})"
    interval = f"95 % interval {show_between(metric, change.low, change.high)}"
    if change.low > 0 or change.high < 0 or not change.gain:
        return f"{start}: {gained} ({interval})"
    nothing = "÷ 1" if is_factor(metric) else "zero"
    return f"{start}: {gained}, but that may be chance ({interval} contains {nothing})"


def _next(
    outcome: Outcome,
    config: Config,
    change: Change | None,
    best: TrialRecord,
    adapter: str | None,
    interrupted: bool,
) -> str:
    if interrupted:
        return "The same command with --resume carries on."
    samples = change.samples if change else None
    length, now = duration(best.spec.get("train") or {"max_steps": config.train.max_steps})
    unsure_and_worse = outcome == "no interval" and change is not None and change.gain <= 0
    if outcome == "worse" or unsure_and_worse:
        return (
            f"Next: lower train.learning_rate or raise {length} ({now} now), and look at the "
            "samples."
        )
    if outcome == "no clear difference":
        held_out = f" (data.val_size; {samples} now)" if samples else ""
        return (
            f"Next: train longer ({length}; {now} now) or search wider, and hold out more "
            f"samples{held_out} to tell."
        )
    if adapter is not None:
        return f"Next: `{_try(adapter, config, best)}`."
    return (
        "Next: the same command with --resume publish.name=NAME publishes it, without training "
        "again."
    )


def _try(adapter: str, config: Config, best: TrialRecord) -> str:
    """Returns the command that talks to a published adapter, with every setting that it takes.

    What `rayfin chat` can't serve, a whole model, a method without an engine or a rank above
    MAX_RANK, it shows instead.
    """
    storage = f"storage={Storage.at(config.registry_storage).location}"
    method = _method_of(best)
    rank = 0 if method is None else method.served_rank
    alone = method is not None and (method.changes_base or "transformers" not in method.engines)
    if alone or rank > MAX_RANK:
        return shlex.join(["rayfin", "adapters", "show", adapter, storage])
    model = [
        f"model.{name}={value}"
        for name in ("name", "revision")
        if (value := setting(best.spec, f"model.{name}")[1]) is not None
    ]
    # What the engine's defaults would refuse.
    defaults = EngineConfig()
    engine = [f"engine.max_rank={rank}"] if rank > defaults.max_rank else []
    if method is not None and method.served_bits is not None:
        engine.append(f"engine.quantization_bit={method.served_bits}")
    positions = setting(best.scenario, "model.max_position_embeddings")[1]
    if isinstance(positions, int) and positions < defaults.max_length:
        engine.append(f"engine.max_length={positions}")
    return shlex.join(["rayfin", "chat", "--use", adapter, *model, storage, *engine])


def _method_of(trial: TrialRecord) -> MethodConfig | None:
    """A trial's method; None where this rayfin has no such method or setting."""
    try:
        return MethodConfig.model_validate(trial.spec.get("method"))
    except ValidationError:
        return None
