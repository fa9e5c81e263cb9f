"""A sweep whose trials no living node can hold any more: Tune would wait for one for ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rayfin.errors import HardwareError
from rayfin.tuning.cluster import Resources, fits, nodes

_EVERY = 10.0
_PATIENCE = 1200.0
"""A cloud may take so many seconds to bring another machine."""


class LostNodeWatch:
    """A watch that tells of a wait for nodes and ends a long one; Tune's loop asks it each turn."""

    def __init__(
        self,
        need: Resources,
        say: Callable[[str], None],
        *,
        processes: int = 1,
        living: Callable[[], Sequence[Resources]] = nodes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watches for nodes that have room for `processes`, each of which holds `need`."""
        self._processes = processes
        self._need = {name: amount for name, amount in need.items() if amount > 0}
        self._say, self._living, self._clock = say, living, clock
        self._asked = clock()
        self._since: float | None = None

    def look(self, *, running: bool = False) -> None:
        """Looks for room where no trial is `running`; raises HardwareError after too long."""
        now = self._clock()
        if now - self._asked < _EVERY:
            return
        self._asked = now
        # A trial of several processes counts as running also while its group waits for room.
        running = running and self._processes == 1
        if running or fits(self._living(), self._need) >= self._processes:
            self._since = None
            return
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in self._need.items())
        times = f"{self._processes} times " if self._processes > 1 else ""
        lost = f"the cluster has lost the nodes that can hold a trial ({times}{wanted} on one node)"
        if self._since is None:
            self._since = now
            self._say(f"{lost}; waiting {_PATIENCE / 60:.0f} minutes for another")
        elif now - self._since >= _PATIENCE:
            raise HardwareError(
                f"{lost}, and none came in {_PATIENCE / 60:.0f} minutes; finished trials are kept: "
                "start a node and go on with --resume"
            )
