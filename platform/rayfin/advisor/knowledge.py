"""What the advisor has learned from a history's trials and from the reference's, with its cache.

The result is kept in the cache as arrays and JSON, and is renewed when trials have changed. The
hyperparameters are those that were learned from the reference (`LEARNED`), whatever a history
holds: so what trials say is measured on one scale before and after an import, a few wrong trials
can't change what all others mean, and the order of imports does not matter.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Self

from rayfin.advisor.answer import SupportingTrial
from rayfin.advisor.features import COLUMNS
from rayfin.advisor.kernel import Array, Hyperparameters
from rayfin.advisor.latency import ServingMeasurement, served_from
from rayfin.advisor.measurements import MeasuredTrial, measured_from
from rayfin.advisor.quality_model import QualityModel
from rayfin.advisor.trial_table import TrialTable, group_by_scenario, set_aside
from rayfin.errors import HistoryError
from rayfin.history import History, TrialRecord
from rayfin.language import localized
from rayfin.methods import capacities
from rayfin.metrics import score_names
from rayfin.paths import cache_dir, write_text
from rayfin.version import __version__

REFERENCES = ("reference.jsonl.gz", "public.jsonl.gz")
"""The trials that come with rayfin: its own, which experiments/reference_history.py ran, and public
ones, which experiments/public_reference.py packed with their origin and licence."""
LEARNED = "reference.json"
"""The hyperparameters that were learned from them: {parameters}."""
_MEASURED_EACH = 12
"""The most trials of a model, method and device whose time and memory are kept."""
_MEASURED = 600
_NEWEST = 2000
"""The most trials of a history that an estimate rests on."""
_FORMAT = 10
"""The version of the cache; raise it whenever the same trials would give other columns."""

_Records = Sequence[TrialRecord]


@dataclass(frozen=True)
class Knowledge:
    """What recommendations rest on: the learned model, and measurements of time and memory."""

    quality_model: QualityModel
    ids: Sequence[str]
    """The trial ids of the table that the model was learned from, in its order."""
    measured: Sequence[MeasuredTrial]
    """The trials whose time and memory correct the estimates."""
    served: Sequence[ServingMeasurement]
    """The measurements of serving."""
    trials: int
    """The number of trials in the history."""
    reference: int
    """The number of trials that come with rayfin, which are not in the history."""
    set_aside: Mapping[str, Array]
    """The features of the trials whose score can't be, by their ids: nothing was learned from them.
    """
    look_up: Callable[[str], TrialRecord | None]
    """Returns a trial by its id, or None where it is gone."""

    @classmethod
    def of(cls, records: Iterable[TrialRecord], *, reference: bool = True) -> Self:
        """Learn from these trials and, with `reference`, from those that come with rayfin."""
        own = list(records)
        shipped = list(reference_trials()) if reference else []
        rows = _once(own, shipped)
        table = TrialTable.of(_in_order(rows))
        return cls(
            QualityModel(
                group_by_scenario(table),
                reference_parameters() if reference else Hyperparameters.expected(COLUMNS),
            ),
            table.ids.tolist(),
            measured_from(_informative(rows)),
            served_from(own),
            len(own),
            len(shipped),
            _set_aside(table),
            {row.trial_id: row for row in rows}.get,
        )

    def supporting_trial(self, index: int, weight: float, similarity: float) -> SupportingTrial:
        """Describe the trial at an index of the table, which a prediction rests on."""
        trial_id = self.ids[index]
        record = self.look_up(trial_id)
        reference = record is not None and record.scenario.get("reference") is True
        return SupportingTrial(
            trial_id=trial_id,
            weight=weight,
            similarity=similarity,
            summary=self.summary_of(trial_id),
            reference=reference,
        )

    def summary_of(self, trial_id: str) -> str:
        """Return a trial's setting, scenario and score, in one line."""
        record = self.look_up(trial_id)
        return localized("gone from the history") if record is None else _summary(record)

    def scenario_of(self, index: int) -> str:
        """Return the scenario of the trial at an index of the table: `smollm2-135m on pydocs`."""
        record = self.look_up(self.ids[index])
        return (
            localized("a trial that is gone from the history") if record is None else _where(record)
        )


