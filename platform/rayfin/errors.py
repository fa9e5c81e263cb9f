"""The errors that rayfin raises on purpose, in one hierarchy that can be pickled.

Each takes one finished sentence that names the value, what is allowed and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from rayfin.redaction import redact


class RayfinError(Exception):
    """The base of all errors that rayfin raises on purpose; its message is redacted."""

    def __init__(self, message: str = "", *more: object) -> None:
        super().__init__(redact(message), *more)


class UsageError(RayfinError):
    """An error that the user can fix: the command ends with one line and exit code 2."""


class ConfigError(UsageError):
    """A configuration key, value or combination that can't be used."""


class DataError(UsageError):
    """Training data that can't be read or used."""


class ModelError(UsageError):
    """A base model or tokenizer that can't be found or loaded."""


class MethodError(UsageError):
    """A fine-tuning method that can't be combined with the rest of the configuration."""


class StorageError(UsageError):
    """A file or directory that can't be read or written."""


class HistoryError(UsageError):
    """A trial history that can't be opened, read or written."""


class AdapterError(UsageError):
    """An adapter, version or alias that is missing, malformed or not allowed."""


class DependencyError(UsageError):
    """An installed package that lacks something which rayfin needs of it."""


class RequestError(UsageError):
    """A request to the served model that can't be answered as it stands (HTTP 400)."""


class ContextLengthError(RequestError):
    """A prompt that leaves no room for an answer within `engine.max_length` (HTTP 400)."""


class AdapterNotFound(AdapterError):
    """A request for an adapter, version or alias that isn't there (HTTP 404)."""


class HardwareError(UsageError):
    """A device or cluster that was requested and does not exist."""


class NothingFits(RayfinError):
    """No configuration fits the available hardware, so that none is recommended (exit code 1)."""


class TrialError(RayfinError):
    """A trial that failed; `status` is that of its row in the history."""

    status = "failed"


class TrialDiverged(TrialError):
    """The loss became NaN or infinite."""


HANG_REMEDY = "look at the disk or network that it waits for, or raise scaling.hang_timeout_minutes"
"""The remedy for a trial that hangs."""


class TrialHung(TrialError):
    """The trial made no progress for scaling.hang_timeout_minutes."""

    @classmethod
    def while_at(cls, where: str, minutes: float) -> TrialHung:
        """Return the error for a hanging trial; `where` is its work and its position in code."""
        return cls(f"no progress for {minutes:g} minutes in {where}; {HANG_REMEDY}")

    @classmethod
    def ended_at(cls, where: str) -> TrialHung:
        """Return the error for a process ended from outside; `where` is its position in code."""
        return cls(f"no progress, and its process hung in {where}; {HANG_REMEDY}")


class TrialOutOfMemory(TrialError):
    """The device or host ran out of memory."""

    status = "oom"


class EngineFailed(RayfinError):
    """A request that the engine failed to answer, through no fault of the request (HTTP 500)."""


class Unavailable(RayfinError):
    """What a request needs is not available now, but may be soon (HTTP 503)."""


class Overloaded(RayfinError):
    """The engine's queue is full (HTTP 429); clients may retry after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message, retry_after)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return str(self.args[0])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the nearest known name, or the empty string."""
    candidates = sorted(known)
    # `method.rank` should find `method.r`, and `rank` should find nothing silly: compare whole
    # names first, then the last dotted part.
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if not near:
        tails = {candidate.rpartition(".")[2]: candidate for candidate in candidates}
        tail = name.rpartition(".")[2]
        near = [tails[t] for t in difflib.get_close_matches(tail, tails, n=1, cutoff=0.6)]
    return f" (did you mean '{near[0]}'?)" if near else ""


def listed(names: Sequence[str]) -> str:
    """Return one or more names as a sentence lists them: `a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
