"""Authentication: API keys with their limits, and the admin's token."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections import Counter
from collections.abc import Callable

from fastapi import Request
from fastapi.security.utils import get_authorization_scheme_param

from rayfin.adapters import AdapterRef
from rayfin.config.serving import ApiConfig, ApiKey
from rayfin.serving.api.errors import ApiError

_MINUTE = 60.0


class _TokenBucket:
    """A token bucket: `per_minute` requests at once, and as many again over a minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._left, self._at = float(per_minute), clock()

    def take(self) -> float:
        """Take one request, and return 0; else the seconds until one may go on, and take none."""
        now = self._clock()
        gained = (now - self._at) * self._per_minute / _MINUTE
        self._left, self._at = min(self._per_minute, self._left + gained), now
        if self._left >= 1:
            self._left -= 1
            return 0.0
        return (1 - self._left) * _MINUTE / self._per_minute


class ApiKeys:
    """The configured keys. They are used by the event loop only; limits count in this process
    alone.
    """

    def __init__(self, config: ApiConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._entries = [(_digest(entry.key), entry) for entry in config.api_keys]
        self._allowances = {
            entry.key: _TokenBucket(entry.requests_per_minute, clock)
            for entry in config.api_keys
            if entry.requests_per_minute is not None
        }
        self._at_work: Counter[str] = Counter()
        self._admin = None if config.admin_token is None else _digest(config.admin_token)

    @property
    def needed(self) -> bool:
        return bool(self._entries)

    def admit(self, request: Request) -> ApiKey | None:
        """Return the request's key, None where none is needed; raises ApiError 401 or 429.

        A key has to be released when its request ends.
        """
        if not self._entries:
            return None
        if (found := self._find(request)) is None:
            raise ApiError(
                401,
                "this server needs an API key; send one as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        most = found.max_concurrent_requests
        if most is not None and self._at_work[found.key] >= most:
            raise ApiError(
                429,
                f"this key may have {most} requests at a time; try again when one has ended",
                code="rate_limit_exceeded",
                headers={"retry-after": "1"},
            )
        if found.key in self._allowances and (seconds := self._allowances[found.key].take()):
            raise ApiError(
                429,
                f"this key may send {found.requests_per_minute} requests a minute; "
                f"try again in {math.ceil(seconds)} s",
                code="rate_limit_exceeded",
                headers={"retry-after": str(math.ceil(seconds))},
            )
        self._at_work[found.key] += 1
        return found

    def release(self, key: ApiKey | None) -> None:
        """Ends a request that was admitted; None was not."""
        if key is not None:
            self._at_work[key.key] -= 1

    def admit_admin(self, request: Request) -> None:
        """Raises ApiError 401 or 403 unless the request has the admin's token."""
        given = _bearer(request)
        if not given:
            raise ApiError(
                401,
                "this call needs the admin token; send it as Authorization: Bearer TOKEN",
                headers={"www-authenticate": "Bearer"},
            )
        if self._admin is None or not hmac.compare_digest(_digest(given), self._admin):
            raise ApiError(403, "this is not the admin token")

    def may_see_all(self, request: Request) -> bool:
        """Return whether the request may see the names of all adapters; it counts for no limit.

        It has the admin's token, or a key for all adapters, or no key is needed at all.
        """
        if not self._entries:
            return True
        if self._admin is not None and hmac.compare_digest(_digest(_bearer(request)), self._admin):
            return True
        found = self._find(request)
        return found is not None and found.adapters is None

    def _find(self, request: Request) -> ApiKey | None:
        given = _digest(_bearer(request))
        found: ApiKey | None = None
        for digest, entry in self._entries:
            # Every key is compared, so that the time tells nothing of which one was near.
            if hmac.compare_digest(digest, given):
                found = entry
        return found


def may_use(key: ApiKey | None, name: str) -> bool:
    """Return whether `key` may ask for an adapter by its bare name, or for the base by its own."""
    return key is None or key.adapters is None or name in key.adapters


def check_use(key: ApiKey | None, ref: AdapterRef | None, base_name: str) -> None:
    """Raises ApiError 403, whether or not there is such an adapter."""
    name = base_name if ref is None else ref.name
    if not may_use(key, name):
        raise ApiError(
            403,
            f"this API key may not use '{name}'",
            param="model",
            code="model_not_allowed",
        )


def _bearer(request: Request) -> str:
    scheme, value = get_authorization_scheme_param(request.headers.get("authorization"))
    return value if scheme.lower() == "bearer" else ""


def _digest(secret: str) -> bytes:
    """Return a digest of fixed length: comparing digests doesn't tell how long a key is."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
