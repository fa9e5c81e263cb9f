"""Trackio: a run for each trial, in the group of its sweep, in its database on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayfin.errors import ConfigError
from rayfin.trackers.base import PROJECT, Answers, Point, Run, Tracker, answers_table, register

_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


@register
class Trackio(Tracker):
    """Writes to Trackio's database under $TRACKIO_DIR, by default its own in the user's cache.

    It is written directly: `trackio.init` knows one run at a time, and prints to standard output,
    which is for results.
    """

    name = "trackio"
    package = "trackio"

    def __init__(self, storage: Path | None) -> None:
        super().__init__(storage)
        for name in _ELSEWHERE:
            if os.environ.get(name):
                raise ConfigError(
                    f"report_to=trackio writes to the database on this machine, and {name} names "
                    f"another place; unset it, and run `trackio sync --project {PROJECT}` later"
                )
        from trackio.sqlite_storage import SQLiteStorage

        self._database = SQLiteStorage
        self._runs: dict[str, Run] = {}

    @property
    def location(self) -> str:
        return f"trackio show --project {PROJECT}"

    @property
    def address(self) -> str:
        return os.environ.get("TRACKIO_DIR") or "cache"

    def start(self, run: Run, key: str, native: str | None, parent: str | None) -> str:
        native = native or key
        self._runs[native] = run
        return native

    def configure(self, native: str, settings: Mapping[str, Any]) -> None:
        run = self._runs[native]
        own = {
            "_Created": run.began.isoformat(),
            "_Group": run.sweep.run_id if run.sweep is not None else run.run_id,
            "_Username": None,
        }
        self._write(native, [(0, {})], {**settings, **own})

    def log(self, native: str, points: Sequence[Point]) -> None:
        self._write(native, points)

    def show(self, native: str, answers: Sequence[Answers]) -> None:
        self._write(native, [(step, {"answers": answers_table(some)}) for step, some in answers])

    def tag(self, native: str, tags: Mapping[str, str]) -> None:
        self._write(native, [(0, dict(tags))])

    def attach(self, native: str, file: Path) -> None:
        """Name the file: Trackio's database holds none."""
        self._write(native, [(0, {file.name: os.fspath(file)})])

    def end(self, native: str, run: Run) -> None:
        step = run.points[-1][0] if run.points else 0
        final = {f"final/{name}": value for name, value in run.figures.items()}
        self._write(native, [(step, {**final})])

    def close(self) -> None:
        """Do nothing: every call has written what it was given."""

    def _write(
        self,
        native: str,
        points: Sequence[tuple[int, Mapping[str, Any]]],
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._database.bulk_log(
            project=PROJECT,
            run=self._runs[native].run_id,
            metrics_list=[dict(values) for _, values in points],
            steps=[step for step, _ in points],
            config=None if config is None else dict(config),
            run_id=native,
        )
