"""A map on an event loop: rows are taken, sent and landed by tasks that end with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

from lepton_ai.async_handle import AsyncJobHandle
from lepton_ai.errors import BrokerUnavailable
from lepton_ai.flight import Flight
from lepton_ai.parcel import Message

__all__ = ["AsyncFlight", "Rows", "cancelled"]

Rows = Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]]
Part = tuple[AsyncJobHandle, Message]
#: Rows that are taken without giving way to other tasks.
_AT_ONCE: Final = 256
#: And bytes that may wait to be sent, whatever the window: what goes out slowly must not fill the memory.
_OUTBOX_BYTES: Final = 16 * 1024 * 1024


class AsyncFlight(Flight[AsyncJobHandle]):
    """The jobs of one map, and the rows on their way out."""

    def __init__(self, window: int, held: Callable[[], bool] | None = None) -> None:
        super().__init__(window, held)
        self._outbox: asyncio.Queue[Part] = asyncio.Queue()
        self._outbox_bytes = 0
        self._wake, self._has_room, self._was_sent = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._error: Exception | None = None

    def end(self, job: AsyncJobHandle) -> None:
        super().end(job)
        self._wake.set()

    def fail(self, error: Exception) -> None:
        """Nothing more will be heard of the jobs."""
        self._error = error
        self._wake.set()

    async def batch(self, most: int, most_bytes: int) -> list[Part]:
        """What is to go out next: at least one row, and whatever else has been taken meanwhile."""
        found = [await self._outbox.get()]
        size = len(found[0][1])
        while len(found) < most and size < most_bytes and not self._outbox.empty():
            found.append(self._outbox.get_nowait())
            size += len(found[-1][1])
        self._outbox_bytes -= size
        self._was_sent.set()
        return found

    def unsent(self) -> Iterator[AsyncJobHandle]:
        """The jobs that nobody will send any more."""
        while not self._outbox.empty():
            yield self._outbox.get_nowait()[0]

    async def jobs(
        self,
        rows: Rows,
        begin: Callable[[int, Mapping[str, Any]], Part],
        work: Sequence[Callable[[], Coroutine[Any, Any, None]]],
        forget: Callable[[AsyncJobHandle], None],
    ) -> AsyncGenerator[AsyncJobHandle, None]:
        """Each job as it ends, while `work` sends what `begin` made of the rows. At the end the rest is forgotten."""
        tasks = [asyncio.create_task(self._pull(rows, begin)), *(asyncio.create_task(each()) for each in work)]
        for task in tasks:
            task.add_done_callback(lambda _: self._wake.set())
        try:
            while True:
                for job in self.land():
                    if self.room:
                        self._has_room.set()
                    yield job
                self._wake.clear()
                for task in tasks:
                    if task.done():
                        task.result()
                if self._error is not None:
                    raise BrokerUnavailable(f"the results cannot be waited for: {self._error}") from self._error
                if not self and tasks[0].done():
                    return
                if not self.landed:
                    await self._wake.wait()
        finally:
            for job in self:
                forget(job)
            await cancelled(tasks)

    async def _pull(self, rows: Rows, begin: Callable[[int, Mapping[str, Any]], Part]) -> None:
        number = 0
        async with aclosing(_each(rows)) as source:
            async for row in source:
                job, message = begin(number, row)
                self.start(job)
                if message:
                    self._outbox.put_nowait((job, message))
                    self._outbox_bytes += len(message)
                else:
                    self._wake.set()
                number += 1
                if self.full:
                    self._has_room.clear()
                    await self._has_room.wait()
                while self._outbox_bytes > _OUTBOX_BYTES:
                    self._was_sent.clear()
                    await self._was_sent.wait()


async def _each(rows: Rows) -> AsyncGenerator[Mapping[str, Any], None]:
    if isinstance(rows, AsyncIterable):
        async for row in rows:
            yield row
        return
    for number, row in enumerate(rows, 1):
        yield row
        if number % _AT_ONCE == 0:
            await asyncio.sleep(0)


async def cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits for their end. Once is not enough: redis-py may swallow it while it connects."""
    tasks = list(tasks)
    running = {task for task in tasks if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=0.1)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # or it would be logged as never looked at
