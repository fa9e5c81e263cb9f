"""Write what serving measures of each adapter to the trial that made it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rayfin.history import SERVING

if TYPE_CHECKING:
    from rayfin.history import History
    from rayfin.serving.api.protocol import ServedEngine
    from rayfin.serving.api.request_log import RequestRecord

log = logging.getLogger(__name__)

PERIOD = 10.0
"""Seconds between looks at what is to be written."""
_CLOSING_SECONDS = 10.0

REQUESTS = f"{SERVING}requests"
"""Requests that were answered whole."""
FIRST_TOKEN = f"{SERVING}time_to_first_token_seconds"
"""Mean over the requests, from a request's arrival to its first token."""
TOKENS = f"{SERVING}tokens"
"""Tokens after each answer's first; the next two are about them."""
TOKENS_PER_SECOND = f"{SERVING}tokens_per_second"
"""Of one request: its later tokens by the seconds that they took."""
ADAPTER_BYTES = f"{SERVING}adapter_bytes"
"""What the adapter's tensors take in the engine."""


@dataclass
class ServingTotals:
    """Sums of what was measured of one trial's adapter and is not written yet."""

    requests: int = 0
    first_seconds: float = 0.0
    tokens: int = 0
    token_seconds: float = 0.0
    nbytes: int | None = None

    def add(self, record: RequestRecord) -> None:
        self.requests += 1
        self.first_seconds += record.seconds_to_first_token or 0.0
        self.tokens += record.later_tokens
        self.token_seconds += record.seconds_of_later_tokens

    def merged(self, other: ServingTotals) -> ServingTotals:
        return ServingTotals(
            self.requests + other.requests,
            self.first_seconds + other.first_seconds,
            self.tokens + other.tokens,
            self.token_seconds + other.token_seconds,
            self.nbytes if other.nbytes is None else other.nbytes,
        )

    @classmethod
    def of(cls, metrics: Mapping[str, Any]) -> ServingTotals:
        """Read what `as_metrics` wrote; nothing is counted where that can't be read."""
        try:
            requests, tokens = int(metrics[REQUESTS]), int(metrics.get(TOKENS, 0))
            seconds = tokens / float(metrics[TOKENS_PER_SECOND]) if tokens else 0.0
            first = float(metrics[FIRST_TOKEN]) * requests
            nbytes = metrics.get(ADAPTER_BYTES)
            return cls(requests, first, tokens, seconds, None if nbytes is None else int(nbytes))
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return cls()

    def as_metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = {
            REQUESTS: self.requests,
            FIRST_TOKEN: self.first_seconds / self.requests,
        }
        if self.tokens and self.token_seconds > 0:
            metrics[TOKENS] = self.tokens
            metrics[TOKENS_PER_SECOND] = self.tokens / self.token_seconds
        if self.nbytes is not None:
            metrics[ADAPTER_BYTES] = self.nbytes
        return metrics


class HistoryMetrics:
    """Adds up what is measured, and writes it to the history every so often, on its own thread.

    Several processes may do so for the same trial: each adds its own. While the history can't be
    written, nothing is lost and serving goes on.
    """

    def __init__(self, history_url: str, engine: ServedEngine, period: float = PERIOD) -> None:
        self._url, self._engine, self._period = history_url, engine, period
        self._sums: dict[tuple[str, str], ServingTotals] = {}
        """(trial id, adapter version) -> what is to be written."""
        self._lock = threading.Lock()
        self._history: History | None = None
        self._complained = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="history-metrics", daemon=True)
        self._thread.start()

    def count(self, record: RequestRecord) -> None:
        """Takes down a request that has ended; those of adapters without a trial don't count."""
        if record.trial_id is None or record.answered_by is None or record.status != 200:
            return
        if record.seconds_to_first_token is None:
            return
        with self._lock:
            key = (record.trial_id, record.answered_by)
            sums = self._sums.setdefault(key, ServingTotals())
            sums.add(record)
            if sums.nbytes is None:  # at the end, when all is written, the engine may be gone
                sums.nbytes = self._engine.resident().get(record.answered_by)

    def close(self) -> None:
        """Writes what is left; gives up after a while where the history hangs."""
        self._stop.set()
        self._thread.join(_CLOSING_SECONDS)
        if self._thread.is_alive():
            log.warning("the last serving figures can't be written: the history does not answer")
            return
        if self._history is not None:
            self._history.close()

    def write(self) -> None:
        """Writes what has come since the last time, or keeps it for the next."""
        with self._lock:
            taken, self._sums = self._sums, {}
        failure: Exception | None = None
        for key, sums in taken.items():
            try:
                self._write_one(*key, sums)
            except Exception as error:  # noqa: BLE001  # this trial's, perhaps; others have theirs
                failure = error
                with self._lock:
                    self._sums[key] = sums.merged(self._sums.get(key, ServingTotals()))
        if failure is not None and not self._complained:
            log.warning("serving figures can't be written now, and are kept: %s", failure)
        self._complained = failure is not None

    def _write_one(self, trial_id: str, ref: str, sums: ServingTotals) -> None:
        sums.nbytes = self._engine.resident().get(ref, sums.nbytes)
        if self._history is None:
            self._history = self._open()
        if not self._history.update_metrics(trial_id, partial(_added, sums)):
            log.info("trial %s is not in the history: %s is not recorded", trial_id, ref)

    def _open(self) -> History:
        from rayfin.history import History

        return History.open(self._url, create=False)

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            self.write()
        self.write()


def _added(sums: ServingTotals, metrics: Mapping[str, Any]) -> dict[str, float]:
    return ServingTotals.of(metrics).merged(sums).as_metrics()
