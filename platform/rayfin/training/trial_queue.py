"""What lies between a worker group and who has it train: trials go one way, reports the other."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from rayfin.errors import StorageError
from rayfin.paths import StoragePath, write_json
from rayfin.statuses import FAILED
from rayfin.training.spec import TrialResult, TrialSpec

_WRITE_SECONDS = 60.0


@dataclass(frozen=True)
class Job:
    """A trial for the group; a greater number is a later one."""

    number: int
    spec: TrialSpec
    location: StoragePath

    @property
    def held(self) -> StoragePath:
        """The file that says what the workers hold while they train it."""
        return self.location / "ray" / "held.json"


@dataclass(frozen=True)
class WorkerReport:
    """A worker's report. It waits for the answer to its `ticket`."""

    ticket: int
    result: TrialResult
    hopeless: bool = False
    """Whether the trial failed as it would fail once more."""


@dataclass(frozen=True)
class GroupEnded:
    """The group's processes have ended, whatever they were at."""

    error: str | None
    at_work: bool
    """Whether one of them had taken the trial."""
    no_room: bool = False
    """Whether they ended, or did not start, as the cluster had no room for all of them."""
    out_of_memory: bool = False


class TrialQueue:
    """An actor, so that it outlives the workers, and waits without a thread for each of them.

    Every report waits for an answer of its own, so that a worker that is killed while it waits
    takes no other's.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._job: Job | None = None
        self._taken = False
        self._open = True
        self._changed = asyncio.Condition()
        self._events: asyncio.Queue[WorkerReport | GroupEnded] = asyncio.Queue()
        self._answers: list[asyncio.Future[bool]] = []
        self._failed: set[int] = set()
        self._placement_groups: set[str] = set()

    async def begin(self, placement_group: str) -> None:
        """Note that a worker starts; `placement_group` (hex) is what the group holds."""
        self._failed.clear()  # those were another attempt's
        self._placement_groups.add(placement_group)
        await self._write_held()

    async def next_job(self, after: int) -> Job | None:
        """Wait for a trial numbered above `after`, and return it; None where no more will come."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._open or self._is_after(after))
            self._taken = self._open
            return self._job if self._open else None

    async def hand_in(self, rank: int, result: TrialResult) -> bool:
        """Hand a `result` to the caller, and return whether to go on."""
        hopeless = False
        if result.status in FAILED:
            self._failed.add(rank)
            # Where one was killed, the others fail for want of it: that is worth another attempt.
            hopeless = result.status == "oom" or len(self._failed) == self._workers
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._answers.append(answer)
        await self._events.put(WorkerReport(len(self._answers) - 1, result, hopeless))
        return await answer

    async def give(self, job: Job | None) -> None:
        """Set the trial from now on; None where there is none for the moment."""
        async with self._changed:
            self._job, self._taken = job, False
            self._failed.clear()
            await self._write_held()
            self._changed.notify_all()

    async def next_event(self) -> WorkerReport | GroupEnded:
        return await self._events.get()

    async def answer(self, ticket: int, go_on: bool) -> None:
        self._answers[ticket].set_result(go_on)

    async def ended(self, error: str | None, **how: bool) -> None:
        """Note that the group has ended; `how` are further fields of `GroupEnded`."""
        await self._events.put(GroupEnded(error, self._taken, **how))

    async def close(self) -> None:
        """Have every worker that asks from now on told that there is no more to do."""
        async with self._changed:
            self._open = False
            self._changed.notify_all()

    def _is_after(self, number: int) -> bool:
        return self._job is not None and self._job.number > number

    async def _write_held(self) -> None:
        if self._job is not None and self._placement_groups:
            held, groups = self._job.held, sorted(self._placement_groups)
            # What can't be written is told by the checkpoint that it does not take; and a disk that
            # stalls, by the worker that is watched while it reads or writes there.
            with suppress(OSError, StorageError, TimeoutError):
                async with asyncio.timeout(_WRITE_SECONDS):
                    await asyncio.to_thread(_write, held, groups)


def _write(held: StoragePath, placement_groups: list[str]) -> None:
    write_json(held.path, placement_groups)
    held.upload_file()
