"""A map's jobs under way: how many more may start, which have ended, which rows go out together. No I/O."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Generic, TypeVar

from lepton_ai import results
from lepton_ai.errors import InvalidRequest, OptionNotSupported
from lepton_ai.handle import Handle
from lepton_ai.parcel import Message, has_blobs
from lepton_ai.patience import Clock

__all__ = ["MOST_TOGETHER", "Flight", "part", "taken"]

H = TypeVar("H", bound=Handle)
M = TypeVar("M", bound=Message)

#: Rows in one pipeline or request.
MOST_TOGETHER: Final = 500
#: How long rows that are slow to come are gathered before they go out.
_GATHER_S: Final = 0.02


class Flight(Generic[H]):
    """The jobs of one map: started, and until they are handed out; at most `window` of them.

    No more start while `held` says so and others are under way.
    """

    def __init__(self, window: int, held: Callable[[], bool] | None = None) -> None:
        if window < 1:
            raise OptionNotSupported(f"window is the most jobs under way, 1 or more, not {window}", "window")
        self._window = window
        self._held = held
        # Started by the quarter window: one at a time would be a round trip each.
        self._quarter = max(1, window // 4)
        self._jobs: dict[int, H] = {}
        self._ended: deque[H] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[H]:
        return iter(list(self._jobs.values()))

    @property
    def full(self) -> bool:
        return len(self._jobs) >= self._window or self.is_held

    @property
    def is_held(self) -> bool:
        """Whether there is no room for their arrays, and some of these jobs will make some."""
        return self._held is not None and bool(self._jobs) and self._held()

    @property
    def room(self) -> int:
        """How many jobs may start now: none before a quarter of the window is free."""
        free = self._window - len(self._jobs)
        return free if free >= self._quarter and not self.is_held else 0

    def start(self, job: H) -> None:
        """Counts a job in; one that could not even be sent has ended with that."""
        assert job.row is not None
        self._jobs[job.row] = job
        if job.meta is not None:
            self._ended.append(job)

    def end(self, job: H) -> None:
        """Notes that a job has its record. May be called from any thread."""
        self._ended.append(job)

    @property
    def landed(self) -> bool:
        """Whether a job can be handed out."""
        return bool(self._ended)

    def land(self) -> Iterator[H]:
        """Hands out those that have ended, as far as they are known now."""
        while self._ended:
            job = self._ended.popleft()
            assert job.row is not None
            if self._jobs.pop(job.row, None) is not None:
                yield job


def part(job: H, row: Mapping[str, Any], encode: Callable[[str, Mapping[str, Any]], M]) -> tuple[H, M | bytes]:
    """A job and its bytes; a row that cannot be sent makes a job that has failed with the reason, and no bytes."""
    try:
        return job, encode(job.id, row)
    except InvalidRequest as error:
        job.meta = results.failure(job.id, error)
        return job, b""


def taken(
    parts: Iterator[tuple[H, M]],
    room: int,
    most_bytes: int,
    clock: Clock = time.monotonic,
    held: Callable[[], bool] | None = None,
) -> list[tuple[H, M]]:
    """The next rows that go out together: at most `room`, of a few MiB, and no longer gathered than 20 ms.

    None at all only where there are no more. Behind one with blobs `held` says whether there is room for another.
    """
    found: list[tuple[H, M]] = []
    size, until = 0, clock() + _GATHER_S
    for each in parts:
        found.append(each)
        size += len(each[1])
        if len(found) >= min(room, MOST_TOGETHER) or size >= most_bytes or clock() >= until:
            break
        if held is not None and has_blobs(each[1]) and held():
            break
    return found
