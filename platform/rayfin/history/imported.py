"""Make records of trials that other programs ran: names, identity, time."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rayfin.history.record import TrialRecord
from rayfin.methods import METHODS
from rayfin.statuses import Status


def method_name(name: str) -> str:
    """Return rayfin's name of a method (`P-Tuning` is `p_tuning`), or an unknown name as it is."""
    plain = re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_")
    return next((own for own, it in METHODS.items() if plain in it.aliases), plain)


def ran_out_of_memory(message: str) -> bool:
    """Whether an error message says that memory ran out."""
    return "out of memory" in message.lower() or "outofmemory" in message.lower()


def parse_time(text: str) -> datetime:
    """Parse an ISO 8601 time, which is UTC if it has no zone; raises ValueError."""
    time = datetime.fromisoformat(text)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time


def imported_record(
    source: str,
    content: Any,
    *,
    sweep_id: str,
    status: Status,
    created_at: datetime,
    spec: Mapping[str, Any],
    scenario: Mapping[str, Any],
    **fields: Any,
) -> TrialRecord:
    """Return the record of a trial that another program ran.

    `content` is what the file says of the trial. Its digest is the trial's id, so that the same
    result is the same trial, however often and from whatever file it is imported.
    """
    return TrialRecord(
        trial_id=f"{source}-{_digest(content)}",
        sweep_id=re.sub(r"[^A-Za-z0-9._:-]+", "-", sweep_id).lstrip("._:-")[:128] or source,
        # Not comparable with rayfin's own: the data's content and the defaults are not known.
        fingerprint=f"imported-{_digest(spec)}",
        status=status,
        created_at=created_at,
        updated_at=created_at,
        spec=dict(spec),
        scenario={"source": source, **scenario},
        **fields,
    )


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
