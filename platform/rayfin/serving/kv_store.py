"""Values that the processes of one deployment share through Ray's key-value store.

The store is with the head: it outlives every replica and proxy, and all nodes see the same.
"""

from __future__ import annotations

import json
from typing import Any

from rayfin.compat.ray import delete_key, get_value, list_keys, put_value

_NAMESPACE = "rayfin_serve"


def put(key: str, value: Any, *, overwrite: bool = True) -> bool:
    """Writes a JSON value, and returns whether the key was there already.

    Raises what Ray does where the head is away.
    """
    return put_value(key, json.dumps(value).encode(), _NAMESPACE, overwrite=overwrite)


def get(key: str) -> Any:
    """Returns the value of a key; None where there is none."""
    data = get_value(key, _NAMESPACE)
    return None if data is None else json.loads(data)


def keys(prefix: str) -> list[str]:
    """Returns all keys that begin with `prefix`, sorted."""
    return list_keys(prefix, _NAMESPACE)


def clear() -> None:
    """Forgets what an earlier deployment on this cluster has left."""
    for key in keys(""):
        delete_key(key, _NAMESPACE)
