"""Where the next trial comes from: Optuna's ask and tell, and what the history knows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from rayfin.history import TrialRecord
from rayfin.history.comparable import centred, comparison_group, comparison_groups
from rayfin.objectives import stage_of
from rayfin.statuses import SCORED
from rayfin.tuning.plan import PlannedTrial, SweepPlan
from rayfin.tuning.sampler import new_sampler, with_values
from rayfin.tuning.space import Choices, Values, decode

# So many draws in a row that were all tried before: the sampler has nothing new in a small space.
_PATIENCE = 50
# A space of more points than this is not walked through for one that was not tried.
_WALKED = 10_000

# Points that an advisor chooses from: all of a small space, else so many drawn, and so many beside
# each of the best few.
_OPTIONS, _BESIDE, _BEST = 256, 24, 3


@dataclass(frozen=True)
class EndedTrial:
    """A trial of this sweep that has ended."""

    spec: Mapping[str, Any]
    value: float | None
    """The sweep's metric as last measured; None for a trial that failed."""
    steps: int | None = None
    """The steps that it went, which are less than its spec says where the scheduler stopped it."""
    recalled: bool = False
    """Whether another sweep trained it: its result was known before."""
    scenario: Mapping[str, Any] = field(default_factory=dict)
    """What its row says it was scored on, if anything."""
    number: int | None = None
    """Its number in the study; None where the sampler does not know it."""


class Advisor(Protocol):
    """What chooses the next trial in the sampler's place."""

    def choose(
        self,
        options: Sequence[Mapping[str, Any]],
        ended: Sequence[EndedTrial],
        running: Sequence[Mapping[str, Any]],
    ) -> int:
        """Return the index in `options` of the next one; `options` and `running` are specs."""
        ...


def distinct_settings(plan: SweepPlan) -> int:
    """Return how many of sweep.num_samples trials have something of their own to compute.

    As many as the space has points that differ in what they compute; a space too large to be
    walked through is taken to have enough.
    """
    wanted = plan.config.sweep.num_samples
    if plan.space.size > _WALKED:
        return wanted
    seen: set[str] = set()
    for values in plan.space.grid():
        if len(seen) == wanted:
            break
        seen.add(plan.trial(values).fingerprint)
    return len(seen)


Recall = Callable[[PlannedTrial], TrialRecord | None]
"""Looks a trial up; a record that it returns is used, and nothing is trained for it."""


