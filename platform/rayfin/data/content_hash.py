"""Hash the content of samples, by which they are ordered and divided into splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

# Changing a salt changes every split that was ever made: histories would no longer compare.
ORDER_SALT = "rayfin/order/1"
EVAL_SALT = "rayfin/eval/1"


def content_hash(salt: str, content: str) -> str:
    """Return the SHA-256 of a salt and a content, as 64 hexadecimal digits."""
    return content_hashes(salt, [content])[0]


def content_hashes(salt: str, contents: Iterable[str]) -> list[str]:
    """Return the `content_hash` of each content."""
    start = f"{salt}\n".encode()
    return [hashlib.sha256(start + content.encode()).hexdigest() for content in contents]