def _summary(record: TrialRecord) -> str:
    """Return `lora learning_rate=0.0003 r=16, smollm2-135m on pydocs: eval_loss 2.81`."""
    method, train = (_section(record, name) for name in ("method", "train"))
    settings = {"learning_rate": train.get("learning_rate")}
    settings |= {name: method[name] for name in capacities() if name in method}
    shown = " ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
    scores = (
        f"{name} {value:.4g}"
        for name in score_names()
        if isinstance(value := record.metrics.get(name), int | float)
    )
    what = f"{method.get('type') or localized('a trial')} {shown}".rstrip()
    trial = localized(
        "{what}, {where}: {score}",
        what=what,
        where=_where(record),
        score=next(scores, record.error or record.status),
    )
    origin, licence = (record.scenario.get(name) for name in ("origin", "licence"))
    if not origin or not licence:
        return trial
    return localized("{trial} ({origin}, {licence})", trial=trial, origin=origin, licence=licence)


def _where(record: TrialRecord) -> str:
    """Return a trial's model and data: `smollm2-135m on pydocs`."""
    base = _section(record, "model").get("name") or localized("a model")
    rows = _section(record, "data").get("path") or record.sweep_id
    return localized("{model} on {data}", model=Path(str(base)).name, data=Path(str(rows)).name)


def _section(record: TrialRecord, name: str) -> dict[str, Any]:
    section = record.spec.get(name)
    return section if isinstance(section, dict) else {}


def reference_trials(*, public: bool = True) -> Iterator[TrialRecord]:
    """Yield the trials that come with rayfin, without `public` only those that it ran itself."""
    for values in _reference_rows():
        if public or "origin" not in values["scenario"]:
            yield TrialRecord.parse(values)


def measured_trials(history: History | None) -> list[MeasuredTrial]:
    """Return what a history's newest trials took, and those that come with rayfin."""
    newest = [] if history is None else history.trials(newest_first=True, limit=_NEWEST)
    return measured_from([*newest, *reference_trials(public=False)])


def _reference_rows() -> list[dict[str, Any]]:
    """Return the trials that come with rayfin as they are packed, none where they were left out."""
    packed = _reference()
    return [json.loads(line) for line in gzip.decompress(packed).splitlines()] if packed else []


