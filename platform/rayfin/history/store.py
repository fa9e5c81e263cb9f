"""The history of all trials, finished or not, in SQLite or PostgreSQL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    Row,
    Select,
    Text,
    case,
    cast,
    extract,
    func,
    select,
)

from rayfin.errors import HistoryError, did_you_mean
from rayfin.history.comparable import comparable
from rayfin.history.connect import (
    connect,
    database_errors,
    lock_writers,
    parse_url,
    shown_url,
    writing,
)
from rayfin.history.record import SERVING, TrialRecord, finite
from rayfin.history.tables import TRIALS
from rayfin.metrics import score_of
from rayfin.objectives import main_metric, stage_of
from rayfin.statuses import STATUSES, Status

_SERVED = cast(TRIALS.c.metrics, Text).contains(f'"{SERVING}', autoescape=True)


@dataclass(frozen=True)
class SweepSummary:
    """A summary of one sweep."""

    sweep_id: str
    created_at: datetime
    updated_at: datetime
    counts: dict[Status, int]
    """The number of trials by status; statuses without trials are left out."""
    best_trial_id: str | None
    best_value: float | None
    """The value of the metric in the best finished trial."""
    best_metric: str
    """The name of the metric."""

    @property
    def trials(self) -> int:
        """The number of all trials."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class MergeCounts:
    added: int
    replaced: int
    unchanged: int


