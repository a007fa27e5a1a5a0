"""Events on an event loop: an asynchronous iterator that steps a follower over a connection of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol

from lepton_ai.errors import BrokerUnavailable, LeptonError
from lepton_ai.event import CloudEvent
from lepton_ai.patience import Pause

__all__ = ["AsyncEvents", "EventWay", "EventWays"]


class EventWay(Protocol):
    """One connection that events come over."""

    async def perform(self, step: Any) -> Any:
        """What the step of a follower asks for. May be cancelled, and is then asked again."""

    async def close(self) -> None: ...


class EventWays:
    """The connections of a client's event iterators: each is closed with its iterator, all of them with the client."""

    def __init__(self) -> None:
        self._open: set[EventWay] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def add(self, way: EventWay) -> None:
        self._loop = asyncio.get_running_loop()
        self._open.add(way)

    def __contains__(self, way: EventWay) -> bool:
        return way in self._open

    async def close(self, way: EventWay) -> None:
        """Closes one, once."""
        if way in self._open:
            self._open.discard(way)
            await way.close()

    async def close_all(self) -> None:
        """Closes every one that is open still, and waits for those that are being closed."""
        for way in list(self._open):
            await self.close(way)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def drop(self, way: EventWay) -> None:
        """Has one closed soon. The garbage collector calls, from whatever thread."""
        if self._loop is not None and way in self._open:
            with suppress(RuntimeError):  # the loop has ended, and its connections with it
                self._loop.call_soon_threadsafe(self._drop, way)

    def _drop(self, way: EventWay) -> None:
        closing = asyncio.create_task(self.close(way))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


class AsyncEvents:
    """Events as they come: `async for event in lepton.events(): ...`.

    Its place in the stream is fixed at the first step, or by `async with lepton.events() as events:` before its body,
    so that nothing which the body causes is missed; that also closes the connection at the end. Otherwise `aclose()`
    does, or dropping the iterator. A step may be cancelled (by a timeout, say), and the next one goes on from there.
    """

    def __init__(self, follower: Generator[Any, Any, None], way: EventWay, ways: EventWays) -> None:
        self._follower = follower
        self._way = way
        self._ways = ways
        self._step: Any = None
        self._is_open = self._is_closed = False

    async def __aenter__(self) -> AsyncEvents:
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncEvents:
        return self

    async def __anext__(self) -> CloudEvent:
        await self._open()
        return await self._next()

    async def aclose(self) -> None:
        """Ends the iterator, also under a task that waits for its next event, and closes its connection."""
        self._is_closed = True
        self._follower.close()
        await self._ways.close(self._way)

    def __del__(self) -> None:
        self._ways.drop(self._way)

    async def _open(self) -> None:
        if not (self._is_open or self._is_closed):
            self._ways.add(self._way)
            await self._next()  # OPENED
            self._is_open = True

    async def _next(self) -> CloudEvent:
        if self._is_closed:
            raise StopAsyncIteration
        try:
            while True:
                if self._step is None:
                    self._step = next(self._follower)
                step = self._step
                if isinstance(step, CloudEvent):
                    self._step = None
                    return step
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                    self._step = None
                    continue
                try:
                    self._check()
                    answer = await self._way.perform(step)
                except LeptonError as error:
                    self._check()
                    self._step = self._follower.throw(error)
                else:
                    self._step = self._follower.send(answer)
        except StopIteration:
            await self.aclose()
            raise StopAsyncIteration from None
        except LeptonError:
            await self.aclose()
            raise

    def _check(self) -> None:
        """Ends the iterator where its connection was closed on purpose: nothing is to open it again."""
        if self._is_closed:
            raise StopIteration
        if self._way not in self._ways:
            raise BrokerUnavailable("the client was closed")
