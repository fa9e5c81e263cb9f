"""What the API says while the engine replicas are away."""

from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError

from rayfin.errors import AdapterError, Unavailable
from rayfin.serving.engine.request import AdapterSource
from rayfin.serving.remote import RemoteEngine


@pytest.mark.parametrize(
    ("raised", "told", "words"),
    [
        (GetTimeoutError(), Unavailable, "was not read in"),
        (TimeoutError(), Unavailable, "was not read in"),
        (ActorDiedError(), Unavailable, "is gone"),
        (RayTaskError("check", "", AdapterError("damaged")), AdapterError, "damaged"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_replica_that_can_not_look_at_an_adapter_now(
    raised: Exception, told: type[Exception], words: str, tmp_path: Path
) -> None:
    class Handle:
        @property
        def check(self) -> Any:
            return self

        def remote(self, source: AdapterSource) -> Any:
            return self

        def result(self, timeout_s: float) -> None:
            raise raised

    engine: Any = object.__new__(RemoteEngine)
    engine._handle = Handle()
    with pytest.raises(told, match=words):
        engine.check(AdapterSource("red@1", tmp_path))
