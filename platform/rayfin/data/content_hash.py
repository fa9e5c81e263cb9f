"""Hash the content of samples, by which they are ordered and divided into splits."""

from __future__ import annotations

import hashlib

# Changing a salt changes every split that was ever made: histories would no longer compare.
ORDER_SALT = "rayfin/order/1"
EVAL_SALT = "rayfin/eval/1"


def content_hash(salt: str, content: str) -> str:
    """Return the SHA-256 of a salt and a content, as 64 hexadecimal digits."""
    return hashlib.sha256(f"{salt}\n{content}".encode()).hexdigest()
