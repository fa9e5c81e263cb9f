"""How a trial stands or ended: the statuses, their words, and which belong together."""

from __future__ import annotations

from typing import Literal

Status = Literal["running", "interrupted", "finished", "stopped", "failed", "oom"]

UNFINISHED: tuple[Status, ...] = ("running", "interrupted")
"""A trial that is being trained, and one that a resumed sweep goes on with."""
SCORED: tuple[Status, ...] = ("finished", "stopped")
"""A trial that ended with scores, at its last step or before it."""
FAILED: tuple[Status, ...] = ("failed", "oom")
"""A trial that ended with an error."""
ENDED: tuple[Status, ...] = (*SCORED, *FAILED)
STATUSES: tuple[Status, ...] = (*UNFINISHED, *ENDED)

STATUS_WORDS: dict[Status, str] = {
    "running": "running",
    "interrupted": "interrupted",
    "finished": "finished",
    "stopped": "stopped early",
    "failed": "failed",
    "oom": "out of memory",
}
"""Status -> what a sentence calls it."""

STATUS_COLOURS: dict[Status, str] = {
    "running": "cyan",
    "interrupted": "yellow",
    "finished": "green",
    "stopped": "yellow",
    "failed": "red",
    "oom": "red",
}
"""Status -> its colour in a terminal."""
