"""What the advisor has learned from a history's trials and from the reference's, with its cache.

The result is kept in the cache as arrays and JSON, and is renewed when the history has changed: new
trials are added at once, and the hyperparameters are learned again when there are a quarter more
trials than they were learned from.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Self

from rayfin.advisor.answer import SupportingTrial
from rayfin.advisor.features import COLUMNS
from rayfin.advisor.kernel import Hyperparameters
from rayfin.advisor.latency import ServingMeasurement, served_from
from rayfin.advisor.measurements import MeasuredTrial, measured_from
from rayfin.advisor.quality_model import QualityModel, fit_hyperparameters
from rayfin.advisor.trial_table import ScenarioTrials, TrialTable, group_by_scenario
from rayfin.errors import HistoryError
from rayfin.history import History, TrialRecord
from rayfin.language import localized
from rayfin.methods import capacities
from rayfin.metrics import score_names
from rayfin.paths import cache_dir, write_text
from rayfin.version import __version__

REFERENCE = "reference.jsonl.gz"
"""The trials that come with rayfin; experiments/reference_history.py made them."""
LEARNED = "reference.json"
"""The hyperparameters that were learned from them: {learned_from, parameters}."""
_MEASURED_EACH = 12
"""The most trials of a model, method and device whose time and memory are kept."""
_MEASURED = 600
_NEWEST = 2000
"""The most trials of a history that an estimate rests on."""
_GROWN = 1.25
_FORMAT = 7
"""The version of the cache; raise it whenever the same trials would give other columns or
hyperparameters."""


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
    look_up: Callable[[str], TrialRecord | None]
    """Returns a trial by its id, or None where it is gone."""

    @classmethod
    def of(cls, records: Iterable[TrialRecord], *, reference: bool = True) -> Self:
        """Learn from these trials and, with `reference`, from those that come with rayfin."""
        own = list(records)
        shipped = list(reference_trials()) if reference else []
        rows = [*own, *shipped]
        table = TrialTable.of(rows)
        groups = group_by_scenario(table)
        parameters, _ = _learned(groups, len(table), _reference_notes() if reference else {})
        return cls(
            QualityModel(groups, parameters),
            table.ids.tolist(),
            measured_from(_informative(rows)),
            served_from(own),
            len(own),
            len(shipped),
            {row.trial_id: row for row in rows}.get,
        )

    def supporting_trial(self, index: int, similarity: float) -> SupportingTrial:
        """Describe the trial at an index of the table, which a prediction rests on."""
        trial_id = self.ids[index]
        record = self.look_up(trial_id)
        summary = localized("gone from the history") if record is None else _summary(record)
        reference = record is not None and record.scenario.get("reference") is True
        return SupportingTrial(
            trial_id=trial_id, similarity=similarity, summary=summary, reference=reference
        )

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
    return localized(
        "{what}, {where}: {score}",
        what=what,
        where=_where(record),
        score=next(scores, record.error or record.status),
    )


def _where(record: TrialRecord) -> str:
    """Return a trial's model and data: `smollm2-135m on pydocs`."""
    base = _section(record, "model").get("name") or localized("a model")
    rows = _section(record, "data").get("path") or record.sweep_id
    return localized("{model} on {data}", model=Path(str(base)).name, data=Path(str(rows)).name)


def _section(record: TrialRecord, name: str) -> dict[str, Any]:
    section = record.spec.get(name)
    return section if isinstance(section, dict) else {}


def reference_trials() -> Iterator[TrialRecord]:
    """Yield the trials that come with rayfin, none where the file was left out."""
    packed = _reference()
    for line in gzip.decompress(packed).splitlines() if packed else ():
        yield TrialRecord.parse(json.loads(line))


def measured_trials(history: History | None) -> list[MeasuredTrial]:
    """Return what a history's newest trials took, and those that come with rayfin."""
    newest = [] if history is None else history.trials(newest_first=True, limit=_NEWEST)
    return measured_from([*newest, *reference_trials()])


def _reference() -> bytes:
    packed = resources.files("rayfin.advisor").joinpath(REFERENCE)
    return packed.read_bytes() if packed.is_file() else b""