class History:
    """A trial history, which several processes may have open and write to.

    Every method raises HistoryError where the database fails. A History can't be passed between
    processes: pass its URL and open it there.
    """

    def __init__(self, url: URL, engine: Engine) -> None:
        self._url = url
        self._engine = engine

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> Self:
        """Open the history at `sqlite:///PATH` or `postgresql+psycopg://USER@HOST/DATABASE`.

        With `create`, a missing history is created. SQLite's WAL needs a local disk; use PostgreSQL
        for writers on several machines.
        """
        parsed = parse_url(url)
        return cls(parsed, connect(parsed, create=create))

    @property
    def shown_url(self) -> str:
        """The URL without the password, to be printed."""
        return shown_url(self._url)

    def put(self, record: TrialRecord) -> None:
        """Insert a record, or replace the one with the same trial_id."""
        with database_errors(self._url), writing(self._engine).begin() as connection:
            _upsert(connection, [record])

    def merge(
        self, records: Iterable[TrialRecord], *, ignoring: Collection[str] = ()
    ) -> MergeCounts:
        """Put all records or none; an older record does not replace a newer one.

        Records that differ only in the fields `ignoring` count as unchanged.
        """
        added = replaced = unchanged = 0
        changed: dict[str, TrialRecord] = {}
        with database_errors(self._url), writing(self._engine).begin() as connection:
            lock_writers(connection)
            for record in records:
                held = changed.get(record.trial_id) or _one(
                    connection, select(TRIALS).where(TRIALS.c.trial_id == record.trial_id)
                )
                if held is None:
                    added += 1
                elif _same(held, record, ignoring) or record.updated_at < held.updated_at:
                    unchanged += 1
                    continue
                else:
                    replaced += 1
                changed[record.trial_id] = record
            _upsert(connection, list(changed.values()))
        return MergeCounts(added, replaced, unchanged)

    def update_metrics(
        self, trial_id: str, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    ) -> bool:
        """Add to a trial's metrics what `change` returns for them; return False for an unknown
        trial.

        The update is atomic: what others write meanwhile is neither lost nor half seen.
        """

        def with_metrics(row: TrialRecord) -> TrialRecord:
            return row.updated(metrics=row.metrics | dict(change(row.metrics)))

        return self.change(trial_id, with_metrics) is not None

    def change(
        self, trial_id: str, change: Callable[[TrialRecord], TrialRecord | None]
    ) -> TrialRecord | None:
        """Replace a trial's row by what `change` returns for it, and return that.

        Returns None for an unknown trial, and where `change` returns None, which leaves the row as
        it is. The change is atomic: what others write meanwhile is neither lost nor half seen.
        """
        query = select(TRIALS).where(TRIALS.c.trial_id == trial_id)
        with database_errors(self._url), writing(self._engine).begin() as connection:
            lock_writers(connection)
            held = _one(connection, query)
            changed = None if held is None else change(held)
            if changed is not None:
                _upsert(connection, [changed])
        return changed

    def get(self, trial_id: str) -> TrialRecord:
        """Return the trial with this id; else raise HistoryError, which names the nearest id."""
        with database_errors(self._url), self._engine.connect() as connection:
            record = _one(connection, select(TRIALS).where(TRIALS.c.trial_id == trial_id))
            if record is not None:
                return record
            known = connection.scalars(select(TRIALS.c.trial_id)).all()
        raise HistoryError(
            f"trial '{trial_id}' is not in {self.shown_url}{did_you_mean(trial_id, known)}; "
            "`rayfin history list` shows all"
        )

    def find(self, prefix: str) -> TrialRecord:
        """Return the only trial whose id is, or starts with, `prefix`; else raise HistoryError."""
        # Not LIKE: SQLite's ignores case.
        starts = func.substr(TRIALS.c.trial_id, 1, len(prefix)) == prefix
        query = select(TRIALS.c.trial_id).where(starts).order_by(TRIALS.c.trial_id).limit(4)
        with database_errors(self._url), self._engine.connect() as connection:
            near = connection.scalars(query).all() if prefix else []
        if len(near) > 1 and prefix not in near:
            more = ", ..." if len(near) == 4 else ""
            raise HistoryError(
                f"trial '{prefix}' could be any of {', '.join(near[:3])}{more}; give more of its id"
            )
        return self.get(near[0] if len(near) == 1 else prefix)

    def trials(
        self,
        *,
        sweep_id: str | None = None,
        status: Status | None = None,
        fingerprint: str | None = None,
        limit: int | None = None,
        newest_first: bool = False,
    ) -> list[TrialRecord]:
        """Return the trials that match all given values, in the order in which they started."""
        query = select(TRIALS)
        for column, value in (
            ("sweep_id", sweep_id),
            ("status", status),
            ("fingerprint", fingerprint),
        ):
            if value is not None:
                query = query.where(TRIALS.c[column] == value)
        order = (TRIALS.c.created_at, TRIALS.c.trial_id)
        query = query.order_by(*(key.desc() if newest_first else key.asc() for key in order))
        with database_errors(self._url), self._engine.connect() as connection:
            return _many(connection, query.limit(limit))

    def finished(self, fingerprint: str) -> TrialRecord | None:
        """Return the newest finished trial with this fingerprint, or None."""
        found = self.trials(fingerprint=fingerprint, status="finished", newest_first=True, limit=1)
        return found[0] if found else None

    def mark(self) -> tuple[int, str, str, int]:
        """Return values that change whenever trials do, to tell whether a cache is up to date.

        They are the number of trials, the start of the first one, and, of those that serving has
        not measured (it changes them every few seconds: see `served`), the last change and the sum
        of the times of all changes, which tells of older trials that were merged. Only a row that
        is merged in place of one with the same time of change goes unnoticed.
        """
        changed = case((_SERVED, None), else_=TRIALS.c.updated_at)
        query = select(
            func.count(),
            func.min(TRIALS.c.created_at),
            func.max(changed),
            func.sum(extract("epoch", changed)),
        )
        with database_errors(self._url), self._engine.connect() as connection:
            count, first, last, total = connection.execute(query).one()
        return count, str(first), str(last), int(total or 0)

    def served(self) -> list[TrialRecord]:
        """Return the trials whose adapters serving has measured, by their ids."""
        query = select(TRIALS).where(_SERVED).order_by(TRIALS.c.trial_id)
        with database_errors(self._url), self._engine.connect() as connection:
            return _many(connection, query)

    def sweeps(
        self, *, metric: str | None = None, mode: Literal["min", "max"] | None = None
    ) -> list[SweepSummary]:
        """Return all sweeps, the oldest first; `metric` and `mode` determine the best trial.

        Left out, the metric is the main score of the objective of the sweep's first trial, and only
        trials of that objective are compared; the mode is where better values of the metric lie.
        """
        columns = [
            TRIALS.c[n]
            for n in (
                "sweep_id",
                "trial_id",
                "status",
                "created_at",
                "updated_at",
                "metrics",
                "spec",
                "scenario",
            )
        ]
        rows: dict[str, list[Any]] = {}
        with database_errors(self._url), self._engine.connect() as connection:
            for row in connection.execute(select(*columns).order_by(TRIALS.c.created_at)):
                rows.setdefault(row.sweep_id, []).append(row)
        return [_summary(sweep_id, trials, metric, mode) for sweep_id, trials in rows.items()]

    def close(self) -> None:
        """Close the connections to the database."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"History({self.shown_url!r})"


def _upsert(connection: Connection, records: list[TrialRecord]) -> None:
    if not records:
        return
    # The two dialects spell ON CONFLICT alike, in classes of their own.
    if connection.dialect.name == "sqlite":
        from sqlalchemy.dialects.sqlite import insert
    else:
        from sqlalchemy.dialects.postgresql import insert  # type: ignore[assignment]
    statement = insert(TRIALS)
    new = {c.name: statement.excluded[c.name] for c in TRIALS.columns if c.name != "trial_id"}
    statement = statement.on_conflict_do_update(index_elements=["trial_id"], set_=new)
    connection.execute(statement, [record.model_dump() for record in records])


def _many(connection: Connection, query: Select[Any]) -> list[TrialRecord]:
    try:
        return [_record(row) for row in connection.execute(query)]
    except ValueError as error:  # JSON that some other program wrote into the table
        raise HistoryError(
            f"history: a row can't be read ({error}); restore a copy or an export"
        ) from error


def _one(connection: Connection, query: Select[Any]) -> TrialRecord | None:
    found = _many(connection, query)
    return found[0] if found else None


def _record(row: Row[Any]) -> TrialRecord:
    return TrialRecord.parse(row._asdict())


def _same(one: TrialRecord, other: TrialRecord, ignoring: Collection[str]) -> bool:
    return one.model_dump(exclude=set(ignoring)) == other.model_dump(exclude=set(ignoring))


def _summary(
    sweep_id: str, rows: list[Any], metric: str | None, mode: Literal["min", "max"] | None
) -> SweepSummary:
    counts = Counter(row.status for row in rows)
    compared = rows
    if metric is None:
        stages = [stage_of(row.spec if isinstance(row.spec, Mapping) else {}) for row in rows]
        metric = main_metric(stages[0])
        compared = [row for row, stage in zip(rows, stages, strict=True) if stage == stages[0]]
    mode = mode or score_of(metric).direction
    measured = [
        (value, row.trial_id)
        for row in comparable(compared, metric)
        if (value := finite(row.metrics.get(metric))) is not None
    ]
    pick = min if mode == "min" else max
    value, trial_id = pick(measured, key=lambda pair: pair[0]) if measured else (None, None)
    return SweepSummary(
        sweep_id=sweep_id,
        created_at=min(row.created_at for row in rows),
        updated_at=max(row.updated_at for row in rows),
        counts={status: counts[status] for status in STATUSES if counts[status]},
        best_trial_id=trial_id,
        best_value=value,
        best_metric=metric,
    )
