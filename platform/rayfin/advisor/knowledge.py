"""What the advisor knows: a history's trials and the reference's, learned from once and kept.

What was learned lies in the cache as arrays and JSON, and is learned again by itself when the
history has changed: new trials are added at once, and the process' parameters follow when there are
a quarter more trials than they were learned from.
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

from rayfin import __version__
from rayfin.advisor.answer import Basis
from rayfin.advisor.features import COLUMNS
from rayfin.advisor.latency import Served, served_from
from rayfin.advisor.measured import Measured, measured_from
from rayfin.advisor.process import Parameters
from rayfin.advisor.quality import Evidence, learned
from rayfin.advisor.table import ScenarioTrials, TrialTable, groups_of
from rayfin.errors import HistoryError
from rayfin.history import History, TrialRecord
from rayfin.methods import capacities
from rayfin.metrics import score_names
from rayfin.paths import cache_dir, write_text

REFERENCE = "reference.jsonl.gz"
"""Trials that come with rayfin: experiments/reference_history.py made them."""
LEARNED = "reference.json"
"""What was learned from them: {learned_from, parameters}."""
_MEASURED_EACH = 12
"""Trials of a model, method and device whose time and memory are kept."""
_MEASURED = 600
_NEWEST = 2000
"""Trials that an estimate looks at."""
_GROWN = 1.25
_FORMAT = 5
"""The version of what is kept: one more whenever the same trials would make other columns or
parameters."""


@dataclass(frozen=True)
class Knowledge:
    """What recommendations rest on."""

    evidence: Evidence
    ids: Sequence[str]
    """Of each place in the table that the evidence was made from."""
    measured: Sequence[Measured]
    """What trials took, for the estimates."""
    served: Sequence[Served]
    """What serving measured."""
    trials: int
    """Of the history."""
    reference: int
    """Those that come with rayfin, on top."""
    look_up: Callable[[str], TrialRecord | None]
    """A trial by its id; None where it is gone."""

    @classmethod
    def of(cls, records: Iterable[TrialRecord], *, reference: bool = True) -> Self:
        """Learned from these trials, and the reference's."""
        own = list(records)
        shipped = list(reference_trials()) if reference else []
        rows = [*own, *shipped]
        table = TrialTable.of(rows)
        groups = groups_of(table)
        parameters, _ = _learned(groups, len(table), _reference_notes() if reference else {})
        return cls(
            Evidence(groups, parameters),
            table.ids.tolist(),
            measured_from(_telling(rows)),
            served_from(own),
            len(own),
            len(shipped),
            {row.trial_id: row for row in rows}.get,
        )

    def basis(self, place: int, likeness: float) -> Basis:
        """What the trial at `place` of the table was."""
        trial_id = self.ids[place]
        record = self.look_up(trial_id)
        summary = "gone from the history" if record is None else _summary(record)
        reference = record is not None and record.scenario.get("reference") is True
        return Basis(trial_id=trial_id, likeness=likeness, summary=summary, reference=reference)

    def scenario_of(self, place: int) -> str:
        """`smollm2-135m on pydocs`: what the trial at `place` of the table was run in."""
        record = self.look_up(self.ids[place])
        return "a trial that is gone from the history" if record is None else _where(record)


def _summary(record: TrialRecord) -> str:
    """`lora learning_rate=0.0003 r=16, smollm2-135m on pydocs: eval_loss 2.81`"""
    method, train = (_section(record, name) for name in ("method", "train"))
    settings = {"learning_rate": train.get("learning_rate")}
    settings |= {name: method[name] for name in capacities() if name in method}
    shown = " ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
    scores = (
        f"{name} {value:.4g}"
        for name in score_names()
        if isinstance(value := record.metrics.get(name), int | float)
    )
    what = f"{method.get('type') or 'a trial'} {shown}".rstrip()
    return f"{what}, {_where(record)}: {next(scores, record.error or record.status)}"


def _where(record: TrialRecord) -> str:
    """`smollm2-135m on pydocs`"""
    base = _section(record, "model").get("name") or "a model"
    rows = _section(record, "data").get("path") or record.sweep_id
    return f"{Path(str(base)).name} on {Path(str(rows)).name}"


def _section(record: TrialRecord, name: str) -> dict[str, Any]:
    section = record.spec.get(name)
    return section if isinstance(section, dict) else {}


