"""Ray's messages to its driver, such as of a process that died, as lines of the log."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rayfin.compat.ray import messages_to
from rayfin.redaction import printable

log = logging.getLogger(__name__)

_LONGEST = 600
# Of a paragraph with the numbers of tasks and nodes, and causes that it may have had.
_DEATH = re.compile(r"Worker PID: (\d+) .*Worker exit detail: (.+?)(?: Some common causes|$)")


@contextmanager
def logged_errors() -> Iterator[None]:
    """Has Ray's errors logged, a line each, during the block; a Ray that starts in it ends in it.

    Ray itself prints them on standard output, which is for results, in colour and over several
    lines. `log_to_driver=False` turns off what workers print, and no setting turns off this.
    """
    with messages_to(_log):
        yield


def _log(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """Takes the place of Ray's function of that signature; `lines` of `data` are the messages."""
    for message in data["lines"]:
        text = " ".join(message.split())
        if (death := _DEATH.search(text)) is not None:
            text = f"process {death[1]} died: {death[2]}"
        log.warning("Ray: %s", printable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"))
