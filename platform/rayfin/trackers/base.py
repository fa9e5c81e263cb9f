"""What a tracker of experiments is to rayfin, and the registry of those that there are.

A tracker is a class in one module beside this one. `register` puts it into TRACKERS, where the
configuration (`report_to`) and the driver find it. Nothing here loads a tracker's own package.
"""

from __future__ import annotations

import importlib.util
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from rayfin.errors import DependencyError
from rayfin.paths import StoragePath
from rayfin.redaction import redact
from rayfin.statuses import Status

PROJECT = "rayfin"
"""The project or experiment in which runs stand, unless the tracker's own variable names one."""

_LONGEST_ERROR = 200
"""Characters of an error of a tracker's package that are shown."""

Point = tuple[int, dict[str, float]]
"""A step, and what was measured at it by name."""
Answers = tuple[int, Sequence[Mapping[str, Any]]]
"""A step, and what the model answered then to held-out questions (`TrialResult.curve`)."""


@dataclass(frozen=True)
class Run:
    """A trial as it is to stand in a tracker, or a sweep, which is a run with trials in it.

    It has all that is known so far: a tracker that was away for a while needs the newest alone.
    """

    run_id: str
    """The id of the trial or the sweep."""
    title: str
    """What tells it from other runs at a glance: the swept settings of a trial."""
    place: StoragePath
    """Its directory in the storage, where rayfin notes what each tracker has of it."""
    status: Status
    began: datetime
    changed: datetime
    sweep: Run | None = None
    """The sweep that a trial belongs to; None for a sweep, and for a trial alone."""
    is_sweep: bool = False
    begins: bool = False
    """Whether this process saw it begin: a trial that is trained anew (--rerun) is another run."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration by dotted names, without secrets."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Facts about it; an empty one is sent only in the place of another."""
    points: Sequence[Point] = ()
    """What was measured, one point a step, in ascending order."""
    answers: Sequence[Answers] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    """The metrics that it came to, by the names that the history has."""
    files: Sequence[Path] = ()
    """What is kept with it: the report of a sweep."""


class Tracker(ABC):
    """A client of one tracker, used by one thread.

    Each method raises whatever its package raises where the tracker does not answer; the call is
    made again later. `native` is the tracker's own id of a run, which `start` returned.
    """

    name: ClassVar[str]
    """Its name in `report_to`, and that of the extra that installs it."""
    package: ClassVar[str]
    """The package that it imports."""

    def __init__(self, storage: Path | None) -> None:
        """Take the directory under which what is kept on this machine lies.

        It is None where the storage is a bucket. Raises UsageErrors for what can't be used.
        """
        self.storage = storage

    @property
    @abstractmethod
    def location(self) -> str:
        """Where the runs are to be found, for people; it may hold secrets."""

    @property
    def address(self) -> str:
        """What tells where the runs go from elsewhere, without secrets; it is noted with them."""
        return ""

    @abstractmethod
    def start(self, run: Run, key: str, native: str | None, parent: str | None) -> str:
        """Start a run, or go on with `native`, and return its id.

        `key` is the same for every try to start this run, and no other run has it; `parent` is the
        id of its sweep's run.
        """

    @abstractmethod
    def configure(self, native: str, settings: Mapping[str, Any]) -> None:
        """Record the settings of a run; called once a run."""

    @abstractmethod
    def log(self, native: str, points: Sequence[Point]) -> None:
        """Record measurements, whose steps are above those of all earlier calls for the run."""

    @abstractmethod
    def show(self, native: str, answers: Sequence[Answers]) -> None:
        """Record what the model answered."""

    @abstractmethod
    def tag(self, native: str, tags: Mapping[str, str]) -> None:
        """Record facts about a run that may change."""

    @abstractmethod
    def attach(self, native: str, file: Path) -> None:
        """Keep a file with a run, in the place of one of the same name."""

    @abstractmethod
    def end(self, native: str, run: Run) -> None:
        """Record how a run ended, and what it came to."""

    @abstractmethod
    def close(self) -> None:
        """Send what is still held back; called last."""


T = TypeVar("T", bound=type[Tracker])

TRACKERS: dict[str, type[Tracker]] = {}
"""Every tracker by its name in `report_to`."""


def register(tracker: T) -> T:
    """Add a tracker to TRACKERS; raises TypeError for a name that another one has."""
    if tracker.name in TRACKERS:
        raise TypeError(f"tracker {tracker.name} is registered; give this one a name of its own")
    TRACKERS[tracker.name] = tracker
    return tracker


def check_installed(names: Iterable[str]) -> None:
    """Raise DependencyError, with the command that installs it, for a tracker without package."""
    for name in names:
        package = TRACKERS[name].package
        if importlib.util.find_spec(package) is None:
            raise DependencyError(
                f"report_to={name} needs the package {package}, which isn't installed; run: "
                f"pip install 'rayfin[{name}]'"
            )


def one_line(error: Exception) -> str:
    """Return an error of a tracker's package as one short line, without secrets."""
    whole = " ".join(redact(str(error)).split())
    text = textwrap.shorten(whole, _LONGEST_ERROR, placeholder=" …")
    if len(text) < min(len(whole), _LONGEST_ERROR // 2):  # a word of it is too long
        text = f"{whole[: _LONGEST_ERROR - 1]}…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def answers_table(answers: Sequence[Mapping[str, Any]]) -> str:
    """Return answers to held-out questions as a table in Markdown."""

    def cell(value: Any) -> str:
        return " ".join(str(value).replace("|", "\\|").split())

    lines = ["| prompt | answer | ended | reference |", "| --- | --- | --- | --- |"]
    for one in answers:
        ended = "yes" if one["ended"] else "no"
        cells = (cell(one["prompt"]), cell(one["answer"]), ended, cell(one["reference"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
