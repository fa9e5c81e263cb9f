"""Values that the processes of one deployment share through Ray's key-value store.

The store is with the head: it outlives every replica and proxy, and all nodes see the same.
"""

from __future__ import annotations

import json
from typing import Any

from ray.experimental import internal_kv

_NAMESPACE = "rayfin_serve"


def put(key: str, value: Any, *, overwrite: bool = True) -> bool:
    """Writes a JSON value, and returns whether the key was there already.

    Raises what Ray does where the head is away.
    """
    data = json.dumps(value).encode()
    return bool(internal_kv._internal_kv_put(key, data, overwrite, namespace=_NAMESPACE))


def get(key: str) -> Any:
    """Returns the value of a key; None where there is none."""
    data = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
    return None if data is None else json.loads(data)


def keys(prefix: str) -> list[str]:
    """Returns all keys that begin with `prefix`, sorted."""
    found = internal_kv._internal_kv_list(prefix, namespace=_NAMESPACE)
    return sorted(key.decode() for key in found)


def clear() -> None:
    """Forgets what an earlier deployment on this cluster has left."""
    for key in keys(""):
        internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
