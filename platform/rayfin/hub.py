"""Ask the Hugging Face hub with a short time limit, and remember for a while that it is silent."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rayfin.compat.huggingface_hub import cache_only

SECONDS = 5.0
"""The time in which the hub must answer a question, the look-up of its address included."""
_REMEMBERED = 60.0
"""The seconds for which a hub that did not answer isn't asked again."""

REMEDY = (
    "give a local directory, set HF_ENDPOINT to a mirror that this machine reaches, or put it "
    "into the hub's cache (HF_HOME) where there is a network"
)
"""The remedy where the hub can't be reached."""

_silent_until = 0.0
_failure: Exception | None = None


class HubUnreachable(OSError):
    """Nothing answered at the hub's address."""


def ask(question: Callable[[], object]) -> Exception | None:
    """Call `question`, and return the error that it raised, or None where the hub answered.

    The hub's client has no time limit for looking up the address, and one for each address behind
    it; here the whole question takes at most `SECONDS`. Where the hub does not answer, the error is
    a HubUnreachable, and the hub is not asked again for a minute.
    """
    global _silent_until, _failure  # noqa: PLW0603 -- of the machine's network, one for a process
    if _failure is not None and time.monotonic() < _silent_until:
        return _failure
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    raised: list[Exception | None] = []

    def run() -> None:
        try:
            question()
            raised.append(None)
        # The hub client lets errors of its HTTP library through, and which one that is may change.
        except Exception as error:  # noqa: BLE001
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    failure = raised[0] if raised else TimeoutError(f"no answer in {SECONDS:g} s")
    if failure is None or isinstance(
        failure, (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled)
    ):
        return failure
    reason = " ".join(str(failure).split()) or type(failure).__name__
    _failure = HubUnreachable(f"{_endpoint()} can't be reached ({reason:.120})")
    _silent_until = time.monotonic() + _REMEMBERED
    return _failure


@contextmanager
def dataset_access(name: str) -> Iterator[None]:
    """Let `datasets` ask the hub in the block if it answers, or else read what was downloaded.

    An error in the block becomes a HubUnreachable where the hub did not answer.
    """
    from huggingface_hub import HfApi

    failure = ask(lambda: HfApi().dataset_info(name, timeout=SECONDS))
    if not isinstance(failure, HubUnreachable):
        with _without_retry_messages():
            yield
        return
    with cache_only():
        try:
            yield
        except Exception as error:
            raise failure from error


@contextmanager
def _without_retry_messages() -> Iterator[None]:
    """Silence the hub's client, which logs each of its retries although an error ends them."""
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)
    try:
        yield
    finally:
        client.setLevel(level)


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)