def _once(own: Iterable[TrialRecord], shipped: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the trials of both, without those of a history that come with rayfin too.

    Whoever imports a public table has its trials under the ids that they have here.
    """
    known = {row.trial_id for row in shipped}
    return [*shipped, *(row for row in own if row.trial_id not in known)]


def _reference() -> bytes:
    files = map(resources.files("rayfin.advisor").joinpath, REFERENCES)
    return b"".join(file.read_bytes() for file in files if file.is_file())  # also one gzip file


def knowledge_of(history: History | None, *, cache: Path | None = None) -> Knowledge:
    """Return what is learned from a history, from the cache if it is up to date.

    None is a history that has not been begun. Raises HistoryError where one can't be read. A cache
    that can't be read is renewed, and one that can't be written is done without.
    """
    folder = (cache or cache_dir()) / "advisor"
    name = "" if history is None else history.shown_url
    kept = _CachedKnowledge(folder / hashlib.sha256(name.encode()).hexdigest()[:16])
    served = [] if history is None else history.served()
    # What another version cached rests on other trials, or on other columns of them.
    mark = [0] if history is None else [*history.mark()]
    mark += [__version__, _FORMAT, zlib.crc32(_reference()), _digest_without_serving(served)]
    return kept.read(history, mark, served) or kept.renew(history, mark, served)


def _digest_without_serving(served: Iterable[TrialRecord]) -> int:
    """Return a number for what these trials are, whatever serving has measured since.

    Beside a busy server measurements change every few seconds, and the trials don't.
    """
    other = {"curve", "updated_at", "metrics"}
    rows = [[row.model_dump(mode="json", exclude=other), row.trained_metrics] for row in served]
    return zlib.crc32(json.dumps(rows, sort_keys=True).encode())


class _CachedKnowledge:
    """The cached knowledge of one history: `learned.json` and the table that it names.

    A table is never overwritten, so that a process that reads one state while another writes the
    next finds the table of that very state, or none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._learned = folder, folder / "learned.json"

    def read(self, history: History | None, mark: list[Any], served: _Records) -> Knowledge | None:
        """Return the cached knowledge if it is of this very state of the history, or else None.

        `served` are the trials that serving has measured, as they are now.
        """
        notes = self._notes()
        if notes is None or notes.get("mark") != mark:
            return None
        try:
            table = TrialTable.load(self._table(mark))
            measured = measured_from(map(TrialRecord.parse, notes["measured"]))
        except (HistoryError, KeyError, TypeError, ValueError):
            return None
        return _knowledge(history, table, measured, served, mark[0])

    def renew(self, history: History | None, mark: list[Any], served: _Records) -> Knowledge:
        """Learn from the history in its current state, and cache the result."""
        every = _once([] if history is None else history.trials(), list(reference_trials()))
        table = TrialTable.of(_in_order(every))
        telling = _informative(every)
        self._write(
            table,
            {
                "mark": mark,
                "columns": COLUMNS.names,
                "measured": [_brief(row) for row in telling],
            },
        )
        return _knowledge(history, table, measured_from(telling), served, mark[0])

    def _notes(self) -> dict[str, Any] | None:
        try:
            notes = json.loads(self._learned.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        ours = isinstance(notes, dict) and notes.get("columns") == list(COLUMNS.names)
        return notes if ours else None

    def _table(self, mark: list[Any]) -> Path:
        return self._folder / f"table-{zlib.crc32(json.dumps(mark).encode()):08x}.npz"

    def _write(self, table: TrialTable, notes: dict[str, Any]) -> None:
        path = self._table(notes["mark"])
        # A recommendation does not need its cache.
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            table.save(path)
            write_text(self._learned, json.dumps(notes))
            for other in self._folder.glob("table*.npz"):
                if other != path:
                    other.unlink(missing_ok=True)


def _in_order(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the trials in the order of their ids, which is that of no import."""
    return sorted(records, key=lambda record: record.trial_id)


def _knowledge(
    history: History | None,
    table: TrialTable,
    measured: Sequence[MeasuredTrial],
    served: Sequence[TrialRecord],
    trials: int,
) -> Knowledge:
    # Of hundreds an answer names a few, and to check them all takes longer than to answer.
    shipped = {values["trial_id"]: values for values in _reference_rows()}

    def look_up(trial_id: str) -> TrialRecord | None:
        if trial_id in shipped:
            return TrialRecord.parse(shipped[trial_id])
        try:
            return None if history is None else history.get(trial_id)
        except HistoryError:
            return None

    ids = table.ids.tolist()
    quality_model = QualityModel(group_by_scenario(table), reference_parameters())
    seconds = served_from(served)
    aside = _set_aside(table)
    return Knowledge(quality_model, ids, measured, seconds, trials, len(shipped), aside, look_up)


def _set_aside(table: TrialTable) -> dict[str, Array]:
    return {str(table.ids[index]): table.rows[index] for index in set_aside(table)}


def reference_parameters() -> Hyperparameters:
    """Return the hyperparameters that were learned from the reference, which every answer uses.

    They are the modes of the priors where the file was left out.
    """
    file = resources.files("rayfin.advisor").joinpath(LEARNED)
    notes = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    expected = Hyperparameters.expected(COLUMNS).values
    return Hyperparameters({**expected, **notes.get("parameters", {})})


def _informative(rows: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the newest trials of every model, method and device, a few of each."""
    counts: Counter[str] = Counter()
    kept: list[TrialRecord] = []
    for row in reversed(rows):
        if "source" in row.scenario or not row.metrics.get("train_seconds"):
            continue
        method, model, hardware = (
            row.spec.get("method"), row.scenario.get("model"), row.scenario.get("hardware"),
        )  # fmt: skip
        if not (
            isinstance(method, dict) and isinstance(model, dict) and isinstance(hardware, dict)
        ):
            continue
        kind = f"{model.get('identity')} {method.get('type')} {hardware.get('device_name')}"
        counts[kind] += 1
        if counts[kind] <= _MEASURED_EACH:
            kept.append(row)
        if len(kept) == _MEASURED:
            break
    return kept


def _brief(row: TrialRecord) -> dict[str, Any]:
    return row.model_copy(update={"curve": [], "versions": {}}).model_dump(mode="json")
