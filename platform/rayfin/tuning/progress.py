"""The live table of a sweep: what runs, how it does, and when it will be done."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rayfin.config import Config
from rayfin.config.steps import epoch_of, position
from rayfin.history import TrialRecord
from rayfin.history.comparable import not_comparable
from rayfin.metrics import METRICS, Score
from rayfin.metrics import Column as MetricColumn
from rayfin.objectives import OBJECTIVES, stage_of
from rayfin.statuses import SCORED, STATUS_COLOURS, UNFINISHED
from rayfin.tables import Cell, TableColumn, TextTable
from rayfin.training.spec import TrialResult
from rayfin.tuning.generations import generation_lines
from rayfin.tuning.plan import SweepPlan
from rayfin.tuning.rows import early_stop
from rayfin.tuning.space import SearchSpace

log = logging.getLogger(__name__)

MISSING = "–"
"""What stands in place of a setting that a trial's method doesn't have."""


class ProgressDisplay:
    """A table that redraws in a terminal; elsewhere one line whenever a trial starts or ends."""

    def __init__(
        self, console: Console | None = None, note: Callable[[str], None] | None = None
    ) -> None:
        """`note` takes the lines that a user should know; by default they are shown as well."""
        self.console = console or Console(stderr=True, highlight=False)
        self._note = note or self._show
        self._live: Live | None = None
        self._rows: dict[str, TrialRecord] = {}
        self._before: set[str] = set()
        self._told: set[str] = set()

    @classmethod
    def silent(cls) -> ProgressDisplay:
        """Return a display that shows nothing; what a user should know goes to the log."""
        return cls(Console(quiet=True), log.warning)

    def begin(
        self, plan: SweepPlan, known: Sequence[TrialRecord], distinct: int | None = None
    ) -> None:
        """Say what a sweep is about to do; `known` are its trials that have ended.

        `distinct`: how many there are to run in all; sweep.num_samples if it isn't given.
        """
        self._config, self._sweep_id = plan.config, plan.sweep_id
        self._total = plan.config.sweep.num_samples if distinct is None else distinct
        self._rows = {row.trial_id: row for row in known}
        self._before = set(self._rows)
        self._started = time.monotonic()
        carried = f", {len(known)} trials already done" if known else ""
        few = few_settings(plan.config, self._total)
        what = f"{few}; each is trained once" if few else f"{self._total} trials"
        self._show(f"sweep {plan.sweep_id}: {what}{carried}")
        if self.console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self.console, refresh_per_second=2
            )
            self._live.start()

    def tell(self, notes: Iterable[str]) -> None:
        """Say each line once, however many trials have it."""
        for note in notes:
            if note not in self._told:
                self._told.add(note)
                self.say(note)

    def update(self, row: TrialRecord) -> None:
        self.tell(row.notes)
        before = self._rows.get(row.trial_id)
        self._rows[row.trial_id] = row
        if self._live is None and (before is None or row.status != "running"):
            self._show(self._line(row))
        lines = list(generation_lines(row.curve)) if row.status in SCORED else []
        if lines and "recalled_from" not in row.scenario:
            if self._live is not None:  # they stand above the table
                self._show(self._head(row, "answers"))
            for line in lines:
                self._show(line)

    def restart(self, row: TrialRecord, error: str) -> None:
        """Say that a trial goes on after its process died."""
        self.say(
            f"{self._head(row, 'again')}  it goes on from its checkpoint, if it has one: {error}"
        )

    def say(self, line: str) -> None:
        """Tell the user what they should know, also where no progress is shown."""
        self._note(line)

    def _show(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False)

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def eta_seconds(self) -> float | None:
        """Return the seconds left at the pace so far; None before anything is done."""
        # What was done before, or never trained, sets no pace.
        timed = [
            _share(row)
            for row in list(self._rows.values())
            if row.trial_id not in self._before and "recalled_from" not in row.scenario
        ]
        if sum(timed) <= 0:
            return None
        pace = (time.monotonic() - self._started) / sum(timed)
        return pace * max(0.0, self._total - self._done())

    def _done(self) -> float:
        """Return the number of trials done, those that run by the share of their steps."""
        # A copy: the table is drawn in a thread of its own.
        return sum(_share(row) for row in list(self._rows.values()))

    def _line(self, row: TrialRecord) -> str:
        cells = [self._head(row, row.status)]
        measured = (name for name, _ in _columns(stage_of(row.spec)) if name in row.metrics)
        cells += [f"{name} {_number(row, name)}" for name in measured]
        cells += [row.error or "", early_stop(row)]
        if "recalled_from" in row.scenario:
            cells.append(f"from the history ({row.scenario['recalled_from']})")
        elif row.status not in UNFINISHED and (eta := self.eta_seconds()) is not None:
            cells.append(f"ETA {_duration(eta)}")
        return "  ".join(cell for cell in cells if cell)

    def _head(self, row: TrialRecord, what: str) -> str:
        position = list(self._rows).index(row.trial_id) + 1
        return f"trial {position}/{self._total} {what:8}  {settings(self._config, row)}".rstrip()

    def _render(self) -> TextTable:
        eta = self.eta_seconds()
        elapsed = _duration(time.monotonic() - self._started)
        left = f", ETA {_duration(eta)}" if eta is not None else ""
        title = f"{self._done():.1f}/{self._total} trials, {elapsed}{left}"
        return trials_table(self._config, list(self._rows.values()), title=title)


def trials_table(config: Config, rows: Sequence[TrialRecord], *, title: str = "") -> TextTable:
    """Return a table of all trials of a sweep, one a line."""
    sweep = config.sweep
    space = SearchSpace(config)
    axes = list(space.axes)
    measured = _columns(config.train.stage, *(stage_of(row.spec) for row in rows))
    others = not_comparable(rows, sweep.metric)
    notes = [row.error or _origin(row, other) for row, other in zip(rows, others, strict=True)]
    epochs = any(row.spec["train"].get("num_train_epochs") is not None for row in rows)
    columns = [
        TableColumn("#", right=True),
        TableColumn("status"),
        *(TableColumn(axis.partition(".")[2], right=True, folds=True) for axis in axes),
        *([TableColumn("epoch", right=True, leaves=2)] if epochs else []),
        TableColumn("step", right=True, leaves=2),
        *(
            TableColumn(
                shown.header, right=True, leaves=0 if metric == sweep.metric else shown.leaves
            )
            for metric, shown in measured
        ),
        *([TableColumn("note", folds=True, leaves=1)] if any(notes) else []),
    ]
    cells: list[list[Cell]] = []
    for number, (row, note) in enumerate(zip(rows, notes, strict=True), 1):
        values = space.values_in(row.spec)
        cells.append(
            [
                str(number),
                Text(row.status, style=STATUS_COLOURS[row.status]),
                *(_value(values[axis]) if axis in values else MISSING for axis in axes),
                *([epoch_of(row.spec["train"], row.metrics.get("steps", 0))] if epochs else []),
                f"{row.metrics.get('steps', 0)}/{row.spec['train']['max_steps']}",
                *(_number(row, name) for name, _ in measured),
                *([note[:_NOTE]] if any(notes) else []),
            ]
        )
    return TextTable(columns, cells, title=title)


_NOTE = 120
"""The most characters of a note in the table: those of an early stop, for example."""


def few_settings(config: Config, distinct: int) -> str | None:
    """Return `4 distinct settings of 5 trials`; None where there are sweep.num_samples."""
    wanted = config.sweep.num_samples
    if distinct >= wanted:
        return None
    return f"{distinct} distinct setting{'s' if distinct > 1 else ''} of {wanted} trials"


def evaluation_line(result: TrialResult, train: Mapping[str, Any]) -> str:
    """Return how a trial does: `step 15/60  eval_loss 2.1034  exact_match 0.1250  118 tokens/s`.

    `train` is the section of its specification, as the history holds it. The scores are those of
    the last evaluation: those of the result are of the adapter that train.keep=best has kept.
    """
    scores = {name for objective in OBJECTIVES.values() for name in objective.metrics}
    evaluated = (point for point in reversed(result.curve) if scores & point.keys())
    metrics = result.metrics | next(evaluated, {})
    told = [position(train, metrics["steps"])]
    for name, column in _columns(*OBJECTIVES):
        if name in metrics:
            text = METRICS[name].in_line(metrics[name])
            score = isinstance(METRICS[name], Score)
            told.append(f"{column.header} {text}" if score else f"{text} {column.header}")
    return "  ".join(told)


def settings(config: Config, row: TrialRecord) -> str:
    """Return the swept settings of a trial, as `r=8 learning_rate=0.0002`."""
    return " ".join(
        f"{axis.partition('.')[2]}={_value(value)}"
        for axis, value in SearchSpace(config).values_in(row.spec).items()
    )


def _origin(row: TrialRecord, other: bool) -> str:
    origin = "from the history" if "recalled_from" in row.scenario else ""
    scored = "scored on other held-out tokens" if other else ""
    return ", ".join(filter(None, (early_stop(row), origin, scored)))


def _columns(*stages: str) -> list[tuple[str, MetricColumn]]:
    """Return the metrics that are shown while trials of these objectives run, with how each is."""
    scores = {name for stage in stages for name in OBJECTIVES[stage].metrics}
    return [
        (name, metric.progress)
        for name, metric in METRICS.items()
        if metric.progress and (name in scores or not isinstance(metric, Score))
    ]


def _share(row: TrialRecord) -> float:
    if row.status not in UNFINISHED:
        return 1.0
    return float(row.metrics.get("steps", 0)) / float(row.spec["train"]["max_steps"])


def _number(row: TrialRecord, name: str) -> str:
    value = row.metrics.get(name)
    if not isinstance(value, (int, float)):
        return ""
    return METRICS[name].in_line(value)


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "null" if value is None else str(value)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
