"""The frozen record of one trial, which refuses contradictory states."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rayfin.errors import HistoryError
from rayfin.metrics import score_names
from rayfin.objectives import main_metric, stage_of
from rayfin.redaction import redact
from rayfin.statuses import FAILED, Status

SERVING = "serving_"
"""The prefix of metrics that are measured while the trial's adapter is served."""

_ID = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$"


def now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


class TrialRecord(BaseModel):
    """One row of the history.

    Raises HistoryError where status, metrics and error contradict each other, and for NaN, infinity
    or anything else that JSON can't hold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    trial_id: str = Field(pattern=_ID)
    """The trial's id, unique in a history."""
    sweep_id: str = Field(pattern=_ID)
    """The sweep, or import, that the trial belongs to."""
    fingerprint: str = Field(min_length=1)
    """A hash of what the trial computes, independent of where it runs."""
    status: Status
    """`running`, `interrupted` (a resumed sweep continues it), or how the trial ended."""
    created_at: AwareDatetime
    """When the trial started, UTC."""
    updated_at: AwareDatetime
    """When the record last changed, UTC."""
    spec: dict[str, Any] = {}
    """The resolved `model`, `data`, `method` and `train` sections."""
    scenario: dict[str, Any] = {}
    """Facts under `model`, `data`, `hardware`; `source` is the format of an imported trial."""
    metrics: dict[str, Any] = {}
    """eval_loss, exact_match, train_seconds, peak_memory_bytes, trainable_parameters, ..."""
    curve: list[dict[str, Any]] = []
    """The measurements during the training: `{step, loss, eval_loss, ...}`."""
    error: str | None = None
    """Why the trial failed, or why it was stopped."""
    versions: dict[str, str] = {}
    """The versions of packages, by their names."""
    directory: str | None = None
    """The directory of the trial's adapter and checkpoints."""

    @property
    def notes(self) -> list[str]:
        """The notes on how the data was read, one line each; older rows have none."""
        data = self.scenario.get("data")
        notes = data.get("notes") if isinstance(data, Mapping) else None
        return [str(note) for note in notes] if isinstance(notes, (list, tuple)) else []

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Parse a record from a mapping; raises HistoryError where it is malformed."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
                for problem in error.errors()
            )
            raise HistoryError(
                f"trial '{values.get('trial_id')}' is not a trial record: {problems}"
            ) from None

    def updated(self, **changes: Any) -> Self:
        """Return a validated copy with changes and a new `updated_at`."""
        return self.parse({**self.model_dump(), "updated_at": now(), **changes})

    @property
    def trained_metrics(self) -> dict[str, Any]:
        """The metrics that the trial itself measured, without those of serving."""
        return {key: value for key, value in self.metrics.items() if not key.startswith(SERVING)}

    @field_validator("created_at", "updated_at")
    @classmethod
    def _utc(cls, value: datetime) -> datetime:
        return value.astimezone(UTC)

    @field_validator("spec", "scenario", "metrics", "curve", "versions")
    @classmethod
    def _json(cls, value: Any, info: ValidationInfo) -> Any:
        return _plain(value, f"trial '{info.data.get('trial_id')}': {info.field_name}")

    @field_validator("error")
    @classmethod
    def _without_secrets(cls, value: str | None) -> str | None:
        return None if value is None else redact(value)

    @field_validator("error", "directory")
    @classmethod
    def _storable(cls, value: str | None) -> str | None:
        # PostgreSQL refuses NUL in text, and a crash may put anything into a message.
        return None if value is None else _text(value).replace("\x00", "\N{REPLACEMENT CHARACTER}")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        who = f"trial '{self.trial_id}'"
        if self.status in FAILED and not self.error:
            raise HistoryError(
                f"{who}: status is '{self.status}' without an error; say what went wrong"
            )
        if self.status in ("running", "finished") and self.error is not None:
            raise HistoryError(
                f"{who}: status is '{self.status}' with error {self.error[:80]!r}; "
                "set status to failed, oom or stopped, or leave the error out"
            )
        if self.status == "finished":
            foreign = self.scenario.get("source")
            allowed = score_names() if foreign else (main_metric(stage_of(self.spec)),)
            if not any(_is_number(self.metrics.get(name)) for name in allowed):
                raise HistoryError(
                    f"{who}: status is 'finished' without a number for {' or '.join(allowed)}; "
                    "record the metric, or set status to failed"
                )
        return self


def _plain(value: Any, where: str) -> Any:
    """Return a value as plain JSON; raises HistoryError, which says where it is not."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise HistoryError(
                f"{where} is {value}; only finite numbers are kept: "
                "leave it out, and set status to failed where the trial diverged"
            )
        return float(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise HistoryError(f"{where} has the key {key!r}; JSON takes text keys only")
        return {_text(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise HistoryError(
        f"{where} is a {type(value).__name__}, which JSON can't hold; "
        "give text, numbers, booleans, None, lists or mappings"
    )


def _text(value: str) -> str:
    """Replace undecodable bytes of a path or message, which no database takes, by `?`."""
    return value.encode("utf-8", errors="replace").decode("utf-8")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def finite(value: Any) -> float | None:
    """Return a finite number as a float, or None for anything else."""
    if not _is_number(value):
        return None
    try:
        found = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return found if math.isfinite(found) else None