def reference_trials() -> Iterator[TrialRecord]:
    """The trials that come with rayfin; none where the file was left out."""
    packed = _reference()
    for line in gzip.decompress(packed).splitlines() if packed else ():
        yield TrialRecord.parse(json.loads(line))


def measured_trials(history: History | None) -> list[Measured]:
    """What the newest trials of a history took, and those that come with rayfin."""
    newest = [] if history is None else history.trials(newest_first=True, limit=_NEWEST)
    return measured_from([*newest, *reference_trials()])


def _reference() -> bytes:
    packed = resources.files("rayfin.advisor").joinpath(REFERENCE)
    return packed.read_bytes() if packed.is_file() else b""


def knowledge_of(history: History, *, cache: Path | None = None) -> Knowledge:
    """What there is to know from `history`, learned now or kept from before.

    Raises HistoryError where the history can't be read; a cache that can't be used is made anew, or
    done without.
    """
    folder = (cache or cache_dir()) / "advisor"
    kept = _Kept(folder / hashlib.sha256(history.shown_url.encode()).hexdigest()[:16])
    # What another version kept rests on other trials, or on other columns made of them.
    mark = [*history.mark(), __version__, _FORMAT, zlib.crc32(_reference())]
    return kept.read(history, mark) or kept.renew(history, mark)


class _Kept:
    """The cached knowledge of one history: `learned.json` and the table that it names.

    A table is never written over: who reads a state while another process writes the next one finds
    the table of that very state, or none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._learned = folder, folder / "learned.json"

    def read(self, history: History, mark: list[Any]) -> Knowledge | None:
        """What is kept, if it is of this very state of the history."""
        notes = self._notes()
        if notes is None or notes.get("mark") != mark:
            return None
        try:
            table = TrialTable.load(self._table(mark))
            parameters, _ = _parameters(notes)
            measured = measured_from(map(TrialRecord.parse, notes["measured"]))
            served = [Served(*one) for one in notes["served"]]
        except (HistoryError, KeyError, TypeError, ValueError):
            return None
        if parameters is None:
            return None
        return _knowledge(history, groups_of(table), parameters, table, measured, served, mark[0])

    def renew(self, history: History, mark: list[Any]) -> Knowledge:
        rows = history.trials()
        every = [*rows, *reference_trials()]
        table = TrialTable.of(every)
        groups = groups_of(table)
        notes = self._notes()
        if notes is None or not _goes_on(notes, mark):
            notes = _reference_notes()
        parameters, learned_from = _learned(groups, len(table), notes)
        telling, served = _telling(every), served_from(rows)
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


def _goes_on(notes: Mapping[str, Any], mark: list[Any]) -> bool:
    """Whether the history is the one that `notes` were made of, or has grown from it.

    One that was deleted and begun anew under the same name is another: its first trial is.
    """
    before = notes.get("mark")
    if not isinstance(before, list) or [*map(type, before)] != [*map(type, mark)]:
        return False
    return before[0] <= mark[0] and before[1] == mark[1] and before[4:] == mark[4:]


def _knowledge(
    history: History,
    groups: Mapping[float, ScenarioTrials],
    parameters: Parameters,
    table: TrialTable,
    measured: Sequence[Measured],
    served: Sequence[Served],
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
    evidence = Evidence(groups, parameters)
    return Knowledge(evidence, ids, measured, served, trials, len(shipped), look_up)


def _learned(
    groups: Mapping[float, ScenarioTrials], trials: int, notes: Mapping[str, Any]
) -> tuple[Parameters, int]:
    """The parameters, and the trials they were learned from: those noted while they still do."""
    parameters, learned_from = _parameters(notes)
    if parameters is None or not learned_from <= trials <= _GROWN * learned_from:
        return learned(groups, parameters), trials
    return parameters, learned_from


def _reference_notes() -> dict[str, Any]:
    """What was learned from the reference alone; nothing where the file was left out."""
    file = resources.files("rayfin.advisor").joinpath(LEARNED)
    notes: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return notes


def _parameters(notes: Mapping[str, Any]) -> tuple[Parameters | None, int]:
    values, count = notes.get("parameters"), notes.get("learned_from")
    names = Parameters.expected(COLUMNS).values.keys()
    if not isinstance(values, dict) or values.keys() != names or not isinstance(count, int):
        return None, 0
    if not all(isinstance(value, float) and math.isfinite(value) for value in values.values()):
        return None, 0
    return Parameters(values), count


def _telling(rows: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The newest trials of every model, method and device, so many of each at most."""
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