class HistorySearch:
    """A search that suggests trials that were not tried yet, and learns from those that were.

    - `known`: this sweep's trials that have ended (after a resume); never suggested again.
    - `first`: points to try before the sampler's own, such as interrupted trials.
    - `advisor`: chooses the points in the sampler's place.
    - `recall`: finished trials of other sweeps, and those that can't run: told to the sampler
      without running them.
    """

    done = False
    """Whether nothing is left to suggest; what was suggested may still run."""

    def __init__(
        self,
        plan: SweepPlan,
        *,
        known: Sequence[TrialRecord] = (),
        first: Sequence[Values] = (),
        recall: Recall = lambda _: None,
        advisor: Advisor | None = None,
    ) -> None:
        sweep = plan.config.sweep
        self.metric, self.direction = sweep.metric, sweep.direction
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._plan, self._recall, self._advisor = plan, recall, advisor
        self._space = plan.space
        self._random = random.Random(sweep.seed)
        self._ended: list[EndedTrial] = []
        self._told: dict[int, float] = {}
        self._groups: set[str] = set()
        self._running: dict[str, Mapping[str, Any]] = {}
        self._queued = 0
        self._study = optuna.create_study(
            sampler=new_sampler(plan.config),
            direction="minimize" if sweep.direction == "min" else "maximize",
        )
        self._asked: dict[str, optuna.Trial] = {}
        self._next: tuple[optuna.Trial, PlannedTrial] | None = None
        self._seen: set[str] = set()
        self._left = sweep.num_samples - len(known)
        for record in known:
            self._learn(record)
        self._centre()
        for values in first:
            self._queued += self._enqueue(values)
        if sweep.search == "grid":
            for values in self._space.grid():
                self._enqueue(values)

    def look_ahead(self) -> bool:
        """Return whether anything is left to train; what the history knows is recalled first."""
        self._next = self._next or self._propose()
        self.done = self._next is None
        return not self.done

    def suggest(self, name: str) -> PlannedTrial | None:
        """Return the next trial, to be told about by `name`; None when none is left."""
        if not self.look_ahead() or self._next is None:
            return None
        self._asked[name], trial = self._next
        self._next = None
        self._running[name] = trial.spec.model_dump(mode="json")
        return trial

    def tell(
        self,
        name: str,
        value: float | None,
        steps: int | None = None,
        scenario: Mapping[str, Any] | None = None,
    ) -> None:
        """Take what a suggested trial came to after how many steps; None for one that failed.

        `scenario` is its row's, which says on what held-out samples it was scored.
        """
        asked = self._asked.pop(name, None)
        if asked is None:
            return
        if value is not None and not math.isfinite(value):
            value = None
        steps = None if value is None else steps
        ended = EndedTrial(self._running.pop(name), value, steps, scenario=scenario or {})
        self._end(asked, ended)

    def _propose(self) -> tuple[optuna.Trial, PlannedTrial] | None:
        """Return the next trial that must be trained; others are recalled on the way."""
        while self._left > 0 and len(self._seen) < self._space.size:
            proposal = self._advised() or self._draw(_PATIENCE) or self._walk()
            if proposal is None:
                break
            asked, trial = proposal
            self._seen.add(trial.fingerprint)
            self._left -= 1
            if (record := self._recall(trial)) is None:
                return proposal
            spec = trial.spec.model_dump(mode="json")  # the record's own may say it differently
            if record.status == "finished":
                value = float(record.metrics[self.metric])
                self._end(asked, EndedTrial(spec, value, recalled=True, scenario=record.scenario))
            else:  # it says nothing of what such a setting is worth
                self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return None

    def _end(self, asked: optuna.Trial, tried: EndedTrial) -> None:
        """Tell the sampler, and keep for the advisor, what a trial came to."""
        self._keep(replace(tried, number=asked.number))
        if tried.value is None:
            # A failed trial has no value; told as such, the sampler neither waits for it nor learns
            # from it.
            self._study.tell(asked.number, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(asked.number, float(tried.value))
        self._centre()

    def _keep(self, tried: EndedTrial) -> None:
        self._ended.append(tried)
        if tried.value is not None:
            if tried.number is not None:
                self._told[tried.number] = tried.value
            profile = tried.scenario.get("data") or {}
            self._groups.add(comparison_group(stage_of(tried.spec), profile, self.metric))

    def _centre(self) -> None:
        """Tell the sampler of each trial how it stands within the trials that it compares with.

        Where all compare with all, the scores stay as they are.
        """
        values = {
            one.number: one.value
            for one in self._centred()
            if one.number is not None and one.value is not None
        }
        if values != self._told:
            self._study, self._told = with_values(self._study, values), values

    def _centred(self) -> list[EndedTrial]:
        """Return the ended trials, with their scores centred by what compares."""
        if len(self._groups) < 2:
            return self._ended
        scored = [one for one in self._ended if one.value is not None]
        groups = comparison_groups(scored, self.metric)
        values = iter(centred([one.value for one in scored if one.value is not None], groups))
        return [
            one if one.value is None else replace(one, value=next(values)) for one in self._ended
        ]

    def _advised(self) -> tuple[optuna.Trial, PlannedTrial] | None:
        """Return the advisor's choice among points that were not tried."""
        if self._advisor is None:
            return None
        while self._queued:  # what was to come first
            self._queued -= 1
            if (proposal := self._draw(1)) is not None:
                return proposal
        options = {
            trial.fingerprint: trial
            for trial in map(self._plan.trial, self._points())
            if trial.fingerprint not in self._seen
        }
        if not options:
            return None
        trials = list(options.values())
        specs = [trial.spec.model_dump(mode="json") for trial in trials]
        chosen = self._advisor.choose(specs, self._centred(), list(self._running.values()))
        self._enqueue(trials[chosen].values)
        return self._draw(1)

    def _points(self) -> Iterator[Values]:
        """Yield the points that an advisor may choose from."""
        space = self._space
        if space.size <= _OPTIONS:
            yield from space.grid()
            return
        yield from (space.drawn(self._random) for _ in range(_OPTIONS))
        good = [one for one in self._centred() if one.value is not None]
        good.sort(key=lambda one: one.value or 0.0, reverse=self.direction == "max")
        for one in good[:_BEST]:
            values = space.values_in(one.spec)
            yield from (space.moved(values, self._random) for _ in range(_BESIDE))

    def _draw(self, times: int) -> tuple[optuna.Trial, PlannedTrial] | None:
        """Return the sampler's first point of so many that was not tried."""
        for _ in range(times):
            asked = self._study.ask()
            trial = self._plan.trial(self._drawn_for(asked))
            if trial.fingerprint not in self._seen:
                return asked, trial
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return None

    def _drawn_for(self, asked: optuna.Trial) -> Values:
        """Return the sampler's point, which is asked for the axes that the drawn method has."""

        def ask(axis: str, choices: Choices) -> Any:
            match self._space.distributions[axis]:
                case FloatDistribution(low=low, high=high, log=log):
                    drawn: Any = asked.suggest_float(axis, low, high, log=log)
                case IntDistribution(low=low, high=high):
                    drawn = asked.suggest_int(axis, low, high)
                case CategoricalDistribution(choices=indices):
                    drawn = asked.suggest_categorical(axis, indices)
            return decode(choices, drawn)

        return self._space.point(ask)

    def _walk(self) -> tuple[optuna.Trial, PlannedTrial] | None:
        """Return any point of a small space that was not tried."""
        if self._space.size > _WALKED:
            return None
        points = list(self._space.grid())
        random.Random(self._plan.config.sweep.seed).shuffle(points)
        for values in points:
            if self._plan.trial(values).fingerprint not in self._seen:
                self._enqueue(values)
                # Points that were enqueued before it, and are known by now, come first.
                return self._draw(_WALKED)
        return None

    def _enqueue(self, values: Values) -> bool:
        """Make it the next point but those before it; returns False where it lies outside."""
        if (parameters := self._space.encode(values)) is None:
            return False
        self._study.enqueue_trial(parameters)
        return True

    def _learn(self, record: TrialRecord) -> None:
        """Add an ended trial of this sweep to the study."""
        self._seen.add(record.fingerprint)
        parameters = self._space.encode(self._space.values_in(record.spec))
        value = record.metrics.get(self.metric)
        if record.status not in SCORED:
            value = None
        recalled = "recalled_from" in record.scenario
        score = None if value is None else float(value)
        steps = None if score is None else record.metrics.get("steps")
        ended = EndedTrial(record.spec, score, steps, recalled=recalled, scenario=record.scenario)
        if parameters is None or value is None:
            self._keep(ended)
            return
        self._keep(replace(ended, number=len(self._study.trials)))
        axes = {axis: self._space.distributions[axis] for axis in parameters}
        self._study.add_trial(
            optuna.trial.create_trial(params=parameters, distributions=axes, value=float(value))
        )
