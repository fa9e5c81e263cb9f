"""Rows that can't be used, and the hash of a sample's content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

HELD_OUT = "held_out"
"""The name of the evaluation split where its rows were held out of the training data."""

# Changing a salt changes every split that was ever made: histories would no longer compare.
ORDER_SALT = "rayfin/order/1"
EVAL_SALT = "rayfin/eval/1"


@dataclass(frozen=True)
class BadRow:
    """A row that can't be used, and why.

    Lines are counted from 1; in Parquet files and JSON arrays, rows are counted instead.
    """

    file: str
    line: int
    reason: str
    rows: int = 1
    """The number of rows lost with it: an open quote swallows the rows after it."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def content_hash(salt: str, content: str) -> str:
    """Return the SHA-256 of a salt and a content, as 64 hexadecimal digits."""
    return hashlib.sha256(f"{salt}\n{content}".encode()).hexdigest()
