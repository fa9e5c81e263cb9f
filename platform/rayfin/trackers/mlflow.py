"""MLflow: a run for each trial, nested in its sweep's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rayfin.errors import ConfigError
from rayfin.redaction import redact_url
from rayfin.statuses import Status
from rayfin.trackers.base import (
    PROJECT,
    Answers,
    Point,
    Run,
    Tracker,
    answers_table,
    one_line,
    register,
)

_KEY = "rayfin.key"
_ALLOWED = (
    "name MLflow's server by MLFLOW_TRACKING_URI=http://HOST:PORT, or a file of its own by "
    "MLFLOW_TRACKING_URI=sqlite:///mlflow.db"
)
_STATUSES: dict[Status, str] = {
    "running": "RUNNING",
    "interrupted": "KILLED",
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "failed": "FAILED",
    "oom": "FAILED",
}
_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""MLflow's own are two minutes and seven tries, for each of which rayfin's next try would wait."""
_LONGEST_VALUE = 500
"""Characters of a parameter, which older servers take at most."""
_BATCH = 100
"""Parameters in a request, which servers take at most."""


@register
class MLflow(Tracker):
    """Writes to $MLFLOW_TRACKING_URI, into the experiment $MLFLOW_EXPERIMENT_NAME or `rayfin`."""

    name = "mlflow"
    package = "mlflow"

    def __init__(self, storage: Path | None) -> None:
        super().__init__(storage)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise ConfigError(f"report_to=mlflow: {_ALLOWED}")
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        try:
            self._uri, self._client = uri, MlflowClient(tracking_uri=uri)
        except Exception as error:  # its own, and those of each database's package
            raise ConfigError(
                f"report_to=mlflow: MLFLOW_TRACKING_URI={redact_url(uri)} can't be used "
                f"({one_line(error)}); {_ALLOWED}"
            ) from error
        self._experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        self._experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID")
        self._address = f"{redact_url(uri)} {self._experiment_id or self._experiment}"

    @property
    def location(self) -> str:
        return f"{self._uri}, experiment {self._experiment_id or self._experiment}"

    @property
    def address(self) -> str:
        return self._address

    def start(self, run: Run, key: str, native: str | None, parent: str | None) -> str:
        if native is None:
            experiment = self._experiment_of_runs()
            # An answer that was lost on the way may have left the run there.
            query = f"tags.`{_KEY}` = '{key}'"
            found = self._client.search_runs([experiment], filter_string=query, max_results=1)
            if found:
                native = str(found[0].info.run_id)
            else:
                tags = {_KEY: key, **({"mlflow.parentRunId": parent} if parent else {})}
                created = self._client.create_run(
                    experiment,
                    start_time=_milliseconds(run.began),
                    tags=tags,
                    run_name=run.title,
                )
                native = str(created.info.run_id)
        else:
            self._client.update_run(native, status=_STATUSES["running"])
        return native

    def configure(self, native: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, str("null" if it is None else it)) for key, it in settings.items()]
        cut = [Param(one.key, one.value[:_LONGEST_VALUE]) for one in params]
        for start in range(0, len(cut), _BATCH):
            self._client.log_batch(native, params=cut[start : start + _BATCH])

    def log(self, native: str, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        at = _milliseconds(datetime.now(UTC))
        metrics = [
            Metric(name, value, at, step)
            for step, values in points
            for name, value in values.items()
        ]
        self._client.log_batch(native, metrics=metrics)

    def show(self, native: str, answers: Sequence[Answers]) -> None:
        for step, some in answers:
            self._client.log_text(native, answers_table(some), f"answers/step-{step:06}.md")

    def tag(self, native: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(native, tags=[RunTag(key, value) for key, value in tags.items()])

    def attach(self, native: str, file: Path) -> None:
        self._client.log_artifact(native, os.fspath(file))

    def end(self, native: str, run: Run) -> None:
        if run.figures:
            self.log(native, [(run.points[-1][0] if run.points else 0, dict(run.figures))])
        self._client.set_terminated(native, _STATUSES[run.status], _milliseconds(run.changed))

    def close(self) -> None:
        """Do nothing: every call has sent what it was given."""

    def _experiment_of_runs(self) -> str:
        if self._experiment_id is None:
            found = self._client.get_experiment_by_name(self._experiment)
            self._experiment_id = (
                str(found.experiment_id)
                if found is not None
                else str(self._client.create_experiment(self._experiment))
            )
        return self._experiment_id


def _milliseconds(at: datetime) -> int:
    return int(at.timestamp() * 1000)