def knowledge_of(history: History, *, cache: Path | None = None) -> Knowledge:
    """Return what is learned from a history, from the cache if it is up to date.

    Raises HistoryError where the history can't be read. A cache that can't be read is renewed, and
    one that can't be written is done without.
    """
    folder = (cache or cache_dir()) / "advisor"
    kept = _CachedKnowledge(folder / hashlib.sha256(history.shown_url.encode()).hexdigest()[:16])
    # What another version cached rests on other trials, or on other columns of them.
    mark = [*history.mark(), __version__, _FORMAT, zlib.crc32(_reference())]
    return kept.read(history, mark) or kept.renew(history, mark)


class _CachedKnowledge:
    """The cached knowledge of one history: `learned.json` and the table that it names.

    A table is never overwritten, so that a process that reads one state while another writes the
    next finds the table of that very state, or none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._learned = folder, folder / "learned.json"

    def read(self, history: History, mark: list[Any]) -> Knowledge | None:
        """Return the cached knowledge if it is of this very state of the history, or else None."""
        notes = self._notes()
        if notes is None or notes.get("mark") != mark:
            return None
        try:
            table = TrialTable.load(self._table(mark))
            parameters, _ = _parameters(notes)
            measured = measured_from(map(TrialRecord.parse, notes["measured"]))
            served = [ServingMeasurement(*one) for one in notes["served"]]
        except (HistoryError, KeyError, TypeError, ValueError):
            return None
        if parameters is None:
            return None
        return _knowledge(
            history, group_by_scenario(table), parameters, table, measured, served, mark[0]
        )

    def renew(self, history: History, mark: list[Any]) -> Knowledge:
        """Learn from the history in its current state, and cache the result."""
        rows = history.trials()
        every = [*rows, *reference_trials()]
        table = TrialTable.of(every)
        groups = group_by_scenario(table)
        notes = self._notes()
        if notes is None or not _continues(notes, mark):
            notes = _reference_notes()
        parameters, learned_from = _learned(groups, len(table), notes)
        telling, served = _informative(every), served_from(rows)
        self._write(
            table,
            {
                "mark": mark,
                "columns": COLUMNS.names,
                "parameters": dict(parameters.values),
                "learned_from": learned_from,
                "measured": [_brief(row) for row in telling],
                "served": [list(vars(one).values()) for one in served],
            },
        )
        measured = measured_from(telling)
        return _knowledge(history, groups, parameters, table, measured, served, mark[0])

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


def _continues(notes: Mapping[str, Any], mark: list[Any]) -> bool:
    """Whether the history is the one that `notes` were made from, or has grown from it.

    One that was deleted and created again under the same name has another first trial.
    """
    before = notes.get("mark")
    if not isinstance(before, list) or [*map(type, before)] != [*map(type, mark)]:
        return False
    return before[0] <= mark[0] and before[1] == mark[1] and before[4:] == mark[4:]


def _knowledge(
    history: History,
    groups: Mapping[float, ScenarioTrials],
    parameters: Hyperparameters,
    table: TrialTable,
    measured: Sequence[MeasuredTrial],
    served: Sequence[ServingMeasurement],
    trials: int,
) -> Knowledge:
    shipped = {row.trial_id: row for row in reference_trials()}

    def look_up(trial_id: str) -> TrialRecord | None:
        if trial_id in shipped:
            return shipped[trial_id]
        try:
            return history.get(trial_id)
        except HistoryError:
            return None

    ids = table.ids.tolist()
    quality_model = QualityModel(groups, parameters)
    return Knowledge(quality_model, ids, measured, served, trials, len(shipped), look_up)


def _learned(
    groups: Mapping[float, ScenarioTrials], trials: int, notes: Mapping[str, Any]
) -> tuple[Hyperparameters, int]:
    """Return hyperparameters and how many trials they were learned from, reusing the noted ones."""
    parameters, learned_from = _parameters(notes)
    if parameters is None or not learned_from <= trials <= _GROWN * learned_from:
        return fit_hyperparameters(groups, parameters), trials
    return parameters, learned_from


def _reference_notes() -> dict[str, Any]:
    """Return what was learned from the reference alone, or nothing where the file was left out."""
    file = resources.files("rayfin.advisor").joinpath(LEARNED)
    notes: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return notes


def _parameters(notes: Mapping[str, Any]) -> tuple[Hyperparameters | None, int]:
    values, count = notes.get("parameters"), notes.get("learned_from")
    names = Hyperparameters.expected(COLUMNS).values.keys()
    if not isinstance(values, dict) or values.keys() != names or not isinstance(count, int):
        return None, 0
    if not all(isinstance(value, float) and math.isfinite(value) for value in values.values()):
        return None, 0
    return Hyperparameters(values), count


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
