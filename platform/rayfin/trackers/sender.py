"""Send runs to one tracker from a thread of its own, so that no trial waits for it."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from rayfin.errors import StorageError
from rayfin.paths import StoragePath, write_json
from rayfin.statuses import SCORED
from rayfin.trackers.base import Run, Tracker, one_line

log = logging.getLogger(__name__)

_VALUES = 400
"""Numbers that go out in one request, at most about."""
_LONGEST_PAUSE = 30.0
"""Seconds between two tries to reach a tracker that is away, at most."""


@dataclass
class _Sent:
    """What a tracker has of a run, kept in the run's directory: a resumed sweep goes on there."""

    address: str = ""
    """Where the run went (`Tracker.address`); empty in notes of before it was noted."""
    key: str = ""
    native: str | None = None
    settings: bool = False
    step: int = -1
    """The last step whose measurements are there."""
    answers: int = -1
    """The last step whose answers are there."""
    tags: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """Name -> sha256 of the contents."""
    status: str | None = None
    """How it ended there; None while it runs."""
    figures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, location: StoragePath) -> _Sent:
        try:
            if not location.download_file():
                return cls()
            values = json.loads(location.path.read_text(encoding="utf-8"))
            values = {"address": "", **values}
            return cls(**{one.name: values[one.name] for one in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError):  # torn, or another version's
            return cls()


class Sender:
    """The thread that sends runs to a tracker, the newest state of each.

    What can't be sent is tried again, in the order in which it came, with growing pauses. Nothing
    is queued but the newest state of each run, which has all that came before.
    """

    def __init__(self, tracker: Tracker, say: Callable[[str], None]) -> None:
        """Take `say`, which is told once when the tracker is away, and once when it is back."""
        self._tracker, self._say = tracker, say
        self._pending: dict[str, Run] = {}
        self._sent: dict[str, _Sent] = {}
        self._open: set[str] = set()
        self._begun: set[str] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._errors: dict[str, str] = {}
        """Run -> why the last try to send it failed, if it did."""
        self._held_back: str | None = None
        """What the tracker said when it was closed, if it could not send all that it had taken."""
        self._told: set[str] = set()
        self._thread = threading.Thread(
            target=self._work, name=f"tracker {tracker.name}", daemon=True
        )
        self._thread.start()

    @property
    def name(self) -> str:
        return self._tracker.name

    def put(self, run: Run) -> None:
        """Have a run sent as it is now; returns at once."""
        with self._changed:
            self._pending[run.run_id] = run
            self._changed.notify()

    def ask_to_close(self) -> None:
        """Have the thread end once all is sent, or can't be."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self, seconds: float, remedy: str) -> str | None:
        """Wait for the thread, and return a line on what is missing in the tracker, or None.

        `remedy` completes it, unless the tracker holds back what it was given and has its own. A
        thread that a tracker holds for longer is left alone; it ends with the process.
        """
        self._thread.join(max(0.0, seconds))
        with self._changed:
            missing, alive = len(self._pending), self._thread.is_alive()
            errors = list(self._errors.values())
        if not missing and not alive:
            return f"{self.name}: {self._held_back}" if self._held_back else None
        why = errors[0] if errors else "it does not answer in time"
        runs = f"{missing} run{'' if missing == 1 else 's'}" if missing else "the last run"
        return f"{self.name} lacks a part of {runs}: {why}; {remedy}"

    def _work(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing, pause)
                self._changed.wait_for(lambda: self._pending or self._closing)
                last, waiting = self._closing, list(self._pending.values())
            sent = self._all_sent(waiting, last)
            pause = 0.0 if sent else min(2 * pause or 1.0, _LONGEST_PAUSE)
            if last:
                break
        try:
            self._tracker.close()
        except Exception as error:  # noqa: BLE001  # each package has errors of its own
            self._held_back = one_line(error)

    def _all_sent(self, runs: list[Run], last: bool) -> bool:
        """Send runs, and return whether the tracker took them.

        One that it does not take, as somebody has removed it there, holds up no other; after two
        it counts as away until the `last` try, which each run gets.
        """
        failed = 0
        for run in runs:
            taken = self._tried(run)
            with self._changed:
                newest = self._pending.pop(run.run_id)
                if not taken or newest is not run:
                    self._pending[run.run_id] = newest
            failed += not taken
            if failed == 2 and not last:
                break
        return not failed

    def _tried(self, run: Run) -> bool:
        """Send a run; return whether the tracker has it, and tell where that changes."""
        try:
            self._send(run)
        except Exception as error:  # each package has errors of its own
            log.debug("tracker %s", self.name, exc_info=error)
            self._errors[run.run_id] = one_line(error)
            self._tell(
                "away",
                f"{self.name}: {one_line(error)}; nothing waits for it, and what is missing there "
                "is sent when it answers",
            )
            return False
        if self._errors.pop(run.run_id, None) is not None and not self._errors:
            self._tell("back", f"{self.name} answers again, and has what it missed")
        return True

    def _tell(self, kind: str, line: str) -> None:
        """Tell the user a line of this kind, once."""
        if kind not in self._told:
            self._told.add(kind)
            try:
                self._say(line)
            except OSError:  # the terminal is closed
                log.debug("%s", line)

    # --- one run ------------------------------------------------------------------------------

    def _send(self, run: Run) -> None:
        if run.sweep is not None and self._sent_of(run.sweep).native is None:
            self._started(run.sweep)
        sent = self._sent_of(run)
        if run.begins and run.run_id not in self._begun:
            self._begun.add(run.run_id)
            if sent.status in SCORED:  # what was interrupted, or failed, goes on instead
                sent = self._sent[run.run_id] = _Sent(address=sent.address)
        points = [point for point in run.points if point[0] > sent.step]
        answers = [point for point in run.answers if point[0] > sent.answers]
        tags = {key: value for key, value in run.tags.items() if sent.tags.get(key, "") != value}
        files = [file for file in run.files if sent.files.get(file.name) != _digest(file)]
        if run.status == "running":
            changed = run.run_id not in self._open
        else:
            changed = (sent.status, sent.figures) != (run.status, dict(run.figures))
        if sent.settings and not (points or answers or tags or files or changed):
            return
        native = self._started(run)
        if not sent.settings:
            self._tracker.configure(native, run.settings)
            sent.settings = True
            self._keep(run)
        while points:
            some, values = 0, 0
            while some < len(points) and (not some or values + len(points[some][1]) <= _VALUES):
                values += len(points[some][1])
                some += 1
            self._tracker.log(native, points[:some])
            sent.step = points[some - 1][0]
            points = points[some:]
            self._keep(run)
        if answers:
            self._tracker.show(native, answers)
            sent.answers = answers[-1][0]
            self._keep(run)
        if tags:
            self._tracker.tag(native, tags)
            sent.tags |= tags
            self._keep(run)
        for file in files:
            self._tracker.attach(native, file)
            sent.files[file.name] = _digest(file)
            self._keep(run)
        if run.status != "running":  # what was sent may have opened it again
            self._open.discard(run.run_id)  # one whose end fails is gone on with first
            self._tracker.end(native, run)
            sent.status, sent.figures = run.status, dict(run.figures)
            self._keep(run)

    def _started(self, run: Run) -> str:
        """Return the tracker's id of a run, which is started or gone on with in this process."""
        sent = self._sent_of(run)
        if run.run_id in self._open and sent.native is not None:
            return sent.native
        if not sent.key:
            # Its id alone is no name for ever: --rerun trains the same trial again.
            sent.key = f"{run.run_id}-{secrets.token_hex(3)}"
            self._keep(run)
        parent = self._sent_of(run.sweep).native if run.sweep is not None else None
        native = self._tracker.start(run, sent.key, sent.native, parent)
        self._open.add(run.run_id)
        if sent.native != native or sent.status is not None:
            sent.native, sent.status = native, None
            self._keep(run)
        return native

    def _sent_of(self, run: Run) -> _Sent:
        if run.run_id not in self._sent:
            sent, address = _Sent.read(self._file(run)), self._tracker.address
            if sent.address not in ("", address):  # nothing is there yet
                sent = _Sent(key=sent.key)
            sent.address = address
            self._sent[run.run_id] = sent
        return self._sent[run.run_id]

    def _keep(self, run: Run) -> None:
        """Note what the tracker has; a note that can't be written costs a repetition, no more."""
        file = self._file(run)
        try:
            file.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(file.path, asdict(self._sent[run.run_id]))
            file.upload_file()
        except (OSError, StorageError) as error:
            log.debug("tracker %s: its note can't be written", self.name, exc_info=error)

    def _file(self, run: Run) -> StoragePath:
        return run.place / f"report_to-{self.name}.json"


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
